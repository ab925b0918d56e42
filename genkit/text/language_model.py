"""A language model with its tokenizer, loaded once and ready to generate."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from genkit.data import characters
from genkit.engine.compiled import weights_version
from genkit.engine.decoder import Stepper, takes_trees
from genkit.engine.precision import check_compiler, check_precision, to_device
from genkit.hub import download, safe_weights, safety
from genkit.hub.model_files import last_written

DEFAULT, REVISION = "gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"
HINT = (
    "Train one with `accelerate launch recipes/train_charlm.py --output_dir NAME`, or give the "
    "folder or the Hub id of a language model in safetensors"
)


@dataclass(eq=False)
class LanguageModel:
    """A causal or sequence-to-sequence model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    precision: str = "float32"  # of the matrix products on a CPU: float32, bfloat16 or int8
    compiled: bool | None = None  # see `load`
    _stepper: tuple[Any, Stepper] | None = field(default=None, init=False, repr=False)

    @functools.cached_property
    def by_character(self) -> bool:
        """Whether each token is one character, so that the model knows no other characters."""
        return characters.is_character_tokenizer(self.tokenizer)

    def possible(self, ids: int | Iterable[int] | None) -> list[int]:
        """Return the tokens, of settings such as eos_token_id, that the vocabulary has."""
        listed = [] if ids is None else [ids] if isinstance(ids, int) else ids
        return [token for token in listed if 0 <= token < self.model.config.vocab_size]

    @property
    def stepper(self) -> Stepper:
        """The steps of the model: made at the first use, and again when weights have changed."""
        version = weights_version(self.model)
        if self._stepper is None or self._stepper[0] != version:
            cpu, trees = self.model.device.type == "cpu", takes_trees(self.model)
            self._stepper = (
                version,
                Stepper(
                    self.model,
                    self.precision if cpu else "float32",
                    self.compiled if cpu and trees else False,
                ),
            )
        return self._stepper[1]


def load_language_model(
    model: str | Path = DEFAULT,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal or sequence-to-sequence language model and its tokenizer; once, then reused.

    Args:
        model: folder or Hub id; default: GPT-2.
        revision: a branch, tag or commit on the Hub.
        dtype: "float32" (default), "bfloat16", or on a GPU "float16". On a CPU it is the
            precision of matrix products; everything between them stays in float32.
        quantize: "int8" for matrix products of 8-bit weights and inputs, on a CPU.
        compile: True packs matrices and compiles a decoder's step before the first token (20 to
            40 s, once for each shape of model: the cache keeps it); None (default) does either once
            the process has spent as long on steps as it takes; False never does.
        trust_remote_code: run code that the model brings along.

    Raises:
        ValueError: the model does not exist, its files are not safe, or an option cannot work.
    """
    check_precision(dtype, quantize)
    check_compiler(compile)
    name = str(model)
    if name == DEFAULT and revision is None:
        revision = REVISION
    folder = download.fetch(name, revision, hint=HINT, code=trust_remote_code).resolve()
    written = last_written(folder)
    language = _load(name, folder, written, dtype, quantize, compile, trust_remote_code)
    if compile and not takes_trees(language.model):
        raise ValueError(
            f"compile=True is for decoders with full attention; {name!r} is not one: leave it out"
        )
    return language


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _load(
    name: str,
    folder: Path,
    written: int,
    dtype: str | None,
    quantize: str | None,
    compile: bool | None,
    trust_remote_code: bool,
) -> LanguageModel:
    device, kept = to_device(dtype)
    options = {"trust_remote_code": trust_remote_code}
    with safety.opened(folder, code=trust_remote_code) as private:
        config = AutoConfig.from_pretrained(private, **options)
        tokenizer = AutoTokenizer.from_pretrained(private, **options)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, report = auto.from_pretrained(
            private, use_safetensors=True, dtype=kept, output_loading_info=True, **options
        )
        safe_weights.check_loaded(model, report)
        safe_weights.check_tokens(model, tokenizer)
    precision = quantize or dtype or "float32"
    return LanguageModel(model.to(device).eval(), tokenizer, name, precision, compile)
