"""The precision and device that a network runs in, checked before it is loaded."""

from __future__ import annotations

import torch

from genkit import machine

DTYPES = ("float32", "bfloat16", "float16")


def check_precision(dtype: str | None, quantize: str | None) -> None:
    """Refuse a precision that this machine does not have.

    Raises:
        ValueError: an option is unknown, or for another kind of machine.
    """
    cuda = torch.cuda.is_available()
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "float16" and not cuda:
        raise ValueError("dtype='float16' is for a GPU; on a CPU use 'bfloat16'")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize must be 'int8', got {quantize!r}")
    if quantize and dtype:
        raise ValueError(f"quantize={quantize!r} and dtype={dtype!r} are both precisions; give one")
    if quantize and cuda:
        raise ValueError("quantize='int8' is for a CPU; on a GPU use dtype='bfloat16'")


def check_compiler(compile: bool | None) -> None:
    """Refuse to compile where there is nothing to do it with.

    Raises:
        ValueError: `compile` is True, and so it is.
    """
    if compile and (torch.cuda.is_available() or not machine.can_compile()):
        raise ValueError("compile=True is for a CPU with a C++ compiler; leave it out")


def to_device(dtype: str | None) -> tuple[str, torch.dtype]:
    """Choose the device, and the type of the weights in its memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, getattr(torch, dtype or "float32") if device == "cuda" else torch.float32
