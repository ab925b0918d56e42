"""genkit.anomalies: the unlikely rows of a table, and which column makes them so."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genkit.arguments import explain_names
from genkit.data.columns import CATEGORY
from genkit.notebook import TextRecord
from genkit.seeds import check_number
from genkit.tabular import writing
from genkit.tabular.drawing import draw
from genkit.tabular.model import TableModel, as_table_model
from genkit.tabular.reading import Given, as_windows, read_values
from genkit.text.scoring import table

Array = NDArray[np.float64]
SHOWN = 3  # columns of a row that are blamed


@dataclass(frozen=True)
class Blame:
    """A column that makes a row unlikely.

    Args:
        nats: by how much more surprising its value is than values of this column usually are, given
            all others of the row.
        expected: what the others make likely: an interval of 90 %, or a category.
    """

    column: str
    value: str
    expected: str
    nats: float


@dataclass(frozen=True)
class Anomaly:
    """An unlikely row.

    Args:
        row: of the table, from 0; of a series the first one of the window.
        surprise: negative log density, in nats.
        as_rare: share of held-out rows that are at least as surprising.
        columns: that make it so, the worst one first.
    """

    row: int
    surprise: float
    as_rare: float
    columns: list[Blame]


@dataclass(frozen=True)
class Anomalies(TextRecord):
    """The rows of a table by how surprising they are.

    Args:
        surprises: of all rows, in their order, in nats; of a series of all windows.
        rows: the most surprising ones, the worst one first.
        notes: what should be said of the table.
    """

    surprises: list[float] = field(repr=False)
    rows: list[Anomaly]
    notes: list[str]
    model: str

    def __str__(self) -> str:
        lines = [["row", "nats", "as rare", "column", "value", "expected"]]
        for row in self.rows:
            rare = f"{100 * row.as_rare:.1f} %"
            head = [str(row.row), f"{row.surprise:.1f}", rare]
            for blame in row.columns:
                lines.append([*head, blame.column, blame.value, blame.expected])
                head = ["", "", ""]
        total = f"the {len(self.rows):,} most surprising of {len(self.surprises):,}"
        return "\n".join([table(lines), "", total, *(f"! {note}" for note in self.notes)])

    def save(self, path: str | Path) -> None:
        """Write how surprising each row is, as CSV."""
        rows = [{"row": i, "surprise": f"{own:.4f}"} for i, own in enumerate(self.surprises)]
        writing.save_csv(["row", "surprise"], rows, path)


@explain_names
def anomalies(
    data: Given,
    *,
    model: str | Path | TableModel,
    count: int = 10,
    revision: str | None = None,
    device: str | None = None,
) -> Anomalies:
    """Find the unlikely rows of a table, or the unlikely windows of a series.

    Args:
        data: a file (csv, parquet, jsonl), a dataset or a Hub id; in Python also rows, as
            dictionaries.
        model: folder or Hub id of a table model, or what `genkit.load` returned.
        count: rows that are explained, the most surprising ones.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid, or a cell is no value of its column.
    """
    check_number("count", count, 1, 1_000_000, whole=True)
    loaded = as_table_model(model, revision, device)
    columns = loaded.columns
    if loaded.window:
        columns = loaded.series_columns
    given = read_values(data, columns)
    values = given.values
    if loaded.window:
        if len(values) < loaded.window:
            raise ValueError(
                f"data: {len(values):,} rows are fewer than a window of {loaded.window}"
            )
        values = as_windows(values, loaded.window)
    surprises = -loaded.log_density(values)
    worst = np.argsort(-surprises, kind="stable")[:count]
    rows = _explain(loaded, values[worst], worst, surprises[worst])
    return Anomalies(surprises.tolist(), rows, given.notes, loaded.name)


def _explain(
    model: TableModel, values: Array, worst: NDArray[np.int64], surprises: Array
) -> list[Anomaly]:
    """Say which columns make rows unlikely, and what was expected there."""
    usual = np.asarray(model.usual)
    nats = np.where(np.isnan(values), -np.inf, model.surprises(values) - model.usual_columns)
    blamed = np.argsort(-nats, 1)[:, :SHOWN]
    masked = np.repeat(values, blamed.shape[1], 0)
    masked[np.arange(len(masked)), blamed.ravel()] = np.nan
    points = draw(model, masked, list(range(len(masked))), points=True).points
    found = []
    for i, row in enumerate(worst):
        columns = []
        for k, j in enumerate(blamed[i]):
            if nats[i, j] > 0 or k == 0:
                own = points[i * blamed.shape[1] + k, j]
                columns.append(_blame(model, int(j), values[i, j], own, float(nats[i, j])))
        rare = float((usual >= surprises[i]).mean()) if len(usual) else 0.0
        found.append(Anomaly(int(row), float(surprises[i]), rare, columns))
    return found


def _blame(model: TableModel, j: int, value: float, points: Array, nats: float) -> Blame:
    column = model.columns[j]
    if column.kind == CATEGORY:
        likely = np.bincount(points.astype(int)).argmax()
        expected = column.format(float(likely))
    else:
        low, high = np.quantile(points, (0.05, 0.95))
        expected = f"{column.format(float(low))} to {column.format(float(high))}"
    return Blame(column.name, column.format(value), expected, nats)
