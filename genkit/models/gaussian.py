"""A Gaussian of which any part can be given: fitted to rows with gaps, exact for any order.

It is the part of a table that needs few rows: how its numbers rise and fall together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
LOG_2PI = math.log(2 * math.pi)
SHRINKAGES = (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
FOLDS, ROUNDS = 5, 30  # of cross-validation; of expectation and maximisation
LEAST = 1e-6  # variance of a feature that hardly varies


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian.

    Args:
        mean: (d,), float64.
        covariance: (d, d), float64, positive definite.
    """

    mean: torch.Tensor
    covariance: torch.Tensor

    def factors(self, orders: torch.Tensor) -> torch.Tensor:
        """Return the Cholesky factors of the covariance in other orders.

        Args:
            orders: of the features, (n, d).

        Returns:
            Lower triangles, (n, d, d).
        """
        rows = self.covariance[orders[:, :, None], orders[:, None, :]]
        return torch.linalg.cholesky(rows)

    def innovations(self, factors: torch.Tensor, ordered: torch.Tensor) -> torch.Tensor:
        """Return by how many deviations each feature differs from what those before it say.

        Args:
            factors: see above, (n, d, d).
            ordered: features minus their means, in the order of the factors, (n, d).
        """
        return torch.linalg.solve_triangular(factors, ordered[..., None], upper=False)[..., 0]

    def log_density(self, features: Array) -> float:
        """Return the log density of rows, (n, d), together; of each what is no gap (NaN)."""
        known, total = ~np.isnan(features), 0.0
        patterns, which = np.unique(known, axis=0, return_inverse=True)
        for i, pattern in enumerate(patterns):
            off = (features - self.mean.numpy())[np.ix_(which.ravel() == i, pattern)]
            factor = np.linalg.cholesky(self.covariance.numpy()[np.ix_(pattern, pattern)])
            squares = (np.linalg.solve(factor, off.T) ** 2).sum()
            each = 2 * np.log(np.diag(factor)).sum() + pattern.sum() * LOG_2PI
            total -= 0.5 * (squares + len(off) * each)
        return total

    def given(
        self, features: torch.Tensor, asked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and covariance of some features, given those of a row that are known.

        Args:
            features: (n, d), NaN where nothing is known.
            asked: which features, (k,), unknown in all rows.

        Returns:
            (n, k) and (n, k, k).
        """
        means = features.new_empty(len(features), len(asked))
        covariances = features.new_empty(len(features), len(asked), len(asked))
        patterns, which = torch.unique(~features.isnan(), dim=0, return_inverse=True)
        for i, known in enumerate(patterns):
            rows, seen = (which == i).nonzero()[:, 0], known.nonzero()[:, 0]
            across = self.covariance[asked][:, seen]  # (k, s)
            factor = torch.linalg.cholesky(self.covariance[seen][:, seen])
            weights = torch.cholesky_solve(across.mT, factor)  # (s, k)
            off = features[rows][:, seen] - self.mean[seen]
            # a sum that does not depend on how many rows there are
            means[rows] = self.mean[asked] + (off[:, :, None] * weights).sum(1)
            covariances[rows] = self.covariance[asked][:, asked] - across @ weights
        return means, covariances


def fit_gaussian(features: Array, seed: int = 0) -> Gaussian:
    """Fit a Gaussian to rows with gaps; correlations shrink by what suits other rows best.

    Args:
        features: (n, d), NaN for gaps.

    Source: expectation and maximisation for gaps: Dempster, Laird and Rubin 1977.
    """
    fold = np.random.default_rng(seed).permutation(len(features)) % FOLDS
    density = dict.fromkeys(SHRINKAGES, 0.0)
    for own in range(FOLDS if len(features) >= 2 * FOLDS else 0):
        mean, covariance = _moments(features[fold != own])
        for shrinkage in SHRINKAGES:
            shrunk = _shrink(covariance, shrinkage)
            gaussian = Gaussian(torch.from_numpy(mean), torch.from_numpy(shrunk))
            density[shrinkage] += gaussian.log_density(features[fold == own])
    mean, covariance = _moments(features)
    chosen = max(density, key=lambda shrinkage: density[shrinkage])
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(_shrink(covariance, chosen)))


def _shrink(covariance: Array, shrinkage: float) -> Array:
    diagonal = np.diag(np.diag(covariance) + LEAST)
    return (1 - shrinkage) * covariance + shrinkage * diagonal


def _moments(features: Array) -> tuple[Array, Array]:
    """Return mean and covariance; of gaps, what the other features of a row make likely."""
    known = ~np.isnan(features)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, features, 0).sum(0) / count
    covariance = np.diag(np.where(known, (features - mean) ** 2, 0).sum(0) / count + LEAST)
    patterns, which = np.unique(known, axis=0, return_inverse=True)
    for _ in range(ROUNDS if len(patterns) > 1 else 1):
        filled, extra = np.where(known, features, mean), np.zeros_like(covariance)
        for i, pattern in enumerate(patterns):
            if not pattern.all():
                rows, gaps = which.ravel() == i, ~pattern
                weights = np.linalg.solve(
                    covariance[np.ix_(pattern, pattern)] + LEAST * np.eye(pattern.sum()),
                    covariance[np.ix_(pattern, gaps)],
                )
                some = features[np.ix_(rows, pattern)] - mean[pattern]
                filled[np.ix_(rows, gaps)] = mean[gaps] + some @ weights
                left = (
                    covariance[np.ix_(gaps, gaps)] - weights.T @ covariance[np.ix_(pattern, gaps)]
                )
                extra[np.ix_(gaps, gaps)] += rows.sum() * left
        mean = filled.mean(0)
        covariance = ((filled - mean).T @ (filled - mean) + extra) / len(filled)
    return mean, covariance
