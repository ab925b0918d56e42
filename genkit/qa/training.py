"""Fine-tuning and evaluation for extractive question answering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from genkit import console, machine
from genkit.data.squad import Example, has_impossible
from genkit.metrics import calibration, squad
from genkit.qa import answering
from genkit.qa.spans import SpanOptions
from genkit.qa.windows import NEVER, Tokens, TokenWindows

CHUNK = 64  # windows whose spans are searched at once
TINY = 1e-45  # the least float32 above 0

# ---------------------------------------------------------------------------------------------
# Training

Inputs = dict[str, torch.Tensor]


class Questions:
    """Examples as windows to train or to evaluate on.

    Args:
        max_seq_len, doc_stride, limit: see `TokenWindows`.

    Raises:
        ValueError: see `TokenWindows`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        max_seq_len: int,
        doc_stride: int,
        limit: int | None = None,
    ) -> None:
        self.examples, self.contexts = examples, [e.context for e in examples]
        questions, self.max_seq_len = [e.question for e in examples], max_seq_len
        self.windows = TokenWindows(
            questions,
            self.contexts,
            tokenizer,
            max_seq_len,
            doc_stride,
            limit,
            name=lambda which, row: f"data: the {which} of {examples[row].id!r}",
        )
        self.targets = find_targets(self.windows, examples)

    def batch(self, group: np.ndarray, model: PreTrainedModel) -> tuple[Inputs, torch.Tensor]:
        """Look up windows: inputs for a model, and targets, (windows, 2)."""
        targets = torch.from_numpy(self.targets[group]).to(model.device)
        return self.windows.inputs(group, model), targets


def find_targets(windows: TokenWindows, examples: Sequence[Example]) -> np.ndarray:
    """Find the first answer of each example in its windows.

    Args:
        examples: one for each question of `windows`.

    Returns:
        The first and the last token of the window that hold a character of the answer, (windows,
        2); 0, the token before the question, where the window does not hold all of it.
    """
    first, last = np.array(
        [_answer_tokens(*each) for each in zip(examples, windows.contexts, strict=True)]
    ).T
    first, last = first[windows.row], last[windows.row]
    held = (windows.first <= first) & (first <= last) & (last < windows.last)
    positions = np.stack([first, last], 1) + (windows.begin - windows.first)[:, None]
    return np.where(held[:, None], positions, 0)


def _answer_tokens(example: Example, tokens: Tokens) -> tuple[int, int]:
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
        inputs: of `TokenWindows.inputs`; the attention mask leaves out padding.
        targets: first and last token, (windows, 2).

    Source: Devlin et al. 2018, section 4.2, https://arxiv.org/abs/1810.04805
    """
    output = model(**inputs)
    return span_loss(output.start_logits, output.end_logits, inputs["attention_mask"], targets)


def span_loss(
    start: torch.Tensor, end: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Compute the loss from the logits of start and end, (windows, longest) each; see `loss`."""
    both = torch.cat([start, end]).float().masked_fill(mask.repeat(2, 1) == 0, NEVER)
    return F.cross_entropy(both, targets.T.flatten())


# ---------------------------------------------------------------------------------------------
# Evaluation


@torch.inference_mode()
def predict_logits(model: PreTrainedModel, questions: Questions) -> tuple[np.ndarray, float]:
    """Compute the logits and the loss of all windows.

    Returns:
        Logits of start and end, of no answer first and then of the tokens of the context,
        (windows, 2, max_seq_len), NEVER beyond a window's end; and the sum of the loss in nats.
    """
    windows, nats = questions.windows, 0.0
    logits = np.full((len(windows), 2, questions.max_seq_len), NEVER, dtype=np.float32)
    with console.bar(None, "evaluating", len(windows), " windows") as bar:
        for group in windows.groups(answering.BATCH[machine.kind(model.device)]):
            inputs, targets = questions.batch(group, model)
            output = model(**inputs)
            both = output.start_logits, output.end_logits
            nats += len(group) * span_loss(*both, inputs["attention_mask"], targets).item()
            for side, values in enumerate(both):
                selected = windows.context_logits(values, group)
                logits[group, side, : selected.shape[1]] = selected.numpy()
            bar.update(len(group))
    return logits, nats


def gold_classes(questions: Questions) -> np.ndarray:
    """Return the index of the right logit in `predict_logits`'s, (windows, 2)."""
    begin = questions.windows.begin[:, None]
    return np.where(questions.targets, questions.targets - begin + 1, 0)


@dataclass(frozen=True)
class Prediction:
    """The most likely answer to a question, whether or not there is one."""

    answer: str  # "" if no span is possible
    score: float  # its probability, normalised over its window
    confidence: float  # the same, calibrated
    null_score: float  # probability of no answer
    null_confidence: float

    @property
    def null_odds(self) -> float:
        """Log-odds of no answer against the best one."""
        return math.log(max(self.null_score, TINY)) - math.log(max(self.score, TINY))


def predict_answers(
    logits: np.ndarray, questions: Questions, longest: int, temperatures: np.ndarray
) -> list[Prediction]:
    """Find the best answer to each question, as `genkit.answer` does.

    Args:
        logits: see `predict_logits`.
        longest: the most tokens of an answer.
        temperatures: to calibrate the confidence of each question, (questions,).
    """
    windows, contexts = questions.windows, questions.contexts
    found = [answering.QuestionSpans() for _ in contexts]
    for temperature in np.unique(temperatures).tolist():
        options = SpanOptions(longest=longest, temperature=temperature)
        chosen = np.flatnonzero(temperatures[windows.row] == temperature)
        for group in np.split(chosen, range(CHUNK, len(chosen), CHUNK)):
            widest = 1 + (windows.last[group] - windows.first[group]).max()
            start, end = torch.from_numpy(logits[group, :, :widest]).unbind(1)
            answering.collect_spans(found, windows, contexts, group, start, end, options)
    return [_prediction(*each) for each in zip(found, contexts, strict=True)]


def _prediction(found: answering.QuestionSpans, context: str) -> Prediction:
    null = found.null, found.null_confidence
    for span in answering.distinct_spans(found.spans, context, 1):
        return Prediction(context[span.start : span.end], span.score, span.confidence, *null)
    return Prediction("", 0.0, 0.0, *null)


def assign_halves(count: int) -> np.ndarray:
    """Assign questions to two halves, 0 and 1: each is evaluated by what the other calibrated."""
    return np.arange(count) % 2


@dataclass(frozen=True)
class Evaluation:
    """Figures of the answers to questions, and the answers themselves."""

    figures: dict[str, float]
    threshold: float  # log-odds of no answer; best for F1 on all questions
    answers: list[str]  # "" for none
    confidences: list[float]  # calibrated
    right: list[bool]  # exact matches


def evaluate_predictions(
    predictions: Sequence[Prediction], examples: Sequence[Example]
) -> Evaluation:
    """Compare answers with gold answers, as SQuAD 1.1 does, or 2.0 if some questions have none.

    Where there may be no answer, each half of the questions is evaluated with the threshold that is
    best for the other.
    """
    golds = {e.id: [text for text, _ in e.answers] for e in examples}
    pairs = list(zip(examples, predictions, strict=True))
    best = {example.id: prediction.answer for example, prediction in pairs}
    if has_impossible(examples):
        odds = {example.id: prediction.null_odds for example, prediction in pairs}
        threshold = squad.best_f1_threshold(best, golds, odds)
        final = _drop_unlikely(best, golds, odds)
        scored = squad.score_v2(final, golds, dict.fromkeys(golds, 0.0))
        names = [f"{part}{name}" for part in ("", "HasAns_", "NoAns_") for name in ("exact", "f1")]
        figures = {name: scored[name] for name in names if name in scored}
    else:
        threshold, final = 0.0, best
        figures = squad.score_v1(final, golds)
    answers = list(final.values())
    right = [
        any(squad.compute_exact(answer, gold) for gold in golds[question] or [""])
        for question, answer in final.items()
    ]
    both = list(zip(predictions, answers, strict=True))
    scores = [p.score if answer else p.null_score for p, answer in both]
    confidences = [p.confidence if answer else p.null_confidence for p, answer in both]
    # sums of probabilities may round up to above 1
    scores, confidences = np.minimum(scores, 1).tolist(), np.minimum(confidences, 1).tolist()
    figures["ece_before"] = calibration.expected_calibration_error(scores, right)
    figures["ece_after"] = calibration.expected_calibration_error(confidences, right)
    return Evaluation(figures, threshold, answers, confidences, right)


def _drop_unlikely(
    best: dict[str, str], golds: dict[str, list[str]], odds: dict[str, float]
) -> dict[str, str]:
    """Leave out answers that are less likely than none, by the other half's best threshold."""
    half = dict(zip(golds, assign_halves(len(golds)).tolist(), strict=True))
    thresholds = []
    for each in (0, 1):
        own = {q: texts for q, texts in golds.items() if half[q] == each}
        of_own = {q: best[q] for q in own}, own, {q: odds[q] for q in own}
        thresholds.append(squad.best_f1_threshold(*of_own))
    return {q: best[q] if odds[q] <= thresholds[1 - half[q]] else "" for q in golds}
