"""Answers under a model: the log-probabilities, entropies and values of their tokens.

Rows are padded on the right, where causal attention lets no token before it see the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

LOGITS = 1 << 26  # computed at once without gradients: a quarter of a gigabyte


@dataclass(frozen=True)
class Rows:
    """Tokens, and which of them answer. Position t of a mask is that of the token t + 1."""

    ids: torch.Tensor  # (n, length + 1), int64
    mask: torch.Tensor  # (n, length), float32: 1 at the tokens of answers

    def to(self, device: torch.device) -> Rows:
        """Return the rows on a device."""
        return Rows(self.ids.to(device), self.mask.to(device))

    def __getitem__(self, which: slice) -> Rows:
        """Return some of the rows, as long as they are."""
        return Rows(self.ids[which], self.mask[which])

    def take(self, which: np.ndarray | slice) -> Rows:
        """Return some of the rows, without what none of them needs of the padding."""
        ids, mask = self.ids[which], self.mask[which]
        longest = int(mask.any(0).nonzero().max()) + 1
        return Rows(ids[:, : longest + 1], mask[:, :longest])


def pad_rows(ids: Sequence[Sequence[int]], answers: Sequence[Sequence[bool]]) -> Rows:
    """Put rows of tokens into one batch, with zeros after their ends.

    Args:
        ids: tokens of each row, two or more.
        answers: which of them are of answers; the first of a row is none.
    """
    padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    masks = [torch.tensor(row, dtype=torch.float32) for row in answers]
    return Rows(padded, pad_sequence(masks, batch_first=True)[:, 1:])


def log_probabilities(model: torch.nn.Module, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log π and the entropy of the tokens of answers, (n, length) each, 0 elsewhere.

    Args:
        model: a causal language model of transformers.
        rows: on the model's device.
    """
    first = int(rows.mask.any(0).nonzero().min())  # no logits of what only prompts have
    length = rows.mask.shape[1]
    output = model(input_ids=rows.ids[:, :-1], use_cache=False, logits_to_keep=length - first)
    logs = output.logits.float().log_softmax(-1)
    mask = rows.mask[:, first:]
    found = logs.gather(-1, rows.ids[:, first + 1 :, None]).squeeze(-1) * mask
    with torch.no_grad():
        entropies = -(logs.exp() * logs).nan_to_num().sum(-1) * mask
    empty = found.new_zeros(len(found), first)
    return torch.cat([empty, found], 1), torch.cat([empty, entropies], 1)


def token_values(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """Return V before each token of answers, (n, length), 0 elsewhere.

    Args:
        model: a token classifier of transformers with one label.
    """
    return model(input_ids=rows.ids[:, :-1]).logits[..., 0].float() * rows.mask


def split_blocks(rows: Rows, vocabulary: int) -> list[slice]:
    """Cut rows into blocks whose logits may be computed at once."""
    count, length = rows.mask.shape
    size = max(1, LOGITS // (length * vocabulary))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
