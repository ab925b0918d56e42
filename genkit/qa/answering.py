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

from genkit import console, machine
from genkit.arguments import check_unicode, explain_names
from genkit.hub import kinds, names
from genkit.qa.reader import DEFAULT, Reader, load_reader
from genkit.qa.spans import AnswerSpan, SpanOptions, best_spans, null_probability
from genkit.qa.windows import TokenWindows
from genkit.seeds import is_whole
from genkit.text.highlight import mark, sentence

HUGE = 700.0  # log-odds whose exponential is still a float
BATCH: dict[machine.Kind, int] = {"cpu": 1024, "accelerator": 1 << 15}  # tokens at once

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Answer:
    """An answer found in a text, with its scores and the window that it was read in.

    Scores are those of the question-answering pipeline that transformers had until 5.3: start and
    end are softmaxes over the context of a window, a span has their product, and spans of a window
    with the same text are one answer with the sum of their scores. An answer in several windows has
    its highest score.
    """

    question: str
    answer: str  # "" if the text has none
    score: float  # its probability, normalised over its window
    start: int  # characters of the context
    end: int
    window: tuple[int, int]  # characters that were read for it; a word cut there is whole above
    null_score: float | None  # probability of no answer; None: the model has no token for it
    confidence: float | None  # the score, calibrated; None: the model is not calibrated
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

    def _repr_html_(self) -> str:
        return f"<p>{self.highlight('html')}</p>"

    @property
    def sentence(self) -> tuple[int, int]:
        """The characters of the sentence, or the sentences, that the answer is in."""
        return sentence(self.context, self.start, self.end)


# ---------------------------------------------------------------------------------------------
# The verb


@overload
def answer(  # type: ignore[overload-overlap]  # a str is a Sequence[str], too
    question: str,
    context: str,
    *,
    model: str | Path | Reader = ...,
    revision: str | None = ...,
    top_k: int = ...,
    max_seq_len: int | None = ...,
    doc_stride: int | None = ...,
    max_answer_len: int | None = ...,
    handle_impossible: bool | None = ...,
    threshold: float | None = ...,
    align_to_words: bool = ...,
    dtype: str | None = ...,
    quantize: str | None = ...,
    trust_remote_code: bool = ...,
    device: str | None = ...,
) -> Answer: ...
@overload
def answer(  # and a text with several contexts, which matches this one, too
    question: Sequence[str],
    context: str | Sequence[str],
    *,
    model: str | Path | Reader = ...,
    revision: str | None = ...,
    top_k: int = ...,
    max_seq_len: int | None = ...,
    doc_stride: int | None = ...,
    max_answer_len: int | None = ...,
    handle_impossible: bool | None = ...,
    threshold: float | None = ...,
    align_to_words: bool = ...,
    dtype: str | None = ...,
    quantize: str | None = ...,
    trust_remote_code: bool = ...,
    device: str | None = ...,
) -> list[Answer]: ...
@explain_names
def answer(
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
    trust_remote_code: bool = False,
    device: str | None = None,
) -> Answer | list[Answer]:
    """Find the answer to a question in a text, or to each of several; see `Answer` for the scores.

    Args:
        question: a question or several.
        context: the text, of any length; or one for each question.
        model: folder or Hub id of a model for question answering (in Python, also what `load`
            returned); default: DistilBERT trained on SQuAD.
        revision: branch, tag or commit on the Hub.
        top_k: the most answers; alternatives to the best differ in their text and do not overlap.
        max_seq_len: tokens of a window with its question; default: 384, at most the model's limit.
        doc_stride: tokens of context that windows share; default: 128, or half a window if less.
        max_answer_len: the most tokens of an answer; default: 15.
        handle_impossible: whether the answer may be "", for none in the text; default: if the model
            was trained on questions without an answer.
        threshold: log-odds of no answer against the best answer above which the answer is "";
            default: what the model's validation chose, or 0.
        align_to_words: extend answers to whole words; without it, spans of tokens as they are,
            each with its own probability.
        dtype: "float32" (default), "bfloat16", or on a GPU "float16".
        quantize: "int8", on a CPU.
        trust_remote_code: run code that the model brings along.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    The defaults of max_seq_len, doc_stride and max_answer_len of a model trained by
    recipes/train_qa.py are those of its validation. A text in which only white space is likely has
    no answer in any case.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    questions, contexts = _pairs(question, context)
    _check_count("top_k", top_k, 1)
    _check_flags(handle_impossible=handle_impossible, align_to_words=align_to_words)
    reader = as_reader(model, revision, dtype, quantize, trust_remote_code, device)
    options = _choose_span_options(reader, top_k, max_answer_len, align_to_words)
    null_odds = _choose_null_odds(reader, handle_impossible, threshold)
    size = choose_window_size(reader, max_seq_len, doc_stride)
    given = {"question": question, "context": context}
    windows = TokenWindows(
        questions,
        contexts,
        reader.tokenizer,
        *size,
        limit=reader.limit,
        name=lambda which, row: _named(which, given[which], row),
    )
    found = read_windows(reader, windows, contexts, options)
    triples = zip(questions, contexts, found, strict=True)
    rows = [rank_answers(reader, *triple, null_odds, top_k) for triple in triples]
    return rows[0] if isinstance(question, str) and isinstance(context, str) else rows


def as_reader(
    model: str | Path | Reader,
    revision: str | None,
    dtype: str | None,
    quantize: str | None,
    trust_remote_code: bool,
    device: str | None,
) -> Reader:
    """Load a model, or return one that is loaded, with which no option of loading can be used."""
    if not isinstance(model, Reader):
        return load_reader(
            model,
            revision=revision,
            dtype=dtype,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
            device=device,
        )
    kinds.refuse_loading(revision=revision, dtype=dtype, quantize=quantize, device=device)
    return model


def _pairs(
    question: str | Sequence[str], context: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """Check the texts, and return as many questions as contexts."""
    both = {}
    for name, given in (("question", question), ("context", context)):
        if not isinstance(given, str | Sequence) or isinstance(given, bytes):
            raise ValueError(f"{name} must be a text or a list of texts, got {given!r:.80}")
        both[name] = [given] if isinstance(given, str) else list(given)
        for i, text in enumerate(both[name]):
            _check_text(_named(name, given, i), text)
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


def _named(name: str, given: str | Sequence[str], row: int) -> str:
    """Name a text by its place, if a list was given."""
    return name if isinstance(given, str) else f"{name}[{row}]"


def _check_text(name: str, text: Any) -> None:
    check_unicode(name, text)
    if not text or text.isspace():
        raise ValueError(f"{name} is empty{' but for spaces' if text else ''}; give a text")
    if name.startswith("context"):
        names.check_no_file(name, text)


def _check_count(name: str, value: Any, least: int) -> None:
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool | None):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def choose_window_size(
    reader: Reader, max_seq_len: int | None, doc_stride: int | None
) -> tuple[int, int]:
    """Return the tokens of a window, and of its context that the next one shares."""
    learned = reader.calibration_or_default
    if max_seq_len is None:
        max_seq_len = min(learned.max_seq_len, reader.limit)
    _check_count("max_seq_len", max_seq_len, 1)
    if max_seq_len > reader.limit:
        raise ValueError(
            f"max_seq_len: {max_seq_len} is more than the {reader.limit} that the model reads"
        )
    if doc_stride is None:
        doc_stride = min(learned.doc_stride, max_seq_len // 2)
    _check_count("doc_stride", doc_stride, 0)
    return max_seq_len, doc_stride


def _choose_span_options(
    reader: Reader, top_k: int, max_answer_len: int | None, align_to_words: bool
) -> SpanOptions:
    """Return how spans are chosen, by the model's calibration where the user leaves it open."""
    learned = reader.calibration_or_default
    if max_answer_len is None:
        max_answer_len = learned.max_answer_len
    _check_count("max_answer_len", max_answer_len, 1)
    return SpanOptions(top_k, max_answer_len, align_to_words, learned.temperature)


def _choose_null_odds(
    reader: Reader, handle_impossible: bool | None, threshold: float | None
) -> float | None:
    """Return the log-odds above which there is no answer; None if there always is one."""
    real = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if threshold is not None and (not real or math.isnan(threshold)):
        raise ValueError(f"threshold must be a number, log-odds, got {threshold!r}")
    if handle_impossible is False and threshold is not None:
        raise ValueError(
            f"threshold: {threshold} is the log-odds of no answer, which handle_impossible=False "
            "rules out; leave out one of them"
        )
    learned = reader.calibration_or_default
    if handle_impossible is None:
        handle_impossible = learned.impossible or threshold is not None
    if not handle_impossible:
        return None
    if not reader.has_null:
        raise ValueError(
            f"handle_impossible: {reader.name} has no [CLS] before the question, which could stand "
            "for no answer; leave it out"
        )
    return learned.threshold if threshold is None else threshold


# ---------------------------------------------------------------------------------------------
# Reading windows


@dataclass
class QuestionSpans:
    """The best spans of all windows of a question, and the probability of no answer."""

    spans: list[AnswerSpan] = field(default_factory=list)
    null: float = 1.0  # the least of any window: an answer in one is enough
    null_confidence: float = 1.0


@torch.inference_mode()
def read_windows(
    reader: Reader, windows: TokenWindows, contexts: Sequence[str], options: SpanOptions
) -> list[QuestionSpans]:
    """Run the model on windows, in batches of like length; return the spans of each question.

    Args:
        contexts: the texts of `windows`.
    """
    rows = [QuestionSpans() for _ in contexts]
    with console.bar(None, "reading", len(windows), " windows") as bar:
        for group in windows.groups(BATCH[machine.kind(reader.model.device)]):
            logits = reader.encoder(windows.inputs(group, reader.model))
            start, end = (windows.context_logits(x, group) for x in logits)
            collect_spans(rows, windows, contexts, group, start, end, options)
            bar.update(len(group))
    return rows


def collect_spans(
    rows: list[QuestionSpans],
    windows: TokenWindows,
    contexts: Sequence[str],
    group: np.ndarray,
    start: torch.Tensor,
    end: torch.Tensor,
    options: SpanOptions,
) -> None:
    """Add the best spans of a group of windows to their questions; see `spans.best_spans`."""
    best = best_spans(start, end, group, windows, contexts, options)
    nulls = null_probability(start, end, 1.0).tolist()
    confidences = null_probability(start, end, options.temperature).tolist()
    for row, spans, null, sure in zip(windows.row[group], best, nulls, confidences, strict=True):
        rows[row].spans += spans
        rows[row].null = min(rows[row].null, null)
        rows[row].null_confidence = min(rows[row].null_confidence, sure)


def rank_answers(
    reader: Reader,
    question: str,
    context: str,
    found: QuestionSpans,
    null_odds: float | None,
    top_k: int,
) -> Answer:
    """Rank the spans of all windows; no answer is one of them unless `null_odds` is None."""
    ranked = distinct_spans(found.spans, context, top_k)
    if null_odds is not None or not ranked:
        nothing = AnswerSpan(found.null, found.null_confidence, 0, 0, (0, len(context)))
        least = found.null * math.exp(min(-(null_odds or 0.0), HUGE))
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


def distinct_spans(spans: list[AnswerSpan], context: str, count: int) -> list[AnswerSpan]:
    """Keep the best spans that neither overlap a better one nor have its text."""
    kept: list[AnswerSpan] = []
    texts: set[str] = set()
    for span in sorted(spans, key=lambda span: (-span.score, span.start)):
        text = context[span.start : span.end].lower()
        overlaps = any(span.start < other.end and other.start < span.end for other in kept)
        if not overlaps and text not in texts:
            kept.append(span)
            texts.add(text)
        if len(kept) == count:
            break
    return kept
