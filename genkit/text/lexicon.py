"""A list of words, searched for those that are a few edits from another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

# letters, with apostrophes between them, and no digit or underscore beside them
WORD = re.compile(r"(?<!\w)[^\W\d_]+(?:['\u2019][^\W\d_]+)*(?!\w)")


def words(text: str) -> list[str]:
    """Find the words of a text as `correct` sees them: letters, with apostrophes between them."""
    return WORD.findall(text)


class Lexicon:
    """Words in lower case, their counts, and a search for those that are a few edits from another.

    An edit is an insertion, a deletion or a substitution of a letter, or a transposition of two
    neighbours; no letter takes part in two edits (Damerau-Levenshtein distance in its restricted
    form, optimal string alignment). No index is built: a bit mask of each word's letters rules out
    nearly all words, and the distances to the others are computed at once.

    Args:
        words: from a list or a running text; a word's count ranks it among neighbours at the same
            distance.

    Raises:
        ValueError: the list is empty, or has an entry that is not a word.
    """

    def __init__(self, words: Iterable[str]) -> None:
        if isinstance(words, str):
            raise ValueError("lexicon: a str is not a list of words; give lexicon.words(text)")
        listed = list(words)
        if not listed:
            raise ValueError("lexicon: [] is empty; give the words that corrections consist of")
        for word in listed:
            if not isinstance(word, str) or not WORD.fullmatch(word):
                raise ValueError(
                    f"lexicon: {word!r} is not a word; give letters, with apostrophes between them"
                )
        self.counts = Counter(word.lower() for word in listed)
        self._words = sorted(self.counts, key=lambda word: (-self.counts[word], word))
        self._lengths = np.array([len(word) for word in self._words])
        self._codes = np.array(self._words).view(np.uint32).reshape(len(self._words), -1)
        self._letters = np.array([_letters(word) for word in self._words], dtype=np.uint64)
        self._found: dict[tuple[str, int], list[tuple[str, int]]] = {}

    def __len__(self) -> int:
        return len(self.counts)

    def __contains__(self, word: str) -> bool:
        return word.lower() in self.counts

    def neighbours(self, word: str, max_edits: int) -> list[tuple[str, int]]:
        """List other words and how many edits away they are: the closest, most frequent first."""
        word = word.lower()
        if (word, max_edits) not in self._found:
            near = self._near(word, max_edits)
            codes = self._codes[near, : len(word) + max_edits]
            edits = edit_distances(word, codes, self._lengths[near])
            found = [
                (self._words[i], int(d))
                for i, d in zip(near, edits, strict=True)
                if 0 < d <= max_edits
            ]
            self._found[word, max_edits] = sorted(found, key=lambda pair: pair[1])
        return self._found[word, max_edits]

    def _near(self, word: str, max_edits: int) -> np.ndarray:
        """Return the indices of the words that length and letters do not rule out."""
        asked = np.uint64(_letters(word))
        near = abs(self._lengths - len(word)) <= max_edits
        near &= np.bitwise_count(self._letters & ~asked) <= max_edits
        near &= np.bitwise_count(asked & ~self._letters) <= max_edits
        return np.flatnonzero(near)


def _letters(word: str) -> int:
    """Return a word's letters as a bit mask; an edit sets one bit at most, and clears one."""
    mask = 0
    for letter in word:
        mask |= 1 << ord(letter) % 64
    return mask


def edit_distances(word: str, codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Compute the restricted Damerau-Levenshtein distance of a word to many others at once.

    Args:
        codes: the other words' code points, padded on the right, (words, longest).
        lengths: (words,).

    Returns:
        (words,).
    """
    asked = np.array([word]).view(np.uint32)
    columns = np.arange(codes.shape[1] + 1)
    earlier = row = np.tile(columns, (len(codes), 1))
    for i, code in enumerate(asked, start=1):
        previous, same = row, codes == code
        row = previous + 1  # deletion
        row[:, 1:] = np.minimum(row[:, 1:], previous[:, :-1] + ~same)  # substitution
        if i > 1:
            swapped = (codes[:, :-1] == code) & (codes[:, 1:] == asked[i - 2])
            transposed = np.where(swapped, earlier[:, :-2] + 1, row[:, 2:])
            row[:, 2:] = np.minimum(row[:, 2:], transposed)
        row = np.minimum.accumulate(row - columns, axis=1) + columns  # insertions
        earlier = previous
    return row[np.arange(len(codes)), lengths]
