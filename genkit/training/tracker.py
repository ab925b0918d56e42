"""The tracker of a run, such as TensorBoard: accelerate calls it, and the disk may refuse it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate

from genkit import files


class Tracker:
    """What sends a run's settings and metrics to the tracker of its accelerator.

    Args:
        folder: of the run, where a tracker keeps its files.
        log: prints a line.
    """

    def __init__(
        self, accelerator: accelerate.Accelerator, folder: Path, log: Callable[[str], None]
    ) -> None:
        self._accelerator, self._folder, self._log = accelerator, folder, log

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Catch what a tracker's own threads raise, and close the tracker at the end."""
        before, threading.excepthook = threading.excepthook, self._on_thread_error
        try:
            yield
        finally:
            try:
                with self._named_errors():
                    self._accelerator.end_training()
            finally:
                threading.excepthook = before

    def start(self, settings: dict[str, Any]) -> None:
        """Begin a record with the run's settings; those that are None are left out."""
        given = {name: value for name, value in settings.items() if value is not None}
        with self._named_errors():
            self._accelerator.init_trackers("genkit", given)

    def send(self, values: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        with self._named_errors():
            self._accelerator.log(values, step=step)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the folder when the disk refuses what a tracker writes."""
        with files.named_write_errors(self._folder, "what the tracker keeps in "):
            yield

    def _on_thread_error(self, failure: threading.ExceptHookArgs) -> None:
        """Log in one line that the disk refused what a tracker's own thread writes."""
        if isinstance(failure.exc_value, OSError):
            self._log(f"the tracker lost figures: {files.reason(failure.exc_value)}")
            return
        threading.__excepthook__(failure)
