"""Keys and values that stay after a text has been read, for texts that go on from it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

KEPT = 2**28  # bytes of keys and values that are kept of texts that may go on


@dataclass(frozen=True, eq=False)
class KeptText:
    """The keys and values of a text that has been read."""

    tokens: list[int]
    keys: list[torch.Tensor]  # (heads, tokens, size) a layer
    values: list[torch.Tensor]

    def first(self, count: int) -> KeptText:
        """Return those of the first tokens only."""
        keys, values = ([own[:, :count] for own in pool] for pool in (self.keys, self.values))
        return KeptText(self.tokens[:count], keys, values)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(layer.nbytes for layer in (*self.keys, *self.values))


class KeptTexts:
    """The keys and values of the texts read last, so that one that goes on is not read again.

    The last text is kept whatever its size, and those before it as far as `KEPT` bytes reach.
    """

    def __init__(self) -> None:
        self._texts: list[KeptText] = []  # the one used last comes last
        self._lock = threading.Lock()

    def find(self, tokens: list[int]) -> KeptText | None:
        """Return what is kept of the longest beginning of a text, but for its last token."""
        with self._lock:
            shared = [shared_length(text.tokens, tokens[:-1]) for text in self._texts]
            if not any(shared):
                return None
            best = max(range(len(shared)), key=shared.__getitem__)
            self._texts.append(self._texts.pop(best))
            return self._texts[-1].first(shared[best])

    def add(self, new: KeptText) -> None:
        """Keep a text in place of its own beginnings."""
        with self._lock:
            count = len(new.tokens)
            if any(text.tokens[:count] == new.tokens for text in self._texts):
                return
            others = [x for x in self._texts if x.tokens != new.tokens[: len(x.tokens)]]
            self._texts = [*others, new]
            while len(self._texts) > 1 and sum(text.size for text in self._texts) > KEPT:
                self._texts.pop(0)


def shared_length(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    both = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(one), len(other)))


def keys_stay(model: PreTrainedModel) -> bool:
    """Whether a text's keys are those that it has as the beginning of any longer text."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return rope.get("rope_type") not in ("dynamic", "longrope")  # whose angles depend on the length
