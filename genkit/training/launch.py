"""Checks of how a run was launched, before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, parse_flag_from_env

from genkit.machine import state

HOW_TO = (
    "Several GPUs: accelerate launch --multi_gpu --num_processes N recipes/…. Several processes "
    "on CPU: ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N recipes/…"
)
DATA_PARALLEL = "NO", "MULTI_"  # how accelerate's names of it begin, for devices of any kind
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # which accelerate sets up only after these checks


def check_launch() -> None:
    """Refuse a launch that would not train what was asked for.

    For some of its own flags, on a machine without GPUs, accelerate starts a single process or N
    unconnected ones without a warning.

    Raises:
        ValueError: fewer processes are connected than were asked for, or they are connected in a
            way (FSDP, DeepSpeed, …) whose state the checkpoints would not hold.
    """
    here = state()
    wanted = requested_processes()
    if here.num_processes < wanted:
        raise ValueError(
            f"num_processes: {wanted} processes were asked for and {here.num_processes} "
            f"{'is' if here.num_processes == 1 else 'are'} connected. {HOW_TO}"
        )
    kind = DistributedType(here.distributed_type).value
    sharded = [name for name in SHARDED if parse_flag_from_env(f"ACCELERATE_USE_{name}")]
    if sharded or not kind.startswith(DATA_PARALLEL):
        raise ValueError(
            f"distributed_type: {(*sharded, kind)[0]} is not supported; "
            f"genkit trains with data parallelism. {HOW_TO}"
        )


def requested_processes() -> int:
    """Return how many processes the launcher was asked to start."""
    if "WORLD_SIZE" in os.environ:  # torchrun, and accelerate when it uses torchrun
        return int(os.environ["WORLD_SIZE"])
    arguments = _accelerate_arguments()
    if arguments is None:
        return 1
    args, _ = launch_command_parser().parse_known_args(arguments)
    if args.num_processes is None:
        default = default_config_file if Path(default_config_file).is_file() else None
        config = args.config_file or default
        return load_config_from_file(config).num_processes if config else 1
    return args.num_processes


def find_launcher() -> int | None:
    """Return the process that launched this one, if it is accelerate's or torch's launcher."""
    launched = "WORLD_SIZE" in os.environ or _accelerate_arguments() is not None
    return os.getppid() if launched else None


def _accelerate_arguments() -> list[str] | None:
    """Return the arguments of `accelerate launch`, if it started this process."""
    arguments = psutil.Process(os.getppid()).cmdline()
    for i, word in enumerate(arguments):
        name, before = Path(word).name, Path(arguments[i - 1]).name
        if (before, name) in (("accelerate", "launch"), ("-m", "accelerate.commands.launch")):
            return arguments[i + 1 :]
        if name == "accelerate-launch":
            return arguments[i + 1 :]
    return None
