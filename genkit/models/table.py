"""Tables as sequences of tokens: a stock decoder that corrects a Gaussian, column by column.

A row is a sequence (column, value, column, value, …) in any order of its columns. At a column's
token the decoder says how likely each value is, given those before it. A number's values are bins
of its residual: by how many deviations it differs from what a Gaussian of the scores expects, given
the columns before it. A category's values are themselves, weighted by the same Gaussian. A decoder
that says nothing leaves the Gaussian copula; what it learns is what that misses.

The density of a number is exact: the probability of the bin, times the density inside it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from genkit.models.gaussian import Gaussian
from genkit.models.margins import Margin
from genkit.models.residual_bins import Bins

Array = NDArray[np.float64]
SCORE_EDGE, SCORE_BINS = 2.25, 16  # of the numbers that are read
MOSTLY = 0.5  # share of atoms from which the Gaussian knows whether a number is one
LEVELS = 16  # categories of a column that the Gaussian knows, at most
DOUBT = 1e-6  # that the Gaussian's evidence on categories and atoms does not count
IGNORED = -100  # what cross_entropy leaves out

# ---------------------------------------------------------------------------------------------
# Rows as tokens


@dataclass(frozen=True)
class Batch:
    """Rows as tokens, each in its order of columns, and what a Gaussian makes of them."""

    ids: torch.Tensor  # (n, 2 columns - 1), int64: column, value, column, …
    orders: torch.Tensor  # (n, columns), int64
    targets: torch.Tensor  # (n, columns), int64: which candidate; IGNORED where there is none
    gaps: torch.Tensor  # (n, columns), float32: 1 for a gap, 0 for a value, NaN where none can be
    base: torch.Tensor  # (n, columns, candidates), float32: log probabilities of the Gaussian
    inside: torch.Tensor  # (n, columns), float64: log density of numbers inside their bins

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, but for what needs float64, which some devices lack."""
        parts = {name: own.to(device) for name, own in vars(self).items() if name != "inside"}
        return Batch(**parts, inside=self.inside)


@dataclass(frozen=True)
class Answers:
    """The tokens that a model may answer for each column."""

    values: torch.Tensor  # (columns, candidates), int64: the gap's where there is no candidate
    gaps: torch.Tensor  # (columns,), int64
    gap_odds: torch.Tensor  # (columns,), float32: log odds of a gap

    def to(self, device: torch.device) -> Answers:
        """Return them on a device."""
        return Answers(*(own.to(device) for own in vars(self).values()))


@dataclass(frozen=True)
class TableFormat:
    """The columns of a table as tokens.

    Args:
        sizes: number of categories of each column; 0 for numbers and dates.
        gaps: share of gaps of each column; 0: it has none, and never will.
        margins: of each number; None for a category.
        shares: of each category of a column, smoothed, or of each atom of a number.
        atoms: values of a number that many rows have exactly, rising; () for a category.
        steps: the least difference of a number's values, as they are written.
        gaussian: of the features of all columns, see `features`.
        bins: of residuals.
        orders: those that a row is drawn and scored in, (orders, columns).
    """

    sizes: Sequence[int]
    gaps: Sequence[float]
    margins: Sequence[Margin | None]
    shares: Sequence[Sequence[float]]
    atoms: Sequence[Sequence[float]]
    steps: Sequence[float]
    gaussian: Gaussian
    bins: Bins
    orders: NDArray[np.int64]
    owners: NDArray[np.int64] = field(init=False, repr=False)  # column of each feature

    def __post_init__(self) -> None:
        object.__setattr__(self, "owners", feature_owners(self.sizes, self.shares))

    @property
    def count(self) -> int:
        """Number of columns."""
        return len(self.sizes)

    @functools.cached_property
    def width(self) -> int:
        """The most candidates of a column."""
        bins = len(self.bins)
        each = zip(self.sizes, self.atoms, strict=True)
        return max(size or bins + len(atoms) for size, atoms in each)

    @functools.cached_property
    def value_tokens(self) -> NDArray[np.int64]:
        """The token of a gap in each column; the tokens of its values follow."""
        each = zip(self.sizes, self.atoms, strict=True)
        sizes = [size or SCORE_BINS + len(atoms) for size, atoms in each]
        starts = np.concatenate([[0], np.cumsum(np.array(sizes) + 1)])
        return self.count + len(self.bins) + starts

    @property
    def vocab_size(self) -> int:
        """Tokens of columns, of residual bins, and of each column's gap and values."""
        return int(self.value_tokens[-1])

    @functools.cached_property
    def answers(self) -> Answers:
        """What a model may answer for each column."""
        found = np.tile(self.value_tokens[:-1, None], self.width)
        for j, (margin, size) in enumerate(self._each()):
            if margin:  # bins of residuals, then atoms
                bins, atoms = len(self.bins), len(self.atoms[j])
                first = self.value_tokens[j] + 1 + SCORE_BINS
                found[j, :bins] = self.count + np.arange(bins)
                found[j, bins : bins + atoms] = first + np.arange(atoms)
            else:
                found[j, :size] = self.value_tokens[j] + 1 + np.arange(size)
        share = torch.tensor(self.gaps).clamp(1e-6, 1 - 1e-6)
        gaps = torch.from_numpy(self.value_tokens[:-1])
        return Answers(torch.from_numpy(found), gaps, share.logit())

    @functools.cached_property
    def static_base(self) -> Array:
        """Log probabilities of the candidates of each column alone, (columns, width)."""
        base = np.full((self.count, self.width), -np.inf)
        for j, (margin, _) in enumerate(self._each()):
            own = np.log(self.shares[j])
            if margin:
                rest = max(1e-6, 1 - sum(self.shares[j]))
                own = np.concatenate([self.bins.log_mass + math.log(rest), own])
            base[j, : len(own)] = own
        return base

    def _each(self) -> list[tuple[Margin | None, int]]:
        return list(zip(self.margins, self.sizes, strict=True))

    # ---- features of the Gaussian

    def features(self, values: Array) -> Array:
        """Return scores of numbers, and of all categories but the first 1 or 0.

        A number that is mostly atoms has two: 1 where it is none and 0 where it is, and its score.

        Args:
            values: see `genkit/data/columns.py`, (n, columns).

        Returns:
            (n, features), NaN for gaps.
        """
        return np.concatenate(
            [self.column_features(j, values[:, j]) for j in range(self.count)], axis=1
        )

    def column_features(self, j: int, own: Array) -> Array:
        """Return the features of a column, (n, features of it), of its values, (n,)."""
        margin = self.margins[j]
        if margin is None:
            count = int((self.owners == j).sum())
            is_one = own[:, None] == np.arange(1, count + 1)
            return np.where(np.isnan(own[:, None]), np.nan, is_one)
        scores = margin.to_scores(own)
        if not is_mostly_atoms(self.shares[j], self.sizes[j]):
            return scores[:, None]
        free = self.find_atoms(j, own) < 0
        is_free = np.where(np.isnan(own), np.nan, free)
        return np.stack([is_free, np.where(free, scores, np.nan)], 1)

    def value_ids(self, values: Array) -> NDArray[np.int64]:
        """Return the token of each value as it is read, (n, columns)."""
        return np.stack([self.column_ids(j, values[:, j]) for j in range(self.count)], axis=1)

    def column_ids(self, j: int, own: Array) -> NDArray[np.int64]:
        """Return the token of each value of a column, (n,)."""
        index = np.nan_to_num(own).astype(np.int64)
        if margin := self.margins[j]:
            borders = np.linspace(-SCORE_EDGE, SCORE_EDGE, SCORE_BINS - 1)
            atom = self.find_atoms(j, own)
            index = np.searchsorted(borders, margin.to_scores(own))
            index = np.where(atom < 0, index, SCORE_BINS + atom)
        return self.value_tokens[j] + np.where(np.isnan(own), 0, index + 1)

    def find_atoms(self, j: int, values: Array) -> NDArray[np.int64]:
        """Return which atom of a number each value is; -1 for none."""
        atoms = np.asarray(self.atoms[j])
        if not len(atoms):
            return np.full(len(values), -1)
        which = np.abs(values[:, None] - atoms).argmin(1)
        near = np.abs(values - atoms[which]) < self.steps[j] / 2
        return np.where(near, which, -1)

    def ordered(self, values: Array, orders: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put gaps where none were in training at the end of each order, where none sees them."""
        unknown = np.isnan(values) & (np.asarray(self.gaps) == 0)
        last = np.take_along_axis(unknown, orders, 1)
        return np.take_along_axis(orders, np.argsort(last, 1, kind="stable"), 1)

    # ---- batches

    def encode(self, values: Array, orders: NDArray[np.int64]) -> Batch:
        """Turn rows into tokens, with what the Gaussian says of each value given those before it.

        Args:
            values: (n, columns), NaN for gaps.
            orders: of the columns, (n, columns).
        """
        orders = self.ordered(values, orders)
        ids = np.empty((len(values), 2 * self.count), np.int64)
        ids[:, ::2] = orders
        ids[:, 1::2] = np.take_along_axis(self.value_ids(values), orders, 1)
        targets, base, inside = self._explain(values, orders)
        may_lack = np.asarray(self.gaps)[orders] > 0
        gaps = np.where(may_lack, np.take_along_axis(np.isnan(values), orders, 1), np.nan)
        return Batch(
            torch.from_numpy(ids[:, :-1]),
            torch.from_numpy(orders),
            torch.from_numpy(np.take_along_axis(targets, orders, 1)),
            torch.from_numpy(gaps).float(),
            torch.from_numpy(np.take_along_axis(base, orders[:, :, None], 1)).float(),
            torch.from_numpy(np.take_along_axis(inside, orders, 1)),
        )

    def _explain(
        self, values: Array, orders: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Array, Array]:
        """Return targets, log probabilities of the Gaussian, and densities inside bins."""
        targets = np.full(values.shape, IGNORED)
        inside = np.zeros(values.shape)
        base = np.tile(self.static_base, (len(values), 1, 1))
        steps = _Steps.of(self.gaussian, self.features(values), self.owners, orders)
        for j, margin in enumerate(self.margins):
            rows = np.flatnonzero(~np.isnan(values[:, j]))
            if not len(rows):
                continue
            known = values[rows, j]
            if margin is None:
                targets[rows, j] = known
                if (self.owners == j).any():
                    base[rows, j, : self.sizes[j]] = self.classify(j, *steps.expected(j, rows))
                continue
            residuals, log_scale = steps.residuals(j, rows)
            atom = self.find_atoms(j, known)
            targets[rows, j] = np.where(atom < 0, self.bins.find(residuals), len(self.bins) + atom)
            density = self.bins.log_density(residuals) - log_scale + margin.log_slope(known)
            inside[rows, j] = np.where(atom < 0, density, -math.log(self.steps[j]))
            if is_mostly_atoms(self.shares[j], self.sizes[j]):
                means, factors = steps.expected(j, rows, 1)
                mean, log_scale = means[:, 0].numpy(), factors[:, 0, 0].log().numpy()
            else:
                mean = margin.to_scores(known) - residuals * np.exp(log_scale)
            base[rows, j] = self.weigh_atoms(j, mean, log_scale)
        return targets, base, inside

    def weigh_atoms(self, j: int, means: Array, log_scales: Array) -> Array:
        """Return log probabilities of a number's bins and atoms.

        An atom counts as much more than its share as its score is likelier than it was, given what
        is before it; where atoms are most, so do all atoms and all bins, by the number's first
        feature.

        Args:
            means, log_scales: of that score or feature, given others, (n,) each.

        Returns:
            (n, candidates).
        """
        base = np.tile(self.static_base[j], (len(means), 1))
        margin, atoms = self.margins[j], self.atoms[j]
        if margin is None or not atoms:
            return base
        feature, bins = int(np.flatnonzero(self.owners == j)[0]), len(self.bins)
        mostly = is_mostly_atoms(self.shares[j], self.sizes[j])
        scores = np.array([0.0, 1.0]) if mostly else margin.to_scores(np.asarray(atoms))
        center = float(self.gaussian.mean[feature])
        spread = 0.5 * math.log(float(self.gaussian.covariance[feature, feature]))
        now = -0.5 * ((scores - means[:, None]) / np.exp(log_scales)[:, None]) ** 2
        alone = -0.5 * ((scores - center) / math.exp(spread)) ** 2
        evidence = now - alone - log_scales[:, None] + spread
        base[:, bins : bins + len(atoms)] += evidence[:, :1] if mostly else evidence
        base[:, :bins] += evidence[:, 1:] if mostly else 0
        base -= np.logaddexp.reduce(base, 1, keepdims=True)
        return _doubt(base, self.static_base[j])

    def classify(self, j: int, means: torch.Tensor, factors: torch.Tensor) -> Array:
        """Return log probabilities of a column's categories, by Bayes' rule.

        It is linear discriminant analysis: the features given are Gaussian around a mean of each
        category, alike but for that.

        Args:
            j: the column.
            means: of its features, given others, (n, features of the column).
            factors: Cholesky factors of their covariance, given the same, (n, …, …).
        """
        own = torch.from_numpy(np.flatnonzero(self.owners == j))
        corners = torch.eye(self.sizes[j], dtype=torch.float64)[:, 1:]  # (categories, features)
        alone = torch.linalg.cholesky(self.gaussian.covariance[own][:, own])
        prior = torch.linalg.solve_triangular(
            alone, (corners - self.gaussian.mean[own]).mT, upper=False
        )
        found = torch.linalg.solve_triangular(
            factors, (corners - means[:, None]).mT, upper=False
        )  # (n, features, categories)
        evidence = 0.5 * (prior**2).sum(0) - 0.5 * (found**2).sum(1)
        logits = torch.log(torch.tensor(self.shares[j], dtype=torch.float64)) + evidence
        return _doubt(logits.log_softmax(-1).numpy(), np.log(self.shares[j]))


def _doubt(logs: Array, alone: Array) -> Array:
    """Mix log probabilities with those of a column alone: what never was is not impossible."""
    return np.logaddexp(logs + math.log1p(-DOUBT), alone + math.log(DOUBT))


def feature_owners(sizes: Sequence[int], shares: Sequence[Sequence[float]]) -> NDArray[np.int64]:
    """Return the column of each feature, see `TableFormat.features`."""
    counts = [
        1 + is_mostly_atoms(share, size) if not size else size - 1 if size <= LEVELS else 0
        for size, share in zip(sizes, shares, strict=True)
    ]
    return np.repeat(np.arange(len(sizes)), counts)


def is_mostly_atoms(shares: Sequence[float], size: int) -> bool:
    """Whether most rows have an atom of a number; `size`: its categories, 0 for a number."""
    return not size and sum(shares) > MOSTLY


@dataclass(frozen=True)
class _Steps:
    """What the Gaussian says of each feature of rows, given those before it in their orders."""

    factors: torch.Tensor  # Cholesky factors in the order of each row, (n, d, d)
    innovations: torch.Tensor  # (n, d), in that order
    places: torch.Tensor  # of each feature in that order, (n, d)
    owners: NDArray[np.int64]
    mean: torch.Tensor

    @classmethod
    def of(
        cls,
        gaussian: Gaussian,
        features: Array,
        owners: NDArray[np.int64],
        orders: NDArray[np.int64],
    ) -> _Steps:
        """Factor the covariance in the order of each row, what a row lacks at the end."""
        ranks = np.argsort(orders, 1)[:, owners]
        ranks = np.where(np.isnan(features), orders.shape[1], ranks)
        order = torch.from_numpy(np.argsort(ranks, 1, kind="stable"))
        off = torch.from_numpy(features) - gaussian.mean
        factors = gaussian.factors(order)
        innovations = gaussian.innovations(factors, off.nan_to_num(0.0).gather(1, order))
        return cls(factors, innovations, order.argsort(1), owners, gaussian.mean)

    def residuals(self, j: int, rows: NDArray[np.int64]) -> tuple[Array, Array]:
        """Return the residuals of a number, and the logarithm of their scale, (rows,) each."""
        place = self.places[rows][:, self.owners == j][:, -1]  # of its score
        every = torch.arange(len(rows))
        scale = self.factors[torch.from_numpy(rows), place, place]
        return self.innovations[rows][every, place].numpy(), scale.log().numpy()

    def expected(
        self, j: int, rows: NDArray[np.int64], most: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of a column's first features and the factor of their covariance.

        Args:
            most: how many features; default: all.
        """
        own = np.flatnonzero(self.owners == j)[:most]
        places = self.places[rows][:, own]  # consecutive
        count, size = places.shape
        lines = self.factors[rows].gather(
            1, places[:, :, None].expand(count, size, self.factors.shape[2])
        )
        before = torch.arange(self.factors.shape[2]) < places[:, :1]
        shift = (lines * (self.innovations[rows] * before)[:, None]).sum(-1)
        corner = lines.gather(2, places[:, None, :].expand(count, size, size))
        return self.mean[own] + shift, corner


# ---------------------------------------------------------------------------------------------
# Model


def make_model(
    table: TableFormat, depth: int, width: int, heads: int, dropout: float
) -> PreTrainedModel:
    """Build a stock GPT-2 that starts as the Gaussian: its output layer is 0.

    Values of a number that are near each other start with similar embeddings.

    Args:
        table: the columns as tokens.
        depth: layers.
        width: size of a layer's vectors.
        heads: attention heads.
        dropout: of embeddings, attention weights and residual branches.
    """
    config = GPT2Config(
        vocab_size=table.vocab_size,
        n_positions=2 * table.count,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.table = "table.json"
    model = GPT2LMHeadModel(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    _smooth_embeddings(table, model.transformer.wte.weight)
    return model


@torch.no_grad()
def _smooth_embeddings(table: TableFormat, weight: torch.Tensor) -> None:
    """Make the embeddings of a number's values a smooth curve."""
    scores = torch.linspace(-SCORE_EDGE, SCORE_EDGE, SCORE_BINS)
    basis = torch.stack([torch.ones_like(scores), scores, scores**2 - 1, (2 * scores).sin()], 1)
    for j, margin in enumerate(table.margins):
        if margin:
            first = int(table.value_tokens[j]) + 1
            curve = basis @ (0.02 * torch.randn(basis.shape[1], weight.shape[1]))
            weight[first : first + SCORE_BINS] = curve


def log_probabilities(model: torch.nn.Module, batch: Batch, answers: Answers) -> torch.Tensor:
    """Return the log probability of each value in a batch, of a number that of its bin.

    Returns:
        (n, columns), in the order of each row; 0 where there is nothing to say.
    """
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, ::2].float()
    scores, lacking = score_answers(logits, batch.orders, batch.base, answers)
    nats = F.cross_entropy(
        scores.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(batch.targets)
    gap_nats = F.binary_cross_entropy_with_logits(
        lacking, batch.gaps.nan_to_num(0), reduction="none"
    )
    return -nats - gap_nats * ~batch.gaps.isnan()


def score_answers(
    logits: torch.Tensor, columns: torch.Tensor, base: torch.Tensor, answers: Answers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of each column's candidates, and the log odds of a gap.

    Args:
        logits: at the columns' tokens, (n, columns, vocabulary).
        columns: which are asked, (n, columns).
        base: log probabilities of the Gaussian, (n, columns, candidates).
    """
    scores = logits.gather(2, answers.values[columns]) + base
    lacking = logits.gather(2, answers.gaps[columns][:, :, None])[:, :, 0]
    return scores, lacking + answers.gap_odds[columns]


def loss(model: torch.nn.Module, batch: Batch, answers: Answers) -> torch.Tensor:
    """Return the cross-entropy of the values of rows in nats, the mean over rows and columns."""
    return -log_probabilities(model, batch, answers).mean()
