"""Samples of a language model in training, as pages in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genkit.data.dialogues import Demonstration, Prompt
from genkit.data.tokens import encode_text
from genkit.text import generation, kv_cache
from genkit.text.dialogue_tokens import encode_prompt_of
from genkit.text.drawing import draw_completions
from genkit.text.language_model import LanguageModel

TEMPERATURES = (0.25, 0.5, 1.0)
ANSWER = 100  # tokens of the longest answer on a page
TRIES = 1000  # places of a text at which a prompt is looked for


def example_prompt(
    ids: np.ndarray, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int
) -> str:
    """Take a prompt that a model knows out of a text: the first that is whole when decoded again.

    Args:
        ids: the text, (tokens,).
        length: the most tokens of a prompt; it is on one line, and ends with a word.
    """
    length = min(length, kv_cache.context_length(model))
    for start in range(0, min(len(ids), TRIES * length), length):
        text = _decode(ids[start : start + length], tokenizer).strip()
        prompt = text.rpartition(" ")[0].strip() or text
        whole = prompt.isprintable() and "\ufffd" not in prompt
        if prompt and whole and _decode(encode_text(tokenizer, prompt), tokenizer) == prompt:
            return prompt
    return _decode(ids[:length], tokenizer)


def _decode(ids: np.ndarray | list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def sample_page(
    step: int,
    prompt: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    compiles: bool,
) -> str:
    """Return a page of continuations in Markdown: the same seed at every evaluation.

    Args:
        step: the number of the step, for the heading.
        prompt: the text to continue.
        max_new_tokens: the most tokens of a continuation.
        compiles: the model's step may be compiled, when that pays.
    """
    language = LanguageModel(model, tokenizer, "this run", compiled=None if compiles else False)
    lines = [f"# Step {step}\n"]
    for temperature in TEMPERATURES:
        text = generation.generate(
            prompt,
            model=language,
            parse_special=False,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=1,
        )
        lines.append(f"## Temperature {temperature}\n\n```text\n{text}\n```\n")
    return "\n".join(lines)


def answers_page(step: int, shown: Sequence[Demonstration], language: LanguageModel) -> str:
    """Return a page of given answers and the model's own in Markdown: the same seed every time.

    Args:
        step: the number of the step, for the heading.
    """
    lines = [f"# Step {step}\n"]
    for each in shown:
        asked = each.prompt if isinstance(each.prompt, str) else each.prompt[-1]["content"]
        start = len(encode_prompt_of(each.prompt, language, "prompt"))
        most = min(ANSWER, kv_cache.context_length(language.model) - start)
        (own,) = draw_completions([each.prompt], language, most, [1])
        lines.append(f"## {' '.join(asked.split())[:80]}\n")
        lines.append(f"Given:\n\n~~~text\n{each.answer}\n~~~\n")
        lines.append(f"The model's own:\n\n~~~text\n{own.completion}\n~~~\n")
    return "\n".join(lines)


def comparison_page(
    step: int,
    prompts: Sequence[Prompt],
    before: Sequence[tuple[str, float]],
    after: Sequence[tuple[str, float]],
) -> str:
    """Return completions of reference and policy, one after the other, in Markdown.

    Args:
        before, after: the completion of each prompt with its reward.
    """
    lines = [f"# Step {step}\n"]
    for prompt, *both in zip(prompts, before, after, strict=True):
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines.append(f"## {' '.join(asked.split())[:80]}\n")
        for name, (text, reward) in zip(("Reference", "Policy"), both, strict=True):
            lines.append(f"{name}, reward {reward:.3f}\n\n~~~text\n{text}\n~~~\n")
    return "\n".join(lines)
