"""Tables as files: CSV with its cells as they were read, or Parquet with numbers and dates."""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit import files
from genkit.data.columns import CATEGORY, DAY, EPOCH, Column

Array = NDArray[np.float64]
ENDINGS = (".csv", ".parquet")


def cells(columns: Sequence[Column], values: Array) -> list[dict[str, str]]:
    """Return rows of values as texts, by column; "" for a gap."""
    return [
        {column.name: column.format(value) for column, value in zip(columns, row, strict=True)}
        for row in values
    ]


def save_values(columns: Sequence[Column], values: Array, path: str | Path) -> None:
    """Write values as a table.

    Raises:
        ValueError: the name of the file ends neither in .csv nor in .parquet.
    """
    path = Path(path)
    check_ending(path, ENDINGS)
    if path.suffix.lower() == ".csv":
        save_csv([column.name for column in columns], cells(columns, values), path)
        return
    arrays = {
        column.name: [_native(column, value) for value in own]
        for column, own in zip(columns, values.T, strict=True)
    }
    _save_parquet(arrays, path)


def save_numbers(names: Sequence[str], values: NDArray[np.float32], path: str | Path) -> None:
    """Write numbers as a table, (n, names).

    Raises:
        ValueError: the name of the file ends neither in .csv nor in .parquet.
    """
    path = Path(path)
    check_ending(path, ENDINGS)
    if path.suffix.lower() == ".parquet":
        _save_parquet(dict(zip(names, values.T, strict=True)), path)
        return
    with files.written_whole(path) as scratch:
        np.savetxt(scratch, values, "%.7g", ",", header=",".join(names), comments="")


def _save_parquet(arrays: Mapping[str, Any], path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with files.written_whole(path) as scratch:
        pq.write_table(pa.table({name: pa.array(own) for name, own in arrays.items()}), scratch)


def _native(column: Column, value: float) -> Any:
    if math.isnan(value):
        return None
    if column.kind == CATEGORY:
        return column.format(value)
    if column.kind == "date":
        when: datetime.datetime = EPOCH + value * DAY
        return when if column.decimals else when.date()
    return float(value) if column.decimals else round(value)


def check_ending(path: Path, endings: Sequence[str]) -> None:
    """Refuse the name of a file that ends in none of these."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"the file must end in {' or '.join(endings)}, got {str(path)!r}")


def save_csv(names: Sequence[str], rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Write rows as CSV.

    Raises:
        ValueError: the name of the file has another ending.
    """
    path = Path(path)
    check_ending(path, ENDINGS[:1])
    with files.written_whole(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
