"""How an autoencoder of tables is trained: scores by rank, swap noise, and the loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import ndtri

Array = NDArray[np.float64]
KNOTS = 256  # values of a number that are kept with their scores, at most


def rank_gauss(values: Array) -> tuple[list[float], list[float]]:
    """Return values of a number, rising, and their normal scores by rank, of deviation 1.

    Equal values have the score of their middle rank; between values, scores are interpolated.

    Args:
        values: (n,), NaN for gaps.

    Source: Jahrer 2018, the winner of Kaggle's Porto Seguro.
    """
    found, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    scores = ndtri((counts.cumsum() - counts / 2) / counts.sum())
    scores = scores - np.average(scores, weights=counts)
    deviation = np.sqrt(np.average(scores**2, weights=counts))
    kept = np.unique(np.linspace(0, len(found) - 1, KNOTS).round().astype(int))
    return found[kept].tolist(), (scores[kept] / (deviation or 1.0)).tolist()


def corrupt(
    rows: torch.Tensor, donors: torch.Tensor, u: torch.Tensor, swap: float, blank: float
) -> torch.Tensor:
    """Replace some cells by those of other rows (swap noise), and leave some out.

    Args:
        rows: scores, (n, columns), NaN for gaps.
        donors: of each cell, the same column of another row, (n, columns).
        u: uniform random numbers, (n, columns).
        swap: part of the cells that are replaced.
        blank: part of the cells that are left out.
    """
    noisy = torch.where(u < swap, donors, rows)
    return torch.where((u >= swap) & (u < swap + blank), torch.nan, noisy)


def cell_losses(
    predictions: torch.Tensor, rows: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """Return half the squared error of numbers and the cross-entropy of categories, (n, columns).

    Args:
        predictions: of the network, (n, predictions).
        rows: the scores that were to be predicted, (n, columns); gaps have no loss.
        sizes: number of categories of each column; 0 for numbers.
    """
    known = ~rows.isnan()
    targets = rows.nan_to_num(0.0)
    parts = predictions.float().split([size or 1 for size in sizes], 1)
    losses = [
        F.cross_entropy(part, target.long(), reduction="none")
        if size
        else 0.5 * (part[:, 0] - target) ** 2
        for part, target, size in zip(parts, targets.T, sizes, strict=True)
    ]
    return torch.stack(losses, 1) * known


def loss(
    model: torch.nn.Module, noisy: torch.Tensor, rows: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """Return the mean loss of all cells, of which noise may have changed some."""
    return cell_losses(model(noisy)[0], rows, sizes).mean()
