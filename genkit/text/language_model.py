"""A language model with its tokenizer, loaded once and ready to generate."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from genkit import machine
from genkit.data import characters
from genkit.engine import kernels
from genkit.engine.decoder import Stepper
from genkit.engine.precision import check_precision, check_saved, move, weights_type
from genkit.engine.quantized import is_quantized, precision_of, quantize_model
from genkit.engine.quantized_files import read_quantized, saved_kind
from genkit.engine.summary import summarize, weights_version
from genkit.engine.weights_files import auto_class, read_plain
from genkit.hub import download, kinds, names, safe_weights, safety
from genkit.hub.model_files import last_written
from genkit.text import gguf_files
from genkit.text.kept_keys import KeptTexts

DEFAULT, REVISION = "gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"
HINT = (
    "Train one with `genkit train charlm --output_dir NAME`, or give the folder or the Hub id of a "
    "language model in safetensors"
)


@dataclass(eq=False, repr=False)
class LanguageModel:
    """A causal or sequence-to-sequence model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    precision: str = "float32"  # of the matrix products on a CPU: float32, bfloat16, int8 or int4
    _reading: tuple[Any, Stepper, KeptTexts] | None = field(default=None, init=False)

    def __repr__(self) -> str:
        return summarize("LanguageModel", self.name, [self.model], self.precision)

    @functools.cached_property
    def by_character(self) -> bool:
        """Whether each token is one character, so that the model knows no other characters."""
        return characters.is_character_tokenizer(self.tokenizer)

    def possible(self, ids: int | Iterable[int] | None) -> list[int]:
        """Return the tokens, of settings such as eos_token_id, that the vocabulary has."""
        listed = [] if ids is None else [ids] if isinstance(ids, int) else ids
        return [
            token for token in listed if 0 <= token < self.model.config.get_text_config().vocab_size
        ]

    @property
    def stepper(self) -> Stepper:
        """The steps of the model: made at the first use, and again when weights have changed."""
        return self._current[1]

    @property
    def kept(self) -> KeptTexts:
        """Keys and values of the chats read last; none when weights have changed."""
        return self._current[2]

    @property
    def _current(self) -> tuple[Any, Stepper, KeptTexts]:
        version = (weights_version(self.model), self.precision)
        if self._reading is None or self._reading[0] != version:
            cpu = self.model.device.type == "cpu"
            stepper = Stepper(self.model, self.precision if cpu else "float32")
            self._reading = (version, stepper, KeptTexts())
        return self._reading


def load_language_model(
    model: str | Path = DEFAULT,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    argument: str = "model",
) -> LanguageModel:
    """Load a causal or sequence-to-sequence language model and its tokenizer; once, then reused.

    Args:
        model: folder, Hub id, or GGUF file; default: GPT-2.
        revision: a branch, tag or commit on the Hub.
        dtype: "float32" (default), "bfloat16", or on a GPU "float16". On a CPU it is the
            precision of matrix products; everything between them stays in float32.
        quantize: "int8" or "int4", on a CPU: the weights of matrices in 8 or 4 bits, in groups of
            32 that share a scale; embeddings and heads in 8 bits at least.
        trust_remote_code: run code that the model brings along.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        argument: the name of the model's argument, for messages.

    Raises:
        ValueError: the model does not exist, its files are not safe, or an option cannot work.
    """
    where = machine.find_device(device)
    check_precision(dtype, quantize, where, ("int8", "int4"))
    name = kinds.as_name(model, argument)
    if names.is_gguf(name):
        if revision is not None:
            raise ValueError(
                f"revision: {revision!r} is for a model on the Hub; {name!r} is a file"
            )
        path = gguf_files.check_gguf(name, argument).resolve()
        return _load(name, path, path.stat().st_mtime_ns, dtype, quantize, False, where)
    if name == DEFAULT and revision is None:
        revision = REVISION
    options: dict[str, Any] = {"hint": HINT, "code": trust_remote_code, "argument": argument}
    folder = download.fetch(name, revision, **options).resolve()
    kinds.check_kind(folder, name, kinds.TEXT, argument)
    written = last_written(folder)
    return _load(name, folder, written, dtype, quantize, trust_remote_code, where)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _load(
    name: str,
    folder: Path,
    written: int,
    dtype: str | None,
    quantize: str | None,
    trust_remote_code: bool,
    device: torch.device,
) -> LanguageModel:
    if folder.is_file():  # GGUF
        model, tokenizer = gguf_files.read_gguf(folder)
        model = model.to(weights_type(dtype, device))
    else:
        model, tokenizer = _read_folder(folder, dtype, quantize, trust_remote_code, device)
    precision = quantize or dtype or "float32"
    if is_quantized(model):
        precision = precision_of(model)
    elif quantize and kernels.available():
        quantize_model(model, quantize)
    return LanguageModel(move(model, device), tokenizer, name, precision)


def _read_folder(
    folder: Path,
    dtype: str | None,
    quantize: str | None,
    trust_remote_code: bool,
    device: torch.device,
) -> tuple[PreTrainedModel, Any]:
    options = {"trust_remote_code": trust_remote_code}
    with safety.opened(folder, code=trust_remote_code, packed=True) as private:
        config = AutoConfig.from_pretrained(private, **options)
        saved = saved_kind(config)
        if saved:
            check_saved(saved, dtype, quantize, device)
        tokenizer = AutoTokenizer.from_pretrained(private, **options)
        if saved:
            model = read_quantized(private, config)
        else:
            model = _read_weights(private, config, weights_type(dtype, device), options)
        safe_weights.check_tokens(model, tokenizer)
    return model, tokenizer


def _read_weights(
    private: Path, config: Any, kept: torch.dtype, options: dict[str, Any]
) -> PreTrainedModel:
    model, report = read_plain(private, config, kept), None
    if model is None:
        model, report = auto_class(config).from_pretrained(
            private, use_safetensors=True, dtype=kept, output_loading_info=True, **options
        )
    safe_weights.check_loaded(model, report)
    return model


def as_language_model(model: str | Path | LanguageModel, **loading: Any) -> LanguageModel:
    """Load a language model, or return one that is loaded.

    Args:
        loading: arguments of `load_language_model`, by name.

    Raises:
        ValueError: the model cannot be loaded; or it is, and there is an option for loading it.
    """
    if not isinstance(model, LanguageModel):
        return load_language_model(model, **loading)
    kinds.refuse_loading(**{k: v for k, v in loading.items() if k != "trust_remote_code"})
    return model
