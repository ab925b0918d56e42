"""Decoding as pure functions on logits, and the texts they make grow."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

# How far float32 logits, and probabilities made of them, can be from those of another batch size:
# about ten times what was seen
NEAR_LOGIT, NEAR_PROBABILITY = 1e-3, 2e-4

# ---------------------------------------------------------------------------------------------
# From logits to a token


def filtered(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> torch.Tensor:
    """Turn logits into the probabilities that are sampled from, both (rows, vocabulary), float64.

    Args:
        temperature: divides the logits, above 0.
        top_k: keep the k most likely tokens, and those as likely as the k-th.
        top_p: keep the fewest most likely tokens that together have this probability
            (Holtzman et al. 2020).
    """
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the probability before the token
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    return logits.softmax(-1)


def draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Sample one token a row by inverting the cumulative distribution.

    Args:
        probabilities: (rows, vocabulary).
        uniforms: one number in [0, 1) a row, (rows,).

    Returns:
        Token ids, (rows,).
    """
    cumulative = probabilities.cumsum(-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    last = probabilities.shape[-1] - 1 - probabilities.flip(-1).gt(0).int().argmax(-1)
    return torch.minimum(tokens, last)  # rounding can carry a target to the very end


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token a row, and tell which draws no rounding of the logits could have changed.

    Args:
        logits: (rows, vocabulary).
        uniforms: one number in [0, 1) a row, (rows,).

    Returns:
        Token ids and whether each is sure, (rows,) both. A draw is not sure when it falls close to
        the border between two tokens, with the filters a little wider or narrower, too.
    """
    near = NEAR_PROBABILITY / min(1.0, temperature)
    tokens = draw(filtered(logits, temperature, top_k, top_p), uniforms)
    sure = torch.ones_like(tokens, dtype=torch.bool)
    for p in (top_p,) if top_p == 1 else (max(top_p - near, 1e-9), top_p + near):
        probabilities = filtered(logits, temperature, top_k, p)
        for shift in (-near, near):
            shifted = (uniforms + shift).clamp(0, 1 - 2**-53)
            sure &= draw(probabilities, shifted) == tokens
    if top_k is not None and top_k < logits.shape[-1]:
        sure &= _apart(logits, top_k)
    return tokens, sure


def most_likely(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the most likely token a row, and tell which no rounding could have changed."""
    return logits.argmax(-1), _apart(logits, 1)


def _apart(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Whether the k-th and the next largest logit are far from equal, (rows,)."""
    largest = logits.topk(k + 1).values
    return largest[:, k - 1] - largest[:, k] > NEAR_LOGIT


def noise(seeds: Sequence[int], steps: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) for each seed and step, (seeds, steps), float64.

    A counter-based generator (Philox): the number of a seed and a step depends on nothing else.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


# ---------------------------------------------------------------------------------------------
# Texts that grow


class Texts:
    """Token rows that grow one token at a time, with the model's key-value cache kept in step.

    A row that outgrows the model's context goes on with the later half of it, decided by the
    row's own length alone, so that a row never depends on its neighbours.

    Args:
        rows: prompts as token ids, none empty, none longer than the context.
    """

    def __init__(self, model: PreTrainedModel, rows: list[list[int]]) -> None:
        self.model = model
        self.rows = [list(row) for row in rows]
        self.starts = [0] * len(rows)  # of the part of each row that the model still sees
        self.context = context_length(model)
        self._positioned = "position_ids" in inspect.signature(model.forward).parameters
        self._cache: DynamicCache | None = None
        self._mask = torch.empty(0)

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """Next-token logits of every row, (rows, vocabulary), float32."""
        overflown = [len(r) - s > self.context for r, s in zip(self.rows, self.starts, strict=True)]
        for i in np.flatnonzero(overflown):
            self.starts[i] = len(self.rows[i]) - max(1, self.context // 2)
        if self._cache is None or any(overflown):
            return self._read_all()
        ones = self._mask.new_ones(len(self.rows), 1)
        self._mask = torch.cat([self._mask, ones], dim=1)
        return self._forward([row[-1:] for row in self.rows])

    def _read_all(self) -> torch.Tensor:
        seen = [row[start:] for row, start in zip(self.rows, self.starts, strict=True)]
        longest = max(map(len, seen))
        self._cache = DynamicCache(config=self.model.config)
        self._mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in seen])
        self._mask = self._mask.to(self.model.device)
        return self._forward([[0] * (longest - len(s)) + s for s in seen])

    def _forward(self, tokens: list[list[int]]) -> torch.Tensor:
        inputs = {"input_ids": torch.tensor(tokens, device=self.model.device)}
        if self._positioned:
            positions = self._mask.cumsum(-1) - 1
            inputs["position_ids"] = positions.clamp(min=0)[:, -len(tokens[0]) :]
        output = self.model(
            **inputs, attention_mask=self._mask, past_key_values=self._cache, use_cache=True
        )
        return output.logits[:, -1].float()

    @torch.inference_mode()
    def logits_alone(self, i: int) -> torch.Tensor:
        """Next-token logits of one row read by itself, (1, vocabulary): no batch, pad or cache."""
        tokens = torch.tensor([self.rows[i][self.starts[i] :]], device=self.model.device)
        return self.model(input_ids=tokens, use_cache=False).logits[:, -1].float()

    def append(self, tokens: Sequence[int]) -> None:
        """Add a token to each row."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)

    def select(self, index: list[int]) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        self.rows = [list(self.rows[i]) for i in index]
        self.starts = [self.starts[i] for i in index]
        assert self._cache is not None, "rows are selected after the model has read them"
        chosen = torch.tensor(index, device=self.model.device)
        self._cache.batch_select_indices(chosen)
        self._mask = self._mask[chosen]


def context_length(model: PreTrainedModel) -> int:
    """How many tokens the model can see at once; some, such as BLOOM, have no limit."""
    return int(getattr(model.config, "max_position_embeddings", sys.maxsize))
