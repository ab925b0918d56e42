"""Signals of a run: those that end it after the step under way, and the one of a continuation."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from genkit.training import launch


class Signals:
    """Signals that came to this process since `listening` began.

    Args:
        log: prints a line.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._launcher = launch.find_launcher()
        self._number = 0  # of the first signal that ends the run
        self._time = 0.0  # when it came
        self._continued = False

    @property
    def stop_requested(self) -> bool:
        """Whether the run is to end: a signal came, or the launcher is gone."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        return self._number != 0 or orphaned

    def take_continued(self) -> bool:
        """Whether the process was stopped and continued (Ctrl-Z, fg) since the last call."""
        continued, self._continued = self._continued, False
        return continued

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals of a run, in place of the handlers that were there."""
        handlers: dict[int, Any] = {signal.SIGINT: self._on_stop, signal.SIGTERM: self._on_stop}
        if hasattr(signal, "SIGHUP"):  # of a terminal that is closed; not on Windows
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
                handlers[signal.SIGHUP] = self._on_stop
            handlers[signal.SIGCONT] = self._on_continue
        before = {number: signal.signal(number, new) for number, new in handlers.items()}
        try:
            yield
        finally:
            for number, handler in reversed(before.items()):
                signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes on a signal that the terminal has already sent: that is not a second one
        if self._number and time.monotonic() - self._time > 1:
            os._exit(128 + number)
        if not self._number:
            self._number, self._time = number, time.monotonic()
            self._log("stopping after this step; a second signal stops at once, without saving")

    def _on_continue(self, number: int, frame: FrameType | None) -> None:
        self._continued = True
