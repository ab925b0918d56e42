"""What a generative model in training is watched by: figures of its images, and its troubles.

A `Monitor` compares images drawn in training with real ones; `troubles` reads a run's log.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.metrics.collapse import CHANCE_LOSS
from genkit.metrics.features import (
    Extractor,
    Features,
    PixelFeatures,
    extract,
    extract_cached,
    load_extractor,
)
from genkit.metrics.fidelity import as_features, frechet_distance
from genkit.metrics.images import class_shares, label_accuracy
from genkit.metrics.judge import Labels, as_images
from genkit.metrics.neighbours import K, manifold

MOST = 2000  # images that are searched for duplicates, and whose pixels are compared
NEAR = 0.01  # the part of real images that have so near a neighbour that it looks like a duplicate
SAME = 1e-5  # of its norm: how far features of an image may differ from batch to batch
CHANCE_LOSS |= {"relativistic": math.log(2), "least_squares": 0.25, "hinge": 2.0}

# ---------------------------------------------------------------------------------------------
# Figures


class Monitor:
    """Compares images drawn in training with real ones; looks at the real ones once.

    Some of the real images, as many as are drawn but half at most, are stand-ins: put in the place
    of the drawn ones they say what a perfect generator gets, the `baseline`. Where more are drawn
    than there are stand-ins, they are compared in blocks of that many, and the mean is told, so
    that figures are as biased as their baseline.

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
            extractor = PixelFeatures()
        self.extractor = load_extractor(extractor) if isinstance(extractor, str) else extractor
        self.count, self.block = count, min(count, len(real) // 2)
        order = np.random.default_rng(0).permutation(len(real))
        held_out, compared = real.take(order[: self.block]), real.take(order[self.block :])
        self.real = extract_cached(compared, self.extractor)
        self._spread = spread(flat_pixels(compared))
        if not self._spread:
            raise ValueError(f"real: all {len(real):,} images are the same; give others")
        self._limit = duplicate_limit(self.real.features[: self.block])
        # labels are numbered as the images do, classes as the classifier does
        names, self._names = self.extractor.names, real.names
        known = bool(real.names) and set(real.names) <= set(names)
        self._places = np.array([names.index(n) for n in real.names]) if known else None
        self.baseline = self._compare(extract_cached(held_out, self.extractor), held_out)

    def measure(self, images: torch.Tensor, labels: Labels | None = None) -> dict[str, float]:
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
        return self._compare(extract(shuffled, self.extractor), shuffled)

    def _compare(self, seen: Features, images: Images) -> dict[str, float]:
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
        return found | {"spread": spread(flat_pixels(images)) / self._spread}


def flat_pixels(images: Images) -> torch.Tensor:
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
