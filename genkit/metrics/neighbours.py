"""Nearest neighbours among features: precision, recall, density, coverage, and copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import evaluate
import numpy.typing as npt
import torch

from genkit.metrics.fidelity import as_features, as_pair

K = 5
AT_ONCE = 1 << 23  # distances: 64 MB
SLACK = 1e-11  # rounding error of squared distances by matrix products, relative to squared norms
NEAREST = 0.01  # share of unseen real images that lie as near to training images as copies do


@dataclass(frozen=True)
class Manifold:
    """How two sets of features cover each other."""

    precision: float  # share of generated points in a neighbourhood of a real one
    recall: float  # share of real points in a neighbourhood of a generated one
    density: float  # mean number of real neighbourhoods of a generated point, over k
    coverage: float  # share of real neighbourhoods with a generated point


def manifold(real: npt.ArrayLike, fake: npt.ArrayLike, k: int = K) -> Manifold:
    """Measure how far generated images lie among real ones, and real ones among generated ones.

    The neighbourhood of a point is the closed ball that reaches to its k-th nearest neighbour of
    its own set, without itself. Precision and recall are as in Kynkaanniemi et al., density and
    coverage as in Naeem et al. Density can be above 1. A set against itself has a density of
    (k + 1) / k, and 1 for the others; against another sample of the same distribution, precision
    and recall are below 1, and nearer to it for a larger k.

    Args:
        real: (n, d).
        fake: (m, d).
        k: the neighbour that gives the radius; below n and m.

    Raises:
        ValueError: an argument is invalid.

    Source: Kynkaanniemi et al. 2019, equations 1 and 2, https://arxiv.org/abs/1904.06991; Naeem et
    al. 2020, equations 3 and 4, https://arxiv.org/abs/2002.09797
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    real, fake = as_pair(real, fake, least=k + 1)
    held, hits = _inside(real, _radii(real, k), fake)
    reached = _inside(fake, _radii(fake, k), real)[1]
    return Manifold(
        precision=(hits > 0).double().mean().item(),
        recall=(reached > 0).double().mean().item(),
        density=hits.double().mean().item() / k,
        coverage=(held > 0).double().mean().item(),
    )


def _radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """Return the squared distance of each point to the k-th nearest of the others, (n,)."""
    radii = []
    for rows, squares in _squares(points, points):
        squares[torch.arange(len(rows)), rows] = torch.inf
        radii.append(squares.topk(k, largest=False, sorted=True).values[:, -1])
    return torch.cat(radii)


def _inside(
    centres: torch.Tensor, radii: torch.Tensor, points: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the points in each ball, (n,), and the balls that each point is in, (m,)."""
    norms, held, hits = points.square().sum(1), [], torch.zeros(len(points), dtype=torch.int64)
    for rows, squares in _squares(centres, points):
        room = SLACK * (centres[rows].square().sum(1)[:, None] + norms)
        inside = squares <= radii[rows, None] + room
        held.append(inside.sum(1))
        hits += inside.sum(0)
    return torch.cat(held), hits


def _squares(
    left: torch.Tensor, right: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield indices of rows of `left`, (r,), and their squared distances to `right`, (r, m)."""
    norms = right.square().sum(1)
    for rows in torch.arange(len(left)).split(max(1, AT_ONCE // len(right))):
        some = left[rows]
        yield rows, torch.addmm(norms, some, right.mT, alpha=-2) + some.square().sum(1)[:, None]


# ---- copies


def nearest_neighbours(
    points: npt.ArrayLike, others: Iterable[npt.ArrayLike]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the nearest of others to each point.

    Args:
        points: (n, d).
        others: (m, d), in any number of blocks.

    Returns:
        Its distance, exactly 0 for a copy, float64; and its index among all of the others, int64;
        (n,) each.

    Raises:
        ValueError: an argument is invalid.
    """
    points = as_features(points, "points", least=1)
    best = torch.full((len(points),), torch.inf, dtype=torch.float64)
    which = torch.zeros(len(points), dtype=torch.int64)
    start = 0
    for block in others:
        block = as_features(block, "others", least=1)
        near = torch.cat([squares.argmin(1) for _, squares in _squares(points, block)])
        distances = (points - block[near]).norm(
            dim=1
        )  # by differences: products would round that of a copy
        closer = distances < best
        best[closer], which[closer] = distances[closer], start + near[closer]
        start += len(block)
    return best, which


def copy_rate(fake: npt.ArrayLike, unseen: npt.ArrayLike) -> tuple[float, float]:
    """Measure the share of generated images that are suspiciously near to a training image.

    A copy is an image that is as near as the nearest hundredth of unseen real images. A model that
    memorised training images has many copies; but images with less detail than real ones are near
    to everything, so inspect the pairs.

    Args:
        fake: distances of generated images to their nearest training image, (n,).
        unseen: those of real images that were not trained on, (m,).

    Returns:
        The share of copies among generated images, and among unseen ones: a hundredth, or more
        where they have duplicates.

    Source: after Meehan et al. 2020, https://arxiv.org/abs/2004.05675, who compare these two sets
    of distances by their ranks, which a few copies would not change.
    """
    near, far = (torch.as_tensor(each, dtype=torch.float64) for each in (fake, unseen))
    limit = far.quantile(NEAREST, interpolation="higher")
    return (near <= limit).double().mean().item(), (far <= limit).double().mean().item()


# ---- evaluate


class ManifoldMetric(evaluate.Metric):
    """`manifold` as an `evaluate.Metric`, which needs no network.

    ManifoldMetric().compute(predictions=features_of_fakes, real=features_of_real_images)
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Precision, recall, density and coverage of generated images.",
            citation="",
            inputs_description="predictions: features of generated images. real: of real ones, of "
            "which there may be more or fewer. k: see genkit.metrics.neighbours.manifold.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64"))}
            ),
            reference_urls=["https://arxiv.org/abs/1904.06991", "https://arxiv.org/abs/2002.09797"],
        )

    def _compute(
        self, predictions: list[list[float]], real: npt.ArrayLike, k: int = K
    ) -> dict[str, Any]:
        return asdict(manifold(real, predictions, k))
