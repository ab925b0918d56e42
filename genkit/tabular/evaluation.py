"""How well the synthetic rows of a table model match real ones, with margins and baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit.arguments import explain_names
from genkit.data.columns import CATEGORY, Column
from genkit.metrics import tabular
from genkit.metrics.judge import HALVES, SURE, Figure, share_figure
from genkit.metrics.neighbours import copy_rate
from genkit.notebook import TextRecord
from genkit.seeds import check_number
from genkit.tabular import pictures
from genkit.tabular.drawing import draw
from genkit.tabular.model import TableModel, as_table_model, check_no_series
from genkit.tabular.reading import Given, read_values

Array = NDArray[np.float64]
LEAST = 20  # real rows
CLASSES = 20  # of a column that a classifier predicts, at most


@dataclass(frozen=True)
class TableEvaluation(TextRecord):
    """How well synthetic rows match real ones.

    Args:
        figures: each with its margin, and with the same figure of held-out real rows.
        columns: distance of each column's distributions, and that of held-out real rows.
        real, synthetic: the rows, for the picture; see `genkit/data/columns.py`.
        protocol: how all this was measured.
        notes: what should be said of the table.
    """

    figures: dict[str, Figure]
    columns: dict[str, tuple[float, float]]
    kinds: list[Column] = field(repr=False)
    real: Array = field(repr=False)
    synthetic: Array = field(repr=False)
    protocol: str
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{'':24}{'value':>10}{'± 95 %':>10}{'baseline':>10}"]
        for name, figure in self.figures.items():
            numbers = (figure.value, figure.margin, figure.baseline)
            lines.append(f"{name:24}" + "".join(f"{number:10.4f}" for number in numbers))
        off = sorted(self.columns.items(), key=lambda item: item[1][1] - item[1][0])[:3]
        worst = [f"{name} {value:.2f} ({base:.2f})" for name, (value, base) in off]
        lines += ["", f"columns most off (held-out real rows): {', '.join(worst)}", ""]
        return "\n".join([*lines, self.protocol, *(f"! {note}" for note in self.notes)])

    def save(self, path: str | Path) -> None:
        """Draw the distribution of each column in real and in synthetic rows into a PNG."""
        pictures.columns(self.kinds, self.real, self.synthetic, Path(path))


@explain_names
def evaluate_table(
    model: str | Path | TableModel,
    data: Given,
    *,
    count: int | None = None,
    train: Given | None = None,
    target: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> TableEvaluation:
    """Measure how well synthetic rows match real ones that the model was not trained on.

    Half of the real rows are compared with the synthetic ones, and with the other half, which is
    the baseline: what a perfect model would reach.

    Args:
        model: folder or Hub id of a table model, or what `genkit.load` returned.
        data: real rows: a file, a dataset or a Hub id; in Python also rows, as dictionaries.
        count: synthetic rows; default: as many as half of the real ones, and 200 at least.
        train: rows that the model was trained on, among which copies are searched; default: none,
            and no figure of copies.
        target: column of categories that a classifier predicts from the others, once trained on
            synthetic rows and once on as many real ones, those of `train` or the other half;
            default: the last one of 2 to 20 categories.
        seed: row i is drawn with seed + i; also of the split and of half samples.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid, or there are too few rows.
    """
    loaded = as_table_model(model, device=device)
    check_no_series(loaded, "evaluate")
    columns = list(loaded.columns)
    given = read_values(data, columns)
    every = given.values
    if len(every) < LEAST:
        raise ValueError(f"data: {len(every)} rows are too few; give {LEAST} or more")
    learned = None if train is None else read_values(train, columns, "train").values
    which = _find_target(columns, target)
    real, held_out = np.array_split(np.random.default_rng(seed).permutation(every), 2)
    if count is None:
        count = max(200, len(real), 0 if learned is None else len(learned))
    check_number("count", count, LEAST, 1e7, whole=True)
    nothing = np.full((count, len(columns)), np.nan)
    synthetic = draw(loaded, nothing, range(seed, seed + count), gaps=True).values
    figures = _compare(columns, real, synthetic, held_out, seed)
    if which is not None:
        tested, taught = (real, held_out) if learned is None else (every, learned)
        name = f"accuracy, {columns[which].name}"[:24]
        figures[name] = _teach(columns, which, synthetic, taught, tested, seed)
    if learned is not None:
        figures["copies"] = _count_copies(columns, learned, synthetic, every)
    sha256 = hashlib.sha256(every.tobytes()).hexdigest()
    protocol = (
        f"{count:,} rows of {loaded.name}, seeds from {seed}, against {len(real):,} of "
        f"{len(every):,} real rows (SHA-256 of their values {sha256[:12]}…); baseline of the "
        f"{len(held_out):,} others, split by seed {seed}"
    )
    distances = _column_distances(columns, real, synthetic, held_out)
    return TableEvaluation(figures, distances, columns, every, synthetic, protocol, given.notes)


def _column_distances(
    columns: Sequence[Column], real: Array, synthetic: Array, held_out: Array
) -> dict[str, tuple[float, float]]:
    """Return the distance of each column's distributions, and that of held-out real rows."""
    values, baselines = (
        tabular.column_distances(columns, real, part).tolist() for part in (synthetic, held_out)
    )
    names = [column.name for column in columns]
    return dict(zip(names, zip(values, baselines, strict=True), strict=True))


def _teach(
    columns: Sequence[Column],
    target: int,
    synthetic: Array,
    real: Array,
    tested: Array,
    seed: int,
) -> Figure:
    """Return the accuracy that synthetic rows teach; the baseline is that of as many real ones."""
    accuracy, baseline = (
        tabular.taught_accuracy(columns, target, part[: len(real)], tested, seed)
        for part in (synthetic, real)
    )
    return share_figure(accuracy, len(tested), baseline)


def _count_copies(
    columns: Sequence[Column], learned: Array, synthetic: Array, unseen: Array
) -> Figure:
    """Return the share of synthetic rows that are as near to a training row as hardly any other."""
    near, usual = (
        tabular.nearest_distances(columns, learned, part) for part in (synthetic, unseen)
    )
    share, baseline = copy_rate(near, usual)
    return share_figure(share, len(near), baseline)


def _find_target(columns: Sequence[Column], target: str | None) -> int | None:
    """Return the column that a classifier predicts; None if there is none."""
    if target is not None:
        names = [column.name for column in columns]
        if target not in names or columns[names.index(target)].kind != CATEGORY:
            categories = [column.name for column in columns if column.kind == CATEGORY]
            raise ValueError(
                f"target must be a column of categories, got {target!r:.60}: "
                f"{', '.join(categories) or 'there is none'}"
            )
        return names.index(target)
    fitting = [
        j
        for j, column in enumerate(columns)
        if column.kind == CATEGORY and 2 <= len(column.categories) <= CLASSES
    ]
    return fitting[-1] if fitting and len(columns) > 1 else None


def _compare(
    columns: Sequence[Column], real: Array, synthetic: Array, held_out: Array, seed: int
) -> dict[str, Figure]:
    """Compare distributions; margins are those of half samples, see `half_sample_margins`."""
    measures: dict[str, Callable[..., Any]] = {
        "columns": lambda *rows: tabular.column_distances(columns, *rows).mean(),
        "pairs": lambda *rows: tabular.pair_distances(columns, *rows).mean(),
        "correlations": lambda *rows: tabular.correlation_error(columns, *rows),
    }
    if len(columns) < 2:
        measures = {"columns": measures["columns"]}
    rng = np.random.default_rng(seed)
    halves: list[dict[str, float]] = []
    for _ in range(HALVES):
        parts = [part[rng.permutation(len(part))[: len(part) // 2]] for part in (real, synthetic)]
        halves.append({name: float(measure(*parts)) for name, measure in measures.items()})
    return {
        name: Figure(
            float(measure(real, synthetic)),
            SURE * float(np.std([each[name] for each in halves], ddof=1)),
            float(measure(real, held_out[: len(synthetic)])),
        )
        for name, measure in measures.items()
    }
