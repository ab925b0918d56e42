"""genkit train: run a recipe, in this process or in several."""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from genkit import console, recipes
from genkit.arguments import Parser

EXAMPLES = """\
  genkit train charlm --text book.txt --output_dir runs/book
  genkit train charlm --output_dir runs/book --resume
  genkit train vae --processes 2
  genkit train vae --help    # its flags, with the defaults on this machine
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command; all but --processes are the recipe's."""
    found = recipes.find_recipes()
    width = max(map(len, found))
    lines = [f"  {name:{width}}  {_first_line(path)}" for name, path in found.items()]
    parser.description = "\n".join(["recipes:", *lines])
    parser.add_argument("recipe", choices=found, metavar="recipe", help="one of those above")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="flags of the recipe"
    )
    _add_processes(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    text = "number of processes; default: one for each GPU, or one on a CPU"
    parser.add_argument("--processes", type=int, default=argparse.SUPPRESS, help=text)


def _first_line(path: Path) -> str:
    """Return what a recipe does, by its docstring; the recipe is not imported, which takes long."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def run(arguments: dict[str, Any]) -> None:
    """Run a recipe.

    Raises:
        ValueError: a flag, a value or a file that it names is wrong.
        SystemExit: a process of several has ended with an error.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    _add_processes(parser)
    own, words = parser.parse_known_args(arguments["arguments"])
    path = recipes.find_recipes()[arguments["recipe"]]
    asked = getattr(own, "processes", arguments.get("processes"))
    device = _parse_device(words)
    processes = 1 if {"-h", "--help"} & set(words) else count_processes(asked, device)
    if processes > 1:
        _run_several(path, words + ["--quiet"] * console.is_quiet(), processes, device)
        return
    sys.argv = [str(path), *words]  # which the card of the model names
    importlib.import_module(f"genkit.recipes.{path.stem}").main()


def _parse_device(words: list[str]) -> str | None:
    """Return the value of the recipe's --device."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    return parser.parse_known_args(words)[0].device


def count_processes(asked: int | None, device: str | None = None) -> int:
    """Return how many processes to start.

    Args:
        asked: the value of --processes; default: one for each GPU.
        device: the value of --device; default: the GPUs, if there are any.

    Raises:
        ValueError: it is below 1, or above the number of GPUs where there are any; or there is no
            such device.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"--processes must be 1 or more, got {asked}")
    if asked == 1 or "WORLD_SIZE" in os.environ:  # a launcher has started this process
        return 1
    from genkit import machine

    gpus = machine.count_accelerators(device)
    if asked is not None and gpus and asked > gpus:
        raise ValueError(
            f"--processes: {asked} are more than the GPUs that there are, {gpus}; give {gpus}, or "
            "--device cpu"
        )
    return asked or max(1, gpus)


def _run_several(path: Path, words: list[str], processes: int, device: str | None) -> None:
    """Run a recipe by accelerate's launcher, without the launcher's log and traceback."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from genkit import machine

    if not machine.count_accelerators(device):
        os.environ["ACCELERATE_USE_CPU"] = "1"
    for name in ("torch.distributed.run", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    launcher = f"--multi_gpu --num_processes {processes} --num_machines 1 --gpu_ids all"
    launcher += " --main_process_port 0 --mixed_precision no --dynamo_backend no"
    command = launch_command_parser().parse_args([*launcher.split(), str(path), *words])
    try:
        launch_command(command)
    except ChildFailedError as failed:  # its process has said why
        raise SystemExit(failed.get_first_failure()[1].exitcode) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
