"""Exact match and F1 of answers, as the official scripts of SQuAD 1.1 and 2.0 compute them."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only: « and … stay

# ---------------------------------------------------------------------------------------------
# One answer


def normalize_answer(text: str) -> str:
    """Lower the case of an answer, and remove ASCII punctuation, articles and extra space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def compute_exact(prediction: str, gold: str) -> bool:
    """Return whether two answers are the same after normalisation."""
    return normalize_answer(prediction) == normalize_answer(gold)


def compute_f1(prediction: str, gold: str) -> float:
    """Compute the F1 of the words of an answer.

    Returns:
        Harmonic mean of precision and recall over the words after normalisation, each counted as
        often as it occurs; 0 where no word is shared, even if neither answer has words.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(gold).split()
    shared = (Counter(predicted) & Counter(expected)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


# ---------------------------------------------------------------------------------------------
# All answers


def score_v1(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Score answers as SQuAD 1.1 does, where every question has an answer.

    Args:
        predictions: an answer by the id of its question; a question without one counts 0.
        answers: gold answers by id; the one nearest to the prediction counts.

    Returns:
        "exact_match" and "f1", in percent.

    Raises:
        ValueError: an id, a text or a question cannot work; the message names it.

    Source: Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, and its evaluate-v1.1.py
    """
    _check(predictions, answers)
    without = [question for question, golds in answers.items() if not golds]
    if without:
        raise ValueError(f"answers: none for {_listed(without)}; such questions are of SQuAD 2.0")
    pairs = [(predictions[each], answers[each]) for each in answers if each in predictions]
    same = sum(any(compute_exact(text, gold) for gold in golds) for text, golds in pairs)
    shared = sum(max(compute_f1(text, gold) for gold in golds) for text, golds in pairs)
    return {"exact_match": 100 * same / len(answers), "f1": 100 * shared / len(answers)}


def score_v2(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float],
    threshold: float = 1.0,
) -> dict[str, float]:
    """Score answers as SQuAD 2.0 does, where some questions have no answer.

    A gold answer that is empty after normalisation is ignored; if no other is left, the empty
    prediction is right. A question counts as one without an answer (NoAns) only if its list of gold
    answers is empty.

    The thresholds of the best figures are those of the official script: it returns 0 if it is best
    to answer nothing, even if scores are below 0; it lets two questions with the same score fall on
    different sides; and it takes every prediction but "" for an answer. So a best figure can differ
    from the figure at its threshold; use `best_f1_threshold` to choose a threshold.

    Args:
        predictions: an answer by the id of its question, "" for none.
        answers: gold answers by id; the one nearest to the prediction counts.
        no_answer_scores: score of having no answer, by id, on any scale.
        threshold: a score above it makes the prediction "".

    Returns:
        "exact" and "f1" in percent, "total"; the same of questions with an answer ("HasAns_…") and
        without ("NoAns_…"), if there are any; "best_exact", "best_exact_thresh", "best_f1" and
        "best_f1_thresh", the best of all thresholds.

    Raises:
        ValueError: an id, a text or a score cannot work; the message names it.

    Source: Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822, and its evaluate-v2.0.py
    """
    _check_v2(predictions, answers, no_answer_scores)
    raw = _raw_scores(predictions, answers)
    final = {}
    for name, scores in raw.items():
        final[name] = {
            q: score if no_answer_scores[q] <= threshold else float(not answers[q])
            for q, score in scores.items()
        }
    figures: dict[str, float] = {}
    parts = {"": list(answers), "HasAns_": [q for q in answers if answers[q]]}
    parts["NoAns_"] = [q for q in answers if not answers[q]]
    for prefix, part in parts.items():
        if part:
            for name, scores in final.items():
                figures[prefix + name] = 100 * sum(scores[q] for q in part) / len(part)
            figures[prefix + "total"] = len(part)
    for name, scores in raw.items():
        best = _official_best(scores, predictions, answers, no_answer_scores)
        figures[f"best_{name}"], figures[f"best_{name}_thresh"] = best
    return figures


def best_f1_threshold(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float],
) -> float:
    """Find the threshold of no-answer scores that gives `score_v2` its highest F1.

    Args:
        predictions, answers, no_answer_scores: see `score_v2`.

    Returns:
        The lowest such score. If it is best to answer nothing: 0 if all scores are above 0,
        otherwise the lowest score less 1.

    Raises:
        ValueError: an id, a text or a score cannot work; the message names it.
    """
    _check_v2(predictions, answers, no_answer_scores)
    f1s = _raw_scores(predictions, answers)["f1"]
    gains = [f1s[q] - (not answers[q]) for q in no_answer_scores]  # of answering
    values, indices = np.unique(list(no_answer_scores.values()), return_inverse=True)
    unanswerable = sum(not golds for golds in answers.values())
    totals = np.cumsum([unanswerable, *np.bincount(indices, gains)])
    nothing = 0.0 if values[0] > 0 else values[0] - 1
    return float([nothing, *values][totals.argmax()])


def _raw_scores(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Score each question before any threshold: "exact" and "f1" by id, between 0 and 1."""
    usable = {
        q: [gold for gold in golds if normalize_answer(gold)] or [""]
        for q, golds in answers.items()
    }
    same = {
        q: float(any(compute_exact(predictions[q], gold) for gold in usable[q])) for q in answers
    }
    # unlike in v1, the F1 of two answers without words is 1
    shared = {
        q: max(same[q], *(compute_f1(predictions[q], gold) for gold in usable[q])) for q in answers
    }
    return {"exact": same, "f1": shared}


def _official_best(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float],
) -> tuple[float, float]:
    """Find the best figure in percent, and its threshold, with the quirks of the official script.

    It starts without answers and adds one question after the other, in the order of their scores.
    """
    order = sorted(no_answer_scores, key=no_answer_scores.__getitem__)
    gains = [scores[q] if answers[q] else -float(predictions[q] != "") for q in order]
    totals = np.cumsum([sum(not golds for golds in answers.values()), *gains])
    best = int(totals.argmax())
    threshold = float(no_answer_scores[order[best - 1]]) if best else 0.0
    return float(100 * totals[best] / len(answers)), threshold


# ---------------------------------------------------------------------------------------------
# Checks


def _check(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> None:
    if not answers:
        raise ValueError("answers: no question; give at least one")
    unknown = [question for question in predictions if question not in answers]
    if unknown:
        raise ValueError(f"predictions: {_listed(unknown)} not among the ids of the questions")
    for question, prediction in predictions.items():
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{question!r}] must be a text, got {prediction!r}")
    for question, golds in answers.items():
        if isinstance(golds, str) or not all(isinstance(gold, str) for gold in golds):
            raise ValueError(f"answers[{question!r}] must be a list of texts, got {golds!r}")


def _check_v2(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float],
) -> None:
    _check(predictions, answers)
    missing = [question for question in answers if question not in predictions]
    if missing:
        raise ValueError(f"predictions: none for {_listed(missing)}; give an empty text for none")
    odd = [question for question in no_answer_scores if question not in answers]
    odd += [question for question in answers if question not in no_answer_scores]
    if odd:
        raise ValueError(f"no_answer_scores: {_listed(odd)} only there or only in answers")
    for question, score in no_answer_scores.items():
        if not math.isfinite(score):
            raise ValueError(f"no_answer_scores[{question!r}] must be finite, got {score}")


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(map(repr, ids[:5])) + more


# ---------------------------------------------------------------------------------------------
# Metrics of `evaluate`


class SquadMetric(evaluate.Metric):
    """`score_v1` as an `evaluate.Metric`: evaluate.load("squad") without a network.

    SquadMetric().compute(
        predictions=[{"id": "q", "prediction_text": "Paris"}],
        references=[{"id": "q", "answers": {"text": ["Paris"], "answer_start": [3]}}],
    )
    """

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info("Exact match and F1 of SQuAD 1.1.", {})

    def _compute(
        self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]
    ) -> dict[str, float]:
        answers = {name: each["text"] for name, each in _by_id(references, "answers").items()}
        return score_v1(_by_id(predictions, "prediction_text"), answers)


class SquadV2Metric(evaluate.Metric):
    """`score_v2` as an `evaluate.Metric`: evaluate.load("squad_v2") without a network.

    SquadV2Metric().compute(
        predictions=[{"id": "q", "prediction_text": "", "no_answer_probability": 0.9}],
        references=[{"id": "q", "answers": {"text": [], "answer_start": []}}],
        no_answer_threshold=0.5,
    )
    """

    def _info(self) -> evaluate.MetricInfo:
        columns = {"no_answer_probability": datasets.Value("float32")}
        return _metric_info("Exact match and F1 of SQuAD 2.0.", columns)

    def _compute(
        self,
        predictions: list[dict[str, Any]],
        references: list[dict[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, float]:
        answers = {name: each["text"] for name, each in _by_id(references, "answers").items()}
        texts = _by_id(predictions, "prediction_text")
        scores = _by_id(predictions, "no_answer_probability")
        return score_v2(texts, answers, scores, no_answer_threshold)


def _metric_info(description: str, columns: dict[str, datasets.Value]) -> evaluate.MetricInfo:
    text, number = datasets.Value("string"), datasets.Value("int32")
    golds = datasets.Sequence({"text": text, "answer_start": number})
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions: answers. references: gold answers, whose answer_start is "
        "ignored. An answer and its gold answers have the same id.",
        features=datasets.Features(
            {
                "predictions": {"id": text, "prediction_text": text} | columns,
                "references": {"id": text, "answers": golds},
            }
        ),
        reference_urls=["https://rajpurkar.github.io/SQuAD-explorer/"],
    )


def _by_id(rows: Iterable[dict[str, Any]], field: str) -> dict[str, Any]:
    found = {row["id"]: row[field] for row in rows}
    twice = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"id: {_listed(twice)} more than once; give every question one row")
    return found
