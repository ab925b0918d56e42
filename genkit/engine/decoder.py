"""One step of a decoder over a tree of tokens: by the stock model, or compiled ahead of time.

A compiled step takes the weights as arguments. It is kept in the cache by the shape of the model,
so that it is paid for once and serves every later process and every fine-tuned sibling.
"""

from __future__ import annotations

import functools
import inspect
import time
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import Cache, PreTrainedModel

from genkit.engine.compiled import CompileSchedule, cache_path, compile_ahead, named_weights
from genkit.engine.packed import pack
from genkit.engine.private_ops import Compiled, load_compiled


class Pool(Cache):
    """Keys and values of one tree of tokens for each text, written to the slots given.

    Args:
        keys, values: one (texts, heads, slots, size) a layer.
        slots: where the tokens of this step go, (texts, width).
    """

    def __init__(
        self, keys: list[torch.Tensor], values: list[torch.Tensor], slots: torch.Tensor
    ) -> None:
        super().__init__(layers=[])
        self.keys, self.values, self.slots = keys, values, slots

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (texts, heads, width, size) and return the whole layer."""
        texts = torch.arange(key.shape[0], device=key.device)[:, None]
        for whole, new in ((self.keys[layer_idx], key), (self.values[layer_idx], value)):
            whole.transpose(1, 2).index_put_((texts, self.slots), new.transpose(1, 2))
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so nobody may derive them from here."""
        return 0


class StockStep(torch.nn.Module):
    """A stock model as a function of its weights, tokens, and a tree of earlier tokens.

    Args of the call:
        weights: parameters and buffers by name.
        ids: new tokens, (texts, width).
        positions: of each in its own line of text, (texts, width).
        slots: where each goes in the pool, (texts, width).
        seen: which slots each attends to, its own included, (texts, width, slots), bool.
        keys, values: the pool, see `Pool`; written in place.

    Returns logits, (texts, width, vocabulary).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = [model]  # in a list: not a submodule, its weights are arguments
        self._cache = cache_argument(model)

    def forward(
        self,
        weights: dict[str, torch.Tensor],
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        seen: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """Do one step."""
        arguments = forward_arguments(self._cache, ids, positions, slots, seen, keys, values)
        return torch.func.functional_call(self._model[0], weights, (), arguments).logits


def cache_argument(model: PreTrainedModel) -> str:
    """Return what the model's forward calls its keys and values; "" if it takes none."""
    taken = inspect.signature(model.forward).parameters
    if "cache" in taken:  # since transformers 5.24, where it may hold states instead
        return "" if model._is_stateful else "cache"
    return "past_key_values" if "past_key_values" in taken else ""


def forward_arguments(
    cache: str,
    ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    seen: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> dict[str, Any]:
    """Return the arguments of a stock model's forward for such a step.

    Args:
        cache: see `cache_argument`; the others are those of `StockStep`.
    """
    nothing = torch.finfo(keys[0].dtype).min
    mask = torch.zeros(seen.shape, dtype=keys[0].dtype, device=seen.device)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": mask.masked_fill(~seen, nothing)[:, None],  # (texts, 1, width, slots)
        cache: Pool(keys, values, slots),
        "use_cache": True,
    }


class Stepper:
    """Runs steps of a model: by the stock model until something faster pays.

    That is the same model with packed matrices, or a compiled step; `CompileSchedule` says when.

    Args:
        model: a decoder; in float32 and on a CPU if it is to be packed or compiled.
        precision: of matrix products, see `packed`; below float32 they are packed at once.
        compiled: True compiles at once; None when it pays; False leaves float32 as it is.
    """

    def __init__(self, model: PreTrainedModel, precision: str, compiled: bool | None) -> None:
        self._precision, self._packed = precision, precision != "float32"
        self._schedule = CompileSchedule(compiled, "this model's step")
        self.model = pack(model, precision) if self._packed else model
        self._cache = cache_argument(model)
        self.exact = self.model  # what decides where rounding could: the same before and after
        self._step: Compiled | None = None
        if compiled:
            self._improve(compile_now=True)

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        seen: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """Do one step; arguments and result are those of `StockStep`, without weights."""
        if self._step:
            inputs = [*self._weights.values(), ids, positions, slots, seen, *keys, *values]
            return self._step(inputs)[0]
        start = time.perf_counter()
        step = ids, positions, slots, seen, keys, values
        logits = self.model(**forward_arguments(self._cache, *step)).logits
        self._schedule.add(time.perf_counter() - start)
        self._schedule.improve_if_due(self._improve)
        return logits

    @torch.inference_mode(False)
    def _improve(self, compile_now: bool) -> None:
        """Pack the matrices, and use a compiled step if there is one, or one is to be made."""
        if not self._packed:
            self.model, self._packed = pack(self.model, self._precision), True
        path = step_path(self.model)
        if compile_now and not path.exists():
            _compile(self.model, self._weights, path)
        if path.exists():
            self._step = load_compiled(path)

    @functools.cached_property
    def _weights(self) -> dict[str, torch.Tensor]:
        return named_weights(self.model)


def empty_pool(model: PreTrainedModel, texts: int, slots: int) -> list[torch.Tensor]:
    """Make room for keys or values, one (texts, heads, slots, size) a layer."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    room = (texts, heads, slots, size)
    layers = range(config.num_hidden_layers)
    return [torch.zeros(room, dtype=model.dtype, device=model.device) for _ in layers]


def _compile(model: PreTrainedModel, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Compile a step for any number of texts, any width and any number of slots."""
    texts, width, size = 3, 5, 64  # all different, none special
    tokens = torch.zeros(texts, width, dtype=torch.int64)
    keys, values = (empty_pool(model, texts, size) for _ in range(2))
    seen = torch.ones(texts, width, size, dtype=torch.bool)
    slots = torch.arange(width).expand(texts, width).contiguous()
    any_ = Dim.AUTO
    pool = [{0: any_, 2: any_}] * len(keys)
    two = {0: any_, 1: any_}
    shapes = (dict.fromkeys(weights), two, two, two, two | {2: any_}, pool, pool)
    example = (weights, tokens, tokens.clone(), slots, seen, keys, values)
    threads = {"cpp.threads": 1} if _is_small(model) else {}
    what = "this model's decoding step"
    compile_ahead(StockStep(model), example, shapes, path, what, **threads)


def step_path(model: PreTrainedModel) -> Path:
    """Return the path of a model's compiled step in the cache."""
    modules = (__name__, pack.__module__)
    return cache_path(model, *modules, threads=1 if _is_small(model) else None)


def _is_small(model: PreTrainedModel) -> bool:
    """Whether no matrix is worth packing: a step is too little work to divide among threads."""
    return not any(getattr(layer, "precision", "") for layer in model.modules())


def takes_trees(model: PreTrainedModel) -> bool:
    """Whether a decoder takes positions and a mask of any shape, so that a tree is one sequence."""
    config = model.config
    arguments = inspect.signature(model.forward).parameters
    return (
        not config.is_encoder_decoder
        and {"position_ids", "logits_to_keep"} <= arguments.keys()
        and model._supports_attention_backend
        and config._attn_implementation in ("sdpa", "eager")
        and getattr(config, "sliding_window", None) is None
        and getattr(config, "kv_lora_rank", None) is None  # keys of another shape are kept
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    )
