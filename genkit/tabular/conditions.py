"""Conditions on the columns of a table: region=north, age>=40."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genkit.data.columns import CATEGORY, Column

OPERATORS: dict[str, Callable[..., NDArray[np.bool_]]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
SIGN = re.compile(r"\s*(<=|>=|=|<|>)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """A column, and what its values are compared with."""

    column: int
    sign: str
    value: float
    text: str  # as it was written

    def holds(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which rows satisfy it, (n,)."""
        return OPERATORS[self.sign](values[:, self.column], self.value)


def parse_conditions(
    where: str | Sequence[str] | None, columns: Sequence[Column]
) -> list[Condition]:
    """Read conditions.

    Raises:
        ValueError: one names no column, or a value that its column cannot have.
    """
    written = [where] if isinstance(where, str) else list(where or ())
    return [_parse(text, columns) for text in written]


def _parse(text: str, columns: Sequence[Column]) -> Condition:
    found = [
        (j, match)
        for j, column in enumerate(columns)
        if text.startswith(column.name) and (match := SIGN.fullmatch(text[len(column.name) :]))
    ]
    if not found:
        names = ", ".join(column.name for column in columns[:12])
        raise ValueError(
            f"where must be a column, a sign (= < <= > >=) and a value, got {text!r:.80}; the "
            f"columns are {names}"
        )
    j, match = max(found, key=lambda each: len(columns[each[0]].name))
    column, sign = columns[j], match[1]
    value = column.parse(match[2], "where")
    if np.isnan(value):
        raise ValueError(f"where: {text!r} has no value; nothing can be asked of gaps")
    if column.kind == CATEGORY and sign != "=":
        raise ValueError(f"where: {text!r}: {column.name!r} is a category, which takes = alone")
    if column.kind != CATEGORY:
        _check_range(text, column, sign, value)
    return Condition(j, sign, value, text)


def _check_range(text: str, column: Column, sign: str, value: float) -> None:
    """Refuse what no row can satisfy, as values beyond those of training are not drawn."""
    impossible = {
        "<": value <= column.least,
        "<=": value < column.least,
        ">": value >= column.most,
        ">=": value > column.most,
        "=": not column.least <= value <= column.most,
    }
    if impossible[sign]:
        raise ValueError(
            f"where: no row satisfies {text!r}: {column.name!r} is {column.format(column.least)} "
            f"to {column.format(column.most)} in the rows of training"
        )
