"""Figures of the samples of a generative model in training, with real-vs-real baselines.

`collapse.find_troubles` finds failures in a log with these figures.
"""

from __future__ import annotations

import numpy as np
import torch

from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.metrics.features import (
    Extractor,
    Features,
    PixelFeatures,
    extract,
    extract_cached,
    load_extractor,
)
from genkit.metrics.fidelity import as_features, frechet_distance
from genkit.metrics.given_images import Labels, as_images
from genkit.metrics.images import class_shares, label_accuracy
from genkit.metrics.neighbours import K, manifold

FEWEST = 4  # real images: two that are held out, and two that are compared
MOST = 2000  # images whose duplicates are searched, and whose pixels are compared
NEAR = 0.01  # share of real images whose nearest neighbour counts as a duplicate
SAME = 1e-5  # relative rounding error of features from batch to batch

# ---------------------------------------------------------------------------------------------
# Figures


class Monitor:
    """Compares samples with real images, whose features are extracted once.

    Some of the real images, as many as there are samples but at most half, are held out: their
    figures are the `baseline`, which a perfect generator would reach. More samples than held-out
    images are compared in blocks of that many, and averaged, so that figures have the bias of their
    baseline. The k of the coverage is 5, or one less than the images in a block if they are fewer.

    Args:
        real: images that the networks are not trained on, FEWEST or more.
        extractor: name of an image classifier, see `load_extractor`, or what that returned; None
            for pixels as features.
        count: number of samples of an evaluation.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(self, real: Images, extractor: str | Extractor | None, count: int) -> None:
        if count < K + 1:
            raise ValueError(f"count must be at least {K + 1} for k={K}, got {count}")
        if len(real) < FEWEST:
            raise ValueError(f"real must be {FEWEST} images or more, got {len(real)}")
        if extractor is None:
            extractor = PixelFeatures()
        self.extractor = load_extractor(extractor) if isinstance(extractor, str) else extractor
        self.count, self.block = count, min(count, len(real) // 2)
        self.k = coverage_k(count, len(real))
        order = np.random.default_rng(0).permutation(len(real))
        held_out, compared = real.take(order[: self.block]), real.take(order[self.block :])
        self.real = extract_cached(compared, self.extractor)
        self._spread = spread(flat_pixels(compared))
        if not self._spread:
            raise ValueError(f"real images must differ, got {len(real):,} equal ones")
        self._limit = duplicate_limit(self.real.features[: self.block])
        # labels are numbered as the images' classes, predicted classes as the classifier's
        names, self._names = self.extractor.names, real.names
        shared = bool(real.names) and set(real.names) <= set(names)
        self._class_indices = np.array([names.index(n) for n in real.names]) if shared else None
        self.baseline = self._compare(extract_cached(held_out, self.extractor), held_out)

    def measure(self, images: torch.Tensor, labels: Labels | None = None) -> dict[str, float]:
        """Compare images with the real ones.

        Args:
            images: in [-1, 1], (count, channels, height, width).
            labels: the class that each should show, numbered as those of the real images.

        Returns:
            distance: Frechet distance.
            coverage: share of real images with a sample among their k nearest neighbours.
            entropy: of the classes' shares, relative to its maximum; from a classifier.
            label_accuracy: share of images that show their class; from a classifier of these
                classes.
            duplicates: see `duplicates`; 0.01 for real images.
            spread: mean over pixels of their standard deviation over images, relative to that of
                real images.

        Raises:
            ValueError: an argument is invalid.
        """
        if len(images) != self.count:
            raise ValueError(f"images must have {self.count:,} rows, got {len(images):,}")
        given = as_images(images, labels, self._names or self.extractor.names)
        shuffled = given.take(np.random.default_rng(0).permutation(len(given)))  # not by class
        return self._compare(extract(shuffled, self.extractor), shuffled)

    def _compare(self, extracted: Features, images: Images) -> dict[str, float]:
        real, figures = self.real.features, []
        for which in blocks(len(extracted) // self.block * self.block, self.block):
            some = extracted.features[which]
            figures.append(
                {
                    "distance": frechet_distance(real, some),
                    "coverage": manifold(real[: self.block], some, self.k).coverage,
                    "duplicates": duplicates(some, self._limit),
                }
            )
        means = {name: float(np.mean([each[name] for each in figures])) for name in figures[0]}
        names = self.extractor.names
        if names:
            means["entropy"] = evenness(class_shares(extracted.classes, len(names)))
        if images.labels is not None and self._class_indices is not None:
            wanted = self._class_indices[images.labels[images.rows]]
            means["label_accuracy"] = label_accuracy(extracted.classes, wanted)
        return means | {"spread": spread(flat_pixels(images)) / self._spread}


def coverage_k(count: int, real: int) -> int:
    """Return the k of the coverage of so many samples, compared with so many real images."""
    return min(K, min(count, real // 2) - 1)


def flat_pixels(images: Images) -> torch.Tensor:
    """Return the pixels of the first images, (n, channels * height * width)."""
    return images.batch(np.arange(min(len(images), MOST))).flatten(1)


def spread(values: torch.Tensor) -> float:
    """Return the mean over pixels of their standard deviation over images; values: (n, d)."""
    return values.std(0).mean().item()


def evenness(shares: np.ndarray) -> float:
    """Return the entropy of classes' shares, relative to that of equal shares."""
    used = shares[shares > 0]
    return float((used * np.log(1 / used)).sum() / np.log(max(2, len(shares))))


def nearest_others(features: np.ndarray) -> torch.Tensor:
    """Return the distance of each row to the nearest of the others, (n,), exactly 0 for a copy."""
    points = as_features(features, "features")
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    return (points - points[distances.argmin(1)]).norm(
        dim=1
    )  # by differences: products would round the distance of a copy


def duplicate_limit(real: np.ndarray) -> float:
    """Return the distance below which NEAR of real images have their nearest neighbour; (n, d)."""
    near = nearest_others(real[:MOST]).quantile(NEAR, interpolation="higher")
    return max(near.item(), SAME * float(np.linalg.norm(real, axis=1).mean()))


def duplicates(features: np.ndarray, limit: float) -> float:
    """Return the share of images that have another within `limit`, by features, (n, d).

    A generator of few different images repeats itself in few samples (the birthday paradox).

    Source: after Arora and Zhang 2018, https://arxiv.org/abs/1706.08224, who inspect the
    nearest pairs; here the limit comes from the distances among as many real images.
    """
    return (nearest_others(features[:MOST]) <= limit).double().mean().item()
