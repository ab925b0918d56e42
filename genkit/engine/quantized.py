"""Models whose matrices are quantised in place, so that no float32 copy of them stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from genkit.engine import kernels
from genkit.engine.kernels import Matrix, pack_matrix


class QuantizedLinear(nn.Module):
    """A linear layer of a packed matrix."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Buffer(torch.empty(0), persistent=False)  # T5 looks at its type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs), float32 both."""
        return kernels.multiply(self.matrix, x)


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are those of a packed matrix."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Buffer(torch.empty(0), persistent=False)

    @property
    def num_embeddings(self) -> int:
        """How many rows there are, as torch's own calls it."""
        return self.matrix.shape[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(…,) to (…, width), float32."""
        return kernels.embed(self.matrix, ids)


def quantize_model(model: PreTrainedModel, kind: str) -> None:
    """Replace the matrices of a float32 model, "int8" or "int4"; biases and norms stay."""
    replace_matrices(model, kind, lambda _, layer, own: pack_layer(layer, own))


def replace_matrices(
    model: PreTrainedModel, kind: str, matrix_of: Callable[[str, nn.Module, str], Matrix]
) -> None:
    """Replace the linear layers of a model, and its embedding of tokens.

    Args:
        kind: of the model, "int8" or "int4".
        matrix_of: returns the packed weights of a layer, by its name, itself and the kind that its
            matrix has; asked once for weights that layers share. Biases are taken from the layers.
    """
    tokens = model.get_input_embeddings()
    matrices: dict[int, Matrix] = {}  # of weights, which layers may share
    for name, layer in list(model.named_modules()):
        embeds = type(layer) is nn.Embedding and layer.weight is tokens.weight
        if type(layer) not in (nn.Linear, Conv1D) and not embeds:
            continue
        key = id(layer.weight)
        if key not in matrices:
            matrices[key] = matrix_of(name, layer, kind_of_layer(model, layer, kind))
        new = QuantizedEmbedding if embeds else QuantizedLinear
        parent, _, leaf = name.rpartition(".")
        matrix = replace(matrices[key], bias=_bias(layer))
        setattr(model.get_submodule(parent), leaf, new(matrix))


def kind_of_layer(model: PreTrainedModel, layer: nn.Module, kind: str) -> str:
    """Return the kind of a layer's matrix in a model of a kind.

    Embeddings of tokens and heads are int8 at least: most of a small model's choice is theirs.
    """
    tokens, head = model.get_input_embeddings(), model.get_output_embeddings()
    chooses = layer is head or layer.weight is tokens.weight
    return "int8" if kind == "int4" and chooses else kind


def pack_layer(layer: nn.Module, kind: str) -> Matrix:
    """Pack the matrix of a linear layer or an embedding; kinds are those of `pack_matrix`."""
    weight = layer.get_parameter("weight").detach()
    return pack_matrix(weight.t() if isinstance(layer, Conv1D) else weight, _bias(layer), kind)


def _bias(layer: nn.Module) -> torch.Tensor | None:
    bias = getattr(layer, "bias", None)
    return None if bias is None else bias.detach()


def list_matrices(network: nn.Module) -> dict[str, Matrix]:
    """Return the packed matrices of a network by the names of their layers."""
    kinds = QuantizedLinear | QuantizedEmbedding
    return {name: m.matrix for name, m in network.named_modules() if isinstance(m, kinds)}


def count_quantized(network: nn.Module) -> int:
    """Count the weights of a network's packed matrices, each once, and their biases."""
    matrices = list_matrices(network).values()
    once = {id(matrix.weights): matrix.shape[0] * matrix.shape[1] for matrix in matrices}
    return sum(once.values()) + sum(m.bias.numel() for m in matrices if m.bias is not None)


def is_quantized(network: nn.Module) -> bool:
    """Whether a network's matrices are packed in place."""
    return any(isinstance(layer, QuantizedLinear) for layer in network.modules())


def precision_of(network: PreTrainedModel) -> str:
    """Return the kind of a network's packed matrices, but for the head's, or else its dtype."""
    kinds = [m.matrix.kind for m in network.modules() if isinstance(m, QuantizedLinear)]
    return min(kinds) if kinds else str(network.dtype).removeprefix("torch.")  # int4 before int8
