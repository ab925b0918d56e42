"""What subcommands share: flags from a table, texts from files and pipes, records as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from genkit.data import utf8

PICTURES = (".png",)  # endings
Flags = tuple[tuple[str, type, str], ...]  # name, type and help


def add_flags(parser: argparse.ArgumentParser, flags: Flags, often: Sequence[str] = ()) -> None:
    """Add a table of flags; those of `often` may be given again."""
    for name, kind, text in flags:
        action = "append" if name in often else "store"
        parser.add_argument(f"--{name}", type=kind, action=action, help=text)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add how a model of text is loaded."""
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--eager", action="store_true", help="never compile")
    speed.add_argument("--compile", action="store_true", help="compile before anything else")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's code")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag for machines."""
    parser.add_argument("--json", action="store_true", help="print records as JSON")


def said(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what was said; of compiling, nothing if it is to be done when it pays."""
    options = {name: value for name, value in arguments.items() if value is not None}
    if options.pop("eager", False):
        options["compile"] = False
    elif not options.get("compile", True):
        del options["compile"]
    return options


def read(name: str, path: str) -> str:
    """Read a text as it is, so that places in it are those of the file; - is the input.

    Raises:
        ValueError: it is no regular file, no UTF-8, or empty.
    """
    if path == "-":
        pieces = utf8.decode_pieces(sys.stdin.buffer, f"{name}: -")
    else:
        pieces = utf8.read_pieces(Path(path), name)
    text = "".join(pieces)
    if not text.strip():
        raise ValueError(f"{name}: {path} is empty; give a text")
    return text


def lines(name: str, given: list[str]) -> list[str]:
    """Return texts as they were given; - alone stands for the lines of the input."""
    if given != ["-"]:
        return given
    return [line for line in read(name, "-").splitlines() if line.strip()]


def quiet() -> None:
    """Keep progress bars and advice of transformers off the output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def print_json(records: Any) -> None:
    """Print a record, or a list of them, without pictures and tensors."""
    print(json.dumps(plain(records), ensure_ascii=False, indent=2))


def plain(value: Any) -> Any:
    """Turn a record into what JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: plain(own) for name, own in named.items() if _tells(own)}
    if isinstance(value, dict):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Iterable):
        return [plain(own) for own in value]
    return str(value)


def _tells(value: Any) -> bool:
    """Whether a value is none of tensors, arrays and pictures."""
    return not hasattr(value, "shape") and not hasattr(value, "getpixel")


def picture(path: str, endings: tuple[str, ...] = PICTURES) -> Path:
    """Return where a picture goes, before any is drawn.

    Raises:
        ValueError: its name has another ending, or there is no such folder.
    """
    place = Path(path)
    if place.suffix.lower() not in endings:
        raise ValueError(f"output must end in {' or '.join(endings)}, got {path!r}")
    if not place.parent.is_dir():
        raise ValueError(f"output: there is no folder {str(place.parent)!r}; make it first")
    return place
