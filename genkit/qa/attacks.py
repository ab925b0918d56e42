"""Adversarial contexts: a reader of answers is led away from the right one, which stays as it is.

Either a few words are changed, none of them the answer's or the question's, or a sentence is added
that answers another question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from genkit.arguments import check_unicode, explain_names
from genkit.hub import kinds
from genkit.metrics.squad import compute_exact, compute_f1
from genkit.notebook import TextRecord
from genkit.qa.answering import as_reader
from genkit.qa.reader import Reader
from genkit.qa.span_goal import SpanGoal, find_goal
from genkit.seeds import row_seeds
from genkit.text import word_search
from genkit.text.attacks import (
    BUDGET,
    MAX_CHANGED,
    check_text,
    check_words,
    describe_changes,
    describe_search,
    load_judge,
    mark_changes,
    measure_perplexity,
    save_json,
)
from genkit.text.candidates import Vocabulary
from genkit.text.edits import Change, Draft, split_words
from genkit.text.encoders import check_differentiable
from genkit.text.language_model import LanguageModel
from genkit.text.masked_models import MaskedModel, load_masked_model
from genkit.text.word_search import Candidates, Importance, Proposer, Queries, Verdict

Method = Literal["words", "distractor"]

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class AttackedAnswer(TextRecord):
    """A context, its adversarial version, and what a reader answers from both."""

    question: str
    context: str
    adversarial: str  # the context with some words changed, or a sentence added
    answer: str  # from the context
    probability: float  # of the answer's characters, normalised over a window
    predicted: str  # the answer from the adversarial context; "": none
    adversarial_probability: float  # of the characters of the first answer
    exact: bool  # whether the two answers are the same, as SQuAD compares them
    f1: float  # of their words
    success: bool  # they share no word
    changes: list[Change]
    distractor: str | None  # the sentence that was added
    words: int  # of the context
    queries: int  # contexts that were given to the model, and gradients
    perplexity: float | None  # of the context under the language model, if one was given
    adversarial_perplexity: float | None
    settings: dict[str, Any]  # of the search, with its limits
    model: str

    @property
    def changed(self) -> float:
        """The share of the words of the context that was changed."""
        return len(self.changes) / self.words

    def __str__(self) -> str:
        marked = mark_changes(self.context, self.changes)
        if self.distractor:
            marked = f"{self.context.rstrip()} «+ {self.distractor}»"
            changed = "a sentence added"
        else:
            changed = describe_changes(self.changes, self.words)
        lines = [
            self.question,
            f"{self.answer} {self.probability:.1%} → {self.adversarial_probability:.1%}; "
            f"the answer is now {self.predicted or '(none)'} (F1 {self.f1:.2f}): "
            f"{'success' if self.success else 'no success'}",
            marked,
            f"{changed}, {self.queries} queries",
        ]
        if self.perplexity is not None and self.adversarial_perplexity is not None:
            lines.append(f"perplexity {self.perplexity:.4g} → {self.adversarial_perplexity:.4g}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON."""
        save_json(self, path)


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def attack_answer(
    question: str,
    context: str,
    *,
    model: str | Path | Reader,
    answer: str | Sequence[str] | None = None,
    method: Method = "words",
    candidates: Candidates = "gradient",
    importance: Importance = "gradient",
    max_changed: float = MAX_CHANGED,
    budget: int = BUDGET,
    seed: int = 0,
    masked_model: str | Path | None = None,
    language_model: str | Path | LanguageModel | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> AttackedAnswer:
    """Change a context so that a reader no longer finds the answer, which stays as it is.

    Neither the words of the answer nor the content words of the question (its names, its numbers
    and its longer words) are changed or put in anywhere.

    Args:
        question: the question.
        context: the text that has the answer.
        model: folder or Hub id of a model for question answering, or what `genkit.load` returned.
        answer: the right answer, or several; default: the one that the model gives.
        method: words, which replaces some; or distractor, which adds a sentence that answers
            another question: with other names, numbers and another answer.
        candidates, importance, max_changed, masked_model: of method="words"; see
            `genkit.text.attacks.attack_text`.
        budget: the most queries: contexts that are given to the model. A gradient counts as one.
        seed: of the typing errors, or of the sentence.
        language_model: folder or Hub id of a language model, for the perplexity of the context
            before and after (in Python, also what `genkit.load` returned).
        revision: a branch, tag or commit of the reader on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid; or the model's answer shares no word with the right one,
            before any change.

    Source: see `genkit.text.attacks.attack_text`; AddSent, Jia and Liang 2017,
        https://arxiv.org/abs/1707.07328
    """
    check_text("question", question)
    check_text("context", context)
    golds = _as_answers(answer)
    (row_seed,) = row_seeds(seed, 1, "a question")
    check_method(method)
    word_search.check_search(candidates, importance, max_changed, budget, masked_model)
    draft = split_words(context)
    allowed = check_words("context", draft, max_changed)
    reader = load_reader_to_attack(model, revision, device)
    masked = None if masked_model is None else load_masked_model(masked_model, device=device)
    language = load_judge(language_model, device)
    goal, first = _find_right_answer(reader, question, draft, golds)
    before = measure_perplexity(context, language)
    search = AnswerSearch(method, candidates, importance, allowed, budget, row_seed, masked)
    result = search.run(goal, first)
    perplexities = before, measure_perplexity(result[0].text, language)
    settings = describe_search(
        candidates, importance, max_changed, budget, row_seed, masked, language
    )
    return _as_record(goal, first, result, perplexities, {"method": method} | settings)


def _as_record(
    goal: SpanGoal,
    first: Verdict,
    result: tuple[Draft, Verdict, int],
    perplexities: tuple[float | None, float | None],
    settings: dict[str, Any],
) -> AttackedAnswer:
    """Describe a context and its adversarial version by what the reader answers from both.

    Args:
        first: verdict on the context as it was.
        result: see `AnswerSearch.run`.
        perplexities: of the context as it was, and of its adversarial version.
    """
    found, last, queries = result
    draft, other = goal.draft, last.output.answer.answer
    return AttackedAnswer(
        question=goal.question,
        context=draft.text,
        adversarial=found.text,
        answer=goal.answer,
        probability=math.exp(first.output.log_probability),
        predicted=other,
        adversarial_probability=math.exp(last.output.log_probability),
        exact=compute_exact(other, goal.answer),
        f1=compute_f1(other, goal.answer),
        success=last.success,
        changes=draft.changes_to(found),
        distractor=found.gaps[-1][len(draft.gaps[-1]) :].strip() or None,
        words=len(draft.words),
        queries=queries,
        perplexity=perplexities[0],
        adversarial_perplexity=perplexities[1],
        settings=settings,
        model=goal.reader.name,
    )


@dataclass(frozen=True)
class AnswerSearch:
    """How an adversarial context is searched for."""

    method: Method
    candidates: Candidates
    importance: Importance
    allowed: int  # words that may be changed
    budget: int
    seed: int
    masked: MaskedModel | None = None

    def run(self, goal: SpanGoal, first: Verdict) -> tuple[Draft, Verdict, int]:
        """Search; return the context that is nearest to the goal, its verdict, and the queries."""
        victim = Queries(goal, self.budget)
        vocabulary = Vocabulary(goal.reader.model, goal.reader.tokenizer)
        if self.method == "distractor":
            return *goal.add_sentence(first, victim, vocabulary, self.seed), victim.used
        proposer = Proposer(
            self.candidates,
            self.importance,
            vocabulary,
            self.masked,
            self.seed,
            goal.protected_words,
        )
        return *goal.change_words(first, self.allowed, victim, proposer), victim.used


def _find_right_answer(
    reader: Reader, question: str, draft: Draft, golds: Sequence[str] | None
) -> tuple[SpanGoal, Verdict]:
    """Answer a question; see `find_goal`.

    Args:
        golds: the right answers; None: what the reader answers.

    Raises:
        ValueError: there is no answer, or it shares no word with a right one.
    """
    found = find_goal(reader, question, draft)
    if found is None:
        raise ValueError(f"context: {reader.name} finds no answer to {question!r:.80} in it")
    answer = found[0].answer
    if golds is not None and not max(compute_f1(answer, gold) for gold in golds):
        raise ValueError(
            f"answer: {', '.join(map(repr, golds))} is missed already: the model answers "
            f"{answer!r}; there is nothing to attack"
        )
    return found


def check_method(method: str) -> None:
    """Refuse what is no method.

    Raises:
        ValueError: it is none; the methods are named.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")


def _as_answers(answer: str | Sequence[str] | None) -> list[str] | None:
    """Return the right answers as a list; None if none was given."""
    if answer is None:
        return None
    answers = [answer] if isinstance(answer, str) else list(answer)
    for each in answers:
        check_unicode("answer", each)
    if not any(answers):
        raise ValueError(f"answer: {answer!r} has no text; leave it out, or give the right answer")
    return answers


def load_reader_to_attack(
    model: str | Path | Reader, revision: str | None, device: str | None
) -> Reader:
    """Load a reader to attack.

    Raises:
        ValueError: there is no such model, or it has no gradients in float32.
    """
    kinds.check_loaded(model, takes="Reader")
    reader = as_reader(model, revision, None, None, False, device)
    check_differentiable(reader.model, reader.tokenizer, reader.name, "model")
    if reader.precision != "float32":
        raise ValueError(
            f"model: {reader.name!r} was loaded in {reader.precision}, which has no gradients in "
            "float32; load it without dtype= and quantize="
        )
    return reader
