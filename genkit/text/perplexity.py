"""How well a causal language model predicts a text: perplexity, bits per character and per byte."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from genkit import console
from genkit.arguments import explain_names
from genkit.data.tokens import encode_text
from genkit.engine.quantized import precision_of
from genkit.errors import panics_are_errors
from genkit.hub import names
from genkit.notebook import TextRecord
from genkit.text import kv_cache
from genkit.text.language_model import DEFAULT, LanguageModel
from genkit.text.scoring import as_language, gather_tokens

UNSCORED = -100  # the target of padding and of tokens that another window scores
ROWS, LOGITS = 64, 1 << 26  # the most windows, and the most logits, of a batch


@dataclass(frozen=True)
class Perplexity(TextRecord):
    """How well a model predicts a text, and how that was measured.

    For a text in one document, nats_per_token at the default stride is the val_loss of
    recipes/train_charlm.py. The recipe's bits_per_character leaves the first character out of the
    count, and is larger by a factor of n / (n - 1) for n characters. Of several documents the
    recipe makes one text with end tokens between them, which gives other figures.
    """

    perplexity: float  # exp(nats_per_token)
    nats_per_token: float  # mean over the tokens scored
    bits_per_character: float  # total over the characters (code points) of the whole text
    bits_per_byte: float  # the same total over its bytes in UTF-8
    tokens_scored: int
    characters: int
    documents: int
    text_sha256: str  # of the documents in UTF-8, a byte 0xFF between two
    model: str
    dtype: str
    vocabulary: int  # tokens of the tokenizer
    context: int  # the most tokens that the model reads to predict one
    stride: int  # the fewest that it reads, where the text has them, are context - stride + 1

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4g}: {self.nats_per_token:.4f} nats a token, "
            f"{self.bits_per_character:.4f} bits a character, {self.bits_per_byte:.4f} a byte\n"
            f"{self.tokens_scored:,} tokens scored of {self.characters:,} characters in "
            f"{self.documents:,} {'document' if self.documents == 1 else 'documents'}, "
            f"SHA-256 {self.text_sha256[:12]}…\n"
            f"{self.model} in {self.dtype}, vocabulary {self.vocabulary:,}, "
            f"context {self.context:,}, stride {self.stride:,}"
        )


@explain_names
def perplexity(
    text: str | Sequence[str],
    *,
    model: str | Path | LanguageModel = DEFAULT,
    device: str | None = None,
    stride: int | None = None,
) -> Perplexity:
    """Measure how well a causal language model predicts a text.

    A window of the model's context slides over the tokens of each document, `stride` at a time,
    and scores what no window before it has scored. This is the protocol of the source below, with
    every token weighing the same and windows one token longer: the model reads `context` tokens and
    also scores the one after them. So windows that do not overlap leave no token out, and a stride
    of 1 gives every token all the context that the model can have.

    A document's first token is scored only where the tokenizer puts a start token before it, but
    its characters always count; later windows have no start token. Special tokens at the end are
    scored, too. Characters that a character model does not know are scored as bytes in UTF-8.

    Args:
        text: one document or several.
        model: folder or Hub id (in Python, also what `load` returned); default: GPT-2. A model
            without a limit to its context reads each document whole.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        stride: how many tokens the window moves at a time, at most the context: 1 is exact and
            slow; default: the context, so that windows do not overlap.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.

    Source: https://huggingface.co/docs/transformers/perplexity
    """
    documents = _named_documents(text)
    encoded = [_encode_utf8(*each) for each in documents.items()]
    if stride is not None and stride < 1:
        raise ValueError(f"stride must be 1 or more, got {stride}")
    language = as_language(model, device)
    if language.model.training:
        raise ValueError(f"model: {language.name} is in training mode; call eval() on it first")
    ids = [_tokens(*each, language.tokenizer) for each in documents.items()]
    limit = kv_cache.context_length(language.model)
    if stride is not None and stride > limit:
        raise ValueError(f"stride must be at most the model's context of {limit}, got {stride}")
    context = limit if limit < sys.maxsize else max(map(len, ids))
    nats = _total_nats(language.model, ids, context, stride or context)
    scored = sum(map(len, ids)) - len(ids)
    characters = sum(map(len, documents.values()))
    return Perplexity(
        perplexity=math.exp(nats / scored),
        nats_per_token=nats / scored,
        bits_per_character=nats / math.log(2) / characters,
        bits_per_byte=nats / math.log(2) / sum(map(len, encoded)),
        tokens_scored=scored,
        characters=characters,
        documents=len(documents),
        text_sha256=hashlib.sha256(b"\xff".join(encoded)).hexdigest(),
        model=language.name,
        dtype=precision_of(language.model),
        vocabulary=len(language.tokenizer),
        context=context,
        stride=stride or context,
    )


def _named_documents(text: str | Sequence[str]) -> dict[str, str]:
    """Return documents by the names that messages give them."""
    if isinstance(text, str):
        return {"text": text}
    if not len(text):
        raise ValueError("text: [] is empty; give at least one text")
    return {f"text[{i}]": document for i, document in enumerate(text)}


def _encode_utf8(name: str, document: str) -> bytes:
    if not isinstance(document, str):
        raise ValueError(f"{name} must be a text, got {document!r}")
    if not document:
        raise ValueError(f"{name} is empty; give a text of two tokens or more")
    names.check_no_file(name, document)
    try:
        return document.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None


@panics_are_errors()
def _tokens(name: str, document: str, tokenizer: Any) -> torch.Tensor:
    ids = encode_text(tokenizer, document, ends=True)
    if len(ids) < 2:
        raise ValueError(f"{name}: {document!r} is a single token; give a text of two or more")
    return torch.tensor(ids)


@torch.inference_mode()
def _total_nats(
    model: PreTrainedModel, documents: list[torch.Tensor], context: int, stride: int
) -> float:
    """Sum the loss over every token but the first of each document, ids of (length,)."""
    windows = (window for ids in documents for window in _windows(ids, context, stride))
    longest = min(context, max(map(len, documents)))
    size = longest * model.get_input_embeddings().num_embeddings  # logits of a row
    rows = min(ROWS, max(1, LOGITS // size))
    total, tokens = 0.0, sum(len(ids) - 1 for ids in documents)
    with console.bar(None, "perplexity", tokens, " tokens", unit_scale=True) as bar:
        while batch := list(itertools.islice(windows, rows)):
            # (rows, longest), padded on the right, which no token before it reads
            inputs = pad_sequence([i for i, _ in batch], True).to(model.device)
            targets = pad_sequence([t for _, t in batch], True, UNSCORED).to(model.device)
            scored = targets != UNSCORED
            logits = model(input_ids=inputs, use_cache=False).logits[scored].float()
            nats = -gather_tokens(logits.log_softmax(-1), targets[scored])
            total += nats.cpu().double().sum().item()
            bar.update(len(nats))
    return total


def _windows(
    ids: torch.Tensor, context: int, stride: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets, (≤ context,) both, with every id but the first a target once."""
    scored = 1
    for start in range(0, max(0, len(ids) - 1 - context) + stride, stride):
        end = min(start + context + 1, len(ids))
        targets = ids[start + 1 : end].clone()
        targets[: scored - start - 1] = UNSCORED
        yield ids[start : end - 1], targets
        scored = end


class PerplexityMetric(evaluate.Metric):
    """`perplexity` as an `evaluate.Metric`, which needs no network.

    PerplexityMetric().compute(predictions=texts, model="runs/mybook", stride=128)
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How well a causal language model predicts texts.",
            citation="",
            inputs_description="predictions: the texts. model, stride: see genkit.perplexity.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def _compute(
        self, predictions: list[str], model: str | Path | LanguageModel, stride: int | None = None
    ) -> dict[str, Any]:
        return asdict(perplexity(predictions, model=model, stride=stride))
