"""How far a run is: its counters, its length, and a clock of the time spent in training."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genkit import machine
from genkit.training.folder import read_record
from genkit.training.settings import RunSettings


@dataclass
class Progress:
    """Where a run is: all of it goes into every checkpoint."""

    step: int = 0
    rows: int = 0  # read by the steps, this one included: where the next one goes on
    seconds: float = 0.0  # of training: evaluation, saving and compilation are not counted
    evaluations: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    rate_scale: float = 1.0  # halved at every roll-back
    rollbacks: int = 0
    skips: int = 0  # non-finite steps in a row
    coefficient: float = 0.0  # a weight in the loss that adapts, in a run that has one

    def __post_init__(self) -> None:
        """Refuse values that no checkpoint holds.

        Raises:
            TypeError: a value is not a number.
        """
        for name, value in asdict(self).items():
            if type(value) not in (int, float) and not (name == "best" and value is None):
                raise TypeError(f"progress: {name} is not a number: {value!r}")

    def fraction(self, max_steps: int | None, max_minutes: float | None) -> float:
        """How much of the run is done, by steps or by time, whichever is further."""
        by_steps = self.step / max_steps if max_steps else 0.0
        by_time = self.seconds / (60 * max_minutes) if max_minutes else 0.0
        return max(by_steps, by_time)

    def record_value(self, value: float, lower_is_better: bool) -> bool:
        """Count an evaluation of this step; return whether its value is the best so far."""
        sign = 1 if lower_is_better else -1
        better = self.best is None or sign * value < sign * self.best
        if better and math.isfinite(value):
            self.best, self.best_step, self.stale = value, self.step, 0
            return True
        self.stale += 1
        return False

    def describe_best(self, folder: Path) -> str:
        """Say where the best model is, and whether it is the one that the run began from."""
        unchanged = self.best is not None and self.best_step == 0
        note = ": it is the one that the run began from, as no later one was better"
        return f"the best model is in {folder}{note if unchanged else ''}"


def read_progress(saved: dict[str, Any], folder: Path) -> Progress:
    """Return the progress in a checkpoint; earlier versions of genkit did not count rows in it."""
    if "rows" not in saved:
        saved = saved | {"rows": saved["step"] * read_record(folder)["settings"]["batch_size"]}
    return Progress(**saved)


def count_steps(
    epochs: float | None, rows: int, batch_size: int, max_steps: int | None
) -> int | None:
    """Return the length of a run in steps: its epochs over `rows`, or max_steps if that is less."""
    if epochs is None:
        return max_steps
    steps = math.ceil(epochs * rows / batch_size)
    return min(steps, max_steps or steps)


def estimate_run(progress: Progress, settings: RunSettings, compile_seconds: float) -> str:
    """Return memory, speed and length of a run, from the steps of a dry run."""
    each = progress.seconds / progress.step
    peak = machine.peak_memory() / 2**30
    seconds = each * settings.max_steps if settings.max_steps else math.inf
    seconds = min(seconds, 60 * settings.max_minutes if settings.max_minutes else math.inf)
    return (
        f"memory {peak:.2f} GB · {1000 * each:.1f} ms a step · compiled in "
        f"{compile_seconds:.0f} s · {seconds / each:,.0f} steps in {seconds / 60:.1f} minutes"
    )


class Clock:
    """Seconds of training: runs inside the loop, stands still inside `paused`.

    It cannot know how long the process was stopped (Ctrl-Z, SIGSTOP): time goes on meanwhile. But
    a signal comes when the process is continued, and then the lap in which it came counts no more
    than the one before: `usual` instead of `seconds`.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._since: float | None = None
        self._lap_start = self._lap_length = 0.0

    @property
    def seconds(self) -> float:
        """The time shown."""
        return self._sum + (time.monotonic() - self._since if self._since is not None else 0.0)

    @property
    def usual(self) -> float:
        """The time shown if this lap has taken no longer than the one before."""
        return min(self.seconds, self._lap_start + self._lap_length)

    def lap(self, seconds: float) -> None:
        """End a lap at a time shown; what has gone by since counts to the next one."""
        self._lap_length, self._lap_start = seconds - self._lap_start, seconds

    def set(self, seconds: float) -> None:
        """Go to a time; a running clock goes on from there."""
        self._sum = self._lap_start = seconds
        self._since = time.monotonic() if self._since is not None else None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the clock run."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._sum, self._since = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still."""
        self._sum, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.monotonic()
