"""How far a run is: its counters, and a clock that knows what is training and what is not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass
class Progress:
    """Where a run is: all of it goes into every checkpoint."""

    step: int = 0
    seconds: float = 0.0  # of training: evaluation, saving and compilation are not counted
    evaluations: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    rate_scale: float = 1.0  # halved at every roll-back
    rollbacks: int = 0
    skips: int = 0  # non-finite steps in a row

    def __post_init__(self) -> None:
        """Refuse what a checkpoint cannot have held.

        Raises:
            TypeError: a value is no number.
        """
        for name, value in asdict(self).items():
            if type(value) not in (int, float) and not (name == "best" and value is None):
                raise TypeError(f"progress: {name} is no number: {value!r}")

    def fraction(self, max_steps: int | None, max_minutes: float | None) -> float:
        """How much of the run is done, by steps or by time, whichever is further."""
        by_steps = self.step / max_steps if max_steps else 0.0
        by_time = self.seconds / (60 * max_minutes) if max_minutes else 0.0
        return max(by_steps, by_time)


class Clock:
    """Seconds of training: runs inside the loop, stands still inside `paused`.

    It cannot know how long the process was stopped (Ctrl-Z, SIGSTOP): time goes on meanwhile. But
    a process is told when it is continued, and then the lap in which that came counts no more than
    the one before: `usual` instead of `seconds`.
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
