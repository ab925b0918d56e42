"""One seed a row, so that a row is the same in any batch; whole numbers, and numbers in a range."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np

LIMIT = 1 << 63


def row_seeds(seed: Any, rows: int, what: str) -> list[int]:
    """Return one seed a row.

    Args:
        seed: a whole number, for it and those that follow it; one a row; None to draw a number.
        rows: how many rows there are.
        what: what a row is, for the message: "an image".

    Raises:
        ValueError: `seed` has another length, or something in it is not a seed.
    """
    given: Any = secrets.randbits(31) if seed is None else seed
    if is_whole(given):
        given = [int(given) + i for i in range(rows)]
    if isinstance(given, str) or np.ndim(given) != 1 or not all(map(is_whole, given)):
        raise ValueError(f"seed must be a whole number, or one {what}, got {seed!r:.80}")
    if len(given) != rows:
        raise ValueError(
            f"seed: {len(given)} seeds for {rows} {what.split()[-1]}s; give one each, or a number"
        )
    if min(given) < 0 or max(given) >= LIMIT:
        raise ValueError(f"seed must be 0 or more and less than 2^63, got {seed!r:.80}")
    return [int(own) for own in given]


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    """Raise ValueError for what is no number from `low` to `high`; with `whole`, no whole one."""
    known = is_whole(value) or (not whole and isinstance(value, float | np.floating))
    if not known or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} from {low:g} to {high:g}, got {value!r:.80}")
