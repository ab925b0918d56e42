"""What this machine can do: device, cores, compiler, fast precisions, random generators."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let torch add up in one order only; memory is not filled first, which would cost time."""
    switches = torch.utils.deterministic  # a module whose attributes set switches
    filled = switches.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        switches.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(False)


def seed_all(*entropy: int) -> None:
    """Seed the global generators of Python, numpy and torch with some numbers."""
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    if state().device.type == "cuda":
        torch.cuda.manual_seed(int(seeds[2]))


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
