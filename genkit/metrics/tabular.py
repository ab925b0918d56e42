"""How well synthetic rows match real ones: columns, pairs, what a classifier learns, copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from genkit.data.columns import CATEGORY, Column

Array = NDArray[np.float64]
PARTS = 5  # of a number, by quantiles, in pairs
MOST_PAIRS = 300


def column_distances(columns: Sequence[Column], real: Array, other: Array) -> Array:
    """Return the distance of each column's distributions, 0 to 1, (columns,).

    Of categories, and of gaps, it is the total variation; of numbers that of Kolmogorov and
    Smirnov: the largest difference of the distribution functions.
    """
    found = []
    for j, column in enumerate(columns):
        gaps = abs(np.isnan(real[:, j]).mean() - np.isnan(other[:, j]).mean())
        if column.kind == CATEGORY:
            size = len(column.categories) + 1
            shares = [_shares(_index(part[:, j], size), size) for part in (real, other)]
            found.append(0.5 * np.abs(shares[0] - shares[1]).sum())
            continue
        known = [np.sort(part[~np.isnan(part[:, j]), j]) for part in (real, other)]
        found.append(max(gaps, _kolmogorov_smirnov(*known)))
    return np.array(found)


def _kolmogorov_smirnov(first: Array, second: Array) -> float:
    if not len(first) or not len(second):
        return float(len(first) != len(second))
    every = np.concatenate([first, second])
    levels = [np.searchsorted(part, every, "right") / len(part) for part in (first, second)]
    return float(np.abs(levels[0] - levels[1]).max())


def pair_distances(columns: Sequence[Column], real: Array, other: Array) -> Array:
    """Return the total variation of each pair of columns, (pairs,); numbers in five parts.

    The parts are those of the real rows, by quantiles. Of many pairs, every n-th is taken.
    """
    indices, sizes = [], []
    for j, column in enumerate(columns):
        edges = _edges(real[:, j], column)
        sizes.append(len(edges) + 2 if column.kind != CATEGORY else len(column.categories) + 1)
        indices.append([_cut(part[:, j], column, edges, sizes[-1]) for part in (real, other)])
    pairs = [(i, j) for i in range(len(columns)) for j in range(i)]
    pairs = pairs[:: -(-len(pairs) // MOST_PAIRS)] if pairs else []
    found = []
    for i, j in pairs:
        size = sizes[i] * sizes[j]
        shares = [_shares(indices[i][k] * sizes[j] + indices[j][k], size) for k in range(2)]
        found.append(0.5 * np.abs(shares[0] - shares[1]).sum())
    return np.array(found)


def correlation_error(columns: Sequence[Column], real: Array, other: Array) -> float:
    """Return by how much rank correlations of numbers differ, on average; 0 for fewer than two."""
    numbers = [j for j, column in enumerate(columns) if column.kind != CATEGORY]
    if len(numbers) < 2:
        return 0.0
    first, second = (_rank_correlations(part[:, numbers]) for part in (real, other))
    return float(np.abs(first - second)[np.triu_indices(len(numbers), 1)].mean())


def _rank_correlations(values: Array) -> Array:
    """Return Spearman's correlations; gaps have the middle rank."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0, nan_policy="omit")
    off = np.nan_to_num(ranks - np.nanmean(ranks, 0))
    lengths = np.sqrt((off**2).sum(0))
    return (off.T @ off) / np.maximum(np.outer(lengths, lengths), 1e-12)


def _edges(values: Array, column: Column) -> Array:
    if column.kind == CATEGORY or np.isnan(values).all():
        return np.empty(0)
    return np.unique(np.nanquantile(values, np.arange(1, PARTS) / PARTS))


def _cut(values: Array, column: Column, edges: Array, size: int) -> NDArray[np.int64]:
    if column.kind == CATEGORY:
        return _index(values, size)
    return np.where(np.isnan(values), size - 1, np.searchsorted(edges, values, "right"))


def _index(values: Array, size: int) -> NDArray[np.int64]:
    """Return categories as numbers; a gap is the last one."""
    return np.where(np.isnan(values), size - 1, np.nan_to_num(values)).astype(int)


def _shares(index: NDArray[np.int64], size: int) -> Array:
    return np.bincount(index, minlength=size) / max(1, len(index))


# ---------------------------------------------------------------------------------------------
# What a classifier learns


def one_hot(columns: Sequence[Column], values: Array) -> Array:
    """Return rows as numbers: a category as one of each value, a gap as a mean, and as a mark."""
    parts = []
    for j, column in enumerate(columns):
        own = values[:, j]
        if column.kind == CATEGORY:
            parts.append(own[:, None] == np.arange(len(column.categories)))
        else:
            middle = (column.least + column.most) / 2
            parts += [np.where(np.isnan(own), middle, own)[:, None], np.isnan(own)[:, None]]
    return np.concatenate(parts, 1).astype(float) if parts else np.zeros((len(values), 0))


def taught_accuracy(
    columns: Sequence[Column], target: int, train: Array, test: Array, seed: int = 0
) -> float:
    """Return how often a random forest that is trained on some rows is right on others.

    Args:
        target: index of the column of categories that it predicts from all others.
        seed: of the forest.
    """
    from sklearn.ensemble import RandomForestClassifier

    others = [column for j, column in enumerate(columns) if j != target]
    parts = []
    for values in (train, test):
        known = values[~np.isnan(values[:, target])]
        parts.append((one_hot(others, np.delete(known, target, 1)), known[:, target].astype(int)))
    (inputs, answers), (unseen, truth) = parts
    if not len(answers) or not len(truth):
        return 0.0
    forest = RandomForestClassifier(200, min_samples_leaf=2, random_state=seed)
    return float((forest.fit(inputs, answers).predict(unseen) == truth).mean())


# ---------------------------------------------------------------------------------------------
# Copies


def nearest_distances(columns: Sequence[Column], train: Array, rows: Array) -> Array:
    """Return the distance of each row to the nearest training row, (n,).

    It is the mean over columns (Gower 1971): of categories 0 or 1, of numbers the difference over
    the range of training.
    """
    nearest = np.full(len(rows), np.inf)
    for start in range(0, len(rows), 256):
        some = rows[start : start + 256]
        total = np.zeros((len(some), len(train)))
        for j, column in enumerate(columns):
            first, second = some[:, j, None], train[None, :, j]
            if column.kind == CATEGORY:
                apart = (first != second).astype(float)
            else:
                width = max(column.most - column.least, 1e-12)
                apart = np.minimum(np.abs(first - second) / width, 1.0)
            both = np.isnan(first) & np.isnan(second)
            one = np.isnan(first) ^ np.isnan(second)
            total += np.where(both, 0.0, np.where(one, 1.0, apart))
        nearest[start : start + 256] = total.min(1) / len(columns)
    return nearest
