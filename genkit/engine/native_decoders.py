"""Which decoders the compiled kernels run, and how each is described to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from genkit.engine import kernels
from genkit.engine.kernels import NO_MATRIX, Matrix, NativeDecoder
from genkit.engine.quantized import QuantizedEmbedding, QuantizedLinear, kind_of_layer, pack_layer

MAKERS = ("torch", "transformers", "genkit")  # of layers; those of others may do anything
CLASSES = ("LlamaForCausalLM", "GPT2LMHeadModel")
LLAMA = {"hidden_act": "silu", "pretraining_tp": 1}
GPT2 = {
    "activation_function": "gelu_new",
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


class _Description:
    """Collects the numbers that describe a decoder to the kernels, and what they point to."""

    def __init__(self, model: PreTrainedModel, precision: str) -> None:
        self.model, self.precision = model, precision
        self.numbers: list[float] = []
        self._tensors: list[torch.Tensor] = []
        self._matrices: list[Matrix] = []
        self._packed: dict[int, Matrix] = {}  # by the address of the weight

    @property
    def sources(self) -> list[Any]:
        """All that the numbers point to."""
        return [*self._tensors, *self._matrices]

    def tensor(self, value: Any) -> None:
        """Add the address of a float32 tensor, or that there is none."""
        if value is None:
            self.numbers.append(0)
            return
        whole = value.detach().contiguous()
        self._tensors.append(whole)
        self.numbers.append(whole.data_ptr())

    def matrix(self, layer: Any) -> None:
        """Add a linear layer or an embedding, packed; one that came before is not packed again."""
        if layer is None:
            self.numbers += NO_MATRIX
            return
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            matrix = layer.matrix
        elif layer.weight.data_ptr() in self._packed:
            matrix = self._packed[layer.weight.data_ptr()]
        else:
            matrix = pack_layer(layer, kind_of_layer(self.model, layer, self.precision))
            self._packed[layer.weight.data_ptr()] = matrix
        self._matrices.append(matrix)
        self.numbers += matrix.numbers()

    def norm(self, layer: nn.Module) -> None:
        """Add a layer of normalisation."""
        self.tensor(layer.weight)
        self.tensor(getattr(layer, "bias", None))


def native_decoder(model: PreTrainedModel, precision: str) -> NativeDecoder | None:
    """Describe a decoder to the kernels; None if they do not know its kind or are not there.

    Args:
        model: on a CPU, in float32.
        precision: of the matrices, "float32", "bfloat16", "int8" or "int4".
    """
    known = {"llama": (_llama, LLAMA), "gpt2": (_gpt2, GPT2)}.get(model.config.model_type)
    if not kernels.available() or known is None or not _is_plain(model, known[1]):
        return None
    description = _Description(model, precision)
    known[0](model, description)
    config = model.config
    return NativeDecoder(
        description.numbers, description.sources, config.hidden_size, config.vocab_size
    )


def _is_plain(model: PreTrainedModel, settings: dict[str, Any]) -> bool:
    """Whether all layers are those of transformers, in float32, with the settings known here."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    ours = (nn.Linear, Conv1D, nn.Embedding)
    weights = ((layer, getattr(layer, "weight", None)) for layer in model.modules())
    matrices = [layer for layer, weight in weights if weight is not None and weight.ndim == 2]
    return (
        type(model).__name__ in CLASSES
        and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and all(getattr(config, name, value) == value for name, value in settings.items())
        and all(type(layer) in ours for layer in matrices)
        and all(type(layer).__module__.split(".")[0] in MAKERS for layer in model.modules())
        and all(p.dtype == torch.float32 for p in model.parameters())
    )


def _llama(model: PreTrainedModel, to: _Description) -> None:
    config, inner = model.config, model.get_decoder()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    to.numbers += [config.hidden_size, config.num_attention_heads, config.num_key_value_heads]
    to.numbers += [size, config.vocab_size, config.max_position_embeddings]
    to.numbers += [config.rms_norm_eps, size**-0.5]
    to.tensor(None)
    to.tensor(_rotations(model))
    to.norm(inner.norm)
    to.matrix(inner.embed_tokens)
    to.matrix(model.lm_head)
    for layer in inner.layers:
        to.norm(layer.input_layernorm)
        attention, mlp = layer.self_attn, layer.mlp
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            to.matrix(part)
        to.norm(layer.post_attention_layernorm)
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            to.matrix(part)


def _rotations(model: PreTrainedModel) -> torch.Tensor:
    """Cosines and sines of every position, (context, 2, head width / 2)."""
    positions = torch.arange(model.config.max_position_embeddings)[None]
    cosines, sines = model.get_decoder().rotary_emb(torch.empty(0), positions)
    half = cosines.shape[-1] // 2
    return torch.stack([cosines[0, :, :half], sines[0, :, :half]], dim=1)


def _gpt2(model: PreTrainedModel, to: _Description) -> None:
    config, inner = model.config, model.transformer
    size = config.hidden_size // config.num_attention_heads
    to.numbers += [config.hidden_size, config.num_attention_heads, config.num_attention_heads]
    to.numbers += [size, config.vocab_size, config.n_positions]
    to.numbers += [config.layer_norm_epsilon, size**-0.5]
    to.tensor(inner.wpe.weight)
    to.tensor(None)
    to.norm(inner.ln_f)
    to.matrix(inner.wte)
    to.matrix(model.lm_head)
    for layer in inner.h:
        to.norm(layer.ln_1)
        for part in (layer.attn.c_attn, None, None, layer.attn.c_proj):
            to.matrix(part)
        to.norm(layer.ln_2)
        for part in (None, layer.mlp.c_fc, layer.mlp.c_proj):
            to.matrix(part)
