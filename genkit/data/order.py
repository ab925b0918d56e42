"""Shuffled orders that are functions of the position, so that any process can look up any part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


class Order:
    """An endless shuffled order of `count` items: a new permutation in every epoch.

    It is a function of the position alone, so that any process can look up any part of it, and a
    resumed run needs no more than its position.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up positions, (n,): the epoch of each, and its item; (n,) each."""
        epochs, offsets = np.divmod(positions, self.count)
        items = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = self._permute(int(epoch))[offsets[here]]
        return epochs, items

    def _permute(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._permutation = epoch, rng.permutation(self.count)
        return self._permutation


class Windows:
    """Training windows of a long sequence of ids, without replacement within an epoch.

    Every epoch cuts the sequence at another random offset, so that no id is always the first one of
    a window.

    Args:
        ids: (length,), usually memory-mapped.
        context: ids of a window.

    Raises:
        ValueError: the sequence is shorter than one window and the id after it.
    """

    def __init__(self, ids: np.ndarray, context: int, seed: int) -> None:
        if len(ids) < context + 1:
            raise ValueError(
                f"text: {len(ids)} characters are less than one window of context {context} "
                f"and its next character; use a longer text, or a context below {len(ids)}"
            )
        self.ids, self.context, self.seed = ids, context, seed
        self.order = Order(max(1, (len(ids) - context) // context), seed)

    def __len__(self) -> int:
        return self.order.count

    def batch(
        self, positions: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up windows by position in the endless order.

        Returns:
            Inputs and targets, the inputs one further: (len(positions), context) each, int64.
        """
        epochs, windows = self.order(positions)
        starts = windows * self.context + np.array([self._offset(int(e)) for e in epochs])
        rows = np.stack([self.ids[s : s + self.context + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(rows).to(device)
        return both[:, :-1], both[:, 1:]

    def _offset(self, epoch: int) -> int:
        room = len(self.ids) - len(self) * self.context
        rng = np.random.default_rng((self.seed, epoch, 1))
        return int(rng.integers(min(self.context, room)))


def blocks(count: int, size: int) -> Iterator[np.ndarray]:
    """Yield the numbers below `count`, `size` at a time."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))
