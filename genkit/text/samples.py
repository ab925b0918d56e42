"""Samples of a language model in training, as pages in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genkit.data.dialogues import Demonstration, Prompt
from genkit.data.parallel import Example
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
) -> str:
    """Return a page of continuations in Markdown: the same seed at every evaluation.

    Args:
        step: the number of the step, for the heading.
        prompt: the text to continue.
        max_new_tokens: the most tokens of a continuation.
    """
    language = LanguageModel(model, tokenizer, "this run")
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


def draw_answers(prompts: Sequence[Prompt], language: LanguageModel) -> list[str]:
    """Draw an answer to each prompt, texts or chats: from the same seeds every time."""
    starts = [len(encode_prompt_of(prompt, language, "prompt")) for prompt in prompts]
    most = min(ANSWER, kv_cache.context_length(language.model) - max(starts))
    answers = [""] * len(prompts)
    for kind in (str, list):
        some = [i for i, prompt in enumerate(prompts) if isinstance(prompt, kind)]
        if some:
            drawn = draw_completions([prompts[i] for i in some], language, most, some)
            for i, record in zip(some, drawn, strict=True):
                answers[i] = record.completion
    return answers


def answers_page(step: int, shown: Sequence[Demonstration], language: LanguageModel) -> str:
    """Return a page of given answers and the model's own in Markdown: the same seeds every time.

    Args:
        step: the number of the step, for the heading.
    """
    lines = [f"# Step {step}\n"]
    answers = draw_answers([each.prompt for each in shown], language)
    for each, own in zip(shown, answers, strict=True):
        lines.append(f"## {_title(each.prompt)}\n")
        lines.append(f"Given:\n\n~~~text\n{each.answer}\n~~~\n")
        lines.append(f"The model's own:\n\n~~~text\n{own}\n~~~\n")
    return "\n".join(lines)


def outputs_page(step: int, shown: Sequence[Example], outputs: Sequence[str]) -> str:
    """Return a page of sources, their targets, and what a model makes of them, in Markdown.

    Args:
        step: the number of the step, for the heading.
        outputs: of the model, one for each source.
    """
    lines = [f"# Step {step}\n"]
    for each, own in zip(shown, outputs, strict=True):
        lines.append(f"## {_title(each.source)}\n")
        lines.append(f"Given:\n\n~~~text\n{each.target}\n~~~\n")
        lines.append(f"The model's own:\n\n~~~text\n{own}\n~~~\n")
    return "\n".join(lines)


def comparison_page(
    step: int,
    prompts: Sequence[Prompt],
    before: Sequence[str],
    after: Sequence[str],
    rewards: Sequence[tuple[float, float]] = (),
) -> str:
    """Return completions of reference and policy, one after the other, in Markdown.

    Args:
        before, after: the completion of each prompt.
        rewards: of both, for each prompt; or none are shown.
    """
    lines = [f"# Step {step}\n"]
    for i, prompt in enumerate(prompts):
        lines.append(f"## {_title(prompt)}\n")
        for k, (name, texts) in enumerate((("Reference", before), ("Policy", after))):
            reward = f", reward {rewards[i][k]:.3f}" if rewards else ""
            lines.append(f"{name}{reward}\n\n~~~text\n{texts[i]}\n~~~\n")
    return "\n".join(lines)


def _title(prompt: Prompt) -> str:
    """Return the beginning of what is asked, on one line."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return " ".join(asked.split())[:80]
