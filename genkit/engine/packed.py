"""Matrix products from weights that are packed once for this CPU: float32, bfloat16 or int8.

Everything between the products stays in float32. A row's result does not depend on other rows.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from genkit.engine import kernels, private_ops
from genkit.engine.private_ops import Product

WORTHWHILE = 1 << 18  # weights of a matrix: smaller ones stay in the core's own cache as they are


class PackedLinear(nn.Module):
    """A linear layer whose weight only its product knows.

    Args:
        weight: (outputs, inputs), float32.
        bias: (outputs,), or None.
        precision: "float32", "bfloat16" or "int8".
        many: it is for many rows at once.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, precision: str, many: bool = False
    ) -> None:
        super().__init__()
        self._product = _make_product(weight, bias, precision, many)
        self.weight = nn.Buffer(torch.empty(0), persistent=False)  # T5 looks at its type
        self.precision = precision

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs), float32 both."""
        return self._product(x)


def _make_product(
    weight: torch.Tensor, bias: torch.Tensor | None, precision: str, many: bool
) -> Product:
    if precision == "int8":
        return _int8(weight, bias, many)
    return (_bfloat16 if precision == "bfloat16" else private_ops.packed_product)(weight, bias)


def _bfloat16(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Return a product of weights in bfloat16, and of inputs where the CPU multiplies such."""
    if not private_ops.has_avx512():
        return private_ops.packed_product(weight.bfloat16().float(), bias)
    product = private_ops.packed_product(weight.bfloat16(), None)
    if bias is None:
        return lambda x: product(x.bfloat16()).float()
    return lambda x: product(x.bfloat16()).float().add_(bias)


def _int8(weight: torch.Tensor, bias: torch.Tensor | None, many: bool) -> Product:
    """Return a product of weights in 8 bits, by what is fast on this CPU.

    With VNNI inputs have 8 bits, too. Without, FBGEMM adds two products in 16 bits, which clips,
    and torch's exact product is slower than that of float32; the kernels have inputs of 16 bits.
    """
    if private_ops.has_vnni():
        return (by_many_rows if many and kernels.available() else by_row)(weight, bias)
    if kernels.available():
        return functools.partial(kernels.multiply, kernels.pack_matrix(weight, bias, "int8"))
    levels, scales = _levels(weight)
    return private_ops.packed_product(levels * scales[:, None], bias)


def _levels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to 8 bits, with one scale an output."""
    scales = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def by_row(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Return a product of 8 bits, with one scale for each row of inputs, for few rows."""
    product = private_ops.packed_int8_product(*_levels(weight))

    def multiply(x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        y = product(x / largest) * largest
        return y if bias is None else y.add_(bias)

    return multiply


def by_many_rows(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Return the same product for many rows, by oneDNN; rounding and scaling are one pass each."""
    levels, scales = _levels(weight)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        rows, sizes = kernels.round_rows(x.flatten(0, -2))
        sums = private_ops.multiply_int8(rows, levels.t())
        return kernels.scale_sums(sums, sizes, scales, bias).unflatten(0, x.shape[:-1])

    return multiply


def pack(
    model: PreTrainedModel, precision: str, head: str | None = None, many: bool = False
) -> PreTrainedModel:
    """Copy a float32 model with its large matrices packed; everything else is shared, not copied.

    Args:
        precision: of the matrix products. Below float32 every matrix is packed, however small.
        head: another one for what is behind the base model.
        many: the copy is for many rows at once, and every matrix is packed.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)
    for name, layer in list(packed.named_modules()):
        if not isinstance(layer, nn.Linear | Conv1D):
            continue
        inside = model.base_model is model or name.startswith(f"{model.base_model_prefix}.")
        kind = precision if inside or head is None else head
        if many or kind != "float32" or layer.weight.numel() >= WORTHWHILE:
            weight = layer.weight.detach()
            matrix = weight.t().contiguous() if isinstance(layer, Conv1D) else weight
            bias = None if layer.bias is None else layer.bias.detach()
            parent, _, leaf = name.rpartition(".")
            setattr(packed.get_submodule(parent), leaf, PackedLinear(matrix, bias, kind, many))
    return packed
