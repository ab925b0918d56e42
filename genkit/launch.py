"""Was the run launched as it was meant to be? Checked before anything is written."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, parse_flag_from_env

HOW_TO = (
    "Several GPUs: accelerate launch --multi_gpu --num_processes N recipes/…. Several processes "
    "on CPU: ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N recipes/…"
)
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def state() -> PartialState:
    """Return what accelerate knows of this process, before there is an Accelerator."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def check() -> None:
    """Refuse a launch that would not train what was asked for.

    accelerate starts a single process, or N unconnected ones, for some of its own flags on a
    machine without GPUs, and says nothing.

    Raises:
        ValueError: fewer processes are connected than were asked for, or they are connected in a
            way (FSDP, DeepSpeed, …) whose state the checkpoints would not hold.
    """
    here = state()
    wanted = asked_processes()
    if here.num_processes < wanted:
        raise ValueError(
            f"num_processes: {wanted} processes were asked for and {here.num_processes} "
            f"{'is' if here.num_processes == 1 else 'are'} connected. {HOW_TO}"
        )
    if here.distributed_type not in SUPPORTED:
        raise ValueError(
            f"distributed_type: {here.distributed_type} is not supported; "
            f"genkit trains with data parallelism. {HOW_TO}"
        )


def asked_processes() -> int:
    """How many processes the launcher was asked to start."""
    if "WORLD_SIZE" in os.environ:  # torchrun, and accelerate when it uses torchrun
        return int(os.environ["WORLD_SIZE"])
    words = _accelerate_words()
    if words is None:
        return 1
    args, _ = launch_command_parser().parse_known_args(words)
    if args.num_processes is None:
        default = default_config_file if Path(default_config_file).is_file() else None
        config = args.config_file or default
        return load_config_from_file(config).num_processes if config else 1
    return args.num_processes


def launcher() -> int | None:
    """Return the process that launched this one, if it is accelerate's or torch's launcher."""
    launched = "WORLD_SIZE" in os.environ or _accelerate_words() is not None
    return os.getppid() if launched else None


def _accelerate_words() -> list[str] | None:
    """What was said to `accelerate launch`, if that started this process."""
    words = psutil.Process(os.getppid()).cmdline()
    for i, word in enumerate(words):
        name, before = Path(word).name, Path(words[i - 1]).name
        if (before, name) in (("accelerate", "launch"), ("-m", "accelerate.commands.launch")):
            return words[i + 1 :]
        if name == "accelerate-launch":
            return words[i + 1 :]
    return None


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
