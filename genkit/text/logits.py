"""Decoding as pure functions on logits: filters, penalties, and drawing a token.

A draw is the largest of logit plus Gumbel noise (Gumbel 1954): an exact sample of the softmax, and
one that rounding can change only where two sums are as close as the rounding is large.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# How far float32 logits, and probabilities made of them, can be from those of another batch size:
# about ten times the largest difference measured
NEAR_LOGIT, NEAR_PROBABILITY = 1e-3, 2e-4
# Noise that is made at once: so many steps, and numbers, and blocks of them that are kept
BLOCK_STEPS, BLOCK_NUMBERS, KEPT_BLOCKS = 64, 1 << 13, 256
COLDEST = 1e-30  # the least temperature: logits divided by less overflow float32
ORDERED = 1024  # tokens that are sorted first: nearly always they have the probability p together


@dataclass(frozen=True)
class Filters:
    """Which tokens are drawn from, and at which temperature; the order is that of the fields."""

    temperature: float = 1.0  # divides the logits
    top_k: int | None = None  # the k most likely tokens, and those as likely as the k-th
    top_p: float | None = None  # the most likely that together have it (Holtzman et al. 2020)
    min_p: float | None = None  # those this share as likely as the likeliest (Nguyen et al. 2024)
    typical_p: float | None = None  # those of the most expected surprise (Meister et al. 2023)

    @property
    def leave_all(self) -> bool:
        """Whether there is nothing but a temperature."""
        return self.scale_only and self.min_p is None

    @property
    def scale_only(self) -> bool:
        """Whether nothing but a temperature and the likeliest token decides what is kept."""
        return self.top_k is self.top_p is self.typical_p is None


def mask_kept(scaled: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return three masks of the tokens that the filters keep, (3, rows, vocabulary).

    Args:
        scaled: logits divided by the temperature, (rows, vocabulary).

    Returns:
        The tokens kept whatever the rounding, those kept, and those that some rounding would keep.
    """
    mask = torch.ones(3, *scaled.shape, dtype=torch.bool, device=scaled.device)
    near = NEAR_LOGIT / min(1.0, filters.temperature)
    if filters.top_k is not None and filters.top_k < scaled.shape[-1]:
        largest = scaled.topk(filters.top_k + 1).values
        mask &= scaled >= _cutoffs(largest, torch.tensor(filters.top_k - 1), near)
    left = scaled.masked_fill(~mask[1], -math.inf)
    if filters.top_p is not None and filters.top_p < 1:
        mask &= scaled >= _nucleus(left, filters.top_p, near)
        left = scaled.masked_fill(~mask[1], -math.inf)
    if filters.min_p is not None:
        least = scaled.amax(-1, keepdim=True) + math.log(filters.min_p)
        mask &= scaled >= torch.stack([least + near, least, least - near])
        left = scaled.masked_fill(~mask[1], -math.inf)
    if filters.typical_p is not None:
        mask &= _typical(left, filters.typical_p, near)
    return mask


def _cutoffs(ordered: torch.Tensor, last: torch.Tensor, near: float) -> torch.Tensor:
    """Return the cutoffs above which a value is surely, just, or perhaps among the first ones.

    Args:
        ordered: the largest values, descending, (rows, n), one more than the last of them.
        last: index of the last one taken, (rows,) or (), or (3, rows) for the three cutoffs.

    Returns:
        (3, rows, 1): a value is surely in if it lies clear of the first one that is out.
    """
    last = last.to(ordered.device).expand(3, len(ordered))
    values = ordered.gather(-1, (last + torch.tensor([[1], [0], [0]], device=last.device)).T).T
    return (values + torch.tensor([[near], [0.0], [-near]], device=last.device))[..., None]


def _first_with(probabilities: torch.Tensor, p: float) -> torch.Tensor:
    """Return the index of the last of the first ones with probability p, and with p -+ near."""
    near = torch.tensor([-NEAR_PROBABILITY, 0.0, NEAR_PROBABILITY], device=probabilities.device)
    before = probabilities.cumsum(-1) - probabilities
    count = (before < (p + near)[:, None, None]).sum(-1)  # (3, rows)
    return count.clamp(min=1, max=probabilities.shape[-1]) - 1


def _nucleus(scaled: torch.Tensor, p: float, near: float) -> torch.Tensor:
    """Return the cutoffs of the most likely tokens that together have probability p."""
    whole, least = scaled.logsumexp(-1, keepdim=True), scaled.new_full((len(scaled), 1), -math.inf)
    for count in (min(ORDERED, scaled.shape[-1]), scaled.shape[-1]):
        values = scaled.topk(count).values
        last = _first_with((values - whole).exp(), p)
        if (last < count - 1).all():
            break
    return _cutoffs(torch.cat([values, least], dim=-1), last, near)


def _typical(scaled: torch.Tensor, p: float, near: float) -> torch.Tensor:
    """Return masks of the tokens whose surprise is nearest the entropy, with probability p."""
    logs = scaled.log_softmax(-1)
    entropy = -(logs.exp() * logs.clamp(min=-1e30)).sum(-1, keepdim=True)
    nearness = -(-logs - entropy).abs()
    values, order = nearness.sort(descending=True, stable=True)
    last = _first_with(logs.exp().gather(-1, order), p)
    least = scaled.new_full((len(scaled), 1), -math.inf)
    return nearness >= _cutoffs(torch.cat([values, least], dim=-1), last, near)


def probabilities(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return the distribution that tokens are drawn from, (rows, vocabulary) both."""
    scaled = logits / filters.temperature
    return scaled.masked_fill(~mask_kept(scaled, filters)[1], -math.inf).softmax(-1)


def choose(
    logits: torch.Tensor, filters: Filters, gumbel: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row, or take the most likely one.

    Args:
        logits: (rows, vocabulary), float32.
        gumbel: noise to draw with, (rows, vocabulary); None takes the most likely.

    Returns:
        Token ids, and whether each is the same whatever the rounding, (rows,) both.
    """
    scaled = logits if filters.temperature == 1 else logits / filters.temperature
    scores = scaled if gumbel is None else scaled + gumbel
    near = 2 * NEAR_LOGIT / min(1.0, filters.temperature)
    if filters.leave_all:
        best, tokens = scores.max(-1, keepdim=True)
        others = scores.scatter(-1, tokens, -math.inf).amax(-1, keepdim=True)
        return tokens[:, 0], (best - others > near)[:, 0]
    surely, left, perhaps = mask_kept(scaled, filters)
    best, tokens = scores.masked_fill(~left, -math.inf).max(-1)
    others = scores.masked_fill(~perhaps, -math.inf).scatter(-1, tokens[:, None], -math.inf)
    sure = surely.gather(-1, tokens[:, None])[:, 0] & (best - others.amax(-1) > near)
    return tokens, sure


def gumbel_noise(seeds: Sequence[int], steps: Sequence[int], vocabulary: int) -> torch.Tensor:
    """Return Gumbel noise for each row, (rows, vocabulary), float32.

    A counter-based generator (Philox, Salmon et al. 2011): the noise of a seed and a step depends
    on nothing else. That of a small vocabulary is made for many steps at once.
    """
    size = _steps_of_block(vocabulary)
    if size < 2 or len(seeds) > KEPT_BLOCKS:
        return _noise_of(list(zip(seeds, steps, strict=True)), vocabulary)
    pairs = zip(seeds, steps, strict=True)
    return torch.stack([_block(s, n // size, size, vocabulary)[n % size] for s, n in pairs])


def noise_ahead(seeds: Sequence[int], step: int, vocabulary: int) -> torch.Tensor:
    """Return the noise of a step and of those after it that is made with it.

    Returns (rows, steps, vocabulary), with no steps for a large vocabulary.
    """
    size = _steps_of_block(vocabulary)
    if size < 2:
        return torch.empty(len(seeds), 0, vocabulary)
    blocks = [_block(seed, step // size, size, vocabulary) for seed in seeds]
    return torch.stack([block[step % size :] for block in blocks])


def _steps_of_block(vocabulary: int) -> int:
    return min(BLOCK_STEPS, BLOCK_NUMBERS // vocabulary)


@functools.lru_cache(maxsize=2 * KEPT_BLOCKS)
def _block(seed: int, number: int, size: int, vocabulary: int) -> torch.Tensor:
    """Return the noise of so many steps of a seed that follow each other."""
    first = number * size
    return _noise_of([(seed, step) for step in range(first, first + size)], vocabulary)


def _noise_of(pairs: Sequence[tuple[int, int]], vocabulary: int) -> torch.Tensor:
    """Return the noise of pairs of a seed and a step, (pairs, vocabulary)."""
    raw = np.stack(
        [np.random.Philox(key=s, counter=n << 64).random_raw(vocabulary) for s, n in pairs]
    )
    uniform = ((raw >> 11) + 0.5) * 2.0**-53  # never 0, never 1
    small = torch.from_numpy(uniform.astype(np.float32)).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-small))


# ---------------------------------------------------------------------------------------------
# Penalties on the text so far


@dataclass(frozen=True)
class Penalties:
    """How much a repeated token is penalised."""

    repetition: float = 1.0  # of a token in prompt or completion (Keskar et al. 2019)
    frequency: float = 0.0  # subtracted for each time that it is in the completion
    no_repeat_ngram: int | None = None  # no sequence of so many tokens twice


def penalized(
    scores: torch.Tensor, lines: Sequence[list[int]], starts: Sequence[int], penalties: Penalties
) -> torch.Tensor:
    """Lower the scores of tokens that would repeat.

    Args:
        scores: logits, or log-probabilities in a beam, (rows, vocabulary).
        lines: prompt and completion of each row.
        starts: where the completion of each row begins.
    """
    if penalties == Penalties():
        return scores
    scores = scores.clone()
    for row, line, start in zip(scores, lines, starts, strict=True):
        if penalties.repetition != 1:
            seen = torch.tensor(sorted(set(line)), device=row.device)
            old = row[seen]
            row[seen] = torch.where(old < 0, old * penalties.repetition, old / penalties.repetition)
        for token, count in Counter(line[start:]).items() if penalties.frequency else ():
            row[token] -= penalties.frequency * count
        if penalties.no_repeat_ngram:
            row[_repeating(line, penalties.no_repeat_ngram)] = -math.inf
    return scores


def _repeating(line: list[int], size: int) -> list[int]:
    """Return the tokens that would complete an n-gram, of `size`, that the line has already."""
    tail = line[len(line) - size + 1 :]
    starts = range(len(line) - size + 1)
    return [line[i + size - 1] for i in starts if line[i : i + size - 1] == tail]


@dataclass(frozen=True)
class Candidate:
    """A text that beam search considered in one step."""

    parent: int  # which of the texts kept in the step before it continues; 0 in the first step
    token: int
    log_probability: float  # of the token
    total: float  # log-probability of the whole completion
    fate: str  # "kept", "dropped" or "finished"
