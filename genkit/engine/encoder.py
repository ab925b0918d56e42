"""An encoder with a span head, run by the stock model until something faster pays."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from genkit import machine
from genkit.engine.compiled import CompileSchedule, cache_path, compile_ahead, named_weights
from genkit.engine.packed import pack
from genkit.engine.private_ops import Compiled, load_compiled

# ---------------------------------------------------------------------------------------------
# Attention in bfloat16 where that is fast, and products are not in float32 anyway

_library = torch.library.Library("genkit", "FRAGMENT")
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor")


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """(windows, heads, tokens, size) of one type each, contiguous, q scaled; the mask is added."""
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    scores = torch.bmm(rows[0], rows[1].mT)
    if mask is not None and mask.any():
        scores.view(*q.shape[:2], *scores.shape[1:]).add_(mask)
    return torch.bmm(scores.softmax(-1), rows[2]).view_as(q)


_library.impl("attention", _attention, "CPU")
_library.impl("attention", lambda q, k, v, mask: torch.empty_like(q), "Meta")


def _low_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' other functions do; see `AttentionInterface`."""
    if key.shape[1] != query.shape[1]:  # several queries share a key
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    query = query * (scaling or query.shape[-1] ** -0.5)
    kind = torch.bfloat16 if machine.fast_bf16(machine.CPU) else torch.float32
    q, k, v = (x.to(kind).contiguous() for x in (query, key, value))
    found = torch.ops.genkit.attention(q, k, v, attention_mask)
    return found.transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register("genkit", _low_attention)
AttentionMaskInterface.register("genkit", eager_mask)


def _lowered(model: PreTrainedModel, precision: str, compiled: bool = False) -> PreTrainedModel:
    """Copy a float32 model with its products, but for those of the head, in a precision."""
    copy = pack(model, precision, head=False, compiled=compiled)
    if precision != "float32" and copy._can_set_attn_implementation():
        copy.set_attn_implementation("genkit")
    return copy


# ---------------------------------------------------------------------------------------------
# The encoder


class StockEncoder(torch.nn.Module):
    """A stock model as a function of its weights and a batch of windows.

    Args of the call:
        weights: parameters and buffers by name.
        ids, mask: tokens, and 1 where there are any, (windows, tokens).
        types: which text each token is of, (windows, tokens); None for a model without token types.

    Returns logits of starts and ends, (windows, tokens) each.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = [model]  # in a list: not a submodule, its weights are arguments

    def forward(
        self,
        weights: dict[str, torch.Tensor],
        ids: torch.Tensor,
        mask: torch.Tensor,
        types: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the windows."""
        inputs = {"input_ids": ids, "attention_mask": mask}
        if types is not None:
            inputs["token_type_ids"] = types
        output = torch.func.functional_call(self._model[0], weights, (), inputs)
        return output.start_logits, output.end_logits


def token_limit(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the most tokens that a model reads at once."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for name, layer in model.named_modules():
        embeds = isinstance(layer, torch.nn.Embedding) and "position_embeddings" in name
        if embeds and layer.padding_idx:  # RoBERTa's start after the one for padding
            return min(tokenizer.model_max_length, positions - layer.padding_idx - 1)
    return min(tokenizer.model_max_length, positions)


class SpanEncoder:
    """Reads windows: by the stock model with packed matrices, then by a compiled one.

    `CompileSchedule` says when the compiled one is read from the cache, or made.

    Args:
        model: an encoder; in float32 and on a CPU if it is to be packed or compiled.
        precision: of the matrix products; None leaves the model as it is.
        compiled: True compiles at once; None when it pays, which in float32 it hardly ever does;
            False never.
        typed: whether the model takes token types.
    """

    def __init__(
        self, model: PreTrainedModel, precision: str | None, compiled: bool | None, typed: bool
    ) -> None:
        self._typed = typed
        self._stock, self._precision = model, precision
        schedule = False if compiled is None and precision == "float32" else compiled
        self._schedule = CompileSchedule(schedule, "this model")
        self._packed = _lowered(model, precision) if precision else model
        self._run: Compiled | None = None
        if compiled:
            self._improve(compile_now=True)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of starts and ends, (windows, tokens) each, for a model's inputs."""
        if self._run is None:
            self._schedule.improve_if_due(self._improve)
        if self._run:
            start, end = self._run([*self._weights, *inputs.values()])
            return start, end
        began = time.perf_counter()
        output = self._packed(**inputs)
        self._schedule.add(time.perf_counter() - began)
        return output.start_logits, output.end_logits

    @torch.inference_mode(False)
    def _improve(self, compile_now: bool) -> None:
        """Use a compiled network if there is one, or one is to be made."""
        model = self._packed
        if self._precision == "int8":
            model = _lowered(self._stock, "int8", compiled=True)
        path = cache_path(model, __name__, pack.__module__)
        path = path.with_stem(f"{path.stem}-typed") if self._typed else path
        weights = named_weights(model)
        if compile_now and not path.exists():
            _compile(model, weights, self._typed, path)
        if path.exists():
            self._run, self._packed = load_compiled(path), model
            self._weights = list(weights.values())


def _compile(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], typed: bool, path: Path
) -> None:
    """Compile an encoder for any number of windows of any length."""
    ids = torch.ones(3, 11, dtype=torch.int64)  # different, and neither special
    example = (weights, ids, ids.clone(), torch.zeros_like(ids) if typed else None)
    two = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = (dict.fromkeys(weights), two, two, two if typed else None)
    compile_ahead(StockEncoder(model), example, shapes, path, "this encoder")
