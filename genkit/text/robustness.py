"""How accurate a classifier of texts stays when a share of the words may be changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit import console
from genkit.arguments import explain_names
from genkit.notebook import TextRecord
from genkit.seeds import row_seeds
from genkit.text.attacks import BUDGET, ClassGoal, check_text, load_victim
from genkit.text.candidates import Vocabulary
from genkit.text.classifiers import TextClassifier
from genkit.text.edits import split_words
from genkit.text.masked_models import load_masked_model
from genkit.text.scoring import table
from genkit.text.word_search import (
    Candidates,
    Importance,
    Proposer,
    check_search,
    words_allowed,
)

SHARES = (0.05, 0.1, 0.2)  # of words changed


@dataclass(frozen=True)
class AccuracyUnderAttack:
    """The accuracy when a share of the words may be changed."""

    share: float  # the most
    accuracy: float  # of all texts
    queries: float  # mean, of the texts that were classified rightly
    changed: float  # mean share of words changed where the attack succeeded; nan: nowhere


@dataclass(frozen=True)
class TextRobustness(TextRecord):
    """The accuracy of a classifier of texts, before and under attack."""

    accuracy: float  # before
    rows: list[AccuracyUnderAttack]
    texts: int
    words: float  # mean, of a text
    settings: dict[str, Any]  # of the attack
    model: str

    def __str__(self) -> str:
        head = ["words changed", "accuracy", "queries a text", "changed on success"]
        rows = [
            [f"{row.share:.0%}", f"{row.accuracy:.1%}", f"{row.queries:.1f}", f"{row.changed:.1%}"]
            for row in self.rows
        ]
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{table([head, ['none', f'{self.accuracy:.1%}', '', ''], *rows])}\n"
            f"{self.model}, {self.texts:,} texts of {self.words:.1f} words; {settings}"
        )


@explain_names
def measure_text_attacks(
    texts: Sequence[str],
    labels: Sequence[str | int],
    *,
    model: str | Path | TextClassifier,
    shares: Sequence[float] = SHARES,
    candidates: Candidates = "gradient",
    importance: Importance = "gradient",
    budget: int = BUDGET,
    seed: int = 0,
    masked_model: str | Path | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> TextRobustness:
    """Measure the accuracy of a classifier of texts before and under attack.

    All texts count: those that are misclassified before are wrong after; those of which the share
    allows no word stay right. The attack of each share is one of its own.

    Args:
        texts: the texts.
        labels: the true class of each, by name or number.
        model: folder or Hub id of a classifier of texts, or what `genkit.load` returned.
        shares: of the words of a text that may be changed at most.
        candidates, importance, budget, masked_model: see `genkit.text.attacks.attack_text`.
        seed: of the typing errors: that of the first text; the next has the next number.
        revision: a branch, tag or commit of the classifier on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid.
    """
    if not texts or len(texts) != len(labels):
        raise ValueError(f"texts, labels: {len(texts)} and {len(labels)}; give one label a text")
    for i, text in enumerate(texts):
        check_text(f"texts[{i}]", text)
    seeds = row_seeds(seed, len(texts), "a text")
    for share in shares:
        check_search(candidates, importance, share, budget, masked_model)
    classifier = load_victim(model, revision, device)
    masked = None if masked_model is None else load_masked_model(masked_model, device=device)
    classes = [classifier.index_of(label, f"labels[{i}]") for i, label in enumerate(labels)]
    outputs = classifier.log_probabilities(texts)
    right = [i for i, label in enumerate(classes) if int(outputs[i].argmax()) == label]
    drafts = [split_words(text) for text in texts]
    vocabulary = Vocabulary(classifier.model, classifier.tokenizer)
    rows = []
    with console.bar(None, "attacking", len(right) * len(shares), " texts") as bar:
        for share in shares:
            queries, changed = [], []
            for i in right:
                proposer = Proposer(candidates, importance, vocabulary, masked, seeds[i])
                allowed = words_allowed(share, len(drafts[i].words))
                goal = ClassGoal(classifier, classes[i])
                found, verdict, used = goal.attack(drafts[i], outputs[i], allowed, budget, proposer)
                queries.append(used)
                if verdict.success:
                    changed.append(len(drafts[i].changes_to(found)) / len(drafts[i].words))
                bar.update()
            accuracy = (len(right) - len(changed)) / len(texts)
            rows.append(AccuracyUnderAttack(share, accuracy, mean(queries), mean(changed)))
    settings = {"candidates": candidates, "importance": importance, "budget": budget, "seed": seed}
    words = mean([len(draft.words) for draft in drafts])
    accuracy = len(right) / len(texts)
    return TextRobustness(accuracy, rows, len(texts), words, settings, classifier.name)


def mean(values: Sequence[float]) -> float:
    """Return the mean of numbers; nan of none."""
    return sum(values) / len(values) if values else float("nan")
