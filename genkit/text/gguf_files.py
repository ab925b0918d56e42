"""Language models in GGUF files, llama.cpp's format: weights, settings, tokenizer in one file."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from genkit import files
from genkit.hub import safe_weights

MAGIC, VERSIONS = b"GGUF", (2, 3)


def check_gguf(name: str, argument: str = "model") -> Path:
    """Return the path of a GGUF file.

    Raises:
        ValueError: it is no such file, or gguf, which reads it, is not installed.
    """
    path = Path(name)
    try:
        with files.open_regular(path) as file:
            head = file.read(8)
    except OSError as error:
        raise ValueError(f"{argument}: cannot read {name!r}: {files.reason(error)}") from None
    version = int.from_bytes(head[4:], "little")
    if head[:4] != MAGIC or version not in VERSIONS:
        raise ValueError(f"{argument}: {name!r} is not a GGUF file of version 2 or 3")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{argument}: reading {name!r} needs gguf: pip install 'hf-genkit[gguf]'")
    return path


def read_gguf(path: Path, argument: str = "model") -> tuple[PreTrainedModel, Any]:
    """Read a decoder, in float32, and its tokenizer by transformers.

    Raises:
        ValueError: the file is damaged, or transformers does not know its architecture.
    """
    where: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    where["trust_remote_code"] = False
    try:
        # in a folder of its own: nothing that lies beside the file is read
        with files.scratch_folder() as alone, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gguf about arrays that cannot be written to
            (alone / "model.gguf").symlink_to(path)
            config = AutoConfig.from_pretrained(alone, **where)
            tokenizer = AutoTokenizer.from_pretrained(alone, **where)
            model, report = AutoModelForCausalLM.from_pretrained(
                alone, config=config, dtype=torch.float32, output_loading_info=True, **where
            )
        # dequantised while it was read: an ordinary model, but for these marks
        model.is_quantized, model.hf_quantizer = False, None
        for owner, mark in ((model, "quantization_method"), (model.config, "quantization_config")):
            if hasattr(owner, mark):
                delattr(owner, mark)
        safe_weights.check_loaded(model, report)
        safe_weights.check_tokens(model, tokenizer)
    except Exception as error:  # gguf and transformers raise whatever their parsers do
        raise ValueError(f"{argument}: cannot load {str(path)!r}: {error!s:.300}") from error
    return model, tokenizer
