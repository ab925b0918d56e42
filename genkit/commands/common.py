"""Code shared by subcommands: flags, texts from files and pipes, records as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from genkit.data import utf8

PICTURES = (".png",)  # endings of file names


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the flags for loading a model of text."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that the model brings along",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag for machine-readable output."""
    parser.add_argument("--json", action="store_true", help="print records as JSON")


def written_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the user wrote."""
    return {name: value for name, value in arguments.items() if value is not None}


def read_text(name: str, path: str) -> str:
    """Read a text without any change, so that offsets in it are those of the file.

    Args:
        name: of the argument, for messages.
        path: a file; - is standard input.

    Raises:
        ValueError: it is not a regular file, not UTF-8, or empty.
    """
    if path == "-":
        pieces = utf8.decode_pieces(sys.stdin.buffer, f"{name}: -")
    else:
        pieces = utf8.read_pieces(Path(path), name)
    text = "".join(pieces)
    if not text.strip():
        raise ValueError(f"{name}: {path} is empty; give a text")
    return text


def read_texts(name: str, given: list[str]) -> list[str]:
    """Return texts as they were given; - alone stands for the lines of standard input."""
    if given != ["-"]:
        return given
    return [line for line in utf8.split_lines(read_text(name, "-")) if line.strip()]


def print_json(records: Any) -> None:
    """Print a record, or a list of them, without pictures and tensors."""
    print(json.dumps(as_json_value(records), ensure_ascii=False, indent=2, allow_nan=False))


def as_json_value(value: Any) -> Any:
    """Return a record as values that JSON can hold; numbers that are not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: as_json_value(own) for name, own in named.items() if not _is_array(own)}
    if isinstance(value, dict):
        return {str(name): as_json_value(own) for name, own in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str) or value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Iterable):
        return [as_json_value(own) for own in value]
    return str(value)


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor, an array or a picture."""
    return hasattr(value, "shape") or hasattr(value, "getpixel")


def check_output(path: str, endings: tuple[str, ...] = PICTURES) -> Path:
    """Return the file that a picture will be written to.

    Raises:
        ValueError: its name has another ending, or its folder does not exist.
    """
    file = Path(path)
    if file.suffix.lower() not in endings:
        raise ValueError(f"--output must end in {' or '.join(endings)}, got {path!r}")
    if not file.parent.is_dir():
        raise ValueError(f"--output: the folder {str(file.parent)!r} does not exist")
    return file
