"""What a generative model in training is watched by: figures of its images, and its troubles.

A `Monitor` compares images drawn in training with real ones; `troubles` reads a run's log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genkit.adversarial import CROSS_ENTROPY
from genkit.features import Extractor, Pixels, Seen, load_extractor, look, look_once
from genkit.images import Images, blocks
from genkit.judge import Labels, as_images
from genkit.metrics.fidelity import as_features, frechet_distance
from genkit.metrics.images import class_shares, label_accuracy
from genkit.metrics.neighbours import K, manifold

MOST = 2000  # images that are searched for duplicates, and whose pixels are compared
NEAR = 0.01  # the part of real images that have so near a neighbour that it looks like a duplicate
SAME = 1e-5  # of its norm: how far features of an image may differ from batch to batch

HEALTHY = {"entropy": 0.75, "duplicates": 0.75, "spread": 0.5, "coverage": 0.1}
LOST = {"entropy": 0.5, "duplicates": 0.5, "spread": 0.1, "coverage": 0.01}  # of the floor's
GRACE = {"spread": 200, "duplicates": 1000, "entropy": 1000}  # steps in which it may be lost yet
STUCK, PROGRESS = 3, 0.01  # evaluations without progress; part by which the distance should fall
WINDOW, FEW = 100, 10  # steps that a trouble of the losses lasts, and that a spike does not
VANISHED = 1e-3  # of the largest gradient norm
SATURATED = 0.01  # loss of a discriminator that tells all apart
PINNED, UNLIKE = 0.01, 0.5  # how far off the loss may be; coverage, of the floor's

# What a discriminator loses that gives all images the same score: told nothing, it can do no better
TOLD_NOTHING = {loss: 2 * math.log(2) for loss in CROSS_ENTROPY}
TOLD_NOTHING |= {"relativistic": math.log(2), "least_squares": 0.25, "hinge": 2.0}

# ---------------------------------------------------------------------------------------------
# Figures


class Monitor:
    """Compares images drawn in training with real ones; looks at the real ones once.

    Some of the real images, as many as are drawn but half at most, are stand-ins: put in the place
    of the drawn ones they say what a perfect generator gets, the `floor`. Where more are drawn than
    there are stand-ins, they are compared in blocks of that many, and the mean is told, so that
    figures are as biased as their floor.

    Args:
        real: images that the networks do not learn from.
        extractor: see `load_extractor`, or what it returned; None for the pixels themselves.
        count: how many images are drawn for an evaluation.

    Raises:
        ValueError: an argument cannot work; it is named.
    """

    def __init__(self, real: Images, extractor: str | Extractor | None, count: int) -> None:
        for name, images in (("count", count), ("real: half of the images", len(real) // 2)):
            if images < K + 1:
                raise ValueError(
                    f"{name}: {images} are too few for k = {K}; {K + 1} are the fewest"
                )
        if extractor is None:
            extractor = Pixels()
        self.extractor = load_extractor(extractor) if isinstance(extractor, str) else extractor
        self.count, self.block = count, min(count, len(real) // 2)
        order = np.random.default_rng(0).permutation(len(real))
        stand_ins, compared = real.take(order[: self.block]), real.take(order[self.block :])
        self.real = look_once(compared, self.extractor)
        self._spread = spread(pixels(compared))
        if not self._spread:
            raise ValueError(f"real: all {len(real):,} images are the same; give others")
        self._limit = duplicate_limit(self.real.features[: self.block])
        # labels are numbered as the images do, classes as the classifier does
        names, self._names = self.extractor.names, real.names
        known = bool(real.names) and set(real.names) <= set(names)
        self._places = np.array([names.index(n) for n in real.names]) if known else None
        self.floor = self._compare(look_once(stand_ins, self.extractor), stand_ins)

    def look(self, images: torch.Tensor, labels: Labels | None = None) -> dict[str, float]:
        """Compare images with the real ones.

        Args:
            images: in [-1, 1], (count, channels, height, width).
            labels: what each should show, as the real images number their classes.

        Returns:
            distance: Frechet distance.
            coverage: part of the real images that a generated one is among the 5 nearest of.
            entropy: of the classes' shares, as a part of the most it can be; from a classifier.
            label_accuracy: part of the images that show what they should; from a classifier that
                knows the classes.
            duplicates: see `duplicates`; a hundredth of real images.
            spread: the mean over pixels of their standard deviation over images, over that of real
                ones.

        Raises:
            ValueError: an argument cannot work; it is named.
        """
        if len(images) != self.count:
            raise ValueError(f"images must be {self.count:,}, got {len(images):,}")
        given = as_images(images, labels, self._names or self.extractor.names)
        shuffled = given.take(np.random.default_rng(0).permutation(len(given)))  # not by class
        return self._compare(look(shuffled, self.extractor), shuffled)

    def _compare(self, seen: Seen, images: Images) -> dict[str, float]:
        real, figures = self.real.features, []
        for which in blocks(len(seen) // self.block * self.block, self.block):
            some = seen.features[which]
            figures.append(
                {
                    "distance": frechet_distance(real, some),
                    "coverage": manifold(real[: self.block], some, K).coverage,
                    "duplicates": duplicates(some, self._limit),
                }
            )
        found = {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
        names = self.extractor.names
        if names:
            found["entropy"] = evenness(class_shares(seen.classes, len(names)))
        if images.labels is not None and self._places is not None:
            wanted = self._places[images.labels[images.rows]]
            found["label_accuracy"] = label_accuracy(seen.classes, wanted)
        return found | {"spread": spread(pixels(images)) / self._spread}


def pixels(images: Images) -> torch.Tensor:
    """Return the pixels of the first images, (n, values)."""
    return images.batch(np.arange(min(len(images), MOST))).flatten(1)


def spread(values: torch.Tensor) -> float:
    """Return the mean over pixels of their standard deviation over images, (n, values)."""
    return values.std(0).mean().item()


def evenness(shares: np.ndarray) -> float:
    """Return the entropy of classes' shares over that of equal ones: 0 for one class alone."""
    used = shares[shares > 0]
    return float((used * np.log(1 / used)).sum() / np.log(max(2, len(shares))))


def nearest_others(features: np.ndarray) -> torch.Tensor:
    """Return the distance of each row to the nearest of the others, (n,), exactly 0 for a copy."""
    points = as_features(features, "features")
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    return (points - points[distances.argmin(1)]).norm(dim=1)  # products would round that of a copy


def duplicate_limit(real: np.ndarray) -> float:
    """Return how near the nearest hundredth of real images are to another, by features, (n, d)."""
    near = nearest_others(real[:MOST]).quantile(NEAR, interpolation="higher")
    return max(near.item(), SAME * float(np.linalg.norm(real, axis=1).mean()))


def duplicates(features: np.ndarray, limit: float) -> float:
    """Return the part of images that have another within `limit`, by features, (n, d).

    A generator that has few images to offer repeats itself in few draws, as birthdays do.

    Source: after Arora and Zhang 2018, https://arxiv.org/abs/1706.08224, who look at the nearest
    pairs; here the distances among as many real images judge them.
    """
    return (nearest_others(features[:MOST]) <= limit).double().mean().item()


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


def troubles(log: list[dict[str, Any]], loss: str, floor: dict[str, float]) -> list[Trouble]:
    """Name what goes wrong in a game, at the evaluation that shows it first.

    collapse: variety is lost. Variety is entropy, the part of images that are no duplicates,
        spread and coverage, each as a part of its floor. An evaluation is healthy if all are at
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
        coverage is below UNLIKE of its floor and the game is stuck: with good images this is its
        proper end, and strong penalties keep it there while much is learnt. Smoothed targets move
        that loss, and an auxiliary classifier adds its own: with these it goes unnoticed.

    A game is stuck if the best distance of the last STUCK evaluations is not PROGRESS below the
    best one before.

    What is said of a step depends on no later one.

    Args:
        log: an entry a step, as a run writes them; some have figures of a `Monitor`.
        loss: one of adversarial.LOSSES.
        floor: that of the `Monitor`.
    """
    found: list[Trouble] = []
    judged: list[dict[str, Any]] = []
    last: set[str] = set()
    for i, entry in enumerate(log):
        if "coverage" in entry:
            judged.append(entry)
            stuck = _stuck([each["distance"] for each in judged])
            now = _collapse(judged, floor, stuck, "collapse" in last)
            now += _unbalanced(log[: i + 1], loss, floor, stuck)
            found += [trouble for trouble in now if trouble.kind not in last]
            last = {trouble.kind for trouble in now}
    return found


def _stuck(distances: list[float]) -> bool:
    before, recent = distances[:-STUCK], distances[-STUCK:]
    return bool(before) and min(recent) > (1 - PROGRESS) * min(before)


def _variety(figures: dict[str, float]) -> dict[str, float]:
    """Return the figures that are low when variety is lost."""
    return {k: 1 - figures[k] if k == "duplicates" else figures[k] for k in LOST if k in figures}


def _collapse(
    judged: list[dict[str, Any]], floor: dict[str, float], stuck: bool, before: bool
) -> list[Trouble]:
    """Say whether the last evaluation shows a collapse, or that the one before goes on."""
    real = _variety(floor)
    lost = [
        [name for name, value in _variety(each).items() if value < LOST[name] * real[name]]
        for each in judged
    ]
    learnt = any(
        all(value >= HEALTHY[name] * real[name] for name, value in _variety(each).items())
        for each in judged
    )
    step = judged[-1]["step"]
    lasting = set.intersection(*map(set, lost[-STUCK:]))
    hopeless = stuck and any(step >= GRACE.get(name, math.inf) for name in lasting)
    if not lost[-1] or not (before or learnt or hopeless):
        return []
    told = [f"{name} {judged[-1][name]:.2f} (real {floor[name]:.2f})" for name in lost[-1]]
    advice = "try r1 and r2, the relativistic loss, packing, or lower rates"
    return [Trouble(step, "collapse", f"{', '.join(told)}; {advice}", fatal=True)]


def _unbalanced(
    log: list[dict[str, Any]], loss: str, floor: dict[str, float], stuck: bool
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
    still = np.abs(window - TOLD_NOTHING[loss]).max() < PINNED
    if stuck and still and log[-1]["coverage"] < UNLIKE * floor["coverage"]:
        text = f"the discriminator learns nothing, loss {level:.4f}"
        advice = "try a higher discriminator_learning_rate, or weaker penalties"
        found.append(Trouble(step, "pinned", f"{text}; {advice}", fatal=False))
    return found
