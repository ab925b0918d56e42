"""A text as words and what is between them, so that an edit of a word leaves all else as it is."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tokenizers import Regex, pre_tokenizers

# scripts without spaces between words: each character counts as a word
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
RUN = rf"[[\p{{L}}\p{{N}}]&&[^{UNSPACED}]][[\p{{L}}\p{{M}}\p{{N}}]&&[^{UNSPACED}]]*"
# don't is one word, well-known are two
WORD = Regex(rf"[{UNSPACED}]\p{{M}}*|{RUN}(?:['\u2019]{RUN})*")
_splitter = pre_tokenizers.Split(WORD, "isolated")

Case = Literal["lower", "title", "upper"]


@dataclass(frozen=True)
class Change:
    """A word that was replaced."""

    position: int  # of the word in the text, from 0
    start: int  # its first character in the original text
    before: str
    after: str


@dataclass(frozen=True)
class Draft:
    """A text, cut into words and the gaps before, between and after them."""

    words: tuple[str, ...]
    gaps: tuple[str, ...]  # one more than words

    @property
    def text(self) -> str:
        """The text."""
        parts = (part for pair in zip(self.gaps, self.words, strict=False) for part in pair)
        return "".join(parts) + self.gaps[-1]

    def span(self, position: int) -> tuple[int, int]:
        """Return the first character of a word, and the one after its last."""
        start = sum(map(len, self.gaps[: position + 1])) + sum(map(len, self.words[:position]))
        return start, start + len(self.words[position])

    def replace(self, position: int, word: str) -> Draft:
        """Return the text with another word in place of one."""
        words = (*self.words[:position], word, *self.words[position + 1 :])
        return Draft(words, self.gaps)

    def changes_to(self, other: Draft) -> list[Change]:
        """List the words in which two versions of a text differ."""
        pairs = enumerate(zip(self.words, other.words, strict=True))
        return [Change(i, self.span(i)[0], a, b) for i, (a, b) in pairs if a != b]


def split_words(text: str) -> Draft:
    """Cut a text into words, which are runs of letters and digits, and gaps."""
    words, gaps = [], [""]
    for piece, _ in _splitter.pre_tokenize_str(text):
        if _is_word(piece):
            words.append(piece)
            gaps.append("")
        else:
            gaps[-1] += piece
    return Draft(tuple(words), tuple(gaps))


def _is_word(piece: str) -> bool:
    return unicodedata.category(piece[0])[0] in "LN"


def has_letters(word: str) -> bool:
    """Whether a word can be replaced: one of letters; numbers stay."""
    return any(character.isalpha() for character in word)


def replaceable(draft: Draft, characters: int) -> list[int]:
    """Return the positions of words with letters among the first characters of a text."""
    each = enumerate(draft.words)
    return [i for i, word in each if has_letters(word) and draft.span(i)[1] <= characters]


def case_of(word: str) -> Case:
    """Return how a word is written."""
    if len(word) > 1 and word.isupper():
        return "upper"
    return "title" if word[0].isupper() else "lower"


def in_case(word: str, case: Case) -> str:
    """Write a word in a case."""
    writers: Mapping[Case, str] = {
        "lower": word.lower(),
        "title": word[0].upper() + word[1:],
        "upper": word.upper(),
    }
    return writers[case]


def script_of(word: str) -> str:
    """Return the first word of the Unicode name of a word's first letter, such as LATIN."""
    return unicodedata.name(word[0], "?").split()[0].removesuffix("-")
