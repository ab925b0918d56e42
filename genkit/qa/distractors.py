"""Sentences that look like an answer to a question and are about something else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from genkit.text.candidates import Vocabulary
from genkit.text.edits import Draft, has_letters, split_words

NEAR = 8  # words to choose from in place of one
TRIES = 4  # draws for each sentence that is wanted; many are equal
LONG = 4  # letters of a content word, where letters have cases
# English questions that become a statement by rule: "what is A", and "who did B"
IS = re.compile(r"(?:what|who) (is|are|was|were) (.+)", re.IGNORECASE)
AUXILIARY = "do|does|did|has|have|had|can|could|will|would|shall|should|may|might|must"
WHO = re.compile(rf"who (?!(?:{AUXILIARY})\b)(.+)", re.IGNORECASE)


def is_content_word(word: str) -> bool:
    """Whether a word may be a name, a number, or another word that a question is about."""
    cased = word.lower() != word.upper()
    return not has_letters(word) or word[0].isupper() or not cased or len(word) >= LONG


def asked_words(question: str) -> frozenset[str]:
    """Return the content words of a question, in lower case."""
    return frozenset(word.lower() for word in split_words(question).words if is_content_word(word))


def distractors(
    question: str, answer: str, context: str, vocabulary: Vocabulary, count: int, seed: int
) -> list[str]:
    """Make sentences that answer another question, much like this one, by another answer.

    The question's names and numbers are replaced by near ones, or where it has none its content
    words that the context has; so are the answer's. None of the new words are in the context.

    Args:
        vocabulary: of the reader, whose vectors say which words are near.
        count: the most sentences.
        seed: of the choice among near words.

    Returns:
        Different sentences; none if the question has no word to replace.

    Source: AddSent, Jia and Liang 2017, https://arxiv.org/abs/1707.07328
    """
    taken = frozenset(word.lower() for word in split_words(f"{context} {question}").words)
    asked, given = split_words(question), split_words(answer)
    asked_choices = _choices(asked, _name_positions(asked, taken_from=context), taken, vocabulary)
    given_choices = _choices(given, _answer_positions(given), taken, vocabulary)
    if not asked_choices or not given_choices:
        return []
    draws = np.random.default_rng(seed)
    found: dict[str, None] = {}
    for _ in range(TRIES * count):
        other, fake = (
            _draw(*each, draws) for each in ((asked, asked_choices), (given, given_choices))
        )
        found.update(dict.fromkeys(statements(other, fake)))
    return [*found][:count]


def statements(question: str, answer: str) -> Iterator[str]:
    """Yield a question and its answer as sentences: as a statement, if a rule fits, and as both."""
    asked = question.strip().rstrip("?\uff1f ")
    capital = answer[0].upper() + answer[1:]
    if match := IS.fullmatch(asked):
        yield f"{match[2][0].upper()}{match[2][1:]} {match[1]} {answer}."
    elif match := WHO.fullmatch(asked):
        yield f"{capital} {match[1]}."
    yield f"{asked}? {capital}."


def _name_positions(asked: Draft, taken_from: str) -> list[int]:
    """Return the words of a question that make it another question: its names and numbers."""
    words = asked.words
    names = [i for i, w in enumerate(words) if not has_letters(w) or (i and w[0].isupper())]
    known = {word.lower() for word in split_words(taken_from).words}
    return names or [
        i for i, w in enumerate(words) if i and is_content_word(w) and w.lower() in known
    ]


def _answer_positions(given: Draft) -> list[int]:
    """Return the words of an answer to replace: its names and numbers, or all content words."""
    each = list(enumerate(given.words))
    names = [i for i, word in each if not has_letters(word) or word[0].isupper()]
    return names or [i for i, word in each if is_content_word(word)] or [i for i, _ in each]


def _choices(
    draft: Draft, positions: Sequence[int], taken: frozenset[str], vocabulary: Vocabulary
) -> dict[int, list[str]]:
    """Return words to put in place of each; {} if one of them has none."""
    found = {}
    for i in positions:
        word = draft.words[i]
        near = vocabulary.nearest_words(word, 10 * NEAR) if has_letters(word) else _numbers(word)
        found[i] = [each for each in near if each.lower() not in taken][:NEAR]
    return found if all(found.values()) else {}


def _numbers(word: str) -> list[str]:
    """Return numbers near one, of as many digits."""
    if not word.isdecimal():
        return []
    near = (int(word) + step for size in range(1, 2 * NEAR) for step in (size, -size))
    return [str(number).zfill(len(word)) for number in near if number > 0]


def _draw(draft: Draft, choices: dict[int, list[str]], draws: np.random.Generator) -> str:
    for position, words in choices.items():
        draft = draft.replace(position, words[draws.integers(len(words))])
    return draft.text
