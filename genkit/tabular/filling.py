"""genkit.fill: what the gaps of a table may hold, with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit import console
from genkit.arguments import explain_names
from genkit.data.columns import CATEGORY, Column
from genkit.data.order import blocks
from genkit.models.table_autoencoder import TableAutoencoderPipeline
from genkit.notebook import TextRecord
from genkit.seeds import check_number, row_seeds
from genkit.tabular import writing
from genkit.tabular.autoencoder import find_autoencoder, read_columns
from genkit.tabular.drawing import BATCH, draw
from genkit.tabular.model import TableModel, as_table_model, check_no_series
from genkit.tabular.reading import Given, read_values
from genkit.text.scoring import table

Array = NDArray[np.float64]
DRAWS = 20
SHOWN = 12  # cells that are printed
INTERVAL = (0.05, 0.95)  # levels of the ends of an interval


@dataclass(frozen=True)
class FilledCell:
    """A gap and what it may hold.

    Args:
        row: of the table, from 0.
        value: the mean of a number or a date; the likeliest category.
        low, high: of a number or a date, the ends of an interval of 90 %.
        probability: of the category.
    """

    row: int
    column: str
    value: str
    low: str | None
    high: str | None
    probability: float | None


@dataclass(frozen=True)
class Filled(TextRecord):
    """A table whose gaps are filled.

    Args:
        names, rows: the table; cells that were given are as they were.
        cells: what was filled, in the order of rows and columns.
        draws: the model's columns of whole tables, their gaps drawn together, (draws, n, columns);
            of an autoencoder one; see `genkit/data/columns.py` for values.
        notes: what should be said of the table.
    """

    names: list[str] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    cells: list[FilledCell]
    columns: list[Column] = field(repr=False)
    draws: Array = field(repr=False)
    notes: list[str]

    def __str__(self) -> str:
        lines = [["row", "column", "value", "90 %"]]
        for cell in self.cells[:SHOWN]:
            sure = f"{cell.low} to {cell.high}" if cell.low is not None else ""
            sure = f"p {cell.probability:.2f}" if cell.probability is not None else sure
            lines.append([str(cell.row), cell.column, cell.value, sure])
        if len(self.cells) > SHOWN:
            lines.append(["…", "", "", ""])
        total = f"{len(self.cells):,} cells of {len(self.rows):,} rows filled"
        return "\n".join([table(lines), "", total, *(f"! {note}" for note in self.notes)])

    def save(self, path: str | Path) -> None:
        """Write the table as CSV."""
        rows = [{name: row.get(name) for name in self.names} for row in self.rows]
        writing.save_csv(self.names, rows, path)

    def save_cells(self, path: str | Path) -> None:
        """Write what was filled as CSV, a cell a line."""
        writing.save_csv(list(FilledCell.__dataclass_fields__), list(map(vars, self.cells)), path)


@explain_names
def fill(
    data: Given,
    *,
    model: str | Path | TableModel | TableAutoencoderPipeline,
    draws: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    device: str | None = None,
) -> Filled:
    """Fill the gaps of a table, given what its rows have.

    By a table model the gaps of a row are drawn together, several times; their values and intervals
    are those of the mixture of all distributions that they were drawn from. An autoencoder predicts
    each of them once, by what the row has; intervals are as wide as it errs on held-out rows.

    Args:
        data: a file (csv, parquet, jsonl), a dataset or a Hub id; in Python also rows, as
            dictionaries.
        model: folder or Hub id of a table model or of an autoencoder of tables, or what
            `genkit.load` returned.
        draws: how often each gap is drawn; default: 20, and none by an autoencoder.
        seed: of the draws: row i has seed + i.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid, or a cell is no value of its column.
    """
    if draws is not None:
        check_number("draws", draws, 1, 10_000, whole=True)
    autoencoder = find_autoencoder(model, revision, device)
    if autoencoder is None:
        loaded = as_table_model(model, revision, device)
        check_no_series(loaded, "fill")
        columns = list(loaded.columns)
        given = read_values(data, columns)
        cells, every = _fill_by_draws(loaded, given.values, draws or DRAWS, seed)
    else:
        if draws is not None:
            raise ValueError(f"draws={draws!r} is for table models; an autoencoder draws nothing")
        columns = read_columns(autoencoder)
        given = read_values(data, columns)
        cells, every = _fill_by_autoencoder(autoencoder, columns, given.values)
    named = {column.name: column for column in columns}
    cells = [cell for cell in cells if _is_gap(given.rows[cell.row], named[cell.column])]
    names = [*given.names, *(name for name in named if name not in given.names)]
    filled = [dict(row) for row in given.rows]
    for cell in cells:
        filled[cell.row][cell.column] = cell.value
    return Filled(names, filled, cells, columns, every, given.notes)


def _is_gap(row: dict[str, Any], column: Column) -> bool:
    """Whether a cell is empty: a category that the model does not know is not."""
    return column.kind != CATEGORY or column.is_gap(row.get(column.name))


# ---------------------------------------------------------------------------------------------
# By an autoencoder


def _fill_by_autoencoder(
    autoencoder: TableAutoencoderPipeline, columns: Sequence[Column], values: Array
) -> tuple[list[FilledCell], Array]:
    """Return what gaps may hold, and the whole table as if it were drawn once."""
    gappy = np.flatnonzero(np.isnan(values).any(1))
    output = autoencoder(values[gappy])
    whole, cells = values.copy(), []
    for i, row in enumerate(gappy.tolist()):
        for j in np.flatnonzero(np.isnan(values[row])).tolist():
            column = columns[j]
            expected = float(output.expected[i, j])
            whole[row, j] = float(column.rounded(np.array(expected)))
            if column.kind == CATEGORY:
                value = column.format(expected) if column.categories else ""
                share = float(output.probability[i, j])
                cells.append(FilledCell(row, column.name, value, None, None, share))
                continue
            ends = output.low[i, j], output.high[i, j]
            value, low, high = (column.format(float(each)) for each in (expected, *ends))
            cells.append(FilledCell(row, column.name, value, low, high, None))
    return cells, whole[None]


# ---------------------------------------------------------------------------------------------
# By draws


def _fill_by_draws(
    model: TableModel, values: Array, draws: int, seed: int
) -> tuple[list[FilledCell], Array]:
    """Return what gaps may hold, and whole tables, (draws, n, columns)."""
    seeds = row_seeds(seed, len(values), "a row")
    every = np.tile(values, (draws, 1, 1))
    cells: list[FilledCell] = []
    gappy = np.flatnonzero(np.isnan(values).any(1))
    with console.bar(None, "filling", len(gappy), " rows") as bar:
        for some in blocks(len(gappy), max(1, BATCH // draws)):
            rows = gappy[some]
            own = [(seeds[i], k) for k in range(draws) for i in rows]
            drawn = draw(model, np.tile(values[rows], (draws, 1)), own, points=True)
            every[:, rows] = drawn.values.reshape(draws, len(rows), -1)
            points = drawn.points.reshape(draws, len(rows), len(model.columns), -1)
            for i, row in enumerate(rows):
                cells += _row_cells(model, values, int(row), points[:, i])
            bar.update(len(rows))
    return cells, every


def _row_cells(model: TableModel, values: Array, row: int, points: Array) -> list[FilledCell]:
    """Return what the gaps of a row may hold.

    Args:
        points: of the distributions of each draw, (draws, columns, points).
    """
    cells = []
    for j in np.flatnonzero(np.isnan(values[row])).tolist():
        column, own = model.columns[j], points[:, j].ravel()
        if column.kind == CATEGORY:
            counts = np.bincount(own.astype(int))
            best = int(counts.argmax())
            value = column.categories[best] if column.categories else ""
            cells.append(
                FilledCell(row, column.name, value, None, None, float(counts[best] / len(own)))
            )
            continue
        mean, (low, high) = own.mean(), np.quantile(own, INTERVAL)
        value, lower, upper = (column.format(float(each)) for each in (mean, low, high))
        cells.append(FilledCell(row, column.name, value, lower, upper, None))
    return cells
