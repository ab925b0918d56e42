"""Signs of failure in the log of a GAN: mode collapse, vanishing gradients, imbalance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from genkit.models.gan_losses import CROSS_ENTROPY

HEALTHY = {"entropy": 0.75, "duplicates": 0.75, "spread": 0.5, "coverage": 0.1}
LOST = {"entropy": 0.5, "duplicates": 0.5, "spread": 0.1, "coverage": 0.01}  # of the baseline
GRACE = {"spread": 200, "duplicates": 1000, "entropy": 1000}  # first steps, where it may be low
PLATEAU, PROGRESS = 3, 0.01  # evaluations without progress; least relative fall of the distance
WINDOW, FEW = 100, 10  # steps of a trouble of the losses, and of a block of gradient norms
VANISHED = 1e-3  # of the largest gradient norm
SATURATED = 0.01  # loss of a saturated discriminator, which separates all images
AT_CHANCE, LOW_COVERAGE = 0.01, 0.5  # distance from CHANCE_LOSS; part of the baseline

# Loss of an at-chance discriminator, which gives all images the same score
CHANCE_LOSS = {loss: 2 * math.log(2) for loss in CROSS_ENTROPY}
CHANCE_LOSS |= {"relativistic": math.log(2), "least_squares": 0.25, "hinge": 2.0}


# ---------------------------------------------------------------------------------------------
# Troubles


@dataclass(frozen=True)
class Trouble:
    """A failure in a run, and what may help."""

    step: int
    kind: str  # collapse, vanished, saturated or at chance
    text: str
    fatal: bool  # more steps do not help

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.kind}: {self.text}"


def find_troubles(
    log: list[dict[str, Any]], loss: str, baseline: dict[str, float]
) -> list[Trouble]:
    """Find the failures of adversarial training, each at the evaluation that first shows it.

    collapse: variety is lost. Variety is entropy, the share of images that are no duplicates,
        spread and coverage, each relative to its baseline. An evaluation is healthy if all are at
        least HEALTHY. After a healthy evaluation, training has collapsed as soon as any is below
        LOST. Before one, the generator may not have learned yet: then it has collapsed if a figure
        was below LOST in PLATEAU evaluations in a row, after its steps of GRACE, and training is on
        a plateau. The collapse lasts until no figure is below LOST.
    vanished: the median gradient norm of the generator over WINDOW steps is below VANISHED of the
        largest median of FEW steps, and training is on a plateau.
    saturated: the median of the discriminator's loss is below SATURATED. Not of the wasserstein
        loss, which has no bound. A penalty prevents this, as it should; label noise can bring the
        loss below 0.
    at chance: the loss hardly differs from CHANCE_LOSS, coverage is below LOW_COVERAGE of its
        baseline, and training is on a plateau. With good images this is the equilibrium, and
        strong penalties keep the loss there while the generator learns. Smoothed targets shift that
        loss, and an auxiliary classifier adds its own: with these it is not detected.

    Training is on a plateau if the best distance of the last PLATEAU evaluations is not PROGRESS
    below the best one before.

    The result for a step depends on no later one.

    Args:
        log: an entry for each step, as a run writes them; some have the figures of a `Monitor`.
        loss: one of gan_losses.LOSSES.
        baseline: that of the `Monitor`.
    """
    found: list[Trouble] = []
    evaluated: list[dict[str, Any]] = []
    last: set[str] = set()
    for i, entry in enumerate(log):
        if "coverage" in entry:
            evaluated.append(entry)
            stuck = _stuck([each["distance"] for each in evaluated])
            now = _collapse(evaluated, baseline, stuck, "collapse" in last)
            now += _unbalanced(log[: i + 1], loss, baseline, stuck)
            found += [trouble for trouble in now if trouble.kind not in last]
            last = {trouble.kind for trouble in now}
    return found


def _stuck(distances: list[float]) -> bool:
    before, recent = distances[:-PLATEAU], distances[-PLATEAU:]
    return bool(before) and min(recent) > (1 - PROGRESS) * min(before)


def _variety(figures: dict[str, float]) -> dict[str, float]:
    """Return figures of variety, which are low after a collapse."""
    return {k: 1 - figures[k] if k == "duplicates" else figures[k] for k in LOST if k in figures}


def _collapse(
    evaluated: list[dict[str, Any]], baseline: dict[str, float], stuck: bool, before: bool
) -> list[Trouble]:
    """Return a collapse that the last evaluation shows, new or lasting."""
    real = _variety(baseline)
    lost = [
        [name for name, value in _variety(each).items() if value < LOST[name] * real[name]]
        for each in evaluated
    ]
    learnt = any(
        all(value >= HEALTHY[name] * real[name] for name, value in _variety(each).items())
        for each in evaluated
    )
    step = evaluated[-1]["step"]
    lasting = set.intersection(*map(set, lost[-PLATEAU:]))
    hopeless = stuck and any(step >= GRACE.get(name, math.inf) for name in lasting)
    if not lost[-1] or not (before or learnt or hopeless):
        return []
    shown = [f"{name} {evaluated[-1][name]:.2f} (real {baseline[name]:.2f})" for name in lost[-1]]
    advice = "try r1 and r2, the relativistic loss, packing, or lower rates"
    return [Trouble(step, "collapse", f"{', '.join(shown)}; {advice}", fatal=True)]


def _unbalanced(
    log: list[dict[str, Any]], loss: str, baseline: dict[str, float], stuck: bool
) -> list[Trouble]:
    """Return failures that the last window of steps shows in losses and gradients."""
    losses, norms = (
        np.array([entry[name] for entry in log if entry.get(name) is not None])
        for name in ("discriminator_loss", "generator_grad_norm")
    )
    if min(len(losses), len(norms)) < WINDOW:
        return []
    step, found, window = log[-1]["step"], [], losses[-WINDOW:]
    medians = np.median(norms[: len(norms) // FEW * FEW].reshape(-1, FEW), 1)
    norm, largest, level = np.median(norms[-WINDOW:]), medians.max(), np.median(window)
    if stuck and norm <= VANISHED * largest:
        text = f"the generator's gradient norm is {norm:.1e}, was {largest:.1e}"
        advice = "try r1 and r2, the relativistic loss, or a lower discriminator_learning_rate"
        found.append(Trouble(step, "vanished", f"{text}; {advice}", fatal=True))
    if loss == "wasserstein":
        return found
    if level < SATURATED:
        text = f"the discriminator separates all images, loss {level:.4f}"
        advice = "try r1 and r2, instance_noise, or a lower discriminator_learning_rate"
        found.append(Trouble(step, "saturated", f"{text}; {advice}", fatal=False))
    still = np.abs(window - CHANCE_LOSS[loss]).max() < AT_CHANCE
    if stuck and still and log[-1]["coverage"] < LOW_COVERAGE * baseline["coverage"]:
        text = f"the discriminator is at chance, loss {level:.4f}"
        advice = "try a higher discriminator_learning_rate, or weaker penalties"
        found.append(Trouble(step, "at chance", f"{text}; {advice}", fatal=False))
    return found
