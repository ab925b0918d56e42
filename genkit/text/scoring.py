"""Scores of tokens in a context, and checks of what a caller asks to see of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from genkit.text import kv_cache, token_names
from genkit.text.generation import LanguageModel
from genkit.text.language_model import load_language_model

# ---------------------------------------------------------------------------------------------
# What all of them need


def as_language(model: str | Path | LanguageModel) -> LanguageModel:
    """Load a language model, and refuse one that does not continue its prompt."""
    language = model if isinstance(model, LanguageModel) else load_language_model(model)
    if language.model.config.is_encoder_decoder:
        raise ValueError(f"model: {language.name} answers a text; give one that continues it")
    return language


@torch.inference_mode()
def next_logits(language: LanguageModel, row: list[int]) -> torch.Tensor:
    """Next-token logits after every token of a row, (tokens, vocabulary), float32."""
    ids = torch.tensor([row], device=language.model.device)
    return language.model(input_ids=ids, use_cache=False).logits[0].float()


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Turn logits into the probabilities of a temperature, both (…, vocabulary), float64."""
    return (logits.double() / temperature).softmax(-1)


def bits(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions, (…, vocabulary) to (…), in bits."""
    return torch.special.entr(probabilities).sum(-1) / math.log(2)


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Refuse temperatures that are not positive and finite."""
    if not len(temperatures):
        raise ValueError("temperatures is empty; give at least one")
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperatures must be above 0, got {temperature}")


def check_top(top: int, language: LanguageModel) -> None:
    """Refuse a number of tokens that the vocabulary does not have."""
    vocabulary = language.model.config.vocab_size
    if not 1 <= top <= vocabulary:
        raise ValueError(f"top must be between 1 and the vocabulary's {vocabulary}, got {top}")


def check_context(name: str, length: int, language: LanguageModel) -> None:
    """Refuse a text whose last token would be predicted from more than the model can see."""
    context = kv_cache.context_length(language.model)
    if length - 1 > context:
        raise ValueError(
            f"{name}: {length} tokens with the prompt are more than the model can look at, "
            f"{context + 1}; give less"
        )


def table(rows: list[list[str]]) -> str:
    """Align the first column to the left, the others to the right."""
    widths = [max(map(token_names.width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, wide) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (wide - token_names.width(cell))
            cells.append(gap + cell if i else cell + gap)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
