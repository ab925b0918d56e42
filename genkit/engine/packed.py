"""Matrix products from weights that are packed once for this CPU: float32, bfloat16 or int8.

Everything between the products stays in float32. Packed weights are held outside of the module
tree, behind a number, so that a compiled step works for any weights of the same shape.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from genkit.engine import private_ops
from genkit.engine.private_ops import Product

WORTHWHILE = 1 << 18  # weights of a matrix: smaller ones stay in the core's own cache as they are

_products: dict[int, Product] = {}
_numbers = itertools.count()

_library = torch.library.Library("genkit", "DEF")
_library.define("product(Tensor x, Tensor number, SymInt width) -> Tensor")


def _product(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    return _products[int(number)](x)


def _product_shape(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], width)


_library.impl("product", _product, "CPU")
_library.impl("product", _product_shape, "Meta")


class PackedLinear(nn.Module):
    """A linear layer whose weight only its product knows.

    Args:
        weight: (outputs, inputs), float32.
        bias: (outputs,), or None.
        precision: "float32", "bfloat16" or "int8". For int8 the weight has one scale an output and
            the input one scale a row, so that a row's result does not depend on other rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, precision: str) -> None:
        super().__init__()
        number = next(_numbers)
        _products[number] = {"float32": _float32, "bfloat16": _bfloat16, "int8": _int8}[precision](
            weight
        )
        weakref.finalize(self, _products.pop, number)
        self.number = nn.Buffer(torch.tensor(number))
        self.weight = nn.Buffer(torch.empty(0))  # T5 looks at its type
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        self.width, self.precision = weight.shape[0], precision

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs), float32 both."""
        if self.precision == "int8":
            largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            y = torch.ops.genkit.product(x / largest, self.number, self.width) * largest
        elif self.precision == "bfloat16":
            y = torch.ops.genkit.product(x.bfloat16(), self.number, self.width).float()
        else:
            y = torch.ops.genkit.product(x, self.number, self.width)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """A linear layer of 8-bit weights and inputs for many rows, to be compiled.

    The same numbers as a `PackedLinear` of int8: a compiler makes one pass of what that does in
    several, and torch's own integer product is the faster one where there are many rows.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        levels, scales = _levels(weight)
        self.levels, self.scales = nn.Buffer(levels), nn.Buffer(scales)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs), float32 both."""
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        rows = (x * (127 / largest)).round().to(torch.int8).flatten(0, -2)
        y = private_ops.multiply_int8(rows, self.levels.t()).view(*x.shape[:-1], len(self.scales))
        y = y * (largest / 127) * self.scales
        return y if self.bias is None else y + self.bias


def _levels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to 8 bits, with one scale an output."""
    scales = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def _float32(weight: torch.Tensor) -> Product:
    return private_ops.packed_product(weight)


def _bfloat16(weight: torch.Tensor) -> Product:
    if private_ops.has_avx512():
        return _float32(weight.bfloat16())
    product = _float32(weight.bfloat16().float())  # the same numbers where the CPU knows no others
    return lambda x: product(x.float()).bfloat16()


def _int8(weight: torch.Tensor) -> Product:
    levels, scales = _levels(weight)
    if not private_ops.has_vnni():  # FBGEMM adds two products in 16 bits there, which clips
        return functools.partial(_exact_int8, levels=levels.t(), scales=scales / 127)
    return private_ops.packed_int8_product(levels, scales)


def _exact_int8(x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows = (x * 127).round().to(torch.int8).flatten(0, -2)
    return (private_ops.multiply_int8(rows, levels) * scales).view(*x.shape[:-1], len(scales))


def pack(
    model: PreTrainedModel, precision: str, head: bool = True, compiled: bool = False
) -> PreTrainedModel:
    """Copy a float32 model with its large matrices packed; everything else is shared, not copied.

    Args:
        precision: of the matrix products. Below float32 every matrix is packed, however small.
        head: pack what is behind the base model, too.
        compiled: the copy will be compiled, and for many rows.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)
    for name, layer in list(packed.named_modules()):
        inside = model.base_model is model or name.startswith(f"{model.base_model_prefix}.")
        if not isinstance(layer, nn.Linear | Conv1D) or not (head or inside):
            continue
        if precision != "float32" or layer.weight.numel() >= WORTHWHILE:
            parent, _, leaf = name.rpartition(".")
            setattr(packed.get_submodule(parent), leaf, _pack_layer(layer, precision, compiled))
    return packed


def _pack_layer(layer: nn.Linear | Conv1D, precision: str, compiled: bool) -> nn.Module:
    """Return a layer of the same function with its matrix packed; see `pack`."""
    weight = layer.weight.detach()
    matrix = weight.t().contiguous() if isinstance(layer, Conv1D) else weight
    bias = None if layer.bias is None else layer.bias.detach()
    if compiled and precision == "int8":
        return Int8Linear(matrix, bias)
    return PackedLinear(matrix, bias, precision)
