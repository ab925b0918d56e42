"""A network that answers questions, loaded with its tokenizer and calibration."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel

from genkit import machine
from genkit.engine.encoder import SpanEncoder, token_limit
from genkit.engine.precision import check_precision, move, weights_type
from genkit.engine.summary import summarize, weights_version
from genkit.hub import download, kinds, model_files, safe_weights, safety
from genkit.qa.windows import read_template

DEFAULT, REVISION = (
    "distilbert/distilbert-base-cased-distilled-squad",
    "564e9b582944a57a3e586bbb98fd6f0a4118db7f",
)
HINT = (
    "Train one with `genkit train qa --data questions.json --from_scratch`, which needs no "
    "network, or give the folder or Hub id of an encoder for question answering in safetensors"
)
MAX_SEQ_LEN, DOC_STRIDE, MAX_ANSWER_LEN = 384, 128, 15  # defaults, in tokens


@dataclass(frozen=True)
class Calibration:
    """How to read a model's scores, learned in validation; kept in its config.json."""

    temperature: float  # divides the logits of the confidence
    threshold: float  # log-odds of no answer above which there is none
    impossible: bool  # trained on questions without an answer
    max_seq_len: int = MAX_SEQ_LEN  # of the validation
    doc_stride: int = DOC_STRIDE
    max_answer_len: int = MAX_ANSWER_LEN


@dataclass(eq=False, repr=False)
class Reader:
    """A model with a span head and its tokenizer, loaded once and used often."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    precision: str = "float32"  # of the matrix products on a CPU: float32, bfloat16 or int8

    _encoder: tuple[Any, SpanEncoder] | None = field(default=None, init=False)

    def __repr__(self) -> str:
        return summarize("Reader", self.name, [self.model], self.precision)

    @property
    def encoder(self) -> SpanEncoder:
        """The model as it runs here: made at the first use, and anew when weights have changed."""
        version = weights_version(self.model)
        if self._encoder is None or self._encoder[0] != version:
            cpu = self.model.device.type == "cpu"
            encoder = SpanEncoder(self.model, self.precision if cpu else None)
            self._encoder = (version, encoder)
        return self._encoder[1]

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that the model was saved with, if any."""
        saved = getattr(self.model.config, "calibration", None)
        return Calibration(**saved) if saved else None

    @property
    def calibration_or_default(self) -> Calibration:
        """The calibration, or for a model without one: raw scores, and always an answer."""
        return self.calibration or Calibration(temperature=1.0, threshold=0.0, impossible=False)

    @property
    def limit(self) -> int:
        """The most tokens that the model reads at once."""
        return token_limit(self.model, self.tokenizer)

    @functools.cached_property
    def has_null(self) -> bool:
        """Whether the first token stands for no answer."""
        return read_template(self.tokenizer).has_null


def load_reader(
    model: str | Path = DEFAULT,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> Reader:
    """Load a model with a span head and its tokenizer; once, then reused.

    Args:
        model: a folder, or the id of a model on the Hub.
        revision: a branch, tag or commit on the Hub.
        dtype, quantize: see `genkit.load`.
        trust_remote_code: run code that the model brings along.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such model, it has no span head, its files are not safe to load, or
            an option cannot work.
    """
    where = machine.find_device(device)
    check_precision(dtype, quantize, where)
    name = kinds.as_name(model)
    if name == DEFAULT and revision is None:
        revision = REVISION
    folder = download.fetch(name, revision, hint=HINT, code=trust_remote_code).resolve()
    kinds.check_kind(folder, name, kinds.ANSWERS)
    written = model_files.last_written(folder)
    options = dtype, quantize, trust_remote_code, where
    return _load_cached(name, folder, written, *options)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _load_cached(
    name: str,
    folder: Path,
    written: int,
    dtype: str | None,
    quantize: str | None,
    trust_remote_code: bool,
    device: torch.device,
) -> Reader:
    kept = weights_type(dtype, device)
    options = {"trust_remote_code": trust_remote_code}
    with safety.opened(folder, code=trust_remote_code) as private:
        tokenizer = AutoTokenizer.from_pretrained(private, **options)
        model, report = AutoModelForQuestionAnswering.from_pretrained(
            private, use_safetensors=True, dtype=kept, output_loading_info=True, **options
        )
        _check_span_head(report["missing_keys"], name)
        safe_weights.check_loaded(model)
        check_tokenizer(tokenizer, name)
        safe_weights.check_tokens(model, tokenizer)
    precision = quantize or dtype or "float32"
    return Reader(move(model, device), tokenizer, name, precision)


def _check_span_head(missing: Collection[str], name: str) -> None:
    """Refuse a model whose file lacks weights: transformers has drawn them at random."""
    if missing:
        raise ValueError(
            f"model: {name!r} has no trained span head: it lacks {min(missing)}; give a model "
            "trained for question answering, or train it by `genkit train qa`"
        )


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that does not give the positions of its tokens, or pads on the left.

    Raises:
        ValueError: it is one of these.
    """
    if not tokenizer.is_fast or tokenizer.padding_side != "right":
        raise ValueError(
            f"model: the tokenizer of {name!r} is a slow one, or pads on the left; question "
            "answering needs an encoder with a fast tokenizer, such as BERT, RoBERTa or DistilBERT"
        )
