"""Tables for the recipes that train on them: their settings, and their columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genkit.data import columns, table_sources, tables
from genkit.data.columns import CATEGORY, Column, find_columns
from genkit.training.settings import RunSettings, setting

Array = NDArray[np.float64]


@dataclass
class TableSettings(RunSettings):
    """What recipes for tables ask about them."""

    data: str | None = setting(None, "table: a file (csv, parquet, jsonl), a dataset or a Hub id")
    val_fraction: float = setting(
        0.1, "part of the rows to validate on; of a series, its end", above=0, below=1
    )
    categories: list[str] | None = setting(None, "columns of categories, whatever they look like")
    numbers: list[str] | None = setting(None, "columns of numbers, however few different ones")
    dates: list[str] | None = setting(None, "columns of dates")
    leave_out: list[str] | None = setting(
        None, "columns to leave out, such as names and numbers of rows"
    )
    gaps: list[str] | None = setting(None, "texts that stand for a gap, beside empty cells")
    table_memory: int = setting(
        tables.MEMORY, "MiB of the process that reads a table", least=tables.MIN_MEMORY
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        table_sources.check_source(self.data)
        lists = self.categories, self.numbers, self.dates, self.leave_out
        given = [name for names in lists for name in names or []]
        twice = next((name for name in given if given.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"--categories, --numbers, --dates, --leave_out: {twice!r} is given twice"
            )


@dataclass(frozen=True)
class TableData:
    """A table that was read.

    Args:
        values: (rows, columns), see `genkit/data/columns.py`.
        notes: what should be said of it.
        sha256: hash of its files.
    """

    columns: list[Column]
    values: Array
    notes: list[str]
    sha256: str


def read_for_run(settings: TableSettings) -> TableData:
    """Read the table of a run, and find out what its columns are.

    Raises:
        ValueError: there is no such table, or a column cannot be what it is said to be.
    """
    assert settings.data is not None, "recipes ask for it"
    names, cells, sha256 = table_sources.read_table(settings.data, settings.table_memory)
    left_out = settings.leave_out or []
    for name in left_out:
        if name not in names:
            raise ValueError(f"--leave_out: there is no column {name!r}: {', '.join(names)}")
    kept = [i for i, name in enumerate(names) if name not in left_out]
    kinds = {
        name: kind for kind, flag in columns.FLAGS.items() for name in getattr(settings, flag) or []
    }
    chosen = [[row[i] for i in kept] for row in cells]
    found, values, notes = find_columns(
        [names[i] for i in kept], chosen, kinds, settings.gaps or []
    )
    return TableData(found, values, notes, sha256)


def hold_out(values: Array, fraction: float, seed: int) -> tuple[Array, Array]:
    """Return rows to train on, and rows to validate on, drawn by seed."""
    held = max(1, round(fraction * len(values)))
    order = np.random.default_rng(seed).permutation(len(values))
    return values[order[held:]], values[order[:held]]


def check_numbers(found: list[Column], train: Array) -> None:
    """Refuse a column of numbers or dates of which the rows to train on have none.

    Raises:
        ValueError: there is one; it is named.
    """
    for column, own in zip(found, train.T, strict=True):
        if column.kind != CATEGORY and np.isnan(own).all():
            raise ValueError(
                f"data: column {column.name!r} has no {column.kind} in the {len(train):,} rows to "
                f"train on; give --leave_out {column.name!r}"
            )


def count_kinds(found: list[Column]) -> str:
    """Count the kinds of columns in words."""
    kinds = [column.kind for column in found]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def describe(found: list[Column]) -> str:
    """Say what the columns are, for a card."""
    parts = [
        f"{column.name} ({len(column.categories)} categories)"
        if column.kind == CATEGORY
        else f"{column.name} ({column.kind})"
        for column in found[:20]
    ]
    more = f" and {len(found) - 20} more" if len(found) > 20 else ""
    return f"Columns: {', '.join(parts)}{more}."
