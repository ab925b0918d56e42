"""What training needs to make an encoder find answers, and to judge it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
)

from genkit.data.squad import Example, has_impossible
from genkit.metrics import calibration, squad
from genkit.qa import answering
from genkit.qa.spans import Wanted
from genkit.qa.windows import NEVER, Tokens, Windows

AT_ONCE = 64  # windows whose spans are weighed together
TINY = 1e-45  # the least probability above 0, in float32


# ---------------------------------------------------------------------------------------------
# Training

Inputs = dict[str, torch.Tensor]


class Questions:
    """Examples as windows to train on, or to judge by.

    Args:
        max_seq_len, doc_stride: see `Windows`.

    Raises:
        ValueError: see `Windows`.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Any, max_seq_len: int, doc_stride: int
    ) -> None:
        self.examples, self.contexts = examples, [e.context for e in examples]
        questions, self.max_seq_len = [e.question for e in examples], max_seq_len
        self.windows = Windows(questions, self.contexts, tokenizer, max_seq_len, doc_stride)
        self.targets = targets(self.windows, examples)

    def batch(self, group: np.ndarray, model: PreTrainedModel) -> tuple[Inputs, torch.Tensor]:
        """Look up windows: inputs for a model, and targets, (windows, 2)."""
        wanted = torch.from_numpy(self.targets[group]).to(model.device)
        return self.windows.inputs(group, model), wanted


def targets(windows: Windows, examples: Sequence[Example]) -> np.ndarray:
    """Find the first answer of each example in its windows.

    Args:
        examples: one for each question of `windows`.

    Returns:
        The first and the last token of the window that hold a character of the answer, (windows,
        2); 0, the token before the question, where the window does not hold all of it.
    """
    first, last = np.array(
        [_answer(*each) for each in zip(examples, windows.contexts, strict=True)]
    ).T
    first, last = first[windows.row], last[windows.row]
    held = (windows.first <= first) & (first <= last) & (last < windows.last)
    places = np.stack([first, last], 1) + (windows.begin - windows.first)[:, None]
    return np.where(held[:, None], places, 0)


def _answer(example: Example, tokens: Tokens) -> tuple[int, int]:
    """Find the first and the last token of an answer in its context; (-1, -1) if there is none."""
    if not example.answers:
        return -1, -1
    text, start = example.answers[0]
    touched = np.flatnonzero((tokens.ends > start) & (tokens.starts < start + len(text)))
    if not len(touched):
        raise ValueError(f"data: the model knows no token of the answer {text!r} ({example.id})")
    return int(touched[0]), int(touched[-1])


def loss(model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of start and end over the tokens of a window.

    Args:
        inputs: as `Windows.inputs` makes them; the attention mask leaves out padding.
        targets: first and last token, (windows, 2).

    Source: Devlin et al. 2018, section 4.2, https://arxiv.org/abs/1810.04805
    """
    output = model(**inputs)
    return span_loss(output.start_logits, output.end_logits, inputs["attention_mask"], targets)


def span_loss(
    start: torch.Tensor, end: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Compute that loss from the logits of start and end, (windows, longest) each."""
    both = torch.cat([start, end]).float().masked_fill(mask.repeat(2, 1) == 0, NEVER)
    return F.cross_entropy(both, targets.T.flatten())


# ---------------------------------------------------------------------------------------------
# The verdict


@torch.inference_mode()
def predict(model: PreTrainedModel, questions: Questions) -> tuple[np.ndarray, float]:
    """Read all windows of questions.

    Returns:
        Logits of start and end, of no answer first and then of the tokens of the context,
        (windows, 2, max_seq_len), NEVER where there are none; and the sum of the loss in nats.
    """
    windows, nats = questions.windows, 0.0
    logits = np.full((len(windows), 2, questions.max_seq_len), NEVER, dtype=np.float32)
    with tqdm(total=len(windows), desc="judging", unit=" windows", delay=2, leave=False) as bar:
        for group in windows.groups(answering.BATCH[model.device.type]):
            inputs, wanted = questions.batch(group, model)
            output = model(**inputs)
            both = output.start_logits, output.end_logits
            nats += len(group) * span_loss(*both, inputs["attention_mask"], wanted).item()
            for side, values in enumerate(both):
                taken = windows.of_context(values, group)
                logits[group, side, : taken.shape[1]] = taken.numpy()
            bar.update(len(group))
    return logits, nats


def gold_classes(questions: Questions) -> np.ndarray:
    """Say which of the logits of `look` are right, (windows, 2)."""
    begin = questions.windows.begin[:, None]
    return np.where(questions.targets, questions.targets - begin + 1, 0)


@dataclass(frozen=True)
class Reading:
    """What a model reads out of a context."""

    answer: str  # the best, if there is one
    score: float  # its probability, normalised over its window
    confidence: float  # the same, calibrated
    null_score: float  # probability that there is none
    null_confidence: float

    @property
    def null_odds(self) -> float:
        """Log-odds of no answer against the best one."""
        return math.log(max(self.null_score, TINY)) - math.log(max(self.score, TINY))


def readings(
    logits: np.ndarray, questions: Questions, longest: int, temperatures: np.ndarray
) -> list[Reading]:
    """Find the best answer to each question, as `genkit.answer` does.

    Args:
        logits: see `look`.
        longest: the most tokens of an answer.
        temperatures: what calibrates the confidence of each question, (questions,).
    """
    windows, contexts = questions.windows, questions.contexts
    found = [answering.Found() for _ in contexts]
    for temperature in np.unique(temperatures).tolist():
        wanted = Wanted(longest=longest, temperature=temperature)
        chosen = np.flatnonzero(temperatures[windows.row] == temperature)
        for group in np.split(chosen, range(AT_ONCE, len(chosen), AT_ONCE)):
            widest = 1 + (windows.last[group] - windows.first[group]).max()
            start, end = torch.from_numpy(logits[group, :, :widest]).unbind(1)
            answering.gather(found, windows, contexts, group, start, end, wanted)
    return [_reading(*each) for each in zip(found, contexts, strict=True)]


def _reading(found: answering.Found, context: str) -> Reading:
    null = found.null, found.null_confidence
    for span in answering.distinct(found.spans, context, 1):
        return Reading(context[span.start : span.end], span.score, span.confidence, *null)
    return Reading("", 0.0, 0.0, *null)


def halves(count: int) -> np.ndarray:
    """Deal questions out to two halves, 0 and 1: each is judged by what the other taught."""
    return np.arange(count) % 2


@dataclass(frozen=True)
class Verdict:
    """How well questions were answered."""

    figures: dict[str, float]
    threshold: float  # of log-odds of no answer, best for F1 on all questions
    given: list[str]  # the answers, "" for none
    confidences: list[float]  # in them, calibrated
    right: list[bool]  # exactly


def judge(read: Sequence[Reading], examples: Sequence[Example]) -> Verdict:
    """Compare answers with gold answers, as SQuAD 1.1 does, or 2.0 if some questions have none.

    Where there may be no answer, a half of the questions is judged by the threshold that is best
    for the other.
    """
    golds = {e.id: [text for text, _ in e.answers] for e in examples}
    best = {e.id: reading.answer for e, reading in zip(examples, read, strict=True)}
    if has_impossible(examples):
        odds = {e.id: reading.null_odds for e, reading in zip(examples, read, strict=True)}
        threshold = squad.best_f1_threshold(best, golds, odds)
        final = _decided(best, golds, odds)
        scored = squad.score_v2(final, golds, dict.fromkeys(golds, 0.0))
        names = [f"{part}{name}" for part in ("", "HasAns_", "NoAns_") for name in ("exact", "f1")]
        figures = {name: scored[name] for name in names if name in scored}
    else:
        threshold, final = 0.0, best
        figures = squad.score_v1(final, golds)
    given = list(final.values())
    right = [
        any(squad.exact(answer, gold) for gold in golds[question] or [""])
        for question, answer in final.items()
    ]
    raw = [r.score if answer else r.null_score for r, answer in zip(read, given, strict=True)]
    sure = [r.confidence if a else r.null_confidence for r, a in zip(read, given, strict=True)]
    raw, sure = np.minimum(raw, 1).tolist(), np.minimum(sure, 1).tolist()  # sums may round up
    figures["ece_before"] = calibration.expected_calibration_error(raw, right)
    figures["ece_after"] = calibration.expected_calibration_error(sure, right)
    return Verdict(figures, threshold, given, sure, right)


def _decided(
    best: dict[str, str], golds: dict[str, list[str]], odds: dict[str, float]
) -> dict[str, str]:
    """Leave out answers that are less likely than none, by the other half's best threshold."""
    half = dict(zip(golds, halves(len(golds)).tolist(), strict=True))
    thresholds = []
    for each in (0, 1):
        own = {q: texts for q, texts in golds.items() if half[q] == each}
        of_own = {q: best[q] for q in own}, own, {q: odds[q] for q in own}
        thresholds.append(squad.best_f1_threshold(*of_own))
    return {q: best[q] if odds[q] <= thresholds[1 - half[q]] else "" for q in golds}
