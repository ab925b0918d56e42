"""genkit.sample_table: synthetic rows, each with its own seed, under conditions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genkit.arguments import explain_names
from genkit.data.columns import Column
from genkit.notebook import TextRecord
from genkit.seeds import check_number, row_seeds
from genkit.tabular import writing
from genkit.tabular.conditions import Condition, parse_conditions
from genkit.tabular.drawing import draw
from genkit.tabular.model import TableModel, as_table_model
from genkit.text.scoring import table

SHOWN_ROWS, SHOWN_COLUMNS = 8, 8
TRIES = 300  # draws of a row, until all its conditions hold


@dataclass(frozen=True)
class TableSamples(TextRecord):
    """Synthetic rows, and how they were drawn.

    Args:
        columns: of the table.
        values: see `genkit/data/columns.py`, (n, columns), NaN for gaps.
        seeds: sample_table(model, 1, seed=seeds[i], …) gives row i again.
        where: conditions that all rows satisfy.
    """

    columns: list[Column] = field(repr=False)
    values: NDArray[np.float64] = field(repr=False)
    seeds: list[int]
    where: list[str]
    seconds: float
    model: str

    @property
    def rows(self) -> list[dict[str, str]]:
        """The rows as texts, by column."""
        return writing.cells(self.columns, self.values)

    def __str__(self) -> str:
        shown = self.columns[:SHOWN_COLUMNS]
        lines = [[column.name for column in shown]]
        lines += [[row[column.name] for column in shown] for row in self.rows[:SHOWN_ROWS]]
        rest = len(self.columns) - len(shown)
        more = f", {rest} more columns" if rest else ""
        where = f", where {' and '.join(self.where)}" if self.where else ""
        return (
            f"{table(lines)}\n\n{len(self.values):,} rows{more}{where}, seeds from "
            f"{self.seeds[0]}, {self.seconds:.1f} s"
        )

    def save(self, path: str | Path) -> None:
        """Write the rows as CSV or Parquet."""
        writing.save_values(self.columns, self.values, path)


@explain_names
def sample_table(
    model: str | Path | TableModel,
    n: int = 1,
    *,
    where: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> TableSamples:
    """Draw synthetic rows from a table model.

    A row depends on its own seed and on the conditions alone, not on the batch that it is in.

    Args:
        model: folder or Hub id, or what `genkit.load` returned.
        n: number of rows.
        where: a condition such as region=north or age>=40, or several, which all hold.
        seed: one number, then row i has seed + i; or one for each row; default: random.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid, or no row that satisfies the conditions was found.
    """
    check_number("n", n, 1, 1e9, whole=True)
    seeds = row_seeds(seed, int(n), "a row")
    loaded = as_table_model(model, revision, device)
    conditions = parse_conditions(where, loaded.columns)
    started = time.perf_counter()
    values = draw_where(loaded, conditions, seeds)
    return TableSamples(
        list(loaded.columns),
        values,
        seeds,
        [condition.text for condition in conditions],
        time.perf_counter() - started,
        loaded.name,
    )


def draw_where(
    model: TableModel, conditions: Sequence[Condition], seeds: Sequence[int]
) -> NDArray[np.float64]:
    """Draw rows that satisfy conditions: given values are set, others drawn until they fit.

    Raises:
        ValueError: a row did not satisfy them in `TRIES` draws.
    """
    given = np.full((len(seeds), len(model.columns)), np.nan)
    for condition in conditions:
        if condition.sign == "=":
            given[:, condition.column] = condition.value
    compared = [condition for condition in conditions if condition.sign != "="]
    only = sorted({c.column for c in compared if np.isnan(given[:, c.column]).all()})
    left = np.arange(len(seeds)) if compared else np.arange(0)
    for attempt in range(TRIES):
        if not len(left):
            return draw(model, given, seeds, gaps=True).values
        own = [(seeds[i], attempt + 1) for i in left.tolist()]
        drawn = draw(model, given[left], own, gaps=True, only=only).values
        holds = np.all([condition.holds(drawn) for condition in compared], 0)
        given[left[holds]] = drawn[holds]
        left = left[~holds]
    texts = " and ".join(condition.text for condition in conditions)
    raise ValueError(
        f"where: {len(left):,} of {len(seeds):,} rows did not satisfy {texts} in {TRIES} draws; "
        "ask for what is less rare"
    )
