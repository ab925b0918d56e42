"""Completions drawn from a model's own distribution, of texts or of chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genkit.data.dialogues import Prompt
from genkit.text import kv_cache
from genkit.text.dialogue_tokens import encode_prompt_of
from genkit.text.generation import Generation, generate
from genkit.text.language_model import LanguageModel


def check_room(prompts: Sequence[Prompt], language: LanguageModel, max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for a completion.

    Raises:
        ValueError: prompt and completion may be longer than the model's context.
    """
    context = kv_cache.context_length(language.model)
    for i, prompt in enumerate(prompts):
        length = len(encode_prompt_of(prompt, language, f"prompts: prompt {i}"))
        if length + max_new_tokens > context:
            raise ValueError(
                f"prompts: prompt {i} has {length} tokens, which with max_new_tokens="
                f"{max_new_tokens} are more than the context of {language.name}, {context}; "
                "shorten it, or lower max_new_tokens"
            )


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
