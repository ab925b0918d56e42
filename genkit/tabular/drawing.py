"""Draw what rows lack, column by column; a row depends on its own seed and values alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from genkit.data.order import blocks
from genkit.engine.decoder import cache_argument
from genkit.models.table import score_answers
from genkit.tabular.model import TableModel
from genkit.text.logits import NEAR_PROBABILITY, Filters, choose

Array = NDArray[np.float64]
BATCH = 2048  # rows drawn at once
Seed = int | tuple[int, ...]
POINTS = 32  # of the distribution of a value


@dataclass(frozen=True)
class Drawn:
    """Rows without gaps, and what their values were drawn from."""

    values: Array  # (n, columns)
    points: Array  # levels of the distribution of what was drawn, (n, columns, points), or NaN


def draw(
    model: TableModel,
    values: Array,
    seeds: Sequence[Seed],
    *,
    gaps: bool = False,
    points: bool = False,
    only: Sequence[int] = (),
) -> Drawn:
    """Draw what rows lack, given what they have.

    A row is drawn in one of the model's orders, after what it has; its seed says in which.

    Args:
        values: (n, columns), NaN for what is to be drawn.
        seeds: one a row.
        gaps: gaps may be drawn, too.
        points: return points of the distributions, evenly by probability.
        only: draw these columns alone; default: all.
    """
    parts = [
        _Drawing(model, values[some], [seeds[i] for i in some], gaps, points, only).run()
        for some in blocks(len(values), BATCH)
    ]
    return Drawn(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.points for part in parts]),
    )


class _Drawing:
    """Rows that are drawn together, a column of each at a time."""

    def __init__(
        self,
        model: TableModel,
        values: Array,
        seeds: Sequence[Seed],
        gaps: bool,
        points: bool,
        only: Sequence[int],
    ) -> None:
        self.model, self.table, self.gaps = model, model.table, gaps
        self.values, self.asked = values.copy(), np.isnan(values)
        count, width = self.table.count, self.table.width
        noise = np.stack([_uniform(seed, 1 + count * (width + 2)) for seed in seeds])
        which = (noise[:, 0] * len(self.table.orders)).astype(int)
        # of each column: one number for a gap, one for the place in a bin, and of each candidate
        self.noise = noise[:, 1:].reshape(len(values), count, width + 2)
        orders = self.table.orders[which]
        later = np.full(self.table.count, 2 if only else 1)
        later[list(only)] = 1
        self.wanted = self.asked & (later == 1)
        last = np.take_along_axis(self.asked * later, orders, 1)
        self.orders = np.take_along_axis(orders, np.argsort(last, 1, kind="stable"), 1)
        self.features = torch.from_numpy(self.table.features(values))
        self.ids = np.zeros((len(values), 2 * count), np.int64)
        self.ids[:, ::2] = self.orders
        self.ids[:, 1::2] = np.take_along_axis(self.table.value_ids(values), self.orders, 1)
        size = POINTS if points else 0
        self.points = np.full((len(values), count, size), np.nan)
        self.answers = self.table.answers
        self.cache, self.read = DynamicCache(), 0

    def run(self) -> Drawn:
        """Draw column after column."""
        given = (~self.asked).sum(1)
        steps = range(int(given.min()), int((given + self.wanted.sum(1)).max()))
        for step in steps:
            columns = self.orders[:, step]
            rows = np.flatnonzero(self.wanted[np.arange(len(columns)), columns])
            logits = self._read(step)
            if len(rows):
                self._draw_step(step, rows, columns[rows], logits[rows])
        return Drawn(self.values, self.points)

    @torch.inference_mode()
    def _read(self, step: int) -> torch.Tensor:
        """Return the logits at the token of a column, (n, vocabulary)."""
        network = self.model.model
        new = torch.from_numpy(self.ids[:, self.read : 2 * step + 1]).to(network.device)
        self.read = 2 * step + 1
        kept = {cache_argument(network): self.cache, "use_cache": True}
        return network(input_ids=new, logits_to_keep=1, **kept).logits[:, -1].float().cpu()

    @torch.inference_mode()
    def _read_alone(self, row: int, step: int) -> torch.Tensor:
        network = self.model.model
        ids = torch.from_numpy(self.ids[row, None, : 2 * step + 1]).to(network.device)
        output = network(input_ids=ids, use_cache=False, logits_to_keep=1)
        return output.logits[:, -1].float().cpu()

    def _draw_step(
        self, step: int, rows: NDArray[np.int64], columns: NDArray[np.int64], logits: torch.Tensor
    ) -> None:
        """Draw one value of some rows."""
        base, means, scales = self._expect(rows, columns)
        chosen, lacking, unsure = self._choose(rows, columns, base, logits)
        for i in np.flatnonzero(unsure):  # rounding could decide: compute it alone
            logits[i] = self._read_alone(int(rows[i]), step)[0]
            one = slice(i, i + 1)
            own = self._choose(rows[one], columns[one], base[one], logits[one])
            chosen[one], lacking[one] = own[:2]
        u = self.noise[rows, columns, 1]
        for j in np.unique(columns):
            own = columns == j
            drawn = self._place(j, chosen[own], u[own], means[own], scales[own])
            self.values[rows[own], j] = np.where(lacking[own], np.nan, drawn)
            if self.points.size:
                scores, _ = self._score(columns[own], base[own], logits[own])
                self._keep_points(j, rows[own], scores, means[own], scales[own])
            features = np.flatnonzero(self.table.owners == j)
            new = self.values[rows[own], j]
            found = torch.from_numpy(self.table.column_features(j, new))
            self.features[np.ix_(rows[own], features)] = found
            self.ids[rows[own], 2 * step + 1] = self.table.column_ids(j, new)

    def _expect(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> tuple[torch.Tensor, Array, Array]:
        """Return what the Gaussian says: log probabilities, and means and scales of numbers."""
        base = self.table.static_base[columns]
        means, scales = np.zeros(len(rows)), np.ones(len(rows))
        for j in np.unique(columns):
            own, features = np.flatnonzero(columns == j), np.flatnonzero(self.table.owners == j)
            if not len(features):
                continue
            mean, covariance = self.table.gaussian.given(
                self.features[rows[own]], torch.from_numpy(features)
            )
            if self.table.sizes[j]:
                factors = torch.linalg.cholesky(covariance)
                base[own, : self.table.sizes[j]] = self.table.classify(j, mean, factors)
            else:
                first, spread = mean[:, 0], covariance[:, 0, 0].sqrt()
                base[own] = self.table.weigh_atoms(j, first.numpy(), spread.log().numpy())
                if len(features) > 1:  # the score, where the number is no atom
                    slope = covariance[:, 0, 1] / covariance[:, 0, 0]
                    first = mean[:, 1] + slope * (1 - first)
                    spread = (covariance[:, 1, 1] - slope * covariance[:, 0, 1]).sqrt()
                means[own], scales[own] = first.numpy(), spread.numpy()
                low, high = self._bounds(j, means[own], scales[own])
                within = self.table.bins.reach(low, high)
                base[own, : within.shape[1]] = np.where(
                    within, base[own, : within.shape[1]], -np.inf
                )
        return torch.from_numpy(base).float(), means, scales

    def _score(
        self, columns: NDArray[np.int64], base: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        which = torch.from_numpy(columns)[:, None]
        scores, lacking = score_answers(logits[:, None], which, base[:, None], self.answers)
        return scores[:, 0], lacking[:, 0]

    def _choose(
        self,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        base: torch.Tensor,
        logits: torch.Tensor,
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Draw candidates and gaps, and tell which of them rounding could change."""
        scores, odds = self._score(columns, base, logits)
        noise = self.noise[rows, columns]
        gumbel = torch.from_numpy(-np.log(-np.log(noise[:, 2:]))).float()
        chosen, sure = choose(scores, Filters(), gumbel)
        share = odds.sigmoid().double().numpy()
        may = np.asarray(self.table.gaps)[columns] > 0 if self.gaps else np.zeros(len(rows), bool)
        near = may & (np.abs(noise[:, 0] - share) < NEAR_PROBABILITY)
        return chosen.numpy().copy(), may & (noise[:, 0] < share), ~sure.numpy() | near

    def _bounds(self, j: int, means: Array, scales: Array) -> tuple[Array, Array]:
        """Return the residuals of the least and the most that training had of a number."""
        column, margin = self.model.columns[j], self.table.margins[j]
        assert margin is not None, "only numbers have residuals"
        low, high = margin.to_scores(np.array([column.least, column.most]))
        return (low - means) / scales, (high - means) / scales

    def _place(
        self, j: int, chosen: NDArray[np.int64], u: Array, means: Array, scales: Array
    ) -> Array:
        """Return the values of candidates."""
        margin, bins = self.table.margins[j], self.table.bins
        if margin is None:
            return chosen.astype(float)
        is_atom = chosen >= len(bins)
        residuals = bins.place(np.where(is_atom, 0, chosen), u, *self._bounds(j, means, scales))
        values = margin.to_values(means + scales * residuals)
        if is_atom.any():
            atoms = np.asarray(self.table.atoms[j])
            values[is_atom] = atoms[chosen[is_atom] - len(bins)]
        return self.model.columns[j].rounded(values)

    def _keep_points(
        self,
        j: int,
        rows: NDArray[np.int64],
        scores: torch.Tensor,
        means: Array,
        scales: Array,
    ) -> None:
        """Keep values at levels evenly from 0 to 1 of the distribution of each."""
        levels = (np.arange(POINTS) + 0.5) / POINTS
        upper = scores.double().softmax(-1).cumsum(-1).numpy()
        upper[:, -1] = 1.0 + 1e-9
        for i, level in enumerate(levels):
            chosen = (upper <= level).sum(1)
            top = np.take_along_axis(upper, chosen[:, None], 1)[:, 0]
            below = np.where(chosen > 0, np.take_along_axis(upper, chosen[:, None] - 1, 1)[:, 0], 0)
            u = np.clip((level - below) / np.maximum(top - below, 1e-12), 1e-6, 1 - 1e-6)
            self.points[rows, j, i] = self._place(j, chosen, u, means, scales)


def _uniform(seed: Seed, count: int) -> Array:
    """Return numbers in (0, 1) that depend on a seed alone."""
    found = np.random.default_rng(seed).random(count)
    return np.clip(found, 1e-12, 1 - 1e-12)
