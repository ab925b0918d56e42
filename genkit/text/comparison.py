"""genkit.compare: two language models on the same prompts, by a reward and how far they are apart.

Both draw a completion of each prompt at temperature 1, from the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genkit.arguments import explain_names
from genkit.data.dialogues import Prompt, read_prompts
from genkit.models.completions import log_probabilities, pad_rows, split_blocks
from genkit.notebook import TextRecord
from genkit.seeds import row_seeds
from genkit.text.dialogue_tokens import encode_prompt_of
from genkit.text.drawing import check_room, draw_completions
from genkit.text.generation import Generation
from genkit.text.language_model import LanguageModel
from genkit.text.rewards import Reward, check_chats, load_reward
from genkit.text.scoring import as_language, table

Z = 1.96  # of an interval that has the true value in 95 of 100 cases
SHOWN = 3  # prompts that are printed with both completions
WIDTH = 72  # characters of a completion that are printed


@dataclass(frozen=True)
class Compared:
    """A prompt with a completion by each model."""

    prompt: Prompt
    text: str  # by the model
    reference_text: str
    reward: float  # of `text`
    reference_reward: float


@dataclass(frozen=True)
class Comparison(TextRecord):
    """How a model does against a reference, and how that was measured."""

    win_rate: float  # share of prompts where the model has the higher reward; a tie counts half
    interval: tuple[float, float]  # of the win rate, 95 %
    reward: float  # mean
    reference_reward: float
    kl: float | None  # nats a completion, from the reference; None: other tokens
    kl_error: float | None  # its standard error
    rows: list[Compared] = field(repr=False)
    settings: dict[str, Any]

    def __str__(self) -> str:
        low, high = self.interval
        figures = [
            ["win rate", f"{self.win_rate:.1%}", f"{low:.1%} to {high:.1%} (95 %)"],
            ["reward", f"{self.reward:.4f}", f"reference {self.reference_reward:.4f}"],
        ]
        if self.kl is not None:
            figures.append(["KL", f"{self.kl:.2f}", f"± {self.kl_error:.2f} nats a completion"])
        pages = [_side_by_side(row) for row in self.rows[:SHOWN]]
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return "\n\n".join([table(figures), *pages, f"{len(self.rows):,} prompts; {settings}"])


@explain_names
def compare(
    model: str | Path | LanguageModel,
    reference: str | Path | LanguageModel,
    *,
    prompts: str | Path | Sequence[Prompt],
    reward: str | Reward,
    max_new_tokens: int = 64,
    seed: int | Sequence[int] | None = 0,
    device: str | None = None,
) -> Comparison:
    """Compare two causal language models by a reward of what they write.

    The divergence is the mean of log π - log π_ref over the model's completions (k1).

    Args:
        model: folder or Hub id, or what `genkit.load` returned.
        reference: the same, of the model to compare with.
        prompts: a text file with one a line, or a table with a column `prompt`; in Python also a
            list of texts or chats.
        reward: sentiment, length=N, format=REGEX, mymodule:function, or the folder or Hub id of a
            reward model.
        max_new_tokens: tokens of the longest completion.
        seed: of the first prompt; the next has the next number.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid.
    """
    read = isinstance(prompts, str | Path)
    asked = read_prompts(str(prompts)) if read else list(prompts)  # type: ignore[arg-type]
    if not asked:
        raise ValueError("prompts: [] is empty; give at least one")
    score = load_reward(reward, device)
    check_chats(score, asked)
    seeds = row_seeds(seed, len(asked), "a prompt")
    new, old = (as_language(each, device) for each in (model, reference))
    for each in (new, old):
        check_room(asked, each, max_new_tokens)
    rows = [draw_completions(asked, each, max_new_tokens, seeds) for each in (new, old)]
    rewards = [score(asked, [record.completion for record in records]) for records in rows]
    divergences = _divergences(asked, rows[0], new, old)
    compared = [
        Compared(prompt, mine.completion, other.completion, own, reference_reward)
        for prompt, mine, other, own, reference_reward in zip(asked, *rows, *rewards, strict=True)
    ]
    wins = [(a > b) + (a == b) / 2 for a, b in zip(*rewards, strict=True)]
    settings: dict[str, Any] = {"model": new.name, "reference": old.name, "reward": score.name}
    settings |= {"max_new_tokens": max_new_tokens, "seed": seeds[0]}
    return Comparison(
        win_rate=_mean(wins),
        interval=wilson_interval(_mean(wins), len(wins)),
        reward=_mean(rewards[0]),
        reference_reward=_mean(rewards[1]),
        kl=None if divergences is None else divergences.mean().item(),
        kl_error=None if divergences is None else _standard_error(divergences),
        rows=compared,
        settings=settings,
    )


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the interval of a share of so many trials, 95 %.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    scale = 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.inference_mode()
def _divergences(
    prompts: list[Prompt], records: list[Generation], new: LanguageModel, old: LanguageModel
) -> torch.Tensor | None:
    """Return log π - log π_ref of each completion, (n,); None if the tokens are not the same."""
    if new.tokenizer.get_vocab() != old.tokenizer.get_vocab():
        return None
    starts = [encode_prompt_of(prompt, new, "prompts") for prompt in prompts]
    rows = pad_rows(
        [start + record.tokens for start, record in zip(starts, records, strict=True)],
        [
            [False] * len(start) + [True] * len(record.tokens)
            for start, record in zip(starts, records, strict=True)
        ],
    )
    parts = []
    for block in split_blocks(rows, new.model.config.vocab_size):
        own = rows[block]
        logs = [log_probabilities(m.model, own.to(m.model.device))[0].cpu() for m in (new, old)]
        parts.append((logs[0] - logs[1]).double().sum(1))
    return torch.cat(parts)


def _standard_error(values: torch.Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _side_by_side(row: Compared) -> str:
    asked = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    lines = [f"> {_shorten(asked)}"]
    for name, text, reward in (
        ("model", row.text, row.reward),
        ("reference", row.reference_text, row.reference_reward),
    ):
        lines.append(f"{name:>9} {reward:8.3f}  {_shorten(text)}")
    return "\n".join(lines)


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
