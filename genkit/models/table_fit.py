"""Fit what a table model keeps of its training rows beside weights: margins and a Gaussian."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from genkit.models.gaussian import Gaussian, fit_gaussian
from genkit.models.margins import WAYS, Margin, fit_margin
from genkit.models.residual_bins import make_bins
from genkit.models.table import TableFormat, feature_owners

Array = NDArray[np.float64]
ORDERS = 8  # of the columns, in which rows are drawn and scored
FOLDS = 5
ATOM, LEAST_ROWS = 0.04, 8  # share of the rows, and rows, that make a value of a number an atom
PRIOR = 0.5  # rows that each category has beforehand


def fit_table(
    sizes: Sequence[int], steps: Sequence[float], values: Array, seed: int = 0
) -> TableFormat:
    """Fit margins, shares of categories and the Gaussian.

    Args:
        sizes: number of categories of each column; 0 for numbers and dates.
        steps: least difference of a column's numbers, as they are written.
        values: training rows, (n, columns), NaN for gaps.
        seed: of folds and orders.
    """
    numbers = [j for j, size in enumerate(sizes) if not size and not np.isnan(values[:, j]).all()]
    sizes = [size if j in numbers else max(1, size) for j, size in enumerate(sizes)]
    atoms = [[] if size else _atoms(values[:, j]) for j, size in enumerate(sizes)]
    way = _choose_way(values[:, numbers], seed) if numbers else WAYS[0]
    margins = [
        None if size else fit_margin(_between(values[:, j], atoms[j]), way)
        for j, size in enumerate(sizes)
    ]
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(len(sizes)) for _ in range(ORDERS)])
    is_number = np.array([size == 0 for size in sizes])[orders]
    orders = np.take_along_axis(orders, np.argsort(is_number, 1, kind="stable"), 1)
    gaps = np.isnan(values).mean(0).tolist()
    shares = [_shares(values[:, j], size, atoms[j]) for j, size in enumerate(sizes)]
    count = len(feature_owners(sizes, shares))
    empty = Gaussian(torch.zeros(count).double(), torch.eye(count).double())
    table = TableFormat(sizes, gaps, margins, shares, atoms, steps, empty, make_bins(), orders)
    return dataclasses.replace(table, gaussian=fit_gaussian(table.features(values), seed))


def _atoms(values: Array) -> list[float]:
    """Return the values that many rows have, rising."""
    found, counts = np.unique(_known(values), return_counts=True)
    return found[counts >= max(LEAST_ROWS, ATOM * counts.sum())].tolist()


def _between(values: Array, atoms: list[float]) -> Array:
    """Return the numbers that are no atoms, or all where too few are left."""
    rest = _known(values)[~np.isin(_known(values), atoms)]
    return rest if len(np.unique(rest)) > 2 * LEAST_ROWS else _known(values)


def _shares(values: Array, size: int, atoms: list[float]) -> list[float]:
    """Return the share of each category, smoothed, or of each atom."""
    known = _known(values)
    if not size:
        return [float((known == atom).mean()) for atom in atoms]
    counts = np.bincount(known.astype(int), minlength=size)[:size] + PRIOR
    return (counts / counts.sum()).tolist()


def _known(values: Array) -> Array:
    return values[~np.isnan(values)]


def _choose_way(values: Array, seed: int) -> str:
    """Return how margins are fitted: the way that gives other rows the highest density together."""
    fold = np.random.default_rng(seed).permutation(len(values)) % FOLDS
    density = dict.fromkeys(WAYS, 0.0)
    for own in range(FOLDS if len(values) >= 2 * FOLDS else 0):
        for way in WAYS:
            density[way] += _density(values[fold != own], values[fold == own], way, seed)
    return max(density, key=lambda way: density[way])


def _density(rest: Array, own: Array, way: str, seed: int) -> float:
    """Return the log density of rows under a Gaussian copula of other rows."""
    margins: list[Margin] = [fit_margin(_known(column), way) for column in rest.T]
    scores = [
        np.stack([margin.to_scores(column) for margin, column in zip(margins, part.T, strict=True)])
        for part in (rest, own)
    ]
    pairs = zip(margins, own.T, strict=True)
    slopes = [margin.log_slope(_known(column)).sum() for margin, column in pairs]
    gaussian = fit_gaussian(scores[0].T, seed)
    return gaussian.log_density(scores[1].T) + float(np.sum(slopes))
