"""Frechet and kernel distance between the features of generated and of real images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import torch

SUBSETS, SUBSET_SIZE = 100, 1000  # as in Binkowski et al. 2018


def as_features(values: npt.ArrayLike, name: str, least: int = 2) -> torch.Tensor:
    """Check features and return them in float64, (n, d).

    Args:
        values: an array or a tensor, (n, d).
        name: for messages.
        least: smallest number of rows.

    Raises:
        ValueError: it has another shape, too few rows, or a number that is not finite.
    """
    features = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if features.ndim != 2 or len(features) < least or not features.shape[1]:
        raise ValueError(
            f"{name} must be (n, d) with n {least} or more, got the shape {tuple(features.shape)}"
        )
    wrong = (~features.isfinite()).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"{name}[{wrong[0]}] must be finite, got nan or inf")
    return features


def as_pair(
    real: npt.ArrayLike, fake: npt.ArrayLike, least: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the features of real and of generated images; see `as_features`."""
    real, fake = as_features(real, "real", least), as_features(fake, "fake", least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"fake must have as many features as real, {real.shape[1]}, got {fake.shape[1]}"
        )
    return real, fake


# ---- Frechet distance


def frechet_distance(real: npt.ArrayLike, fake: npt.ArrayLike) -> float:
    """Return the Frechet distance of Gaussians with the features' means and covariances.

    |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½). With S = RᵀR the last trace is the sum of the singular
    values of R1 R2ᵀ, and a QR decomposition of the features gives R. So no covariance is formed and
    no matrix root taken, and there may be fewer rows than columns.

    It is biased upwards, more so for fewer rows. Compare figures of the same counts only.

    Args:
        real, fake: features, (n, d) and (m, d).

    Returns:
        The squared distance, as in the Frechet Inception distance, of covariances over n - 1.

    Raises:
        ValueError: an argument is invalid.

    Source: Heusel et al. 2017, equation 6, https://arxiv.org/abs/1706.08500
    """
    means, roots = zip(*map(_moments, as_pair(real, fake)), strict=True)
    between = torch.linalg.svdvals(roots[0] @ roots[1].mT).sum()
    spreads = sum(root.square().sum() for root in roots)
    distance = (means[0] - means[1]).square().sum() + spreads - 2 * between
    return max(0.0, distance.item())  # for equal features it is a rounding error of either sign


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean, (d,), and a root R of the covariance RᵀR, (min(n, d), d)."""
    mean = features.mean(0)
    centred = (features - mean) / math.sqrt(len(features) - 1)
    return mean, torch.linalg.qr(centred, mode="r").R


# ---- kernel distance


@dataclass(frozen=True)
class KernelDistance:
    """The squared maximum mean discrepancy, and its standard error."""

    value: float
    standard_error: float


def kernel_distance(
    real: npt.ArrayLike,
    fake: npt.ArrayLike,
    subsets: int = SUBSETS,
    subset_size: int | None = None,
    seed: int = 0,
) -> KernelDistance:
    """Estimate the squared maximum mean discrepancy under the kernel (x·y / d + 1)³.

    The mean of an unbiased estimate over subsets, so it can be below 0. The standard deviation s
    over subsets of m of n rows is √(n/m - 1) times the standard error of the whole (the delete-d
    jackknife), while s / √subsets would vanish with more subsets of the same rows.

    Args:
        real: (n, d).
        fake: (n', d).
        subsets: number of subsets, each drawn without replacement.
        subset_size: rows of each; default: 1,000, or half of the rows if that is less.
        seed: of the subsets.

    Raises:
        ValueError: an argument is invalid.

    Source: Binkowski et al. 2018, section 3, https://arxiv.org/abs/1801.01401; Shao and Wu 1989,
    https://doi.org/10.1214/aos/1176347263
    """
    real, fake = as_pair(real, fake, least=4)
    least = min(len(real), len(fake))
    size = min(SUBSET_SIZE, least // 2) if subset_size is None else subset_size
    if not 2 <= size < least:
        raise ValueError(f"subset_size must be 2 or more and below {least}, got {size}")
    if subsets < 2:
        raise ValueError(f"subsets must be 2 or more, got {subsets}")
    rng = np.random.default_rng(seed)
    values = [_mmd2(_some(real, size, rng), _some(fake, size, rng)) for _ in range(subsets)]
    error = np.std(values, ddof=1) / math.sqrt(least / size - 1)
    return KernelDistance(float(np.mean(values)), float(error))


def _some(features: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    return features[rng.permutation(len(features))[:size]]


def _mmd2(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the unbiased estimate for two sets of the same size."""
    size = len(x)
    same = _kernel(x, x) + _kernel(y, y)
    within = (same.sum() - same.trace()) / (size * (size - 1))
    return (within - 2 * _kernel(x, y).mean()).item()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.mT / x.shape[1] + 1) ** 3


# ---- evaluate


class FidelityMetric(evaluate.Metric):
    """Frechet and kernel distance as an `evaluate.Metric`, which needs no network.

    FidelityMetric().compute(predictions=features_of_fakes, real=features_of_real_images)
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How far generated images are from real ones, by their features.",
            citation="",
            inputs_description="predictions: features of generated images. real: of real ones, of "
            "which there may be more or fewer. seed: see genkit.metrics.fidelity.kernel_distance.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64"))}
            ),
            reference_urls=["https://arxiv.org/abs/1706.08500", "https://arxiv.org/abs/1801.01401"],
        )

    def _compute(
        self, predictions: list[list[float]], real: npt.ArrayLike, seed: int = 0
    ) -> dict[str, Any]:
        kernel = kernel_distance(real, predictions, seed=seed)
        return {
            "frechet_distance": frechet_distance(real, predictions),
            "kernel_distance": kernel.value,
            "kernel_distance_standard_error": kernel.standard_error,
        }
