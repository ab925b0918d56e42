"""The most likely answer spans of a window."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from genkit.qa.windows import NEVER, Tokens, TokenWindows

CANDIDATES = 12  # spans looked at in one pass, as many as in transformers 4


@dataclass(frozen=True)
class AnswerSpan:
    """Characters of a context that answer a question."""

    score: float  # probability in its window
    confidence: float  # the same at the calibrated temperature
    start: int
    end: int
    window: tuple[int, int]  # the characters that were read


def likeliest_spans(
    start: torch.Tensor, end: torch.Tensor, longest: int, taken: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the most likely spans of each window.

    Args:
        start, end: log-probabilities that an answer starts or ends with a token, (windows, tokens).
        longest: the most tokens of a span.
        taken: tokens that no span may touch, (windows, tokens), bool.

    Returns:
        Log-probabilities, the highest first, and first and last tokens; (windows, candidates) each.
        Logarithms, because a probability may be too small for a float32.
    """
    tokens = start.shape[1]
    longest = min(longest, tokens)
    spans = start[:, :, None] + _following(end, longest)
    if taken.any():
        spans = spans.masked_fill(_following(taken.float(), longest).cummax(2).values > 0, NEVER)
    found, indices = spans.flatten(1).topk(min(CANDIDATES, tokens * longest))
    first = indices // longest
    return found, first, (first + indices % longest).clamp(max=tokens - 1)


def _following(values: torch.Tensor, longest: int) -> torch.Tensor:
    """Lay out the values of each token and those after it; (windows, tokens, longest)."""
    return F.pad(values, (0, longest - 1), value=NEVER).unfold(1, longest, 1)


@dataclass(frozen=True)
class SpanOptions:
    """Which spans of a window to return."""

    top_k: int = 1
    longest: int = 15  # tokens of an answer
    words: bool = True  # answers are whole words, and spans with the same text are one
    temperature: float = 1.0  # of the calibrated confidence


def best_spans(
    start: torch.Tensor,
    end: torch.Tensor,
    group: np.ndarray,
    windows: TokenWindows,
    contexts: Sequence[str],
    options: SpanOptions,
) -> list[list[AnswerSpan]]:
    """Find the best answers of each window, of different text and without overlap.

    Args:
        start, end: logits of no answer and of the tokens of context, (windows, 1 + tokens).
        group: which windows these are.
        contexts: the texts of `windows`.
    """
    p_start, p_end = (F.log_softmax(x, -1)[:, 1:] for x in (start, end))
    c_start, c_end = (F.log_softmax(x / options.temperature, -1)[:, 1:] for x in (start, end))
    taken = torch.zeros_like(p_start, dtype=torch.bool)
    found: list[list[AnswerSpan]] = [[] for _ in group]
    chosen: list[set[object]] = [set() for _ in group]  # keys of the candidates found so far
    unfinished = set(range(len(group)))  # windows that may have more answers
    while unfinished:
        p, first, last = likeliest_spans(p_start, p_end, options.longest, taken)
        c = c_start.gather(1, first) + c_end.gather(1, last)
        columns = list(zip(*(x.tolist() for x in (p, c, first, last)), strict=True))
        for i in sorted(unfinished):
            row, offset = windows.row[group[i]], int(windows.first[group[i]])
            tokens = windows.contexts[row]
            candidates = _merge_spans(contexts[row], tokens, offset, options.words, *columns[i])
            new = {key: each for key, each in candidates.items() if key not in chosen[i]}
            if new:
                best = max(new, key=lambda key: new[key].score)
                chosen[i].add(best)
                last_token = int(windows.last[group[i]]) - 1
                extent = int(tokens.starts[offset]), int(tokens.ends[last_token])
                found[i].append(new[best].span(extent))
            for key in chosen[i] & candidates.keys():
                for a, b in candidates[key].spans:
                    taken[i, max(a - offset, 0) : b - offset + 1] = True
            if not candidates or len(found[i]) == options.top_k:
                unfinished.remove(i)
    return found


@dataclass
class _Candidate:
    """Spans with the same text: the most likely one's characters, and the sum of their scores."""

    start: int  # characters
    end: int
    spans: list[tuple[int, int]] = field(default_factory=list)  # first and last token of each
    score: float = 0.0
    confidence: float = 0.0

    def span(self, window: tuple[int, int]) -> AnswerSpan:
        return AnswerSpan(self.score, self.confidence, self.start, self.end, window)


def _merge_spans(
    context: str,
    tokens: Tokens,
    offset: int,
    words: bool,
    p: list[float],
    c: list[float],
    first: list[int],
    last: list[int],
) -> dict[object, _Candidate]:
    """Merge spans with the same text, and add up their probabilities.

    Args:
        offset: the token of the context that the window begins with.
        p, c, first, last: of the spans, the most likely first: log-probabilities, as they are and
            calibrated, and tokens of the window.
    """
    candidates: dict[object, _Candidate] = {}
    for score, confidence, a, b in zip(p, c, first, last, strict=True):
        if score == NEVER:
            break  # no span is left; those that follow may be outside of the text
        a, b = a + offset, b + offset
        if words:
            a, b = int(tokens.first[a]), int(tokens.last[b])
        start, end = _trim(context, int(tokens.starts[a]), int(tokens.ends[b]))
        if start < end:
            key = context[start:end].lower() if words else (a, b)
            candidate = candidates.setdefault(key, _Candidate(start, end))
            candidate.spans.append((a, b))
            candidate.score += math.exp(score)
            candidate.confidence += math.exp(confidence)
    return candidates


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Leave out white space at the ends, which some tokenizers count to words.

    A combining accent stays with its letter, though some tokenizers leave it out of the word.
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
