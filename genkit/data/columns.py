"""The columns of a table: categories, numbers and dates, found or given; cells as numbers and back.

A table is an array of float64, (rows, columns): of a category its index, of a number itself, of a
date the days since 1970, and NaN for a gap.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CATEGORY, NUMBER, DATE = "category", "number", "date"
KINDS = (CATEGORY, NUMBER, DATE)
NUMERIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
GAPS = ("NA", "N/A", "NaN", "nan", "null", "NULL", "None", "none", "-", "?")
FEW = 10  # numbers of so few different values are categories
MOST = 1000  # categories of a column
DIGITS = 6  # that a number needs, from its deviation on
EPOCH = datetime.datetime(1970, 1, 1)
DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        kind: category, number or date.
        categories: texts of a category's values, by index.
        decimals: of a number that is written; of a date 0, or more if it has times.
        least, most: of a number or a date, in the rows that it was found in.
        missing: texts that stand for a gap, beside empty cells.
    """

    name: str
    kind: str
    categories: Sequence[str] = ()
    decimals: int = 0
    least: float = 0.0
    most: float = 0.0
    missing: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not isinstance(self.name, str):
            raise ValueError(f"a column must be a category, number or date, got {self!r:.200}")

    def parse(self, cell: Any, name: str) -> float:
        """Return a cell as a number; NaN for a gap.

        Args:
            name: of the cell, for messages.

        Raises:
            ValueError: it is no value of this column.
        """
        text = as_text(cell)
        if text is None or self.is_gap(text):
            return math.nan
        if self.kind == CATEGORY:
            if text not in self.categories:
                known = ", ".join(self.categories[:8]) + (", …" if len(self.categories) > 8 else "")
                raise ValueError(f"{name}: {text!r:.60} is no category of {self.name!r}: {known}")
            return float(self.categories.index(text))
        value = as_number(text) if self.kind == NUMBER else as_days(text)
        if value is None:
            raise ValueError(f"{name}: {text!r:.60} is no {self.kind}")
        return value

    def is_gap(self, cell: Any) -> bool:
        """Whether a cell has no value."""
        text = as_text(cell)
        return text is None or text in self.missing

    def format(self, value: float) -> str:
        """Write a value as a cell; "" for a gap."""
        if math.isnan(value):
            return ""
        if self.kind == CATEGORY:
            return self.categories[int(value)]
        if self.kind == DATE:
            when = EPOCH + value * DAY
            return when.isoformat(timespec="seconds") if self.decimals else when.date().isoformat()
        return f"{value:.{self.decimals}f}"

    def rounded(self, values: Array) -> Array:
        """Return values as exactly as they are written, within the range that was found."""
        if self.kind == CATEGORY:
            return values
        return np.asarray(np.clip(values, self.least, self.most)).round(self.decimals)


def as_text(cell: Any) -> str | None:
    """Return a cell as a text; None for a gap: an empty cell, a null or what is not a number."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    text = str(cell).strip()
    return text or None


def as_number(text: str) -> float | None:
    """Return the number that a text is; None if it is none, or not finite."""
    value = float(text) if NUMERIC.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def as_days(text: str) -> float | None:
    """Return the days from 1970 to an ISO date or time; None if it is none."""
    if not re.match(r"\d{4}-?\d\d-?\d\d", text):
        return None
    try:
        when = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    if when.tzinfo is not None:
        when = when.astimezone(datetime.UTC).replace(tzinfo=None)
    return (when - EPOCH) / DAY


# ---------------------------------------------------------------------------------------------
# Finding out what the columns are


def find_columns(
    names: Sequence[str],
    cells: Sequence[Sequence[Any]],
    kinds: dict[str, str] | None = None,
    gaps: Sequence[str] = (),
) -> tuple[list[Column], Array, list[str]]:
    """Find out what the columns of a table are, and read its cells.

    Args:
        names: of the columns.
        cells: rows of cells.
        kinds: of columns whose kind is known.
        gaps: texts that stand for a gap, beside empty cells.

    Returns:
        The columns, their values, (rows, columns), and what should be said about them.

    Raises:
        ValueError: a column is neither numbers, nor dates, nor few enough categories.
    """
    kinds = kinds or {}
    for name in kinds:
        if name not in names:
            raise ValueError(
                f"--{FLAGS[kinds[name]]}: there is no column {name!r}: {', '.join(names)}"
            )
    columns, values, notes = [], [], []
    for i, name in enumerate(names):
        texts = [as_text(row[i]) for row in cells]
        texts = [None if text in gaps else text for text in texts]
        column, own, note = _find_column(name, texts, kinds.get(name))
        missing = [*gaps, *(text for text in column.missing if text not in gaps)]
        columns.append(dataclasses.replace(column, missing=missing))
        values.append(own)
        notes += note
    return columns, np.stack(values, 1), notes


FLAGS = {CATEGORY: "categories", NUMBER: "numbers", DATE: "dates"}


def _find_column(
    name: str, texts: list[str | None], kind: str | None
) -> tuple[Column, Array, list[str]]:
    given = [text for text in texts if text is not None]
    if not given:
        note = f"column {name!r} has nothing but gaps"
        return Column(name, CATEGORY), np.full(len(texts), math.nan), [note]
    if kind != CATEGORY:
        for own, parse in ((NUMBER, as_number), (DATE, as_days)):
            if kind in (None, own):
                found = _find_numbers(name, texts, own, parse, kind is not None)
                if found:
                    return found
    return _find_categories(name, texts, chosen=kind is not None)


def _find_numbers(
    name: str,
    texts: list[str | None],
    kind: str,
    parse: Callable[[str], float | None],
    chosen: bool,
) -> tuple[Column, Array, list[str]] | None:
    """Read a column of numbers or dates; None if it is not one."""
    marks = Counter(text for text in texts if text in GAPS and parse(text) is None)
    given = [text for text in texts if text is not None and text not in marks]
    parsed = {text: parse(text) for text in given}
    wrong = next((text for text in given if parsed[text] is None), None)
    if wrong is not None:
        row = texts.index(wrong)
        share = sum(parsed[text] is not None for text in given) / len(given)
        if chosen or (share > 0.5 and len(set(given)) > FEW * 5):
            raise ValueError(
                f"data: row {row}: column {name!r} has {wrong!r:.60}, which is no {kind}; mend it, "
                f"or give --gaps {wrong!r:.30} if it stands for a gap, or --categories {name}"
            )
        return None
    if not given or (kind == NUMBER and not chosen and len(set(parsed.values())) <= FEW):
        return None
    values = np.array([parsed.get(text, math.nan) if text else math.nan for text in texts], float)
    known = values[~np.isnan(values)]
    decimals = _decimals(given, known) if kind == NUMBER else 6 * bool((known % 1).any())
    column = Column(name, kind, (), decimals, float(known.min()), float(known.max()), sorted(marks))
    said = ", ".join(f"{mark!r}" for mark in marks)
    return column, values, [f"column {name!r}: {said} is read as a gap"] if marks else []


def _decimals(given: list[str], known: Array) -> int:
    """Return how many decimals numbers have, and no more than anybody can see."""
    written = max(map(_written_decimals, given))
    spread = float(np.std(known)) or max(abs(float(known[0])), 1.0)
    return min(written, max(0, DIGITS - math.floor(math.log10(spread)) - 1))


def _written_decimals(text: str) -> int:
    mantissa, _, exponent = text.lower().partition("e")
    return max(0, len(mantissa.partition(".")[2].rstrip("0")) - int(exponent or 0))


def _find_categories(
    name: str, texts: list[str | None], chosen: bool
) -> tuple[Column, Array, list[str]]:
    counts = Counter(text for text in texts if text is not None)
    rows = sum(counts.values())
    if len(counts) > MOST or (not chosen and len(counts) > max(FEW, rows // 2)):
        raise ValueError(
            f"data: column {name!r} has {len(counts):,} different texts in {rows:,} rows, such as "
            f"{next(iter(counts))!r:.60}: names or sentences, which no table model learns; give "
            f"--leave_out {name}"
        )
    categories = sorted(counts, key=_sort_key)
    index = {text: float(i) for i, text in enumerate(categories)}
    values = np.array([math.nan if text is None else index[text] for text in texts])
    notes = []
    marks = [text for text in categories if text in GAPS]
    if marks:
        notes.append(
            f"column {name!r}: {marks[0]!r} is a category; --gaps {marks[0]} makes it a gap"
        )
    if len(categories) == 1:
        notes.append(f"column {name!r} is always {categories[0]!r:.60}")
    return Column(name, CATEGORY, categories), values, notes


def _sort_key(text: str) -> tuple[float, str]:
    number = as_number(text)
    return (math.inf if number is None else number, text)
