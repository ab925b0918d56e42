"""What guesses the next tokens, for a model to verify in one step; the text stays the same.

See `strategies.sample` (Leviathan et al. 2023).
"""

from __future__ import annotations

from genkit.text.kv_cache import Tree
from genkit.text.strategies import TokenSampler

SIZES = (3, 2, 1)  # of the last tokens that are looked up
LONGEST_GUESS, MEMORY = 8, 8  # tokens; guessed tokens that a rate of right ones is taken over


class PromptLookup:
    """Guesses the continuation that the last tokens had before (prompt lookup, Saxena 2023).

    Args:
        length: tokens to guess at a time; None: as many as will probably be right, judged by what
            would have been right so far in this text.
    """

    def __init__(self, length: int | None) -> None:
        self._length = length
        self._pasts: dict[int, _Past] = {}

    def __call__(self, texts: list[int], lines: list[list[int]]) -> list[list[int]]:
        """Continue lines of the given texts."""
        pasts = [self._pasts.setdefault(text, _Past()) for text in texts]
        pairs = zip(pasts, lines, strict=True)
        return [past.continuation(line, self._length) for past, line in pairs]


class _Past:
    """What a text has had so far, and how often its guesses would have been right."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # of some tokens, where the last one was
        self._read = 0
        self._guess: list[int] = []
        self._size = 0  # of what was looked up for it
        self._right = dict.fromkeys(SIZES, 0.0)  # share of guessed tokens

    def continuation(self, line: list[int], length: int | None) -> list[int]:
        """Guess what follows a line, which goes on from the last one."""
        self._judge(line)
        for end in range(self._read, len(line) - 1):
            for size in SIZES:
                self._ends[tuple(line[max(0, end + 1 - size) : end + 1])] = end
        self._read = len(line) - 1
        self._guess = []
        for size in SIZES:
            end = self._ends.get(tuple(line[-size:]), -1)
            if end >= 0:
                self._size = size
                self._guess = line[end + 1 :][: length or LONGEST_GUESS]
                break
        return self._guess[: self._likely() if length is None else length]

    def _judge(self, line: list[int]) -> None:
        for guessed, token in zip(self._guess, line[self._read + 1 :], strict=False):
            self._right[self._size] += ((guessed == token) - self._right[self._size]) / MEMORY
            if guessed != token:
                return

    def _likely(self) -> int:
        """Return how many tokens are right before the first wrong one; 0 where that is few."""
        wrong = 1 - self._right.get(self._size, 0.0)
        return int(1 / wrong) if wrong <= 0.5 else 0


class Draft:
    """Guesses by a smaller model of the same vocabulary, with the noise of the larger one.

    Args:
        reader: the smaller model, having read the same prompts.
        draw: chooses the larger model's tokens.
        length: tokens to guess at a time.
    """

    def __init__(self, reader: Tree, draw: TokenSampler, length: int) -> None:
        self.reader, self.draw, self.length = reader, draw, length
        self.texts = list(range(len(reader.lines)))

    def __call__(self, texts: list[int], lines: list[list[int]]) -> list[list[int]]:
        """Continue lines of the given texts."""
        if texts != self.texts:
            self.reader.keep([self.texts.index(text) for text in texts])
            self.texts = list(texts)
        news = [line[len(own) :] for line, (own,) in zip(lines, self.reader.lines, strict=True)]
        width = max(map(len, news))
        if self.reader.room < width + self.length:
            return [[] for _ in texts]
        self.reader.step([(new + [0] * width)[:width] for new in news], chain=True)
        self.reader.branch([[len(new) - 1] for new in news])
        mark = self.reader.mark(self.length)
        for _ in range(self.length):
            branches = [(i, 0) for i in range(len(texts))]
            tokens, _ = self.draw(self.reader, texts, branches)
            self.reader.step([[max(token, 0)] for token in tokens])  # any guess for NO_TOKEN
        guesses = [own[len(line) :] for line, (own,) in zip(lines, self.reader.lines, strict=True)]
        self.reader.back_to(mark)
        return guesses
