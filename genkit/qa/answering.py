"""genkit.answer: extractive question answering by any encoder with a span head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from tqdm import tqdm

from genkit.qa.reader import DEFAULT, Reader, load_reader
from genkit.qa.spans import Span, Wanted, answers, null_probability
from genkit.qa.windows import Windows
from genkit.text.highlight import mark, sentence

HUGE = 700.0  # odds whose exponential is still a float
BATCH = {"cpu": 1024, "cuda": 1 << 15}  # tokens at once

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Answer:
    """An answer found in a text, and what there is to know about it."""

    question: str
    answer: str  # "" if the text has none
    score: float  # its probability, normalised over its window
    start: int  # characters of the context
    end: int
    window: tuple[int, int]  # characters that were read for it; a word cut there is whole above
    null_score: float | None  # probability that there is no answer; None: the model cannot tell
    confidence: float | None  # the score, calibrated; None: the model was not
    context: str = field(repr=False)
    alternatives: list[Answer] = field(default_factory=list, repr=False)  # from the 2nd best

    def __str__(self) -> str:
        return self.answer or "(no answer in this text)"

    def highlight(self, form: str = "terminal", whole: bool = False) -> str:
        """Show the answer in its sentence.

        Args:
            form: "terminal", with escape codes for bold; "html", a fragment with <mark>; "text".
            whole: show the whole context, not only the sentence.
        """
        first, last = (0, len(self.context)) if whole else self.sentence
        marked = mark(self.context, self.start, self.end, first, last, form)
        return marked if self.answer or whole else str(self)

    @property
    def sentence(self) -> tuple[int, int]:
        """The characters of the sentence, or the sentences, that the answer is in."""
        return sentence(self.context, self.start, self.end)


# ---------------------------------------------------------------------------------------------
# The verb


@overload
def answer(question: str, context: str, **options: Any) -> Answer: ...
@overload
def answer(
    question: str | Sequence[str], context: str | Sequence[str], **options: Any
) -> Answer | list[Answer]: ...
def answer(  # type: ignore[misc]  # the options of the two above are those of this one
    question: str | Sequence[str],
    context: str | Sequence[str],
    *,
    model: str | Path | Reader = DEFAULT,
    revision: str | None = None,
    top_k: int = 1,
    max_seq_len: int | None = None,
    doc_stride: int | None = None,
    max_answer_len: int | None = None,
    handle_impossible: bool | None = None,
    threshold: float | None = None,
    align_to_words: bool = True,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool | None = None,
    trust_remote_code: bool = False,
) -> Answer | list[Answer]:
    """Find the answer to a question in a text.

    Scores are those of the question-answering pipeline that transformers had until 5.3: start and
    end are normalised over a window's context, a span has the product, and spans of a window that
    read the same are one answer with their sum. Of several windows, the surest gives the score.

    Args:
        question: a question or several.
        context: the text, of any length; or one a question.
        model: folder, Hub id, or what `qa.load` returned; DistilBERT trained on SQuAD unless told.
        revision, dtype, quantize, compile, trust_remote_code: see `qa.load`.
        top_k: how many answers to give at most: the others are the best one's alternatives. They
            read differently and do not overlap.
        max_seq_len: tokens of a window, question included; 384 unless told, or what the model can.
        doc_stride: tokens of context that a window shares with the next; 128 unless told, or a half
            of shorter windows.
        max_answer_len: the most tokens of an answer; 15 unless told.
        handle_impossible: whether "" may be the answer: there is none. Unless told, if the model
            was trained for it by recipes/train_qa.py.
        threshold: log-odds of no answer against the best one above which there is none; 0 unless
            told, or what the model's validation set taught. A text whose likeliest spans are blank
            has none, either.
        align_to_words: answers are whole words. False: spans of tokens as they are, each with its
            own probability.

    A model by recipes/train_qa.py has max_seq_len, doc_stride and max_answer_len of its validation
    in place of these numbers.

    Returns:
        An `Answer` for one question and one context, otherwise a list of them.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    questions, contexts = _pairs(question, context)
    _check_count("top_k", top_k, 1)
    for name, flag in (
        ("handle_impossible", handle_impossible),
        ("align_to_words", align_to_words),
    ):
        if not isinstance(flag, bool | None):
            raise ValueError(f"{name} must be True or False, got {flag!r}")
    if not isinstance(model, Reader):
        model = load_reader(
            model,
            revision=revision,
            dtype=dtype,
            quantize=quantize,
            compile=compile,
            trust_remote_code=trust_remote_code,
        )
    elif revision or dtype or quantize or compile is not None:
        raise ValueError(
            "revision, dtype, quantize and compile are for loading; the model given is loaded"
        )
    if max_answer_len is None:
        max_answer_len = model.known.max_answer_len
    _check_count("max_answer_len", max_answer_len, 1)
    impossible, threshold = _null(model, handle_impossible, threshold)
    size = _window_size(model, max_seq_len, doc_stride)
    windows = Windows(questions, contexts, model.tokenizer, *size)
    wanted = Wanted(top_k, max_answer_len, align_to_words, model.known.temperature)
    found = find(model, windows, contexts, wanted)
    rows = [
        _record(model, *row, threshold if impossible else None, top_k)
        for row in zip(questions, contexts, found, strict=True)
    ]
    return rows[0] if isinstance(question, str) and isinstance(context, str) else rows


def _pairs(
    question: str | Sequence[str], context: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """Make as many questions as contexts, and look at each."""
    both = {}
    for name, given in (("question", question), ("context", context)):
        if not isinstance(given, str | Sequence) or isinstance(given, bytes):
            raise ValueError(f"{name} must be a text or a list of texts, got {given!r:.80}")
        both[name] = [given] if isinstance(given, str) else list(given)
        for i, text in enumerate(both[name]):
            _check_text(name if isinstance(given, str) else f"{name}[{i}]", text)
    questions, contexts = both.values()
    if not questions or not contexts:
        raise ValueError(f"{'context' if questions else 'question'}: an empty list; give a text")
    count = max(len(questions), len(contexts))
    if isinstance(question, str):
        questions = questions * count
    if isinstance(context, str):
        contexts = contexts * count
    if len(questions) != len(contexts):
        raise ValueError(
            f"question, context: {len(questions)} questions and {len(contexts)} contexts; give one "
            "context for all questions, or one each"
        )
    return questions, contexts


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {text!r:.80}")
    if not text or text.isspace():
        raise ValueError(f"{name} is empty{' but for spaces' if text else ''}; give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a surrogate pair: {error.reason}") from None


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")


def _window_size(
    reader: Reader, max_seq_len: int | None, doc_stride: int | None
) -> tuple[int, int]:
    """Choose the tokens of a window, and of its context that the next one shares."""
    if max_seq_len is None:
        max_seq_len = min(reader.known.max_seq_len, reader.limit)
    _check_count("max_seq_len", max_seq_len, 1)
    if max_seq_len > reader.limit:
        raise ValueError(
            f"max_seq_len: {max_seq_len} is more than the {reader.limit} that the model reads"
        )
    if doc_stride is None:
        doc_stride = min(reader.known.doc_stride, max_seq_len // 2)
    _check_count("doc_stride", doc_stride, 0)
    return max_seq_len, doc_stride


def _null(reader: Reader, handle: bool | None, threshold: float | None) -> tuple[bool, float]:
    """Choose whether there may be no answer, and the odds that it takes."""
    real = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if threshold is not None and (not real or math.isnan(threshold)):
        raise ValueError(f"threshold must be a number, log-odds, got {threshold!r}")
    if handle is False and threshold is not None:
        raise ValueError(
            f"threshold: {threshold} is the odds of no answer, which handle_impossible=False rules "
            "out; leave out one of them"
        )
    if handle is None:
        handle = reader.known.impossible or threshold is not None
    if handle and not reader.has_null:
        raise ValueError(
            f"handle_impossible: {reader.name} has no [CLS] before the question, which could stand "
            "for no answer; leave it out"
        )
    return handle, reader.known.threshold if threshold is None else threshold


# ---------------------------------------------------------------------------------------------
# Reading


@dataclass
class Found:
    """What the windows of a question gave."""

    spans: list[Span] = field(default_factory=list)
    null: float = 1.0  # the least of any window: an answer in one is enough
    null_confidence: float = 1.0


@torch.inference_mode()
def find(reader: Reader, windows: Windows, contexts: Sequence[str], wanted: Wanted) -> list[Found]:
    """Read windows in batches of like length, and gather what they give; one `Found` a question.

    Args:
        contexts: the texts of `windows`.
    """
    rows = [Found() for _ in contexts]
    bar = tqdm(total=len(windows), desc="reading", unit=" windows", delay=2, leave=False)
    with bar:
        for group in windows.groups(BATCH[reader.model.device.type]):
            logits = reader.encoder(windows.inputs(group, reader.model))
            start, end = (windows.of_context(x, group) for x in logits)
            gather(rows, windows, contexts, group, start, end, wanted)
            bar.update(len(group))
    return rows


def gather(
    rows: list[Found],
    windows: Windows,
    contexts: Sequence[str],
    group: np.ndarray,
    start: torch.Tensor,
    end: torch.Tensor,
    wanted: Wanted,
) -> None:
    """Add what windows give to the findings of their questions; see `spans.answers`."""
    best = answers(start, end, group, windows, contexts, wanted)
    nulls = null_probability(start, end, 1.0).tolist()
    confidences = null_probability(start, end, wanted.temperature).tolist()
    for row, spans, null, sure in zip(windows.row[group], best, nulls, confidences, strict=True):
        rows[row].spans += spans
        rows[row].null = min(rows[row].null, null)
        rows[row].null_confidence = min(rows[row].null_confidence, sure)


def _record(
    reader: Reader,
    question: str,
    context: str,
    found: Found,
    threshold: float | None,
    top_k: int,
) -> Answer:
    """Rank the answers of all windows; no answer is one of them unless `threshold` is None."""
    ranked = distinct(found.spans, context, top_k)
    if threshold is not None or not ranked:
        nothing = Span(found.null, found.null_confidence, 0, 0, (0, len(context)))
        least = found.null * math.exp(min(-(threshold or 0.0), HUGE))
        better = [span for span in ranked if span.score >= least]
        ranked.insert(len(better), nothing)
    null = found.null if reader.has_null else None
    calibrated = reader.calibration is not None
    records = [
        Answer(
            question,
            context[span.start : span.end],
            span.score,
            span.start,
            span.end,
            span.window,
            null,
            span.confidence if calibrated else None,
            context,
        )
        for span in ranked[:top_k]
    ]
    return dataclasses.replace(records[0], alternatives=records[1:])


def distinct(spans: list[Span], context: str, count: int) -> list[Span]:
    """Keep the best spans that neither touch nor read as a better one."""
    kept: list[Span] = []
    readings: set[str] = set()
    for span in sorted(spans, key=lambda span: (-span.score, span.start)):
        reading = context[span.start : span.end].lower()
        touching = any(span.start < other.end and other.start < span.end for other in kept)
        if not touching and reading not in readings:
            kept.append(span)
            readings.add(reading)
        if len(kept) == count:
            break
    return kept
