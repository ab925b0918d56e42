"""genkit cache: show or delete the files that genkit keeps to be quicker the next time."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from genkit import files

EXAMPLES = """\
  genkit cache
  genkit cache --clear   # encoded texts, pixels and features; they are made again when needed
"""
UNITS = ("B", "kB", "MB", "GB", "TB")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--clear", action="store_true", help="delete the files")


def run(arguments: dict[str, Any]) -> None:
    """Print how large the cache is, and delete its files if asked to."""
    found = files.list_cached()
    size = describe(found)
    if arguments["clear"]:
        for path in found:
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                path.unlink()
    print(f"{shorten(files.cache_folder())}: {size}{' deleted' * arguments['clear']}")


def describe(paths: list[Path]) -> str:
    """Return number and size of files."""
    count = f"{len(paths):,} {'file' if len(paths) == 1 else 'files'}"
    return f"{count}, {format_bytes(files.count_bytes(paths))}"


def format_bytes(count: float) -> str:
    """Return a size with three digits and its unit."""
    for unit in UNITS[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {UNITS[-1]}"


def shorten(path: Path) -> str:
    """Return a path with ~ for the user's own folder, whose name stays here."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
