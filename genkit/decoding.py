"""Decoding as pure functions on logits: what may come next, what changes its odds, what is drawn.

A draw is the largest of logit plus Gumbel noise (Gumbel 1954): an exact sample of the softmax, and
one that rounding can change only where two sums are as close as the rounding is large.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# How far float32 logits, and probabilities made of them, can be from those of another batch size:
# about ten times what was seen
NEAR_LOGIT, NEAR_PROBABILITY = 1e-3, 2e-4
ORDERED = 1024  # tokens that are sorted first: nearly always they hold the probability asked for


@dataclass(frozen=True)
class Filters:
    """Which tokens are drawn from, and at which temperature; the order is that of the fields."""

    temperature: float = 1.0  # divides the logits
    top_k: int | None = None  # the k most likely tokens, and those as likely as the k-th
    top_p: float | None = None  # the most likely that together have it (Holtzman et al. 2020)
    min_p: float | None = None  # those this share as likely as the likeliest (Nguyen et al. 2024)
    typical_p: float | None = None  # those of the most expected surprise (Meister et al. 2023)


def kept(scaled: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Tell which tokens the filters leave.

    Args:
        scaled: logits divided by the temperature, (rows, vocabulary).

    Returns:
        Three masks, (3, rows, vocabulary): what the filters surely leave whatever the rounding,
        what they leave, and what rounding could make them leave.
    """
    near = NEAR_LOGIT / min(1.0, filters.temperature)
    slack = torch.tensor([-near, 0.0, near], device=scaled.device)[:, None, None]
    mask = torch.ones(3, *scaled.shape, dtype=torch.bool, device=scaled.device)
    left = scaled
    for least in _least_logits(scaled, filters):  # (3 or 1, rows, 1)
        mask &= scaled >= least - slack
        left = scaled.masked_fill(~mask[1], -math.inf)
    if filters.typical_p is not None:
        mask &= _typical(left, filters.typical_p)
    return mask


def _least_logits(scaled: torch.Tensor, filters: Filters) -> list[torch.Tensor]:
    """The least logit that each filter leaves, (1 or 3, rows, 1): filters that cut the tail."""
    least, left = [], scaled
    if filters.top_k is not None:
        least.append(scaled.topk(min(filters.top_k, scaled.shape[-1])).values[None, :, -1:])
        left = scaled.masked_fill(scaled < least[0][0], -math.inf)
    if filters.top_p is not None and filters.top_p < 1:
        least.append(_nucleus(left, filters.top_p, filters.temperature))
    if filters.min_p is not None:
        least.append(scaled.amax(-1, keepdim=True)[None] + math.log(filters.min_p))
    return least


def _targets(p: float, temperature: float, device: torch.device) -> torch.Tensor:
    near = NEAR_PROBABILITY / min(1.0, temperature)
    return torch.tensor([p - near, p, p + near], device=device)[:, None, None]


def _nucleus(scaled: torch.Tensor, p: float, temperature: float) -> torch.Tensor:
    """The logit of the last of the most likely tokens that together have probability p."""
    targets, whole = _targets(p, temperature, scaled.device), scaled.logsumexp(-1, keepdim=True)
    for count in (min(ORDERED, scaled.shape[-1]), scaled.shape[-1]):
        values = scaled.topk(count).values
        probabilities = (values - whole).exp()
        before = probabilities.cumsum(-1) - probabilities  # of more likely tokens
        if (before[:, -1] >= targets[2, 0]).all():
            break
    last = (before < targets).sum(-1, keepdim=True).clamp(min=1) - 1  # (3, rows, 1)
    return values.expand(3, -1, -1).gather(-1, last)


def _typical(scaled: torch.Tensor, p: float) -> torch.Tensor:
    """Tokens whose surprise is nearest the entropy and that together have probability p."""
    logs = scaled.log_softmax(-1)
    entropy = -(logs.exp() * logs.clamp(min=-1e30)).sum(-1, keepdim=True)
    distance, order = (-logs - entropy).abs().sort(stable=True)
    probabilities = logs.exp().gather(-1, order)
    before = probabilities.cumsum(-1) - probabilities
    last = (before < _targets(p, 1.0, scaled.device)).sum(-1, keepdim=True).clamp(min=1) - 1
    furthest = distance.expand(3, -1, -1).gather(-1, last)
    slack = torch.tensor([-NEAR_LOGIT, 0.0, NEAR_LOGIT], device=scaled.device)[:, None, None]
    return (-logs - entropy).abs() <= furthest + slack


def probabilities(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """The distribution that is drawn from, (rows, vocabulary) both."""
    scaled = logits / filters.temperature
    return scaled.masked_fill(~kept(scaled, filters)[1], -math.inf).softmax(-1)


def choose(
    logits: torch.Tensor, filters: Filters, gumbel: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token a row, or take the most likely, and tell which no rounding could have changed.

    Args:
        logits: (rows, vocabulary), float32.
        gumbel: noise to draw with, (rows, vocabulary); None takes the most likely.

    Returns:
        Token ids and whether each is sure, (rows,) both.
    """
    scaled = logits / filters.temperature
    scores = scaled if gumbel is None else scaled + gumbel
    near = 2 * NEAR_LOGIT / min(1.0, filters.temperature)
    if filters == Filters(filters.temperature):  # nothing to filter
        best, tokens = scores.max(-1)
        others = scores.scatter(-1, tokens[:, None], -math.inf)
        return tokens, best - others.amax(-1) > near
    surely, left, perhaps = kept(scaled, filters)
    best, tokens = scores.masked_fill(~left, -math.inf).max(-1)
    others = scores.masked_fill(~perhaps, -math.inf).scatter(-1, tokens[:, None], -math.inf)
    sure = surely.gather(-1, tokens[:, None])[:, 0] & (best - others.amax(-1) > near)
    return tokens, sure


def gumbel_noise(seeds: Sequence[int], steps: Sequence[int], vocabulary: int) -> torch.Tensor:
    """Gumbel noise for each row, (rows, vocabulary), float32.

    A counter-based generator (Philox, Salmon et al. 2011): the noise of a seed and a step depends
    on nothing else.
    """
    raw = np.stack(
        [
            np.random.Philox(key=seed, counter=step << 64).random_raw(vocabulary)
            for seed, step in zip(seeds, steps, strict=True)
        ]
    )
    uniform = ((raw >> 11) + 0.5) * 2.0**-53  # never 0, never 1
    small = torch.from_numpy(uniform.astype(np.float32)).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-small))


# ---------------------------------------------------------------------------------------------
# What the text so far does to the odds


@dataclass(frozen=True)
class Penalties:
    """What repeating costs a token."""

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
    """Tokens that would make the last `size` tokens a sequence that the line has already."""
    tail = line[len(line) - size + 1 :]
    places = range(len(line) - size + 1)
    return [line[i + size - 1] for i in places if line[i : i + size - 1] == tail]


@dataclass(frozen=True)
class Candidate:
    """A text that beam search weighed in one step."""

    parent: int  # which of the texts kept in the step before it continues; 0 in the first step
    token: int
    log_probability: float  # of the token
    total: float  # log-probability of the whole completion
    fate: str  # "kept", "dropped" or "finished"
