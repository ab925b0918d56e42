"""Correct the words of a text with a language model and a lexicon.

This follows Hannun et al. 2014 (Deep Speech, arXiv 1412.5567, section 2.2): of all transcriptions c
of what was heard, x, take the one with the largest

    Q(c) = log P(c|x) + alpha log P_lm(c) + beta word_count(c)

Here words are neither split nor joined, so that the word count would add the same to every text;
there is no beta. The channel is that of Kernighan, Church and Gale 1990 with every edit equally
likely, as in Norvig 2009 (Natural Language Corpus Data):

    log P(word seen | word meant) = log keep                       if they are the same
                                    log(1 - keep) - edit_cost n    if they are n edits apart

A language model of characters or of parts of words finds misspelled words too likely. So a word
meant has the further log-probability log unknown if the lexicon does not have it, and
log(1 - unknown) if it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from genkit import console
from genkit.arguments import check_unicode, explain_names
from genkit.hub import names
from genkit.notebook import TextRecord
from genkit.text.language_model import LanguageModel, as_language_model
from genkit.text.lexicon import WORD, Lexicon
from genkit.text.rescoring import check_weights
from genkit.text.scoring import ScoringReader, encode_after_start, log_probabilities

UNIT = 32  # characters between two words that the model reads at once


# ---------------------------------------------------------------------------------------------
# Correcting a text


@dataclass(frozen=True)
class Change:
    """A word that was replaced."""

    start: int  # its first character in the source
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before} -> {self.after} (at {self.start})"


@dataclass(frozen=True)
class Correction(TextRecord):
    """A corrected text, and its changes."""

    source: str
    text: str
    changes: list[Change]
    score_before: float  # of channel and lexicon, plus alpha log P_lm(source)
    score_after: float  # the same of the corrected text, never lower

    def __str__(self) -> str:
        scores = f"score {self.score_before:.2f} -> {self.score_after:.2f}"
        return "\n".join([self.text, *(f"  {change}" for change in self.changes), f"  {scores}"])


@explain_names
def correct(
    text: str | Sequence[str],
    *,
    model: str | Path | LanguageModel,
    lexicon: Iterable[str] | Lexicon,
    alpha: float = 0.6,
    beams: int = 4,
    max_edits: int = 2,
    candidates: int = 8,
    keep: float = 0.95,
    edit_cost: float = 5.0,
    unknown: float = 0.01,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> Correction | list[Correction]:
    """Correct the misspelled words of a text, or of each of several.

    Every word may stay, whether the lexicon has it or not, or be replaced by a word of the lexicon
    a few edits away. A beam search from the first word to the last finds the text with about the
    largest Q, which the docstring of this module defines.

    Spaces, punctuation and the case of words stay. So do words with digits, underscores or mixed
    case, which are seldom prose, and words or signs with a character that a character model has
    never seen; it reads the text as if that character were not there. A text without a word, even
    an empty one, comes back as it is.

    Args:
        text: one text or several.
        model: folder or Hub id (in Python, also what `load` returned); with any kind of tokens.
        lexicon: words that a correction may consist of; a `Lexicon` can be reused.
        alpha: weight of the language model; 0 changes nothing.
        beams: how many beginnings of the text are kept at each word.
        max_edits: edits between a word and what replaces it.
        candidates: replacements tried for a word, the closest and most frequent.
        keep: probability that a word was written as it was meant, in (0, 1).
        edit_cost: minus the log-probability of one edit among those of a word, in nats.
        unknown: probability that a word that was meant is not in the lexicon, in (0, 1). The
            smaller, the more misspellings are found, and the more rare names are taken for one.
        trust_remote_code: run code that the model brings along.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A record for one text, a list of records for several.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    texts = _check_texts(text)
    check_weights(alpha=alpha)
    _check_counts(beams=beams, max_edits=max_edits, candidates=candidates)
    _check_probabilities(keep=keep, unknown=unknown)
    if not 0 <= edit_cost < math.inf:
        raise ValueError(f"edit_cost must be 0 or more, got {edit_cost}")
    listed = lexicon if isinstance(lexicon, Lexicon) else Lexicon(lexicon)
    language = as_language_model(model, trust_remote_code=trust_remote_code, device=device)
    channel = _Channel(listed, _View(language), max_edits, candidates, keep, edit_cost, unknown)
    bar = console.bar(texts, "correcting", hidden=len(texts) == 1)
    found = [_correct(each, channel, language, alpha, beams) for each in bar]
    return found[0] if isinstance(text, str) else found


def _check_texts(text: str | Sequence[str]) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text: [] is empty; give at least one text")
    for each in texts:
        check_unicode("text", each)
        names.check_no_file("text", each)
    return texts


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")


def _check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")


class _View:
    """The part of a text that a model reads: all characters, or those that it knows."""

    def __init__(self, language: LanguageModel) -> None:
        self.known = language.tokenizer.get_vocab().keys() if language.by_character else None

    def __call__(self, text: str) -> str:
        return text if self.known is None else "".join(c for c in text if c in self.known)


@dataclass(frozen=True)
class _Channel:
    """The noisy channel: the words that a written word may stand for, and how likely each is."""

    lexicon: Lexicon
    view: _View
    max_edits: int
    candidates: int
    keep: float
    edit_cost: float
    unknown: float

    def choices(self, word: str) -> list[tuple[str, float]]:
        """List the words that may be meant, with log-probabilities; the word itself is first."""
        listed = math.log(1 - self.unknown)
        prior = listed if word in self.lexicon else math.log(self.unknown)
        stays = (word, math.log(self.keep) + prior)
        if self.view(word) != word or _in_case(word.lower(), word) != word:
            return [stays]
        error = math.log(1 - self.keep) + listed
        near = [
            (_in_case(other, word), error - self.edit_cost * edits)
            for other, edits in self.lexicon.neighbours(word, self.max_edits)
        ]
        return [stays, *[pair for pair in near if self.view(pair[0]) == pair[0]][: self.candidates]]


def _in_case(word: str, like: str) -> str:
    """Give a word in lower case the case of another: lower, UPPER, or with a Capital."""
    if like == like.lower():
        return word
    if like == like.upper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:]


@dataclass(frozen=True)
class _Unit:
    """A word, the words that it may stand for, and the text up to the next word."""

    start: int
    word: str
    choices: list[tuple[str, float]]
    after: str


def _units(text: str, channel: _Channel) -> list[_Unit]:
    """Split a text into units; those before the first word and in long gaps have no word."""
    found = {match.start(): match[0] for match in WORD.finditer(text) if len(match[0]) <= UNIT}
    units = []
    for start, end in pairwise(sorted({0, *found, len(text)})):
        word = found.get(start, "")
        choices = channel.choices(word) if word else [("", 0.0)]
        first = start + len(word)
        units.append(_Unit(start, word, choices, text[first : min(first + UNIT, end)]))
        for cut in range(first + UNIT, end, UNIT):
            units.append(_Unit(cut, "", [("", 0.0)], text[cut : min(cut + UNIT, end)]))
    return units


@dataclass(frozen=True)
class _Hypothesis:
    """The beginning of a corrected text, and its score."""

    words: list[str]  # one of each unit
    seen: str  # the text, as the model sees it
    log_channel: float
    logs: list[float]  # of each token, under the model; 0 of the start token

    def score(self, alpha: float) -> float:
        """Return Q without the term of the word count."""
        return self.log_channel + alpha * sum(self.logs)


def _correct(
    text: str, channel: _Channel, language: LanguageModel, alpha: float, beams: int
) -> Correction:
    """Search for the best text, and score it and the source in the same way."""
    units = _units(text, channel)
    log_kept = sum(unit.choices[0][1] for unit in units)
    kept = _Hypothesis([unit.word for unit in units], channel.view(text), log_kept, [])
    best = _search(units, channel.view, language, alpha, beams)
    logs = log_probabilities([kept.seen, best.seen], language)
    before, after = replace(kept, logs=logs[:1]), replace(best, logs=logs[1:])
    if after.score(alpha) < before.score(alpha):  # the beam search had dropped the source itself
        after = before
    changes = [
        Change(unit.start, unit.word, word)
        for unit, word in zip(units, after.words, strict=True)
        if word != unit.word
    ]
    corrected = "".join(word + unit.after for unit, word in zip(units, after.words, strict=True))
    return Correction(text, corrected, changes, before.score(alpha), after.score(alpha))


def _search(
    units: list[_Unit], view: _View, language: LanguageModel, alpha: float, beams: int
) -> _Hypothesis:
    """Keep the `beams` best beginnings while the text is read unit by unit."""
    reader, kept = ScoringReader(language), [_Hypothesis([], "", 0.0, [0.0])]
    reader.start(encode_after_start([""], language))
    for i, unit in enumerate(units, start=1):
        grown, parents, after = [], [], view(unit.after)
        for parent, old in enumerate(kept):
            for word, log in unit.choices:
                seen = old.seen + view(word) + after
                grown.append(_Hypothesis([*old.words, word], seen, old.log_channel + log, old.logs))
                parents.append(parent)
        # only a character is a token of its own: other tokens hold the space before a word
        whole = language.by_character or i == len(units)
        rows = encode_after_start(
            [new.seen if whole else new.seen.rstrip() for new in grown], language
        )
        for j, (row, logs) in enumerate(zip(rows, reader.extend(parents, rows), strict=True)):
            read = grown[j].logs[: len(row) - len(logs)]
            grown[j] = replace(grown[j], logs=read + logs)
        best = sorted(range(len(grown)), key=lambda j: -grown[j].score(alpha))[:beams]
        reader.keep(best)
        kept = [grown[j] for j in best]
    return kept[0]
