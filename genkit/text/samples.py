"""Samples of a language model in training: a prompt, continued at several temperatures."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genkit.text import generation
from genkit.text.language_model import LanguageModel

TEMPERATURES = (0.25, 0.5, 1.0)


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
            prompt, model=language, temperature=temperature, max_new_tokens=max_new_tokens, seed=1
        )
        lines.append(f"## Temperature {temperature}\n\n```text\n{text}\n```\n")
    return "\n".join(lines)
