"""Rescoring: candidate transcriptions of another system, ranked with a language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TypeAlias, cast

from genkit.arguments import explain_names
from genkit.data import characters
from genkit.notebook import TextRecord
from genkit.text.language_model import LanguageModel, as_language_model
from genkit.text.scoring import log_probabilities

Scored: TypeAlias = tuple[str, float]  # a transcription and its log P(c|x)

# ---------------------------------------------------------------------------------------------
# Ranking transcriptions


@dataclass(frozen=True)
class Ranked(TextRecord):
    """One transcription and the terms of its score."""

    text: str
    log_channel: float  # log P(c|x), as given
    log_language: float  # log P_lm(c), in nats
    words: int
    score: float  # log_channel + alpha log_language + beta words

    def __str__(self) -> str:
        terms = f"{self.log_channel:8.2f} {self.log_language:8.2f} {self.words:4d}"
        return f"{self.score:8.2f} = Q({terms} )  {self.text}"


@explain_names
def rescore(
    candidates: Sequence[Scored] | Sequence[Sequence[Scored]],
    *,
    model: str | Path | LanguageModel,
    alpha: float = 1.0,
    beta: float = 1.0,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> list[Ranked] | list[list[Ranked]]:
    """Rank the transcriptions of an utterance, or of each of several, by Q(c).

    Choose alpha and beta on utterances whose transcription is known (`word_error_rate`).

    Args:
        candidates: pairs of a text and its log P(c|x), in nats; or a list of such lists.
        model: folder or Hub id (in Python, also what `load` returned); with any kind of tokens.
        alpha: weight of the language model.
        beta: nats added for each word, against the language model's preference for few words.
        trust_remote_code: run code that the model brings along.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        Records, the best first; or a list of them for each utterance.

    Raises:
        ValueError: an argument cannot work, or a character model does not know a character.
    """
    if not candidates or not all(candidates):
        raise ValueError("candidates: an empty list; give (text, log-probability) pairs")
    check_weights(alpha=alpha, beta=beta)
    several = not isinstance(candidates[0][0], str)
    utterances = cast(Sequence[Sequence[Scored]], candidates if several else [candidates])
    pairs = [pair for utterance in utterances for pair in utterance]
    check_pairs(pairs)
    language = as_language_model(model, trust_remote_code=trust_remote_code, device=device)
    check_characters([text for text, _ in pairs], language)
    logs = iter(log_probabilities([text for text, _ in pairs], language))
    ranked = []
    for utterance in utterances:
        records = [_ranked(text, float(log), next(logs), alpha, beta) for text, log in utterance]
        ranked.append(sorted(records, key=lambda record: -record.score))
    return ranked if several else ranked[0]


def _ranked(text: str, channel: float, language: float, alpha: float, beta: float) -> Ranked:
    words = len(text.split())
    return Ranked(text, channel, language, words, channel + alpha * language + beta * words)


def check_weights(**weights: float) -> None:
    """Raise ValueError for weights that are not finite, and for a negative alpha."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or (name == "alpha" and weight < 0):
            least = "0 or more" if name == "alpha" else "a finite number"
            raise ValueError(f"{name} must be {least}, got {weight}")


def check_pairs(pairs: list[Scored]) -> None:
    """Raise ValueError for candidates that are no pairs of a text and a finite log-probability."""
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Real):
            raise ValueError(f"candidates: {pair!r} is not a pair of a text and its log P(c|x)")
        if not math.isfinite(pair[1]):
            raise ValueError(f"candidates: {pair[0]!r} has the log-probability {pair[1]}")


def check_characters(texts: list[str], language: LanguageModel) -> None:
    """Raise ValueError for texts with characters that a character model does not know."""
    if language.by_character:
        unknown = characters.unknown_characters(language.tokenizer, "".join(texts))
        if unknown:
            raise ValueError(
                f"candidates: {language.name} has never seen {', '.join(map(repr, unknown))}; "
                "leave such characters out, or fine-tune it on text that has them"
            )


# ---------------------------------------------------------------------------------------------
# Evaluation


def word_error_rate(references: str | Sequence[str], hypotheses: str | Sequence[str]) -> float:
    """Insertions, deletions and substitutions of words, over the words of the references.

    Words are what white space separates. The edits of all texts are added up before the division.

    Args:
        references: the right transcription, one text or several.
        hypotheses: the system's transcriptions, as many.

    Raises:
        ValueError: the numbers of texts differ, or the references have no word.
    """
    right = [references] if isinstance(references, str) else list(references)
    heard = [hypotheses] if isinstance(hypotheses, str) else list(hypotheses)
    if len(right) != len(heard):
        raise ValueError(
            f"hypotheses: {len(heard)} texts for {len(right)} references; give one each"
        )
    total = sum(len(text.split()) for text in right)
    if not total:
        raise ValueError(f"references: {references!r} has no word; give the words that were said")
    return sum(_edits(r.split(), h.split()) for r, h in zip(right, heard, strict=True)) / total


def _edits(first: list[str], second: list[str]) -> int:
    """Levenshtein distance of two lists of words."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
