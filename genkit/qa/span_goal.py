"""A reader under attack: how likely the right answer still is, and what it answers instead."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genkit import machine
from genkit.metrics.squad import compute_exact, compute_f1
from genkit.qa.answering import (
    BATCH,
    Answer,
    QuestionSpans,
    choose_window_size,
    collect_spans,
    rank_answers,
)
from genkit.qa.distractors import asked_words, distractors, is_content_word
from genkit.qa.reader import Reader
from genkit.qa.spans import SpanOptions
from genkit.qa.windows import TokenWindows
from genkit.text.candidates import Vocabulary
from genkit.text.edits import Draft, replaceable, split_words
from genkit.text.encoders import TokenGradients, embedding_gradients
from genkit.text.word_search import BATCH as VERSIONS
from genkit.text.word_search import Proposer, Queries, Verdict, search_words


class NoDistractorError(ValueError):
    """A question or an answer has no word that could be replaced by a similar one."""


@dataclass(frozen=True)
class SpanReading:
    """What a reader makes of a context."""

    answer: Answer
    log_probability: float  # of the right answer's characters, in their best window


@dataclass(frozen=True)
class SpanGoal:
    """A reader, its question, and the right answer in the context as it was."""

    reader: Reader
    question: str
    draft: Draft  # the context as it was
    answer: str
    start: int  # characters of the answer
    end: int

    def judge(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Judge several versions of the context."""
        spans = [self.span_in(draft) for draft in drafts]
        readings = read_contexts(self.reader, self.question, [d.text for d in drafts], spans)
        return [self.verdict(reading) for reading in readings]

    def verdict(self, reading: SpanReading) -> Verdict:
        """Judge a reading: the less likely the right answer the better; success shares no word."""
        other = reading.answer.answer
        success = not compute_exact(other, self.answer) and compute_f1(other, self.answer) == 0
        return Verdict(-reading.log_probability, success, reading)

    def span_in(self, draft: Draft) -> tuple[int, int]:
        """Return where the right answer is in a version of the context."""
        moved = sum(
            len(change.after) - len(change.before)
            for change in self.draft.changes_to(draft)
            if change.start < self.start
        )
        return self.start + moved, self.end + moved

    def gradients(self, draft: Draft) -> TokenGradients:
        """Differentiate the score by the embeddings of the window where the answer is likeliest."""
        windows = make_windows(self.reader, self.question, [draft.text])
        span = self.span_in(draft)
        with torch.inference_mode():
            everything = np.arange(len(windows))
            output = self.reader.model(**windows.inputs(everything, self.reader.model))
            likely = span_log_probabilities(windows, everything, output, [span])
        group = np.array([int(likely.argmax())])
        found = embedding_gradients(
            self.reader.model,
            windows.inputs(group, self.reader.model),
            lambda output: -span_log_probabilities(windows, group, output, [span])[0],
        )
        return TokenGradients(*_token_characters(windows, group[0], len(found[0])), *found)

    @functools.cached_property
    def protected_words(self) -> frozenset[str]:
        """Content words of the question and words of the answer, in lower case."""
        own = (word for word in split_words(self.answer).words if is_content_word(word))
        return asked_words(self.question) | {word.lower() for word in own}

    def change_words(
        self, first: Verdict, allowed: int, victim: Queries, proposer: Proposer
    ) -> tuple[Draft, Verdict]:
        """Search for words of the context to replace; those of the answer and question stay."""
        positions = [
            i
            for i in replaceable(self.draft, len(self.draft.text))
            if self.draft.words[i].lower() not in self.protected_words
            and not self._is_in_answer(*self.draft.span(i))
        ]
        return search_words(self.draft, first, positions, allowed, victim, proposer)

    def _is_in_answer(self, start: int, end: int) -> bool:
        return start < self.end and end > self.start

    def add_sentence(
        self, first: Verdict, victim: Queries, vocabulary: Vocabulary, seed: int
    ) -> tuple[Draft, Verdict]:
        """Search for a sentence after the context that leads the reader away.

        Raises:
            NoDistractorError: the question or the answer has no word to replace.
        """
        text = self.draft.text
        asked = self.question, self.answer, text, vocabulary, victim.left, seed
        sentences = distractors(*asked)
        if not sentences:
            raise NoDistractorError(
                f"question: {self.question!r:.80} has no name, number or word of the context that "
                "could be replaced by a similar one; use method='words'"
            )
        best = self.draft, first
        for i in range(0, len(sentences), VERSIONS):
            drafts = [append_sentence(self.draft, each) for each in sentences[i : i + VERSIONS]]
            both = zip(drafts, victim.judge(drafts), strict=True)
            best = max([best, *both], key=lambda each: (each[1].success, each[1].score))
            if best[1].success:
                break
        return best


def append_sentence(draft: Draft, sentence: str) -> Draft:
    """Return a context with a sentence at its end, after a space."""
    space = "" if draft.gaps[-1][-1:].isspace() else " "
    return Draft(draft.words, (*draft.gaps[:-1], f"{draft.gaps[-1]}{space}{sentence}"))


# ---------------------------------------------------------------------------------------------
# Reading


def make_windows(reader: Reader, question: str, contexts: Sequence[str]) -> TokenWindows:
    """Cut contexts into the windows that `genkit.answer` reads by default."""
    size = choose_window_size(reader, None, None)
    questions = [question] * len(contexts)
    return TokenWindows(questions, contexts, reader.tokenizer, *size, limit=reader.limit)


@torch.inference_mode()
def read_contexts(
    reader: Reader, question: str, contexts: Sequence[str], spans: Sequence[tuple[int, int]]
) -> list[SpanReading]:
    """Answer a question from several contexts, as `genkit.answer` does by default.

    Args:
        spans: characters of each context whose probability is wanted.
    """
    learned = reader.calibration_or_default
    options = SpanOptions(1, learned.max_answer_len, True, learned.temperature)
    windows = make_windows(reader, question, contexts)
    rows = [QuestionSpans() for _ in contexts]
    likely = torch.full((len(contexts),), -torch.inf)
    for group in windows.groups(BATCH[machine.kind(reader.model.device)]):
        output = reader.model(**windows.inputs(group, reader.model))
        start, end = (windows.context_logits(x, group) for x in _logits(output))
        collect_spans(rows, windows, contexts, group, start, end, options)
        found = span_log_probabilities(windows, group, output, spans)
        for row, value in zip(windows.row[group], found, strict=True):
            likely[row] = max(likely[row], value)
    null_odds = learned.threshold if learned.impossible else None
    return [
        SpanReading(rank_answers(reader, question, context, row, null_odds, 1), float(value))
        for context, row, value in zip(contexts, rows, likely, strict=True)
    ]


def _logits(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return output.start_logits, output.end_logits


def span_log_probabilities(
    windows: TokenWindows, group: np.ndarray, output: Any, spans: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Return the log-probability of a span in windows, normalised over each.

    Args:
        group: which windows these are.
        output: of the model, for them.
        spans: characters of each context.

    Returns:
        (windows,), minus infinity where the span is not inside the window.
    """
    start, end = (windows.context_logits(x, group).log_softmax(-1) for x in _logits(output))
    found = []
    for i, window in enumerate(group):
        row, offset = windows.row[window], int(windows.first[window])
        tokens = windows.contexts[row]
        inside = (tokens.starts < spans[row][1]) & (tokens.ends > spans[row][0])
        (touched,) = np.nonzero(inside)
        if len(touched) and offset <= touched[0] and touched[-1] < windows.last[window]:
            first, last = 1 + int(touched[0]) - offset, 1 + int(touched[-1]) - offset
            found.append(start[i, first] + end[i, last])
        else:
            found.append(start.new_tensor(-torch.inf))
    return torch.stack(found)


def _token_characters(
    windows: TokenWindows, window: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the characters of the context that each token of a window has; -1 for others."""
    starts, ends = (torch.full((count,), -1) for _ in range(2))
    first, last, begin = (int(x[window]) for x in (windows.first, windows.last, windows.begin))
    tokens = windows.contexts[windows.row[window]]
    here = slice(begin, begin + last - first)
    starts[here] = torch.from_numpy(tokens.starts[first:last])
    ends[here] = torch.from_numpy(tokens.ends[first:last])
    return starts, ends


# ---------------------------------------------------------------------------------------------
# The answer to lead away from


def find_goal(reader: Reader, question: str, draft: Draft) -> tuple[SpanGoal, Verdict] | None:
    """Answer a question; the answer is what an attack leads away from.

    Args:
        draft: the context.

    Returns:
        The goal, and the verdict on the context as it is; None if the reader finds no answer.
    """
    context = draft.text
    (reading,) = read_contexts(reader, question, [context], [(0, len(context))])
    found = reading.answer
    if not found.answer:
        return None
    goal = SpanGoal(reader, question, draft, found.answer, found.start, found.end)
    return goal, goal.judge([draft])[0]
