"""Calibration: the expected calibration error, its diagram, and temperature scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import matplotlib.figure
import numpy as np
import numpy.typing as npt

from genkit.plots import save_figure

BINS = 15  # as in Guo et al. 2017
SHARPEST, FLATTEST = 0.01, 100.0  # the range of temperatures

# ---------------------------------------------------------------------------------------------
# Calibration error


def bin_by_confidence(
    confidences: npt.ArrayLike, right: npt.ArrayLike, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort predictions into bins of equal width by confidence.

    Args:
        confidences: the probability of each prediction, (n,).
        right: whether each is right, (n,), booleans or 0 and 1.
        bins: number of bins; bin i holds confidences above i / bins and up to (i + 1) / bins, and
            the first bin 0, too.

    Returns:
        The number of predictions in each bin, the sum of their confidences, and the number of right
        ones; (bins,) each.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    scores, hits = np.asarray(confidences, dtype=float), np.asarray(right, dtype=float)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"confidences must be (n,) with n above 0, got the shape {scores.shape}")
    if hits.shape != scores.shape:
        raise ValueError(f"right must be {scores.shape} as confidences, got {hits.shape}")
    outside = scores[~((scores >= 0) & (scores <= 1))]
    if outside.size:
        raise ValueError(f"confidences must be between 0 and 1, got {outside[0]}")
    neither = hits[(hits != 0) & (hits != 1)]
    if neither.size:
        raise ValueError(f"right must be booleans, or 0 and 1, got {neither[0]}")
    if bins < 1:
        raise ValueError(f"bins must be 1 or more, got {bins}")
    indices = np.searchsorted(np.arange(1, bins) / bins, scores)
    counts, trust, correct = (np.bincount(indices, w, bins) for w in (None, scores, hits))
    return counts, trust, correct


def expected_calibration_error(
    confidences: npt.ArrayLike, right: npt.ArrayLike, bins: int = BINS
) -> float:
    """Compute the expected difference between confidence and accuracy.

    Args:
        confidences, right, bins: see `bin_by_confidence`.

    Returns:
        The difference between mean confidence and accuracy of each bin, averaged over the
        predictions; between 0 and 1.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.

    Source: Naeini et al. 2015, https://ojs.aaai.org/index.php/AAAI/article/view/9602; Guo et al.
    2017, equation 3, https://arxiv.org/abs/1706.04599
    """
    counts, trust, correct = bin_by_confidence(confidences, right, bins)
    return float(np.abs(trust - correct).sum() / counts.sum())


# ---------------------------------------------------------------------------------------------
# Temperature


def fit_temperature(logits: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Find the temperature T of softmax(logits / T) with the least negative log-likelihood.

    Its mean over the targets is convex in 1 / T, so that the slope has one zero, which is found by
    bisection in log T, in float64.

    Args:
        logits: (n, classes); -inf for a class that is not allowed.
        targets: the right class, (n,).

    Returns:
        T, clipped to SHARPEST and FLATTEST: SHARPEST also if every target has the largest logit of
        its row (the best T would be 0), FLATTEST also if the targets' logits are no larger than
        others on average. 1 if the logits of no row differ: no temperature changes anything then.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.

    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599
    """
    scores, classes = np.asarray(logits, dtype=float), np.asarray(targets)
    _check(scores, classes)
    scores = scores - scores.max(axis=1, keepdims=True)
    allowed = np.isfinite(scores)
    scores[~allowed] = 0
    if not scores.any():
        return 1.0
    of_targets = scores[np.arange(len(classes)), classes].mean()

    def slope(temperature: float) -> float:
        """Differentiate the mean negative log-likelihood by 1 / T."""
        weights = np.exp(scores / temperature, where=allowed, out=np.zeros_like(scores))
        return float(((weights * scores).sum(1) / weights.sum(1)).mean() - of_targets)

    if slope(SHARPEST) <= 0:
        return SHARPEST
    if slope(FLATTEST) >= 0:
        return FLATTEST
    low, high = math.log(SHARPEST), math.log(FLATTEST)
    for _ in range(48):  # to 3e-14 of T
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def _check(logits: np.ndarray, targets: np.ndarray) -> None:
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"logits must be (n, classes), neither 0, got the shape {logits.shape}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets must be {logits.shape[:1]} as logits, got {targets.shape}")
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    wrong = np.flatnonzero((np.isnan(logits) | (logits == np.inf)).any(1))
    if wrong.size:
        raise ValueError(f"logits[{wrong[0]}] must be finite or -inf, got nan or inf")
    beyond = np.flatnonzero((targets < 0) | (targets >= logits.shape[1]))
    if beyond.size:
        raise ValueError(
            f"targets[{beyond[0]}] must be a class between 0 and {logits.shape[1] - 1}, "
            f"got {targets[beyond[0]]}"
        )
    banned = np.flatnonzero(np.isneginf(logits[np.arange(len(targets)), targets]))
    if banned.size:
        raise ValueError(
            f"targets[{banned[0]}] must be a class that is allowed, got {targets[banned[0]]}, "
            "whose logit is -inf"
        )


# ---------------------------------------------------------------------------------------------
# A metric of `evaluate`


class CalibrationMetric(evaluate.Metric):
    """`expected_calibration_error` as an `evaluate.Metric`, which needs no network.

    CalibrationMetric().compute(predictions=[0.9, 0.6], references=[True, False])
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")  # for references, too: as integers 0.5 would become 0
        return evaluate.MetricInfo(
            description="Expected calibration error of a model's confidences.",
            citation="",
            inputs_description="predictions: confidences. references: whether each is right. "
            "bins: see genkit.metrics.calibration.expected_calibration_error.",
            features=datasets.Features({"predictions": number, "references": number}),
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )

    def _compute(
        self, predictions: list[float], references: list[float], bins: int = BINS
    ) -> dict[str, Any]:
        error = expected_calibration_error(predictions, references, bins)
        return {"expected_calibration_error": error, "bins": bins, "total": len(predictions)}


def plot_reliability(confidences: Sequence[float], right: Sequence[bool], path: Path) -> None:
    """Draw a reliability diagram: accuracy by confidence, and the share of each confidence.

    Args:
        confidences, right: see `bin_by_confidence`.
        path: the PNG to write.

    Source: Guo et al. 2017, figure 1, https://arxiv.org/abs/1706.04599
    """
    counts, trust, correct = bin_by_confidence(confidences, right)
    error = expected_calibration_error(confidences, right)
    filled, width = counts > 0, 1 / len(counts)
    lefts = np.flatnonzero(filled) * width
    accuracy, gap = (each[filled] / counts[filled] for each in (correct, trust - correct))
    figure = matplotlib.figure.Figure(figsize=(6, 6.5), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bars: dict[str, Any] = {"width": width, "align": "edge"}
    upper.bar(lefts, accuracy, color="tab:blue", edgecolor="white", label="accuracy", **bars)
    hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": "tab:red", "hatch": "///"}
    hatched |= {"linewidth": 0, "label": "gap to confidence"}
    upper.bar(lefts, gap, bottom=accuracy, **hatched, **bars)
    upper.plot([0, 1], [0, 1], "--", color="0.3", label="perfect calibration")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.01))
    upper.legend(edgecolor="none", loc="upper left")
    lower.bar(lefts, 100 * counts[filled] / counts.sum(), color="0.6", edgecolor="white", **bars)
    lower.set(xlabel="confidence", ylabel="predictions (%)")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"expected calibration error {error:.3f} · {len(confidences):,} predictions")
    save_figure(figure, path)
