"""Completions drawn from a model's own distribution, of texts or of chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genkit.data.dialogues import Prompt
from genkit.text.generation import Generation, generate
from genkit.text.language_model import LanguageModel


def draw_completions(
    prompts: Sequence[Prompt], language: LanguageModel, max_new_tokens: int, seeds: Sequence[int]
) -> list[Generation]:
    """Draw a completion of each prompt at temperature 1.

    Args:
        prompts: all of them texts, in which nothing is a control token, or all of them chats.
        max_new_tokens: tokens of the longest completion.
        seeds: one a prompt.
    """
    given: Any = list(prompts)
    as_text: dict[str, Any] = {"parse_special": False} if isinstance(given[0], str) else {}
    records: list[Generation] = generate(
        given,
        model=language,
        strategy="stochastic",
        max_new_tokens=max_new_tokens,
        seed=seeds,
        **as_text,
    )
    return records
