"""Rows of a table (csv, json, jsonl, parquet, Arrow), read by a process of its own.

The process has a limit of memory and of time, so that a table that lies about its size, or that
makes a reader crash, costs an error of one line. A name is never a pattern or an address, no cell
is fetched, and the files that are read are those that were hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

from genkit.files import open_regular

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
MIN_MEMORY = 64  # MiB
ARROW = "arrow"  # what `datasets` saves
MEMORY = 1 << 10  # MiB of the process that reads, by default
COLUMNS, LINES, LIST, DATA = "columns", "lines", "list", "data"  # layouts
START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])  # so that genkit is the same there
from genkit.data import table_formats
from genkit.data import tables
table_formats.serve(tables.Request(**json.loads(sys.argv[2])))
"""

# ---------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Table:
    """Files of rows, and what is in them."""

    name: str  # in errors
    kind: str
    files: list[str]
    facts: list[list[int]]  # size, time of change and inode of each when it was hashed
    sha256: str
    memory: int  # MiB

    def check(self) -> None:
        """Check that the files are as they were when they were hashed.

        Raises:
            ValueError: one is not.
        """
        if [_facts(Path(file).stat()) for file in self.files] != self.facts:
            raise ValueError(f"{self.name} changed while it was read; try again when it is whole")


def hash_files(name: str, kind: str, files: Sequence[Path], memory: int | None = None) -> Table:
    """Hash the files of a table.

    Args:
        name: what to call it in errors.
        kind: one of `KINDS`, or `ARROW`.
        memory: MiB of the process that will read it.

    Raises:
        ValueError: a file cannot be read, or the memory is out of range.
    """
    memory = MEMORY if memory is None else memory
    if memory < MIN_MEMORY:
        raise ValueError(f"table_memory must be {MIN_MEMORY} MiB or more, got {memory}")
    facts, digest = [], hashlib.sha256()
    for path in files:
        try:
            with open_regular(path) as file:
                facts.append(_facts(os.fstat(file.fileno())))
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from None
    return Table(name, kind, [str(path) for path in files], facts, digest.hexdigest(), memory)


def _facts(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def saved_files(folder: Path) -> dict[str | None, list[Path]]:
    """List the Arrow files of a dataset saved by `datasets`, by split; None if it has no splits.

    Raises:
        ValueError: it is damaged, or names files outside its folder.
    """
    index = folder / "dataset_dict.json"
    if not index.exists():
        return {None: _arrow_files(folder)}
    splits = [_plain(split, index) for split in _described(index, "splits")]
    return {split: _arrow_files(folder / split) for split in splits}


def _arrow_files(folder: Path) -> list[Path]:
    index = folder / "state.json"
    files = []
    for each in _described(index, "_data_files"):
        file = _plain(each.get("filename") if isinstance(each, dict) else each, index)
        if (folder / file).is_symlink():
            raise ValueError(f"{index} names {file!r}, which is a link; copy the file there")
        files.append(folder / file)
    return files


def _described(index: Path, key: str) -> list[Any]:
    try:
        with open_regular(index) as file:
            found = json.load(file)[key]
        if not isinstance(found, list):
            raise TypeError(f"{key!r} is no list")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read {index}: {type(error).__name__} {error}") from None
    return found


def _plain(name: Any, index: Path) -> str:
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError(f"{index} names {name!r}, which is no plain name of a file beside it")
    return name


# ---------------------------------------------------------------------------------------------
# This end of the pipe: a line of JSON for some rows, then the bytes of pictures in them


@dataclass(frozen=True)
class Request:
    """What the process is to read; see `opened`."""

    kind: str
    files: list[str]
    memory: int
    columns: list[str]
    picture: str | None
    label: str | None
    largest: int


@dataclass(frozen=True)
class Head:
    """What a table says before its rows."""

    columns: list[str]
    layout: str  # "columns"; of JSON "lines", "list" or "data", a list in an object
    classes: list[str] | None  # names of the labels' numbers


@contextlib.contextmanager
def open_table(
    table: Table,
    columns: Sequence[str],
    picture: str | None = None,
    label: str | None = None,
    largest: int = 0,
) -> Iterator[tuple[Head, Iterator[Any]]]:
    """Read a table: its head, and its rows with these columns.

    Args:
        columns: to read, of those that it has.
        picture: one of them, of which each cell becomes {"bytes": …, "path": …}, of which one may
            be None, or both.
        label: another, whose names of classes are wanted.
        largest: bytes of a picture, beyond which it is cut off.

    Raises:
        ValueError: it cannot be read; the file and, where it is known, the row are named.
    """
    request = Request(table.kind, table.files, table.memory, list(columns), picture, label, largest)
    command = [sys.executable, "-P", "-W", "ignore", "-c", START]
    command += [json.dumps(sys.path), json.dumps(asdict(request))]
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    try:
        head = _answer(table, process)
        yield Head(head["columns"], head["layout"], head["classes"]), _rows(table, process, picture)
    finally:
        process.kill()
        process.communicate()


def _rows(table: Table, process: subprocess.Popen[bytes], picture: str | None) -> Iterator[Any]:
    assert process.stdout, "it was made a pipe"
    while rows := _answer(table, process)["rows"]:
        for row in rows:
            cell = row.get(picture) if isinstance(row, dict) else None
            if cell is not None and cell["bytes"] is not None:
                cell["bytes"] = process.stdout.read(cell["bytes"])
            yield row
    table.check()


def _answer(table: Table, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout, "it was made a pipe"
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        code = process.wait()
        how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
        raise ValueError(
            f"{table.name} cannot be read: the process that reads it ended ({how}), within the "
            f"limits of table_memory, {table.memory} MiB"
        )
    found = json.loads(line)
    if "error" in found:
        raise ValueError(f"{table.name} {found['error']}")
    return found


# ---------------------------------------------------------------------------------------------
# Datasets


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder is a dataset, or several splits of one, saved by `datasets`."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
