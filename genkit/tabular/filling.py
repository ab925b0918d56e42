"""genkit.fill: what the gaps of a table may hold, with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit import console
from genkit.arguments import explain_names
from genkit.data.columns import CATEGORY, Column
from genkit.data.order import blocks
from genkit.notebook import TextRecord
from genkit.seeds import check_number, row_seeds
from genkit.tabular import writing
from genkit.tabular.drawing import BATCH, draw
from genkit.tabular.model import TableModel, as_table_model, check_no_series
from genkit.tabular.reading import Given, read_values
from genkit.text.scoring import table

Array = NDArray[np.float64]
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
            see `genkit/data/columns.py` for values.
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
    model: str | Path | TableModel,
    draws: int = 20,
    seed: int = 0,
    revision: str | None = None,
    device: str | None = None,
) -> Filled:
    """Fill the gaps of a table, given what its rows have.

    The gaps of a row are drawn together, several times; their values and intervals are those of the
    mixture of all distributions that they were drawn from.

    Args:
        data: a file (csv, parquet, jsonl), a dataset or a Hub id; in Python also rows, as
            dictionaries.
        model: folder or Hub id of a table model, or what `genkit.load` returned.
        draws: how often each gap is drawn.
        seed: row i has seed + i.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid, or a cell is no value of its column.
    """
    check_number("draws", draws, 1, 10_000, whole=True)
    loaded = as_table_model(model, revision, device)
    check_no_series(loaded, "fill")
    given = read_values(data, loaded.columns)
    seeds = row_seeds(seed, len(given.rows), "a row")
    every = np.tile(given.values, (draws, 1, 1))
    cells: list[FilledCell] = []
    gappy = np.flatnonzero(np.isnan(given.values).any(1))
    with console.bar(None, "filling", len(gappy), " rows") as bar:
        for some in blocks(len(gappy), max(1, BATCH // draws)):
            rows = gappy[some]
            own = [(seeds[i], k) for k in range(draws) for i in rows]
            drawn = draw(loaded, np.tile(given.values[rows], (draws, 1)), own, points=True)
            every[:, rows] = drawn.values.reshape(draws, len(rows), -1)
            points = drawn.points.reshape(draws, len(rows), len(loaded.columns), -1)
            for i, row in enumerate(rows):
                cells += _row_cells(loaded, given.values, int(row), points[:, i])
            bar.update(len(rows))
    cells = [cell for cell in cells if _is_gap(given.rows[cell.row], cell.column, loaded)]
    names = [*given.names, *(c.name for c in loaded.columns if c.name not in given.names)]
    filled = [dict(row) for row in given.rows]
    for cell in cells:
        filled[cell.row][cell.column] = cell.value
    return Filled(names, filled, cells, list(loaded.columns), every, given.notes)


def _is_gap(row: dict[str, Any], column: str, model: TableModel) -> bool:
    """Whether a cell is empty: a category that the model does not know is not."""
    cell = row.get(column)
    own = next(each for each in model.columns if each.name == column)
    return own.kind != CATEGORY or own.is_gap(cell)


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
