"""The precision that a network runs in on its device, checked before it is loaded."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from genkit import machine
from genkit.engine import kernels

DTYPES = ("float32", "bfloat16", "float16")


def check_precision(
    dtype: str | None,
    quantize: str | None,
    device: torch.device,
    kinds: tuple[str, ...] = ("int8",),
) -> None:
    """Refuse a precision that a device does not have.

    Args:
        kinds: what `quantize` may be.

    Raises:
        ValueError: an option is unknown, or for another kind of device.
    """
    cpu = device.type == "cpu"
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "float16" and cpu:
        raise ValueError("dtype='float16' is for a GPU; on a CPU use 'bfloat16'")
    if dtype == "bfloat16" and not machine.has_bf16(device):
        raise ValueError(f"dtype='bfloat16': {device} does not have it; use 'float16'")
    if quantize not in (None, *kinds):
        raise ValueError(f"quantize must be {' or '.join(map(repr, kinds))}, got {quantize!r}")
    if quantize and dtype:
        raise ValueError(f"quantize={quantize!r} and dtype={dtype!r} are both precisions; give one")
    if quantize and not cpu:
        raise ValueError(f"quantize={quantize!r} is for a CPU; on a GPU use dtype='bfloat16'")
    if quantize == "int4" and not kernels.available():
        raise ValueError(
            "quantize='int4' needs the compiled kernels, which genkit was installed without: "
            "install it again where there is a C++ compiler, or use 'int8'"
        )


def check_saved(saved: str, dtype: str | None, quantize: str | None, device: torch.device) -> None:
    """Refuse a precision, or a device, that a model which was saved quantised does not have.

    Args:
        saved: "int8" or "int4".

    Raises:
        ValueError: an option asks for another one, or the kernels are not there.
    """
    if dtype or quantize not in (None, saved):
        name, value = ("dtype", dtype) if dtype else ("quantize", quantize)
        raise ValueError(f"{name}={value!r}: this model was saved in {saved}; leave it out")
    if device.type != "cpu":
        raise ValueError(f"this model was saved in {saved}, for a CPU; give device='cpu'")
    if not kernels.available():
        raise ValueError(
            f"this model was saved in {saved}, which needs the compiled kernels; genkit was "
            "installed without: install it again where there is a C++ compiler"
        )


def weights_type(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the type of the weights in memory; on a CPU only products are in other types."""
    return torch.float32 if device.type == "cpu" else getattr(torch, dtype or "float32")


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a loaded model to its device, ready to run there."""
    if not machine.has_fused_attention(device.type):
        model.set_attn_implementation("eager")
    return model.to(device).eval()
