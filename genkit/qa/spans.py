"""The spans of a window that answer best."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from genkit.qa.windows import NEVER, Tokens, Windows

CANDIDATES = 12  # spans that are weighed at once; transformers 4 took as many


@dataclass(frozen=True)
class Span:
    """Characters of a context that answer a question."""

    score: float  # probability in its window
    confidence: float  # the same at the calibrated temperature
    start: int
    end: int
    window: tuple[int, int]  # the characters that were read


def likeliest(
    start: torch.Tensor, end: torch.Tensor, longest: int, taken: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the likeliest spans of each window.

    Args:
        start, end: log-probabilities that an answer starts or ends with a token, (windows, tokens).
        longest: the most tokens of a span.
        taken: tokens that no span may touch, (windows, tokens), bool.

    Returns:
        Log-probabilities, the likeliest first, and first and last tokens; (windows, candidates)
        each. Logarithms: a probability may be too small for a float32.
    """
    tokens = start.shape[1]
    longest = min(longest, tokens)
    spans = start[:, :, None] + _reach(end, longest)
    if taken.any():
        spans = spans.masked_fill(_reach(taken.float(), longest).cummax(2).values > 0, NEVER)
    found, places = spans.flatten(1).topk(min(CANDIDATES, tokens * longest))
    first = places // longest
    return found, first, (first + places % longest).clamp(max=tokens - 1)


def _reach(values: torch.Tensor, longest: int) -> torch.Tensor:
    """Lay out what each token reaches: itself and those after it; (windows, tokens, longest)."""
    return F.pad(values, (0, longest - 1), value=NEVER).unfold(1, longest, 1)


@dataclass(frozen=True)
class Wanted:
    """What is asked of a window."""

    answers: int = 1
    longest: int = 15  # tokens of an answer
    words: bool = True  # answers are whole words, and spans that read the same are one
    temperature: float = 1.0  # of the calibrated confidence


def answers(
    start: torch.Tensor,
    end: torch.Tensor,
    group: np.ndarray,
    windows: Windows,
    contexts: Sequence[str],
    wanted: Wanted,
) -> list[list[Span]]:
    """Find the best answers of each window, which read differently and do not touch each other.

    Args:
        start, end: logits of no answer and of the tokens of context, (windows, 1 + tokens).
        group: which windows these are.
        contexts: the texts of `windows`.
    """
    p_start, p_end = (F.log_softmax(x, -1)[:, 1:] for x in (start, end))
    c_start, c_end = (F.log_softmax(x / wanted.temperature, -1)[:, 1:] for x in (start, end))
    taken = torch.zeros_like(p_start, dtype=torch.bool)
    found: list[list[Span]] = [[] for _ in group]
    known: list[set[object]] = [set() for _ in group]  # what they read
    open_ = set(range(len(group)))  # windows that may have more answers
    while open_:
        p, first, last = likeliest(p_start, p_end, wanted.longest, taken)
        c = c_start.gather(1, first) + c_end.gather(1, last)
        weighed = list(zip(*(x.tolist() for x in (p, c, first, last)), strict=True))
        for i in sorted(open_):
            row, offset = windows.row[group[i]], int(windows.first[group[i]])
            tokens = windows.contexts[row]
            readings = _readings(contexts[row], tokens, offset, wanted.words, *weighed[i])
            new = {name: reading for name, reading in readings.items() if name not in known[i]}
            if new:
                best = max(new, key=lambda name: new[name].score)
                known[i].add(best)
                last_token = int(windows.last[group[i]]) - 1
                read = int(tokens.starts[offset]), int(tokens.ends[last_token])
                found[i].append(new[best].span(read))
            for name in known[i] & readings.keys():
                for a, b in readings[name].places:
                    taken[i, max(a - offset, 0) : b - offset + 1] = True
            if not readings or len(found[i]) == wanted.answers:
                open_.remove(i)
    return found


@dataclass
class _Reading:
    """Spans that read the same: where the likeliest is, and what they have together."""

    start: int  # characters
    end: int
    places: list[tuple[int, int]] = field(default_factory=list)  # of all, in tokens
    score: float = 0.0
    confidence: float = 0.0

    def span(self, window: tuple[int, int]) -> Span:
        return Span(self.score, self.confidence, self.start, self.end, window)


def _readings(
    context: str,
    tokens: Tokens,
    offset: int,
    words: bool,
    p: list[float],
    c: list[float],
    first: list[int],
    last: list[int],
) -> dict[object, _Reading]:
    """Add up candidates that read the same.

    Args:
        offset: the token of the context that the window begins with.
        p, c, first, last: of the candidates, the likeliest first; logarithms, and tokens of the
            window.
    """
    readings: dict[object, _Reading] = {}
    for score, confidence, a, b in zip(p, c, first, last, strict=True):
        if score == NEVER:
            break  # no span is left; what follows may be outside of the text
        a, b = a + offset, b + offset
        if words:
            a, b = int(tokens.first[a]), int(tokens.last[b])
        start, end = _trimmed(context, int(tokens.starts[a]), int(tokens.ends[b]))
        if start < end:
            name = context[start:end].lower() if words else (a, b)
            reading = readings.setdefault(name, _Reading(start, end))
            reading.places.append((a, b))
            reading.score += math.exp(score)
            reading.confidence += math.exp(confidence)
    return readings


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Leave out white space at the ends, which some tokenizers give to words.

    An accent that is a character of its own stays with its letter, though others leave it out.
    """
    inside = text[start:end]
    start += len(inside) - len(inside.lstrip())
    end = start + len(inside.strip())
    while start < end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return start, end


def null_probability(start: torch.Tensor, end: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probability of no answer; (windows, 1 + tokens) to (windows,)."""
    p_start, p_end = (F.softmax(x / temperature, -1)[:, 0] for x in (start, end))
    return p_start * p_end
