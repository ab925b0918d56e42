"""Greedy search for words that raise a score, under a budget of queries and of words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from genkit.seeds import is_whole
from genkit.text.candidates import (
    Vocabulary,
    typing_errors,
    words_by_gradient,
    words_by_masked_model,
)
from genkit.text.edits import Draft
from genkit.text.encoders import TokenGradients
from genkit.text.masked_models import MaskedModel

Candidates = Literal["gradient", "mlm", "characters"]
Importance = Literal["gradient", "deletion"]
BATCH = 16  # texts that the model judges at once
Edits = Iterator[tuple[int, str]]  # positions and words, the most promising first


@dataclass(frozen=True)
class Verdict:
    """What a model makes of a text."""

    score: float  # higher is nearer to the goal
    success: bool
    output: Any  # of the model


class Victim(Protocol):
    """A model under attack, with its goal."""

    def judge(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Judge several versions of a text."""

    def gradients(self, draft: Draft) -> TokenGradients:
        """Differentiate the score of a text."""


class Queries:
    """A victim that counts how many texts it is given, and is never given more than a budget.

    The text itself has been judged: one query is used.
    """

    def __init__(self, victim: Victim, budget: int) -> None:
        self.victim, self.budget, self.used = victim, budget, 1

    @property
    def left(self) -> int:
        """How many texts it may still be given."""
        return self.budget - self.used

    def judge(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Judge several versions of a text, a query each."""
        self.used += len(drafts)
        assert self.used <= self.budget, "more queries than the budget"
        return self.victim.judge(drafts)

    def gradients(self, draft: Draft) -> TokenGradients:
        """Differentiate the score of a text: one query."""
        self.used += 1
        assert self.used <= self.budget, "more queries than the budget"
        return self.victim.gradients(draft)


# ---------------------------------------------------------------------------------------------
# Which edits to try first


@dataclass(frozen=True)
class Proposer:
    """How edits are found and ranked."""

    candidates: Candidates
    importance: Importance
    vocabulary: Vocabulary  # of the victim
    masked: MaskedModel | None
    seed: int
    avoided: frozenset[str] = frozenset()  # words that are not put in, in lower case

    def edits(self, draft: Draft, positions: Sequence[int], victim: Queries) -> Edits:
        """Yield edits of a text, the most promising first.

        By gradient, those of all words are ranked together, as in HotFlip. Otherwise all candidates
        of the most important word come first.

        Args:
            positions: of words, in the order of their importance by deletion if that is used.
        """
        found = self._find(draft, positions, victim)
        return (edit for edit in found if edit[1].lower() not in self.avoided)

    def _find(self, draft: Draft, positions: Sequence[int], victim: Queries) -> Edits:
        if "gradient" not in (self.candidates, self.importance):
            return self._edits_in_order(draft, positions, None)
        gradients = victim.gradients(draft)
        if self.importance == "deletion":
            return self._edits_in_order(draft, positions, gradients)
        if self.candidates == "gradient":
            return self._edits_by_gain(draft, positions, gradients)
        order = rank_by_gradient(draft, positions, gradients)
        return self._edits_in_order(draft, order, gradients)

    def _edits_by_gain(
        self, draft: Draft, positions: Sequence[int], gradients: TokenGradients
    ) -> Edits:
        found = [
            (gain, position, word)
            for position in positions
            for gain, word in words_by_gradient(draft, position, gradients, self.vocabulary)
        ]
        found.sort(key=lambda edit: -edit[0])
        return ((position, word) for _, position, word in found)

    def _edits_in_order(
        self, draft: Draft, order: Sequence[int], gradients: TokenGradients | None
    ) -> Edits:
        if self.candidates == "mlm":
            assert self.masked is not None
            yield from words_by_masked_model(draft, order, self.masked)
            return
        for position in order:
            if self.candidates == "characters":
                words = typing_errors(draft, position, self.seed)
            else:
                assert gradients is not None
                ranked = words_by_gradient(draft, position, gradients, self.vocabulary)
                words = [word for _, word in ranked]
            yield from ((position, word) for word in words)


def rank_by_gradient(
    draft: Draft, positions: Sequence[int], gradients: TokenGradients
) -> list[int]:
    """Order words by how much the score would rise without them, to first order."""
    added = {i: gradients.of_word(*draft.span(i))[1] for i in positions}
    return sorted(positions, key=lambda i: added[i])


def rank_by_deletion(draft: Draft, positions: Sequence[int], victim: Queries) -> list[int]:
    """Order words by the score without them, the highest first: a query a word.

    Half of the queries are spent at most; words that are not asked about come last.
    """
    if len(positions) < 2:
        return list(positions)
    asked, rest = positions[: victim.left // 2], positions[victim.left // 2 :]
    without = victim.judge([draft.replace(i, "") for i in asked])
    scores = {i: verdict.score for i, verdict in zip(asked, without, strict=True)}
    return [*sorted(asked, key=lambda i: -scores[i]), *rest]


# ---------------------------------------------------------------------------------------------
# The search


def search_words(
    draft: Draft,
    verdict: Verdict,
    positions: Sequence[int],
    allowed: int,
    victim: Queries,
    proposer: Proposer,
) -> tuple[Draft, Verdict]:
    """Replace words one after the other, each time by the best of the edits that are tried.

    Every word has an equal share of the queries that are left; it ends at the first success.

    Args:
        verdict: of the text as it is.
        positions: of the words that may be replaced.
        allowed: how many of them.
        proposer: of the edits to try.

    Returns:
        The text with the highest score that was found, and its verdict.

    Source: Yoo et al. 2020, https://arxiv.org/abs/2009.06368: greedy search by word importance
    """
    if proposer.importance == "deletion" and not verdict.success:
        positions = rank_by_deletion(draft, positions, victim)
    open_positions = list(positions)
    for remaining in range(min(allowed, len(positions)), 0, -1):
        if verdict.success or victim.left < 2:
            break
        share = max(victim.left // remaining, 2)
        used = victim.used
        edits = proposer.edits(draft, open_positions, victim)
        best = _best_edit(draft, verdict, edits, victim, victim.used - used, share)
        if best is None:
            break
        position, draft, verdict = best
        open_positions.remove(position)
    return draft, verdict


def _best_edit(
    draft: Draft, verdict: Verdict, edits: Edits, victim: Queries, used: int, share: int
) -> tuple[int, Draft, Verdict] | None:
    """Try edits until a success, or until a share of queries is used and one is an improvement."""
    best: tuple[int, Draft, Verdict] | None = None
    while victim.left and not (best and (best[2].success or used >= share)):
        size = min(BATCH, victim.left, share - used if used < share else BATCH)
        batch = list(itertools.islice(edits, size))
        if not batch:
            break
        drafts = [draft.replace(*edit) for edit in batch]
        used += len(drafts)
        for edit, made, found in zip(batch, drafts, victim.judge(drafts), strict=True):
            if (found.success, found.score) > _rank(best, verdict):
                best = edit[0], made, found
    return best


def _rank(best: tuple[int, Draft, Verdict] | None, verdict: Verdict) -> tuple[bool, float]:
    leader = best[2] if best else verdict
    return leader.success, leader.score


# ---------------------------------------------------------------------------------------------
# Checks


def check_search(
    candidates: str, importance: str, max_changed: float, budget: int, masked_model: object
) -> None:
    """Refuse options of the search that cannot work.

    Raises:
        ValueError: an option is invalid; it is named.
    """
    for name, value, known in (
        ("candidates", candidates, get_args(Candidates)),
        ("importance", importance, get_args(Importance)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    number = isinstance(max_changed, int | float) and not isinstance(max_changed, bool)
    if not number or not 0 < max_changed <= 1:
        raise ValueError(f"max_changed must be above 0 and at most 1, got {max_changed!r}")
    if not is_whole(budget) or budget < 3:
        raise ValueError(f"budget must be a whole number of queries, 3 or more, got {budget!r}")
    if (candidates == "mlm") != (masked_model is not None):
        raise ValueError(
            f"masked_model={masked_model!r}, candidates={candidates!r}: candidates='mlm' needs "
            "masked_model=, and no other takes it"
        )


def words_allowed(max_changed: float, words: int) -> int:
    """Return how many of some words a share of them is, rounded down."""
    return int(max_changed * words + 1e-9)
