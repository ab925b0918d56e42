"""Signs in a GAN's log that the game has gone wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from genkit.models.gan_losses import CROSS_ENTROPY

HEALTHY = {"entropy": 0.75, "duplicates": 0.75, "spread": 0.5, "coverage": 0.1}
LOST = {"entropy": 0.5, "duplicates": 0.5, "spread": 0.1, "coverage": 0.01}  # of the baseline's
GRACE = {"spread": 200, "duplicates": 1000, "entropy": 1000}  # steps in which it may be lost yet
PLATEAU, PROGRESS = 3, 0.01  # evaluations without progress; part by which the distance should fall
WINDOW, FEW = 100, 10  # steps that a trouble of the losses lasts, and that a spike does not
VANISHED = 1e-3  # of the largest gradient norm
SATURATED = 0.01  # loss of a discriminator that tells all apart
AT_CHANCE, LOW_COVERAGE = 0.01, 0.5  # how far off the loss may be; coverage, of the baseline's

# What a discriminator loses that gives all images the same score: told nothing, it can do no better
CHANCE_LOSS = {loss: 2 * math.log(2) for loss in CROSS_ENTROPY}


# ---------------------------------------------------------------------------------------------
# Troubles


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a run, and what may help."""

    step: int
    kind: str  # collapse, vanished, saturated or pinned
    text: str
    fatal: bool  # more steps will not help

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.kind}: {self.text}"


def find_troubles(
    log: list[dict[str, Any]], loss: str, baseline: dict[str, float]
) -> list[Trouble]:
    """Name what goes wrong in a game, at the evaluation that shows it first.

    collapse: variety is lost. Variety is entropy, the part of images that are no duplicates,
        spread and coverage, each as a part of its baseline. An evaluation is healthy if all are at
        least HEALTHY. After one, the game has collapsed as soon as any is below LOST. Where none
        was healthy, nothing may be learnt yet: then it has if a figure of GRACE was that low in
        STUCK evaluations in a row, after so many steps, and the game is stuck. It lasts until
        nothing is below LOST.
    vanished: the generator's gradient norm, the median of WINDOW steps, is below VANISHED of what
        it was, the largest median of any FEW steps, and the game is stuck.
    saturated: the median of the discriminator's loss is below SATURATED: it tells all apart. Not of
        the wasserstein loss, which has no end. A penalty keeps a loss from that, as it should;
        label noise can bring it below 0.
    pinned: the loss hardly moves from that of a discriminator that gives all the same score, where
        coverage is below LOW_COVERAGE of its baseline and the game is stuck: with good images this
        is its proper end, and strong penalties keep it there while much is learnt. Smoothed
        targets move that loss, and an auxiliary classifier adds its own: with these it goes
        unnoticed.

    A game is stuck if the best distance of the last STUCK evaluations is not PROGRESS below the
    best one before.

    What is said of a step depends on no later one.

    Args:
        log: an entry a step, as a run writes them; some have figures of a `Monitor`.
        loss: one of adversarial.LOSSES.
        baseline: that of the `Monitor`.
    """
    found: list[Trouble] = []
    judged: list[dict[str, Any]] = []
    last: set[str] = set()
    for i, entry in enumerate(log):
        if "coverage" in entry:
            judged.append(entry)
            stuck = _stuck([each["distance"] for each in judged])
            now = _collapse(judged, baseline, stuck, "collapse" in last)
            now += _unbalanced(log[: i + 1], loss, baseline, stuck)
            found += [trouble for trouble in now if trouble.kind not in last]
            last = {trouble.kind for trouble in now}
    return found


def _stuck(distances: list[float]) -> bool:
    before, recent = distances[:-PLATEAU], distances[-PLATEAU:]
    return bool(before) and min(recent) > (1 - PROGRESS) * min(before)


def _variety(figures: dict[str, float]) -> dict[str, float]:
    """Return the figures that are low when variety is lost."""
    return {k: 1 - figures[k] if k == "duplicates" else figures[k] for k in LOST if k in figures}


def _collapse(
    judged: list[dict[str, Any]], baseline: dict[str, float], stuck: bool, before: bool
) -> list[Trouble]:
    """Say whether the last evaluation shows a collapse, or that the one before goes on."""
    real = _variety(baseline)
    lost = [
        [name for name, value in _variety(each).items() if value < LOST[name] * real[name]]
        for each in judged
    ]
    learnt = any(
        all(value >= HEALTHY[name] * real[name] for name, value in _variety(each).items())
        for each in judged
    )
    step = judged[-1]["step"]
    lasting = set.intersection(*map(set, lost[-PLATEAU:]))
    hopeless = stuck and any(step >= GRACE.get(name, math.inf) for name in lasting)
    if not lost[-1] or not (before or learnt or hopeless):
        return []
    told = [f"{name} {judged[-1][name]:.2f} (real {baseline[name]:.2f})" for name in lost[-1]]
    advice = "try r1 and r2, the relativistic loss, packing, or lower rates"
    return [Trouble(step, "collapse", f"{', '.join(told)}; {advice}", fatal=True)]


def _unbalanced(
    log: list[dict[str, Any]], loss: str, baseline: dict[str, float], stuck: bool
) -> list[Trouble]:
    """Say whether the last window of steps shows that one player has nothing to go by."""
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
        text = f"the discriminator tells all apart, loss {level:.4f}"
        advice = "try r1 and r2, instance_noise, or a lower discriminator_learning_rate"
        found.append(Trouble(step, "saturated", f"{text}; {advice}", fatal=False))
    still = np.abs(window - CHANCE_LOSS[loss]).max() < AT_CHANCE
    if stuck and still and log[-1]["coverage"] < LOW_COVERAGE * baseline["coverage"]:
        text = f"the discriminator learns nothing, loss {level:.4f}"
        advice = "try a higher discriminator_learning_rate, or weaker penalties"
        found.append(Trouble(step, "pinned", f"{text}; {advice}", fatal=False))
    return found
