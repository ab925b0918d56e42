"""Was the run launched as it was meant to be? Checked before anything is written."""

from __future__ import annotations

import os
import shutil
import sys
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
LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch")
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
    words = psutil.Process(os.getppid()).cmdline()
    launchers = [i for i, word in enumerate(words) if word.endswith(LAUNCHERS)]
    if not launchers:
        return 1
    args, _ = launch_command_parser().parse_known_args(words[launchers[0] + 1 :])
    if args.num_processes is None:
        default = default_config_file if Path(default_config_file).is_file() else None
        config = args.config_file or default
        return load_config_from_file(config).num_processes if config else 1
    return args.num_processes


def use_all_cores() -> None:
    """Share this machine's cores among its processes; accelerate's launcher may leave them idle."""
    if state().device.type == "cpu":
        linux = sys.platform == "linux"
        cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores // local))


def can_compile() -> bool:
    """Whether torch.compile has the C++ compiler it needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
