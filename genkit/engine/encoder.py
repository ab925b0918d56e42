"""An encoder with a span head, as it runs fastest: packed, and where it can be, without padding."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from genkit.engine.packed import pack

# kinds whose tokens meet in attention alone, and which take each token's position
UNPADDED = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")
MAKERS = ("torch", "transformers")  # of layers; those of others may do anything


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: list[int],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' other functions do, each window to itself; see `AttentionInterface`.

    Args:
        query, key, value: of all windows, one after the other, (1, heads, tokens, size).
        cu_seq_lens_q: where windows begin, and the last one ends.
    """
    found = []
    for first, last in itertools.pairwise(cu_seq_lens_q):
        q, k, v = (x[:, :, first:last] for x in (query, key, value))
        found.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2))
    return torch.cat(found, 1), None


AttentionInterface.register("genkit", _attend)  # transformers makes no mask for it


def _first_position(model: PreTrainedModel) -> int:
    """Return the position of a window's first token; RoBERTa's follow the one for padding."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and "position_embeddings" in name:
            return 0 if layer.padding_idx is None else layer.padding_idx + 1
    return 0


def token_limit(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the most tokens that a model reads at once."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    return min(tokenizer.model_max_length, positions - _first_position(model))


def _needs_no_padding(model: PreTrainedModel) -> bool:
    """Whether a model can read windows one after the other as one row of tokens."""
    makers = {type(layer).__module__.split(".")[0] for layer in model.modules()}
    return (
        model.config.model_type in UNPADDED
        and not getattr(model.config, "is_decoder", False)
        and makers <= {*MAKERS}
    )


class SpanEncoder:
    """Reads windows by a stock model; on a CPU with packed matrices, and without padding.

    Args:
        model: an encoder; in float32 and on a CPU if it is to be packed.
        precision: of the matrix products but for the head's; None leaves the model as it is.
    """

    def __init__(self, model: PreTrainedModel, precision: str | None) -> None:
        self._unpadded = precision is not None and _needs_no_padding(model)
        self._first = _first_position(model)
        self._model = model
        if precision is not None:
            self._model = pack(model, precision, head="float32", many=True)
        if self._unpadded:
            self._model.set_attn_implementation("genkit")

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of starts and ends, (windows, tokens) each, for a model's inputs."""
        if not self._unpadded:
            output = self._model(**inputs)
            return output.start_logits, output.end_logits
        inside = inputs["attention_mask"].bool()
        tokens = {name: x[inside][None] for name, x in inputs.items() if name != "attention_mask"}
        positions = (inside.cumsum(1) - 1 + self._first)[inside][None]
        bounds = F.pad(inside.sum(1).cumsum(0), (1, 0)).tolist()
        output = self._model(**tokens, position_ids=positions, cu_seq_lens_q=bounds)
        start, end = (
            x.new_zeros(inside.shape).masked_scatter(inside, x[0])
            for x in (output.start_logits, output.end_logits)
        )
        return start, end
