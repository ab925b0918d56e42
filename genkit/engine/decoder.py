"""One step of a decoder over trees of tokens, by compiled kernels or by the stock model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from genkit.engine.native_decoders import native_decoder
from genkit.engine.packed import pack
from genkit.engine.quantized import count_quantized, is_quantized

WEIGHTS_AT_ONCE = 1 << 27  # that the steps of one call read: for tens of milliseconds
FEW = 16  # tokens of a step in float32: more of them the stock model reads faster


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
        cache: see `cache_argument`; the others are those of `Stepper`.
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
    """Runs steps of a decoder over trees of tokens: by compiled kernels, or by the stock model.

    Args:
        model: a decoder, or any other model, whose steps the caller runs.
        precision: of matrix products on a CPU: "float32", "bfloat16", "int8" or "int4".
    """

    def __init__(self, model: PreTrainedModel, precision: str) -> None:
        native = model.device.type == "cpu" and takes_trees(model)
        self.native = native_decoder(model, precision) if native else None
        self._stock_reads = precision == "float32"
        weights = model.num_parameters() + count_quantized(model)
        self._steps_at_once = WEIGHTS_AT_ONCE // weights
        stock = self.native is not None or self._stock_reads or is_quantized(model)
        self.model = model if stock else pack(model, precision)
        self._cache = cache_argument(model)

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        seen: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        kept: int,
        hidden: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do one step.

        Args:
            ids: new tokens, (texts, width).
            positions: of each in its own line of text, (texts, width).
            slots: where each goes in the pool, (texts, width).
            seen: which slots each attends to, its own included, (texts, width, slots), bool.
            keys, values: the pool, see `Pool`; written in place.
            kept: of how many of the last tokens logits are wanted.
            hidden: return the last states, too.

        Returns:
            Logits, (texts, kept, vocabulary), and states, (texts, width, size), or None.
        """
        step = ids, positions, slots, seen, keys, values
        if self.native is not None and not (self._stock_reads and ids.numel() > FEW):
            logits, states = self.native(*step, kept)
            return logits, states if hidden else None
        arguments = forward_arguments(self._cache, *step)
        output = self.model(**arguments, logits_to_keep=kept, output_hidden_states=hidden)
        return output.logits.float(), output.hidden_states[-1] if hidden else None

    @property
    def is_exact(self) -> bool:
        """Whether a token's logits hardly depend on what else is in its step."""
        return self.native is not None or (self._stock_reads and self.model.dtype == torch.float32)

    def steps_at_once(self, texts: int) -> int:
        """Return how many steps `native` should do in one call: 0, or as many as end soon."""
        if self.native is None or (self._stock_reads and texts > FEW):
            return 0
        return self._steps_at_once

    def read_alone(self, tokens: list[int]) -> torch.Tensor:
        """Return the logits after one line of text, (vocabulary,): no batch, tree or kept keys."""
        ids = torch.tensor([tokens], device=self.model.device)
        if self.native is None or self._stock_reads:
            mask = torch.ones_like(ids)
            output = self.model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1
            )
            return output.logits[0, -1].float()
        steps = torch.arange(len(tokens))
        seen = steps[:, None] >= steps
        keys, values = (empty_pool(self.model, 1, len(tokens)) for _ in range(2))
        logits, _ = self.native(ids, steps[None], steps[None], seen[None], keys, values, 1)
        return logits[0, 0]


def empty_pool(model: PreTrainedModel, texts: int, slots: int) -> list[torch.Tensor]:
    """Make room for keys or values, one (texts, heads, slots, size) a layer."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    room = (texts, heads, slots, size)
    layers = range(config.num_hidden_layers)
    return [torch.zeros(room, dtype=model.dtype, device=model.device) for _ in layers]


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
