"""Read the rows of a table (csv, json, jsonl, parquet, Arrow) in a process of its own.

The process has a limit of memory and of time, so that a table with a false size, or one that makes
a reader crash, costs an error of one line. A name is never a pattern or an address, nothing that a
cell names is downloaded, and the files that are read are those that were hashed.
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
ARROW = "arrow"  # the format of datasets that `datasets` saves
MEMORY = 1 << 10  # MiB of the process, by default
COLUMNS, LINES, LIST, DATA = "columns", "lines", "list", "data"  # layouts
START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])  # so that genkit is the same there
from genkit.data import table_formats, tables
table_formats.serve_table(tables.Request(**json.loads(sys.argv[2])))
"""

# ---------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Table:
    """Files of a table, with the hash of their content."""

    name: str  # for errors
    kind: str
    files: list[str]
    stats: list[list[int]]  # size, time of change and inode of each when it was hashed
    sha256: str
    memory: int  # MiB

    def check_unchanged(self) -> None:
        """Check that the files are as they were when they were hashed.

        Raises:
            ValueError: a file has changed.
        """
        if [_stats(Path(file).stat()) for file in self.files] != self.stats:
            raise ValueError(f"{self.name} changed while it was read; try again when it is whole")


def find_kind(path: Path) -> str | None:
    """Return the kind of a table by the ending of its name, in any case; None if it is none."""
    return KINDS.get(path.suffix.lower())


def hash_files(name: str, kind: str, files: Sequence[Path], memory: int | None = None) -> Table:
    """Hash the files of a table.

    Args:
        name: name of the table, for errors.
        kind: one of `KINDS`, or `ARROW`.
        memory: MiB of the process that will read it; default: `MEMORY`.

    Raises:
        ValueError: a file cannot be read, or the memory is out of range.
    """
    memory = MEMORY if memory is None else memory
    if memory < MIN_MEMORY:
        raise ValueError(f"table_memory must be {MIN_MEMORY} MiB or more, got {memory}")
    stats, digest = [], hashlib.sha256()
    for path in files:
        try:
            with open_regular(path) as file:
                stats.append(_stats(os.fstat(file.fileno())))
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from None
    return Table(name, kind, [str(path) for path in files], stats, digest.hexdigest(), memory)


def _stats(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def saved_files(folder: Path) -> dict[str | None, list[Path]]:
    """List the Arrow files of a dataset saved by `datasets`, by split: None if it has no splits.

    Raises:
        ValueError: it is damaged, or names files outside its folder.
    """
    index = folder / "dataset_dict.json"
    if not index.exists():
        return {None: _arrow_files(folder)}
    splits = [_check_file_name(split, index) for split in _read_index(index, "splits")]
    return {split: _arrow_files(folder / split) for split in splits}


def _arrow_files(folder: Path) -> list[Path]:
    index = folder / "state.json"
    files = []
    for each in _read_index(index, "_data_files"):
        file = _check_file_name(each.get("filename") if isinstance(each, dict) else each, index)
        if (folder / file).is_symlink():
            raise ValueError(f"{index} names {file!r}, which is a link; copy the file there")
        files.append(folder / file)
    return files


def _read_index(index: Path, key: str) -> list[Any]:
    try:
        with open_regular(index) as file:
            found = json.load(file)[key]
        if not isinstance(found, list):
            raise TypeError(f"{key!r} is no list")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read {index}: {type(error).__name__} {error}") from None
    return found


def _check_file_name(name: Any, index: Path) -> str:
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError(f"{index} names {name!r}, which is no plain name of a file beside it")
    return name


# ---------------------------------------------------------------------------------------------
# This end of the pipe: a line of JSON for some rows, then the bytes of images in them


@dataclass(frozen=True)
class Request:
    """Arguments of the process; see `open_table`."""

    kind: str
    files: list[str]
    memory: int
    columns: list[str]
    image: str | None
    label: str | None
    max_bytes: int


@dataclass(frozen=True)
class Head:
    """The header of a table."""

    columns: list[str]
    layout: str  # "columns"; of JSON "lines", "list" or "data", a list in an object
    classes: list[str] | None  # names of the labels' numbers


@contextlib.contextmanager
def open_table(
    table: Table,
    columns: Sequence[str],
    image: str | None = None,
    label: str | None = None,
    max_bytes: int = 0,
) -> Iterator[tuple[Head, Iterator[Any]]]:
    """Read a table: its header, and an iterator over its rows with these columns.

    Args:
        columns: columns to read, of those that the table has.
        image: the column of images: each cell becomes {"bytes": …, "path": …}, with None for what
            it does not have.
        label: the column of labels, whose class names the header gets.
        max_bytes: an image is cut off beyond one byte more.

    Raises:
        ValueError: the table cannot be read; the message names it and, if possible, the row.
    """
    request = Request(table.kind, table.files, table.memory, list(columns), image, label, max_bytes)
    command = [sys.executable, "-P", "-W", "ignore", "-c", START]
    command += [json.dumps(sys.path), json.dumps(asdict(request))]
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    try:
        head = _receive(table, process)
        yield (
            Head(head["columns"], head["layout"], head["classes"]),
            _receive_rows(table, process, image),
        )
    finally:
        process.kill()
        process.communicate()


def _receive_rows(
    table: Table, process: subprocess.Popen[bytes], image: str | None
) -> Iterator[Any]:
    assert process.stdout, "it was made a pipe"
    while rows := _receive(table, process)["rows"]:
        for row in rows:
            cell = row.get(image) if isinstance(row, dict) else None
            if cell is not None and cell["bytes"] is not None:
                cell["bytes"] = process.stdout.read(cell["bytes"])
            yield row
    table.check_unchanged()


def _receive(table: Table, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout, "it was made a pipe"
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        code = process.wait()
        how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
        raise ValueError(
            f"{table.name} cannot be read: the process that reads it ended ({how}), within the "
            f"limits of table_memory, {table.memory} MiB"
        )
    message = json.loads(line)
    if "error" in message:
        raise ValueError(f"{table.name} {message['error']}")
    return message


# ---------------------------------------------------------------------------------------------
# Datasets


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder is a dataset, or several splits of one, saved by `datasets`."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
