"""How good the answers of a reader stay when their contexts are attacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit import console
from genkit.arguments import explain_names
from genkit.data.squad import Example
from genkit.metrics.squad import compute_exact, compute_f1
from genkit.notebook import TextRecord
from genkit.qa.attacks import AnswerSearch, Method, check_method, load_reader_to_attack
from genkit.qa.reader import Reader
from genkit.qa.span_goal import NoDistractorError, SpanGoal, find_goal
from genkit.seeds import row_seeds
from genkit.text.attacks import BUDGET
from genkit.text.edits import Draft, split_words
from genkit.text.masked_models import load_masked_model
from genkit.text.robustness import SHARES, mean
from genkit.text.scoring import table
from genkit.text.word_search import Candidates, Importance, Verdict, check_search, words_allowed


@dataclass(frozen=True)
class ScoresUnderAttack:
    """Exact match and F1, in percent, when contexts are attacked."""

    share: float | None  # of the words changed at most; None: a sentence is added
    exact_match: float  # of all questions
    f1: float
    queries: float  # mean, of the questions that were attacked


@dataclass(frozen=True)
class AnswerRobustness(TextRecord):
    """Exact match and F1 of a reader, in percent, before and under attack."""

    exact_match: float  # before
    f1: float
    rows: list[ScoresUnderAttack]
    questions: int
    words: float  # mean, of a context
    settings: dict[str, Any]  # of the attack
    model: str

    def __str__(self) -> str:
        head = ["words changed", "exact match", "F1", "queries a question"]
        rows = [
            [
                "a sentence added" if row.share is None else f"{row.share:.0%}",
                f"{row.exact_match:.1f}",
                f"{row.f1:.1f}",
                f"{row.queries:.1f}",
            ]
            for row in self.rows
        ]
        before = ["none", f"{self.exact_match:.1f}", f"{self.f1:.1f}", ""]
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{table([head, before, *rows])}\n"
            f"{self.model}, {self.questions:,} questions on contexts of {self.words:.1f} words; "
            f"{settings}"
        )


@explain_names
def measure_answer_attacks(
    examples: Sequence[Example],
    *,
    model: str | Path | Reader,
    method: Method = "words",
    shares: Sequence[float] = SHARES,
    candidates: Candidates = "gradient",
    importance: Importance = "gradient",
    budget: int = BUDGET,
    seed: int = 0,
    masked_model: str | Path | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> AnswerRobustness:
    """Measure exact match and F1 of a reader before and under attack, against the gold answers.

    All questions count. Those whose answer shares no word with a gold one are not attacked, nor
    those for which no distractor can be made: they keep their answers.

    Args:
        examples: questions with contexts and answers, as `genkit.data.squad.read_examples` reads.
        model: folder or Hub id of a model for question answering, or what `genkit.load` returned.
        method: words or distractor; see `genkit.qa.attacks.attack_answer`.
        shares: of the words of a context that may be changed at most, for method="words".
        candidates, importance, budget, masked_model: see `genkit.text.attacks.attack_text`.
        seed: that of the first question; the next has the next number.
        revision: a branch, tag or commit of the reader on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid, or a question has no gold answer.
    """
    if not examples or not all(example.answers for example in examples):
        raise ValueError("examples: give questions, each with an answer in its context")
    check_method(method)
    seeds = row_seeds(seed, len(examples), "a question")
    limits = list(shares) if method == "words" else [1.0]
    for share in limits:
        check_search(candidates, importance, share, budget, masked_model)
    reader = load_reader_to_attack(model, revision, device)
    masked = None if masked_model is None else load_masked_model(masked_model, device=device)
    drafts = [split_words(example.context) for example in examples]
    answers, goals = _find_goals(reader, examples, drafts)
    before = _mean_scores(answers, examples)
    rows = []
    with console.bar(None, "attacking", len(goals) * len(limits), " questions") as bar:
        for share in limits:
            after, queries = list(answers), []
            for i, goal, first in goals:
                allowed = words_allowed(share, len(drafts[i].words))
                search = AnswerSearch(
                    method, candidates, importance, allowed, budget, seeds[i], masked
                )
                after[i], used = _attack(search, goal, first)
                queries.append(used)
                bar.update()
            limit = share if method == "words" else None
            rows.append(ScoresUnderAttack(limit, *_mean_scores(after, examples), mean(queries)))
    settings: dict[str, Any] = {"method": method, "candidates": candidates}
    settings |= {"importance": importance, "budget": budget, "seed": seed}
    words = mean([len(draft.words) for draft in drafts])
    return AnswerRobustness(*before, rows, len(examples), words, settings, reader.name)


def _find_goals(
    reader: Reader, examples: Sequence[Example], drafts: Sequence[Draft]
) -> tuple[list[str], list[tuple[int, SpanGoal, Verdict]]]:
    """Answer questions, and find those to attack.

    Returns:
        The answers, "" where there is none; and of the questions whose answer shares a word with
        a gold one the number, the goal and the first verdict.
    """
    answers = [""] * len(examples)
    goals = []
    for i, example in enumerate(examples):
        found = find_goal(reader, example.question, drafts[i])
        if found:
            answers[i] = found[0].answer
            if score(answers[i], example)[1]:
                goals.append((i, *found))
    return answers, goals


def _attack(search: AnswerSearch, goal: SpanGoal, first: Verdict) -> tuple[str, int]:
    """Return the answer under attack, the first one if no distractor can be made; and queries."""
    try:
        _, verdict, used = search.run(goal, first)
    except NoDistractorError:
        verdict, used = first, 1
    return verdict.output.answer.answer, used


def score(answer: str, example: Example) -> tuple[bool, float]:
    """Return exact match and F1 of an answer, by the gold answer that is nearest to it."""
    golds = [text for text, _ in example.answers]
    exact = any(compute_exact(answer, gold) for gold in golds)
    return exact, max(compute_f1(answer, gold) for gold in golds)


def _mean_scores(answers: Sequence[str], examples: Sequence[Example]) -> tuple[float, float]:
    """Return mean exact match and F1 in percent."""
    scores = [score(*pair) for pair in zip(answers, examples, strict=True)]
    return mean([100.0 * exact for exact, _ in scores]), mean([100 * f1 for _, f1 in scores])
