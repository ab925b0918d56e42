"""The process that reads a table: the formats, and the rows that it writes to its output.

`tables` starts it and reads the output.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import io
import itertools
import json
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genkit.data import utf8
from genkit.data.tables import ARROW, COLUMNS, DATA, LINES, LIST, Head, Request
from genkit.files import open_regular

SEPARATORS = ",;\t|"  # of the cells of a CSV
RATIO = 100  # the most bytes of rows for a byte of the files, if more than the memory
ROW = 512  # bytes that count for a row beside its cells
BATCH = 1 << 22  # bytes of rows sent at a time, at most (and one row at least)
OWN = 192  # MiB of the process before it reads anything
ROWS = 256  # rows of an Arrow batch that become Python objects at a time
PATIENCE, PACE = 10, 10_000_000  # CPU seconds to the next rows; bytes of file for one more


class _TableError(Exception):
    """Why a table cannot be read: the end of a sentence that starts with its name."""


def serve_table(request: Request) -> None:
    """Write the header and the rows of a table to the output; the main program of the process."""
    most = request.memory << 20
    limit = most + (OWN << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = sum(Path(file).stat().st_size for file in request.files)
    try:
        _send_table(request, max(most, RATIO * size), PATIENCE + size / PACE)
    except _TableError as error:
        _write({"error": str(error)})
    except MemoryError:
        _write({"error": f"needs more than {request.memory} MiB; raise table_memory"})
    except RecursionError:
        _write({"error": "is nested too deeply"})
    except BrokenPipeError:  # the reader has stopped
        pass
    except Exception as error:  # readers of formats raise errors of any kind
        words = " ".join(f"{type(error).__name__}: {error}".split())
        _write({"error": f"cannot be read: {words[:300]}"})


def _send_table(request: Request, most: int, patience: float) -> None:
    """Write batches of rows, each within `patience` CPU seconds, `most` bytes in all."""
    signal.setitimer(signal.ITIMER_PROF, patience)  # its signal ends the process
    head, rows = _READERS[request.kind](request)
    _write(asdict(head))
    texts: list[str] = []
    blobs: list[bytes] = []
    size = 0
    for i, row in enumerate(rows):
        if request.image is not None:
            blobs.append(_take_bytes(row, request, i))
            size += len(blobs[-1])
        texts.append(json.dumps(row, default=_plain))
        size += len(texts[-1]) + ROW
        if size >= BATCH:
            _write_rows(texts, blobs)
            most -= size
            if most < 0:
                raise _TableError("holds far more than the size of its files; raise table_memory")
            texts, blobs, size = [], [], 0
            signal.setitimer(signal.ITIMER_PROF, patience)
    if texts:
        _write_rows(texts, blobs)
    _write({"rows": []})


def _plain(value: Any) -> Any:
    """Return what JSON does not have as a text if it is a date or a number, else as a list."""
    if isinstance(value, datetime.date):  # or a datetime
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return [f"{value!r:.60}"]


def _take_bytes(row: dict[str, Any], request: Request, i: int) -> bytes:
    """Bring the image's cell into the form of `tables.open_table`, and take its bytes out."""
    name = request.image or ""
    cell = row.get(name)
    if isinstance(cell, str | bytes):
        cell = {"path" if isinstance(cell, str) else "bytes": cell}
    cell = {} if cell is None else cell
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (0, None)
    if not isinstance(data, bytes | None) or not isinstance(path, str | None):
        raise _TableError(f"row {i} of column {name!r} holds no image, but {row[name]!r:.60}")
    data = data and data[: request.max_bytes + 1]
    row[name] = {"bytes": None if data is None else len(data), "path": path}
    return data or b""


def _write_rows(texts: list[str], blobs: list[bytes]) -> None:
    sys.stdout.buffer.write(f'{{"rows": [{", ".join(texts)}]}}\n'.encode())
    sys.stdout.buffer.write(b"".join(blobs))
    sys.stdout.buffer.flush()


def _write(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


# ---------------------------------------------------------------------------------------------
# Formats


def _read_csv(request: Request) -> tuple[Head, Iterator[dict[str, Any]]]:
    """Read a CSV file, in which every cell is a text; a missing cell is an error."""
    csv.field_size_limit(request.memory << 20)
    sign = _find_separator(request)
    rows = csv.reader(_check_text(_open_text(request, newline="")), delimiter=sign, strict=True)
    names = next(rows, None)
    if not names:
        raise _TableError("is empty; its first line must name the columns")
    if len(set(names)) < len(names):
        raise _TableError(f"has two columns of one name: {names!r:.200}")
    return Head(names, COLUMNS, None), _csv_rows(rows, names, set(request.columns))


def _find_separator(request: Request) -> str:
    """Return what is between cells: the first sign that splits the header; else a comma."""
    for sign in SEPARATORS:
        with _open_text(request, newline="") as file, contextlib.suppress(csv.Error):
            if len(next(csv.reader(file, delimiter=sign, strict=True), [])) > 1:
                return sign
    return SEPARATORS[0]


def _csv_rows(rows: Any, names: list[str], columns: set[str]) -> Iterator[dict[str, Any]]:
    chosen = [(i, name) for i, name in enumerate(names) if name in columns]
    for row in rows:
        if not row:  # an empty line
            continue
        if len(row) != len(names):
            raise _TableError(f"has {len(row)} fields, not {len(names)}, in line {rows.line_num}")
        yield {name: row[i] for i, name in chosen}


def _open_text(request: Request, newline: str | None = None) -> io.TextIOWrapper:
    """Open a file of UTF-8, with or without a byte-order mark."""
    file = open_regular(Path(request.files[0]))
    if utf8.is_utf16(file.read(8)):
        raise _TableError(utf8.UTF16)
    file.seek(0)
    return io.TextIOWrapper(file, "utf-8-sig", newline=newline)


def _check_text(lines: Iterable[str]) -> Iterator[str]:
    for i, line in enumerate(lines, 1):
        if "\0" in line:
            raise _TableError(f"is binary, not text: line {i} holds a zero byte")
        yield line


def _read_json(request: Request) -> tuple[Head, Iterator[Any]]:
    """Read JSON: an object a line, a list of objects, or {"data": such a list}."""
    file = _open_text(request)  # lines end at \n, \r\n or \r
    lines = filter(str.strip, file)
    first = next(lines, "")
    if request.files[0].lower().endswith(".jsonl") or (_is_object(first) and next(lines, "")):
        file.seek(0)
        layout = LINES
        rows: Iterator[Any] = map(json.loads, filter(str.strip, file))
    else:
        file.seek(0)
        rows, layout = _json_list(json.load(file))
    first_row = next(rows, None)
    columns = list(first_row) if isinstance(first_row, dict) else []
    all_rows = itertools.chain(() if first_row is None else (first_row,), rows)
    return Head(columns, layout, None), (_select_columns(row, request) for row in all_rows)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json_list(content: Any) -> tuple[Iterator[Any], str]:
    if isinstance(content, list):
        return iter(content), LIST
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return iter(content["data"]), DATA
    if isinstance(content, dict):
        return iter([content]), LINES
    raise _TableError(f"must hold a list of rows, or a row a line, got {content!r:.60}")


def _select_columns(row: Any, request: Request) -> Any:
    """Keep the columns of the request; a row of a table of images must be an object."""
    if isinstance(row, dict):
        return {name: row[name] for name in request.columns if name in row}
    if request.image is not None:
        raise _TableError(f"holds {row!r:.60}, which is no row of columns")
    return row


def _read_parquet(request: Request) -> tuple[Head, Iterator[dict[str, Any]]]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    file = pq.ParquetFile(
        open_regular(Path(request.files[0])), buffer_size=1 << 20, pre_buffer=False
    )
    meta = file.metadata
    held = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    rows = max(1, min(4096, BATCH * meta.num_rows // max(1, held)))
    columns = [name for name in request.columns if name in file.schema_arrow.names]
    batches = file.iter_batches(rows, columns=columns, use_threads=False) if columns else ()
    return _arrow_head(file.schema_arrow, request), _arrow_rows(batches, request)


def _read_arrow(request: Request) -> tuple[Head, Iterator[dict[str, Any]]]:
    import pyarrow as pa

    readers = [pa.ipc.open_stream(open_regular(Path(file))) for file in request.files]
    if not readers:
        raise _TableError("has no file of rows")
    batches = (batch for reader in readers for batch in reader)
    return _arrow_head(readers[0].schema, request), _arrow_rows(batches, request)


def _arrow_head(schema: Any, request: Request) -> Head:
    return Head(schema.names, COLUMNS, _classes(schema.metadata or {}, request.label))


def _classes(metadata: dict[bytes, bytes], label: str | None) -> list[str] | None:
    """Return the class names of the labels that `datasets` has saved, if it has."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
    valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if valid else None


def _arrow_rows(batches: Iterable[Any], request: Request) -> Iterator[dict[str, Any]]:
    for batch in batches:
        batch.validate(full=True)
        names = [name for name in request.columns if name in batch.schema.names]
        for i in range(0, batch.num_rows, ROWS):
            yield from batch.select(names).slice(i, ROWS).to_pylist()


_READERS = {
    "csv": _read_csv,
    "json": _read_json,
    "parquet": _read_parquet,
    ARROW: _read_arrow,
}
