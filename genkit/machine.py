"""What this machine can do: devices, memory, cores, compiler, precisions, random generators.

This is the one file that names kinds of accelerators. Everything else asks it, and knows only "cpu"
and "accelerator".
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from accelerate import PartialState
from accelerate import utils as accelerated
from accelerate.utils import parse_flag_from_env, patch_environment

CPU = torch.device("cpu")
ACCELERATORS = {  # whether there are any, in accelerate's order
    "mps": accelerated.is_mps_available,
    "mlu": accelerated.is_mlu_available,
    "sdaa": accelerated.is_sdaa_available,
    "musa": accelerated.is_musa_available,
    "npu": accelerated.is_npu_available,
    "hpu": accelerated.is_hpu_available,
    "cuda": accelerated.is_cuda_available,
    "xpu": accelerated.is_xpu_available,
    "neuron": accelerated.is_neuron_available,
}
SHARED = ("cpu", "mps")  # work in main memory
COMPILED = ("cpu", "cuda", "xpu")  # those that torch.compile is finished for
EXACT = ("cpu", "cuda")  # all of which have float64
Kind = Literal["cpu", "accelerator"]

# ---------------------------------------------------------------------------------------------
# Devices


def state() -> PartialState:
    """Return what accelerate knows of this process, before there is an Accelerator."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def start(name: str | None) -> None:
    """Choose the device of this process, before anything asks accelerate for one.

    Args:
        name: see `find_device`; of several processes each takes its own of that kind.

    Raises:
        ValueError: there is no such device, it is one for several processes, or this process has
            begun on another.
    """
    if name is None:
        return
    device = name_to_device(name, list_devices())
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and device.index is not None:
        raise ValueError(f"device: {name} is one for several processes; give {device.type}")
    alone = not several and device.type != "cpu"
    with patch_environment(**({"ACCELERATE_TORCH_DEVICE": name} if alone else {})):
        PartialState(cpu=device.type == "cpu")
    here = find_device()
    if here.type != device.type or device.index not in (None, here.index):
        raise ValueError(f"device: {name}, but this process has begun on {here}; start another")
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)


def list_devices() -> list[str]:
    """Name the devices of this machine as torch does: cpu, and accelerators with their index."""
    kinds = [kind for kind, are_there in ACCELERATORS.items() if are_there()]
    counts = {kind: torch.get_device_module(kind).device_count() for kind in kinds}
    return ["cpu", *(f"{kind}:{i}" for kind, count in counts.items() for i in range(count))]


def name_to_device(name: str, present: Sequence[str]) -> torch.device:
    """Return the device of a name.

    Args:
        name: see `find_device`.
        present: see `list_devices`.

    Raises:
        ValueError: it is not there.
    """
    if str(name) not in present and f"{name}:0" not in present:
        raise ValueError(f"device: {name} is not there; this machine has {', '.join(present)}")
    return torch.device(name)


def find_device(name: str | None = None) -> torch.device:
    """Return the device of a name, or the one that accelerate has chosen for this process.

    Args:
        name: "cpu", or a kind of accelerator with or without an index, such as "cuda:1"; default:
            the accelerator, if there is one and ACCELERATE_USE_CPU is not set.

    Returns:
        An accelerator with its index, so that each has one name.

    Raises:
        ValueError: it is not there.
    """
    device = state().device if name is None else name_to_device(name, list_devices())
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def count_accelerators(name: str | None = None) -> int:
    """Return how many accelerators the processes of a run can have.

    Args:
        name: of the run's device, see `find_device`.

    Raises:
        ValueError: it is not there.
    """
    present = list_devices()
    if name is None:
        return 0 if parse_flag_from_env("ACCELERATE_USE_CPU") else len(present) - 1
    device = name_to_device(name, present)
    of_kind = [each for each in present if each.startswith(f"{device.type}:")]
    return len(of_kind) if device.index is None else 1


def kind(device: torch.device) -> Kind:
    """Return what decides batch sizes and the length of a run."""
    return "cpu" if device.type == "cpu" else "accelerator"


def hide_accelerators() -> dict[str, str]:
    """Return variables for a process that is to leave the accelerators to others."""
    return {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


# ---------------------------------------------------------------------------------------------
# Memory and cores


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device's memory."""
    main = int(psutil.virtual_memory().available)
    if device.type == "mps":  # of the main memory, as much as the driver recommends
        return min(main, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return main if device.type == "cpu" else torch.get_device_module(device).mem_get_info(device)[0]


def peak_memory() -> int:
    """Return the most bytes that this process has held on its device.

    Where main memory is that of the device, those that it holds now.
    """
    device = state().device
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    return int(torch.get_device_module(device).max_memory_allocated())


def empty_cache(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def has_own_memory(device: torch.device) -> bool:
    """Whether a network can wait in main memory while another one computes."""
    return device.type not in SHARED


def use_all_cores() -> None:
    """Share this machine's cores among its processes; accelerate's launcher may leave them idle."""
    if state().device.type == "cpu":
        linux = sys.platform == "linux"
        cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores // local))


# ---------------------------------------------------------------------------------------------
# Random numbers and the order of sums


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
    """Seed the global generators of Python, numpy and torch, the device's own included."""
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    device = state().device
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(int(seeds[2]))


def fork_random_state() -> AbstractContextManager[None]:
    """Return a context that leaves torch's global random state as it was, on every device."""
    found = torch.accelerator.current_accelerator()
    devices = range(torch.accelerator.device_count())
    return torch.random.fork_rng(devices, device_type="cpu" if found is None else found.type)


# ---------------------------------------------------------------------------------------------
# Compiler and precisions


def can_compile(device: torch.device | None = None) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler, Python's headers, a known device.

    Args:
        device: default: that of this process.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    known = (device or state().device).type in COMPILED
    return known and shutil.which(compiler) is not None and headers.is_file()


def attention(device: str, mixed_precision: str | None) -> str:
    """Return transformers' name of the attention that trains faster, and right.

    On a CPU the fused one's backward is slower than plain products in bfloat16; in float32 it is
    faster, the more so the longer the context.
    """
    slow = device == "cpu" and mixed_precision == "bf16"
    return "sdpa" if has_fused_attention(device) and not slow else "eager"


def has_fused_attention(device: str) -> bool:
    """Whether torch's fused attention is right on a kind of device.

    On MPS it has silently been wrong with masks, and in 16 bits tokens have seen later ones:
    https://github.com/pytorch/pytorch/pull/184180, https://github.com/pytorch/pytorch/issues/195910
    """
    return device != "mps"


def fast_bf16(device: torch.device | None = None) -> bool:
    """Whether a device is known to multiply bfloat16 matrices faster than float32 ones.

    Args:
        device: default: that of this process.
    """
    name = (device or state().device).type
    if name == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if name == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return name == "xpu" and torch.xpu.is_bf16_supported(including_emulation=False)


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 at all."""
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def half_precision(device: torch.device) -> torch.dtype:
    """Return the type of 16 bits in which a device runs a network best."""
    native = fast_bf16(device) if device.type == "cuda" else has_bf16(device)
    return torch.bfloat16 if native else torch.float16


def to_float64(values: torch.Tensor) -> torch.Tensor:
    """Return values in float64: where they are, or on the CPU if their device may have none."""
    return (values if values.device.type in EXACT else values.cpu()).double()
