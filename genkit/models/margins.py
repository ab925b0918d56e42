"""The margin of a number: a rising map of its values to normal scores, through a few quantiles.

Between two quantiles the map is a line, and so it goes on beyond the outermost ones. They are those
of the data, of a kernel density estimate, or of a power of the data.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import boxcox, yeojohnson

from genkit.models.gaussian import LOG_2PI

Array = NDArray[np.float64]
WAYS = ("power", "quantiles 9", "quantiles 33", "kernels")  # see `fit_margin`
MOST = 2000  # values of which powers and densities are estimated
FAR = 10  # deviations
GRID, DRAWN = 400, 65  # points of a density estimate; points that are kept of a map


@dataclass(frozen=True)
class Margin:
    """Quantiles of a number.

    Args:
        values: rising, two or more.
        scores: the normal score of each, rising.
    """

    values: Sequence[float]
    scores: Sequence[float]

    def __post_init__(self) -> None:
        same = len(self.values) == len(self.scores) >= 2
        if not same or not (np.diff(self.values) > 0).all() or not (np.diff(self.scores) > 0).all():
            raise ValueError(f"a margin needs rising values and scores, got {self!r:.200}")

    def to_scores(self, values: Array) -> Array:
        """Return the normal scores of values, of any shape."""
        return _follow(values, np.asarray(self.values), np.asarray(self.scores))

    def to_values(self, scores: Array) -> Array:
        """Undo `to_scores`."""
        return _follow(scores, np.asarray(self.scores), np.asarray(self.values))

    def log_slope(self, values: Array) -> Array:
        """Return the logarithm of the derivative of the scores by the values."""
        values = np.asarray(values)
        knots = np.asarray(self.values)
        which = np.clip(np.searchsorted(knots, values, "right") - 1, 0, len(knots) - 2)
        return np.log(np.diff(self.scores) / np.diff(knots))[which]

    def log_density(self, values: Array) -> Array:
        """Return the log density of values whose scores are standard normal."""
        return -0.5 * (self.to_scores(values) ** 2 + LOG_2PI) + self.log_slope(values)


def _follow(given: Array, start: Array, end: Array) -> Array:
    """Interpolate linearly, and extrapolate by the outermost lines."""
    given = np.asarray(given)
    which = np.clip(np.searchsorted(start, given, "right") - 1, 0, len(start) - 2)
    slope = np.diff(end) / np.diff(start)
    return end[which] + (given - start[which]) * slope[which]


def fit_margin(values: Array, way: str) -> Margin:
    """Fit a margin in one of `WAYS`.

    Args:
        values: (n,), without gaps.
    """
    if len(np.unique(values)) < 2:  # nothing varies: a narrow bell around it
        value = float(values[0]) if len(values) else 0.0
        width = max(abs(value), 1.0) * 1e-3
        return Margin([value - width, value + width], [-1.0, 1.0])
    kind, _, size = way.partition(" ")
    if kind == "quantiles":
        return _through_quantiles(values, int(size))
    some = values if len(values) <= MOST else values[:: -(-len(values) // MOST)]
    return _by_power(some) if kind == "power" else _through_kernels(some)


def _by_power(values: Array) -> Margin:
    """Draw the map through the power of the values that is most like a Gaussian.

    Source: Yeo and Johnson 2000, Box and Cox 1964 for what is above 0.
    """
    deviation, least = values.std(), values.min()
    low, high = least - deviation, values.max() + deviation
    if 0 < least < FAR * deviation:  # powers of what is far from 0 are lines, and round badly
        power, middle, low = boxcox, 0.0, max(low, least / 4)
    else:
        power, middle = yeojohnson, values.mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of powers that are tried
        raised, exponent = power((values - middle) / deviation)
    grid = np.linspace(low, high, DRAWN)
    if raised.std() < 1e-9:
        return _straight(values)
    scores = (power((grid - middle) / deviation, exponent) - raised.mean()) / raised.std()
    return _rising(grid, scores)


def _through_quantiles(values: Array, count: int) -> Margin:
    """Draw the map through so many quantiles; where they coincide, there are fewer."""
    edge = 0.5 / len(values) ** 0.5  # the map goes on straight beyond
    levels = np.linspace(edge, 1 - edge, count)
    found, which = np.unique(np.quantile(values, levels), return_inverse=True)
    scores = np.bincount(which, ndtri(levels)) / np.bincount(which)
    return _rising(found, scores) if len(found) > 1 else _straight(values)


def _through_kernels(values: Array) -> Margin:
    """Draw the map through quantiles of a kernel density estimate, as wide as Scott's rule says."""
    width = values.std() * len(values) ** -0.2
    grid = np.linspace(values.min() - 3 * width, values.max() + 3 * width, GRID)
    levels = ndtr((grid[:, None] - values) / width).mean(1)
    inside = (levels > 1e-4) & (levels < 1 - 1e-4)
    scores, grid = ndtri(levels[inside]), grid[inside]
    wanted = np.linspace(scores[0], scores[-1], DRAWN)
    return _rising(np.interp(wanted, scores, grid), wanted)


def _rising(values: Array, scores: Array) -> Margin:
    """Leave out what does not rise."""
    kept = [0]
    for i in range(1, len(values)):
        room = 1e-9 * max(1.0, abs(values[i]))
        if values[i] > values[kept[-1]] + room and scores[i] > scores[kept[-1]] + 1e-9:
            kept.append(i)
    return Margin(values[kept].tolist(), scores[kept].tolist()) if kept[1:] else _straight(values)


def _straight(values: Array) -> Margin:
    mean, deviation = values.mean(), values.std()
    return Margin([mean - deviation, mean + deviation], [-1.0, 1.0])
