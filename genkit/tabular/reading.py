"""Rows of a table, or windows of a series, for a model: read, checked, split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit.data import table_sources
from genkit.data.columns import CATEGORY, Column, as_text

Array = NDArray[np.float64]


Given = str | Path | Sequence[dict[str, Any]]  # a file or a dataset; or rows


@dataclass(frozen=True)
class Cells:
    """Rows as they were given, and as values of a model's columns."""

    names: list[str]
    rows: list[dict[str, Any]]
    values: Array  # (n, columns of the model)
    notes: list[str]  # what should be said of them


def read_values(source: Given, columns: Sequence[Column], argument: str = "data") -> Cells:
    """Read rows as the values of a model's columns.

    What no training row had is read as a gap, and said: categories, and columns that are not there.

    Args:
        source: a file, a saved dataset or a Hub id; or rows as dictionaries.
        columns: of the model; others in the table are left out.
        argument: the source's, for messages.

    Raises:
        ValueError: there is no such table, or a cell is no value of its column.
    """
    if isinstance(source, str | Path):
        names, cells, _ = table_sources.read_table(str(source), argument=argument)
        rows = [dict(zip(names, row, strict=True)) for row in cells]
    else:
        rows = list(source)
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{argument} must be rows, as dictionaries, got {rows!r:.80}")
        names = list(dict.fromkeys(name for row in rows for name in row))
    missing = [column.name for column in columns if column.name not in names]
    if len(missing) == len(columns):
        raise ValueError(
            f"{argument}: it has none of the model's columns, {', '.join(missing[:8])}; "
            f"it has {', '.join(map(repr, names[:8]))}"
        )
    notes = (
        [f"no column {', '.join(map(repr, missing))}: nothing is given of it"] if missing else []
    )
    values = np.stack([_column(rows, column, argument, notes) for column in columns], 1)
    return Cells(names, rows, values, notes)


def _column(
    rows: Sequence[dict[str, Any]], column: Column, argument: str, notes: list[str]
) -> Array:
    """Read a column; categories that the model does not know are gaps."""
    unknown: dict[str, int] = {}
    values = np.full(len(rows), math.nan)
    for i, row in enumerate(rows):
        text = as_text(row.get(column.name))
        known = text is None or text in column.categories or text in column.missing
        if column.kind == CATEGORY and text is not None and not known:
            unknown[text] = unknown.get(text, 0) + 1
            continue
        values[i] = column.parse(text, f"{argument}: row {i}: column {column.name!r}")
    if unknown:
        shown = ", ".join(repr(text)[:40] for text in list(unknown)[:3])
        notes.append(
            f"column {column.name!r}: {sum(unknown.values()):,} cells have a category that no "
            f"training row has, such as {shown}, and are read as gaps"
        )
    if column.kind != CATEGORY and not np.isnan(values).all():
        outside = int(((values < column.least) | (values > column.most)).sum())
        if outside:
            notes.append(
                f"column {column.name!r}: {outside:,} of {len(rows):,} values are outside the "
                f"range of training, {column.format(column.least)} to {column.format(column.most)}"
            )
    return values


def as_windows(values: Array, window: int) -> Array:
    """Return all stretches of `window` rows as rows, (n - window + 1, window * columns)."""
    count = len(values) - window + 1
    return np.concatenate([values[i : i + count] for i in range(window)], 1)


def window_columns(columns: Sequence[Column], window: int) -> list[Column]:
    """Return the columns of windows: "x 0" is the first of each, and so on."""
    return [
        dataclasses.replace(column, name=f"{column.name} {i}")
        for i in range(window)
        for column in columns
    ]
