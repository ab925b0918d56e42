"""The operators of torch that its documentation does not promise, each called here and only here.

A torch that lacks one of them raises a RuntimeError that names it: a model that was to become
faster then stays as it is, and only a model that was asked for in such a precision is refused.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch

Product = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Name the version of torch where an operator is missing."""
    try:
        yield
    except AttributeError as error:
        raise RuntimeError(f"torch {torch.__version__} lacks an operator: {error}") from None


def has_avx512() -> bool:
    """Whether this CPU has the vector instructions for products in bfloat16."""
    with _named():
        return bool(torch.cpu._is_avx512_supported())


def has_vnni() -> bool:
    """Whether this CPU adds products of 8-bit integers in 32 bits."""
    with _named():
        return bool(torch.cpu._is_vnni_supported())


def packed_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Pack a matrix, (outputs, inputs), for this CPU; float32 or bfloat16, by oneDNN."""
    with _named():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        linear = torch.ops.mkldnn._linear_pointwise.default  # the overload: looked up once
    return lambda x: linear(x, packed, bias, "none", [], "")


def packed_int8_product(levels: torch.Tensor, scales: torch.Tensor) -> Product:
    """Pack an 8-bit matrix, (outputs, inputs), with a scale for each output, by FBGEMM.

    The product takes float32 in [-1, 1], which it rounds to 8 bits.
    """
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with _named(), warnings.catch_warnings():  # torch 2.13 warns of this format and has no other
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(levels, scales.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
        linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    return lambda x: linear(x, 1 / 127, 128, packed)


def multiply_int8(rows: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Multiply (rows, inputs) by (inputs, outputs), int8 both, to int32."""
    return torch._int_mm(rows, levels)
