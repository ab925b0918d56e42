"""What this machine can do: its device, cores, compiler and fast precisions, in one place."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def state() -> PartialState:
    """Return what accelerate knows of this process, before there is an Accelerator."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def use_all_cores() -> None:
    """Share this machine's cores among its processes; accelerate's launcher may leave them idle."""
    if state().device.type == "cpu":
        linux = sys.platform == "linux"
        cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores // local))


def can_compile() -> bool:
    """Whether torch.compile has what it needs: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(compiler) is not None and headers.is_file()


def attention(device: str, mixed_precision: str | None) -> str:
    """Return transformers' name of the attention that trains faster.

    On a CPU the fused one's backward is slower than plain products in bfloat16; in float32 it is
    faster, the more so the longer the context.
    """
    return "eager" if device == "cpu" and mixed_precision == "bf16" else "sdpa"


def fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones."""
    if state().device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
