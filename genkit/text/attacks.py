"""Adversarial texts: a few words changed, so that a classifier chooses another class."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genkit.arguments import check_unicode, explain_names
from genkit.data.tokens import encode_text
from genkit.files import write_text
from genkit.hub import kinds, names
from genkit.notebook import TextRecord
from genkit.seeds import row_seeds
from genkit.text.candidates import Vocabulary
from genkit.text.classifiers import TextClassifier, load_text_classifier
from genkit.text.edits import Change, Draft, has_letters, replaceable, split_words
from genkit.text.encoders import TokenGradients, check_differentiable
from genkit.text.language_model import LanguageModel, as_language_model
from genkit.text.masked_models import MaskedModel, load_masked_model
from genkit.text.perplexity import perplexity
from genkit.text.word_search import (
    Candidates,
    Importance,
    Proposer,
    Queries,
    Verdict,
    check_search,
    search_words,
    words_allowed,
)

MAX_CHANGED, BUDGET = 0.2, 500  # by default: share of words, and texts given to the model

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class AttackedText(TextRecord):
    """A text, its adversarial version, and what a classifier makes of both."""

    text: str
    adversarial: str  # the text with some words changed; all else is as it was
    label: str  # the class of the text
    probability: float  # of the label, of the text
    predicted: str  # the class that the model predicts for the adversarial text
    predicted_probability: float
    target: str | None  # the class to reach; None: any other than the label
    success: bool
    changes: list[Change]
    words: int  # of the text
    queries: int  # texts that were given to the model, and gradients
    perplexity: float | None  # of the text under the language model, if one was given
    adversarial_perplexity: float | None
    settings: dict[str, Any]  # of the search, with its limits
    model: str

    @property
    def changed(self) -> float:
        """The share of the words that was changed."""
        return len(self.changes) / self.words

    def __str__(self) -> str:
        wanted = f" (wanted: {self.target})" if self.target and not self.success else ""
        lines = [
            f"{self.label} {self.probability:.1%} → {self.predicted} "
            f"{self.predicted_probability:.1%}{wanted}: "
            f"{'success' if self.success else 'no success'}",
            mark_changes(self.text, self.changes),
            f"{describe_changes(self.changes, self.words)}, {self.queries} queries",
        ]
        if self.perplexity is not None and self.adversarial_perplexity is not None:
            lines.append(f"perplexity {self.perplexity:.4g} → {self.adversarial_perplexity:.4g}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON."""
        save_json(self, path)


def mark_changes(text: str, changes: Sequence[Change]) -> str:
    """Write the adversarial version of a text, with each change as «before → after»."""
    parts, end = [], 0
    for change in changes:
        parts += [text[end : change.start], f"«{change.before} → {change.after}»"]
        end = change.start + len(change.before)
    return "".join([*parts, text[end:]])


def describe_changes(changes: Sequence[Change], words: int) -> str:
    """Say how many words were changed, and their share."""
    return f"{len(changes)} of {words} words changed ({len(changes) / words:.1%})"


def save_json(record: Any, path: str | Path) -> None:
    """Write a record as JSON, whole or not at all."""
    content = json.dumps(dataclasses.asdict(record), ensure_ascii=False, indent=1)
    write_text(Path(path), content + "\n")


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def attack_text(
    text: str,
    *,
    model: str | Path | TextClassifier,
    label: str | int | None = None,
    target: str | int | None = None,
    candidates: Candidates = "gradient",
    importance: Importance = "gradient",
    max_changed: float = MAX_CHANGED,
    budget: int = BUDGET,
    seed: int = 0,
    masked_model: str | Path | None = None,
    language_model: str | Path | LanguageModel | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> AttackedText:
    """Change a few words of a text so that a classifier chooses another class.

    Words are replaced greedily, those first that matter most. What is between words never changes,
    nor do numbers. Of a text longer than the model reads, words at its end are left as they are.

    Args:
        text: the text.
        model: folder or Hub id of a classifier of texts, or what `genkit.load` returned.
        label: true class of the text, by name or number; default: the one that the model predicts.
        target: class to reach; default: any other than the label.
        candidates: words to try: gradient, those of the model's vocabulary that raise the score
            most to first order; mlm, those that a masked language model finds likely in the place;
            characters, typing errors.
        importance: which words come first: by gradient, one query a word changed; or deletion, by
            the score without a word, one query for each word of the text.
        max_changed: largest share of the words that may be changed.
        budget: the most queries: texts that are given to the model. A gradient counts as one.
        seed: of the typing errors.
        masked_model: folder or Hub id of a masked language model, for candidates="mlm".
        language_model: folder or Hub id of a language model, for the perplexity of the text before
            and after (in Python, also what `genkit.load` returned).
        revision: a branch, tag or commit of the classifier on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid; or the model predicts another class than the label, or
            the target, before any change.

    Source: Ebrahimi et al. 2018, https://arxiv.org/abs/1712.06751; Garg and Ramakrishnan 2020,
        https://arxiv.org/abs/2004.01970; Gao et al. 2018, https://arxiv.org/abs/1801.04354;
        Yoo et al. 2020, https://arxiv.org/abs/2009.06368
    """
    check_text("text", text)
    (row_seed,) = row_seeds(seed, 1, "a text")
    check_search(candidates, importance, max_changed, budget, masked_model)
    draft = split_words(text)
    allowed = check_words("text", draft, max_changed)
    classifier = load_victim(model, revision, device)
    goal, output = _find_goal(classifier, text, label, target)
    masked = None if masked_model is None else load_masked_model(masked_model, device=device)
    language = load_judge(language_model, device)
    before = measure_perplexity(text, language)
    vocabulary = Vocabulary(classifier.model, classifier.tokenizer)
    proposer = Proposer(candidates, importance, vocabulary, masked, row_seed)
    result = goal.attack(draft, output, allowed, budget, proposer)
    perplexities = before, measure_perplexity(result[0].text, language)
    settings = describe_search(
        candidates, importance, max_changed, budget, row_seed, masked, language
    )
    return _as_record(goal, draft, output, result, perplexities, settings)


def describe_search(
    candidates: Candidates,
    importance: Importance,
    max_changed: float,
    budget: int,
    seed: int,
    masked: MaskedModel | None,
    language: LanguageModel | None,
) -> dict[str, Any]:
    """Return the settings of a search as they stand in its record."""
    return {
        "candidates": candidates,
        "importance": importance,
        "max_changed": max_changed,
        "budget": budget,
        "seed": seed,
        "masked_model": masked.name if masked else None,
        "language_model": language.name if language else None,
    }


def _as_record(
    goal: ClassGoal,
    draft: Draft,
    output: torch.Tensor,
    result: tuple[Draft, Verdict, int],
    perplexities: tuple[float | None, float | None],
    settings: dict[str, Any],
) -> AttackedText:
    """Describe a text and its adversarial version by what the classifier makes of both.

    Args:
        output: log-probabilities of the text as it was, (classes,).
        result: see `ClassGoal.attack`.
        perplexities: of the text as it was, and of its adversarial version.
    """
    found, verdict, queries = result
    names, predicted = goal.classifier.names, int(verdict.output.argmax())
    return AttackedText(
        text=draft.text,
        adversarial=found.text,
        label=names[goal.label],
        probability=float(output[goal.label].exp()),
        predicted=names[predicted],
        predicted_probability=float(verdict.output[predicted].exp()),
        target=None if goal.target is None else names[goal.target],
        success=verdict.success,
        changes=draft.changes_to(found),
        words=len(draft.words),
        queries=queries,
        perplexity=perplexities[0],
        adversarial_perplexity=perplexities[1],
        settings=settings,
        model=goal.classifier.name,
    )


# ---------------------------------------------------------------------------------------------
# The goal


@dataclass(frozen=True)
class ClassGoal:
    """A classifier under attack, with the class to leave, and perhaps one to reach."""

    classifier: TextClassifier
    label: int
    target: int | None = None

    def score(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """Return how far texts are beyond the goal, (..., classes) to (...): above 0 is success.

        It is the margin of the target over the best other class; without a target, that of the
        best other class over the label.
        """
        one = self.label if self.target is None else self.target
        rest = [i for i in range(log_probabilities.shape[-1]) if i != one]
        margin = log_probabilities[..., one] - log_probabilities[..., rest].amax(-1)
        return -margin if self.target is None else margin

    def judge(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Judge several versions of a text."""
        found = self.classifier.log_probabilities([draft.text for draft in drafts])
        return [self.verdict(row) for row in found]

    def verdict(self, log_probabilities: torch.Tensor) -> Verdict:
        """Judge a text by its log-probabilities, (classes,)."""
        score = float(self.score(log_probabilities))
        return Verdict(score, score > 0, log_probabilities)

    def gradients(self, draft: Draft) -> TokenGradients:
        """Differentiate the score of a text."""
        return self.classifier.gradients(draft.text, self.score)

    def attack(
        self,
        draft: Draft,
        output: torch.Tensor,
        allowed: int,
        budget: int,
        proposer: Proposer,
    ) -> tuple[Draft, Verdict, int]:
        """Search for an adversarial version of a text.

        Args:
            output: log-probabilities of the text as it is, (classes,).
            allowed: how many words may be changed.
            budget: the most queries.

        Returns:
            The version that is nearest to the goal, its verdict, and the queries used.
        """
        read = self.classifier.characters_read(draft.text)
        positions = replaceable(draft, read)
        victim = Queries(self, budget)
        found = search_words(draft, self.verdict(output), positions, allowed, victim, proposer)
        return *found, victim.used


# ---------------------------------------------------------------------------------------------
# Edges


def check_text(name: str, text: Any) -> None:
    """Refuse what is no text, or an empty one.

    Raises:
        ValueError: it is one of these.
    """
    check_unicode(name, text)
    if not text or text.isspace():
        raise ValueError(f"{name} is empty{' but for spaces' if text else ''}; give a text")
    names.check_no_file(name, text)


def check_words(name: str, draft: Draft, max_changed: float) -> int:
    """Return how many words of a text may be changed.

    Raises:
        ValueError: none may; or there is none but numbers.
    """
    if not any(map(has_letters, draft.words)):
        raise ValueError(f"{name}: {draft.text!r:.60} has no word that could be changed")
    allowed = words_allowed(max_changed, len(draft.words))
    if not allowed:
        raise ValueError(
            f"max_changed={max_changed:g} of {len(draft.words)} words is none; raise it to "
            f"{math.ceil(1000 / len(draft.words)) / 1000:g} or more"
        )
    return allowed


def load_victim(
    model: str | Path | TextClassifier, revision: str | None, device: str | None
) -> TextClassifier:
    """Load a classifier to attack.

    Raises:
        ValueError: there is no such model, or it has no gradients.
    """
    kinds.check_loaded(model, takes="TextClassifier")
    classifier = load_text_classifier(model, revision=revision, device=device)
    check_differentiable(classifier.model, classifier.tokenizer, classifier.name, "model")
    return classifier


def load_judge(
    language_model: str | Path | LanguageModel | None, device: str | None
) -> LanguageModel | None:
    """Load a language model, if one is given, to measure perplexity."""
    if language_model is None or isinstance(language_model, LanguageModel):
        return language_model
    return as_language_model(language_model, device=device, argument="language_model")


def measure_perplexity(text: str, language: LanguageModel | None) -> float | None:
    """Return the perplexity of a text; None without a language model, or of a single token."""
    if language is None or len(encode_text(language.tokenizer, text, ends=True)) < 2:
        return None
    return perplexity(text, model=language).perplexity


def _find_goal(
    classifier: TextClassifier, text: str, label: str | int | None, target: str | int | None
) -> tuple[ClassGoal, torch.Tensor]:
    """Find the class of a text to leave, and the one to reach.

    Args:
        label, target: of `attack_text`.

    Returns:
        The goal, and the log-probabilities of the text, (classes,).

    Raises:
        ValueError: there is no such class; or the model predicts another than the label, or the
            target.
    """
    own, wanted = (
        None if given is None else classifier.index_of(given, name)
        for name, given in (("label", label), ("target", target))
    )
    output = classifier.log_probabilities([text])[0]
    predicted = int(output.argmax())
    seen = f"the model predicts {classifier.names[predicted]} ({output[predicted].exp():.1%})"
    if own is not None and own != predicted:
        raise ValueError(
            f"label: {classifier.names[own]!r} is misclassified already: {seen}; there is "
            "nothing to attack"
        )
    if wanted == predicted:
        raise ValueError(f"target: {classifier.names[predicted]!r} is reached already: {seen}")
    return ClassGoal(classifier, predicted, wanted), output
