import functools
import itertools

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from genkit.text.logits import (
    Filters,
    Penalties,
    _repeating,
    choose,
    gumbel_noise,
    penalized,
    probabilities,
)

FILTERS = [
    Filters(),
    Filters(temperature=0.3),
    Filters(temperature=2.0),
    Filters(top_k=1),
    Filters(top_k=4),
    Filters(top_k=100),
    Filters(top_p=0.01),
    Filters(top_p=0.5),
    Filters(top_p=0.95),
    Filters(min_p=0.05),
    Filters(min_p=0.4),
    Filters(typical_p=0.3),
    Filters(typical_p=0.9),
    Filters(temperature=1.3, top_k=6, top_p=0.8),
    Filters(temperature=0.7, top_k=9, top_p=0.95, min_p=0.02, typical_p=0.9),
]


def random_logits(rows: int, vocabulary: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def warped(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """The distribution that transformers' own processors leave."""
    scores = logits / filters.temperature
    for value, warper in (
        (filters.top_k, reference.TopKLogitsWarper),
        (filters.top_p, reference.TopPLogitsWarper),
        (filters.min_p, reference.MinPLogitsWarper),
        (filters.typical_p, reference.TypicalLogitsWarper),
    ):
        if value is not None:
            scores = warper(value)(torch.zeros(len(logits), 1, dtype=torch.long), scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [12, 3000])
def test_filters_leave_what_those_of_transformers_leave(filters, vocabulary):
    logits = random_logits(50, vocabulary)
    ours, theirs = probabilities(logits, filters), warped(logits, filters)
    assert torch.equal(ours > 0, theirs > 0)
    assert torch.allclose(ours, theirs, atol=1e-6)


@functools.cache
def much_noise(count: int) -> torch.Tensor:
    """Noise of so many draws of 12 tokens, with 100 steps of each seed."""
    seeds, steps = (np.arange(count) // 100).tolist(), (np.arange(count) % 100).tolist()
    return gumbel_noise(seeds, steps, 12)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(filters):
    """A chi-square test against the exact distribution, seeds and steps varied."""
    logits, count = random_logits(1, 12), 20_000
    exact = warped(logits, filters)[0].numpy()
    drawn, _ = choose(logits.expand(count, -1), filters, much_noise(count))
    observed = np.bincount(drawn.numpy(), minlength=12)
    assert observed[exact == 0].sum() == 0
    expected = exact[exact > 0] * count
    statistic = ((observed[exact > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert statistic <= freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_sure_draw_survives_rounding(filters):
    """Noise larger than another batch's rounding changes no draw that is called sure."""
    logits = random_logits(20_000, 12, seed=0) * 1.5
    noise = gumbel_noise(range(20_000), [0] * 20_000, 12)
    tokens, sure = choose(logits, filters, noise)
    generator = torch.Generator().manual_seed(1)
    others, _ = choose(
        logits + 2e-5 * torch.randn(logits.shape, generator=generator), filters, noise
    )
    assert (tokens == others)[sure].all()
    assert sure.double().mean() > 0.9


def test_what_is_not_sure_is_close():
    """Unsure draws exist, and are those that rounding could change."""
    logits = torch.tensor([[0.0, 1.0, 1.0 + 1e-4], [0.0, 1.0, 1.1]])
    _, sure = choose(logits, Filters())
    assert sure.tolist() == [False, True]
    _, sure = choose(logits[:1], Filters(top_k=1), torch.tensor([[0.0, 0.0, 3.0]]))
    assert sure.tolist() == [False]  # another rounding would keep the other one only


def test_noise_depends_on_seed_and_step_alone():
    many = gumbel_noise([3, 4, 2**40], [7, 0, 2], 50)
    for i, (seed, step) in enumerate([(3, 7), (4, 0), (2**40, 2)]):
        assert torch.equal(gumbel_noise([seed], [step], 50)[0], many[i])
        assert torch.equal(gumbel_noise([seed], [step], 20)[0], many[i, :20])
    assert len(many.unique()) == many.numel()


def test_noise_is_gumbel():
    """Against its distribution function exp(-exp(-x)), tails included, and without correlation."""
    noise = gumbel_noise(range(100), [0] * 100, 10_000).double()
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    grid = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    assert (uniform - grid).abs().max() < 1.6 / len(uniform) ** 0.5  # Kolmogorov-Smirnov
    assert noise.min() < -2.4 and noise.max() > 11
    rows = torch.corrcoef(noise[:20])
    assert (rows - torch.eye(20)).abs().max() < 0.05


# ---- penalties


LINES = [[1, 2, 3, 1, 2], [4, 4, 4, 4], [5], [0, 1, 0, 1, 0], [7, 8, 9, 7, 8, 9, 7, 8]]


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.5])
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_penalties_are_those_of_transformers(penalty, size):
    scores = random_logits(len(LINES), 12)
    found = penalized(scores, LINES, [0] * 5, Penalties(penalty, 0.0, size))
    for row, line, own in zip(scores, LINES, found, strict=True):
        ids, expected = torch.tensor([line]), row[None]
        if penalty != 1:
            expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(ids, expected)
        if size:
            expected = reference.NoRepeatNGramLogitsProcessor(size)(ids, expected)
        assert torch.equal(own, expected[0])


def test_frequency_is_counted_in_the_completion():
    scores = torch.zeros(1, 6)
    found = penalized(scores, [[1, 2, 2, 3, 2]], [2], Penalties(frequency=0.5))
    assert found[0].tolist() == [0, 0, -1.0, -0.5, 0, 0]
    assert (scores == 0).all()


def test_without_penalties_nothing_is_copied():
    scores = random_logits(2, 5)
    assert penalized(scores, [[1], [2]], [0, 0], Penalties()) is scores


def test_repeating_by_brute_force():
    for line in itertools.product(range(3), repeat=6):
        for size in (1, 2, 3):
            grams = {line[i : i + size] for i in range(len(line) - size + 1)}
            banned = {t for t in range(3) if (*line, t)[-size:] in grams}
            assert set(_repeating(list(line), size)) == banned
