"""Bins of residuals: by how many deviations a number differs from what was expected of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from genkit.models.gaussian import LOG_2PI

Array = NDArray[np.float64]
EDGE, STEP, DECAY = 2.5, 0.25, 2.5  # where the tails begin, width of a bin, rate of the tails


@dataclass(frozen=True)
class Bins:
    """Bins of residuals: between borders Gaussian, beyond the outermost ones exponential."""

    borders: Sequence[float]

    @functools.cached_property
    def log_mass(self) -> Array:
        """The log probability of each bin under the Gaussian, (bins,)."""
        levels = np.concatenate([[0.0], ndtr(np.asarray(self.borders)), [1.0]])
        return np.log(np.diff(levels))

    def __len__(self) -> int:
        return len(self.borders) + 1

    def find(self, residuals: Array) -> NDArray[np.int64]:
        """Return the bin of each residual."""
        return np.searchsorted(np.asarray(self.borders), residuals, "right")

    def log_density(self, residuals: Array) -> Array:
        """Return the log density of each residual inside its bin."""
        inside = -0.5 * (residuals**2 + LOG_2PI) - self.log_mass[self.find(residuals)]
        low, high = self.borders[0], self.borders[-1]
        beyond = np.maximum(low - residuals, residuals - high)
        return np.where(beyond > 0, math.log(DECAY) - DECAY * beyond, inside)

    def reach(self, low: Array, high: Array) -> NDArray[np.bool_]:
        """Return which bins have a part between two residuals, (n, bins)."""
        edges = np.concatenate([[-np.inf], self.borders, [np.inf]])
        return (edges[1:] > low[:, None]) & (edges[:-1] < high[:, None])

    def place(self, bins: NDArray[np.int64], u: Array, low: Array, high: Array) -> Array:
        """Return the residual at the level `u`, in (0, 1), of the part of each bin within bounds.

        Args:
            bins: which, (n,).
            low, high: the bounds, (n,) each; infinite for none.
        """
        first, last = self.borders[0], self.borders[-1]
        edges = np.concatenate([[-np.inf], self.borders, [np.inf]])
        start, end = np.maximum(edges[bins], low), np.minimum(edges[bins + 1], high)
        inside = ndtri(ndtr(start) + u * (ndtr(end) - ndtr(start)))
        below = np.exp(DECAY * (np.minimum([start, end], first) - first))
        above = np.exp(-DECAY * (np.maximum([start, end], last) - last))
        under = first + np.log(np.maximum(below[0] + u * (below[1] - below[0]), 1e-300)) / DECAY
        over = last - np.log(np.maximum(above[0] + u * (above[1] - above[0]), 1e-300)) / DECAY
        found = np.where(bins == 0, under, np.where(bins == len(self) - 1, over, inside))
        return np.clip(found, start, end)


def make_bins() -> Bins:
    """Return the bins of residuals of a new model."""
    return Bins(np.round(np.arange(-EDGE, EDGE + STEP / 2, STEP), 6).tolist())
