"""Pushes of a run's model: in the background while it trains, and at its end."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from genkit.hub import pushing, staging

STAGED, LOG = ".pushing", ".pushing.log"


class Pusher:
    """Pushes the model in a run's folder.

    Args:
        folder: of the run.
        repository: on the Hub; made at once if there is none, so that a run that may not push
            ends before it begins.
        private: see `genkit.push`.
        log: prints a line.

    Raises:
        ValueError: the Hub refuses.
    """

    def __init__(
        self, folder: Path, repository: str, private: bool, log: Callable[[str], None]
    ) -> None:
        self._created = pushing.prepare_repository(repository, private)
        self.folder, self.repository, self.private, self.log = folder, repository, private, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Push the model as it is now, while training goes on; not if the last one is under way."""
        if self._process is not None and self._process.poll() is None:
            return
        self._log_failure()
        staged = self.folder / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        staging.stage(self.folder, staged, self.repository)
        command = [sys.executable, "-m", "genkit.cli", "push", str(staged), self.repository]
        command += ["--private"] if self.private else []
        with (self.folder / LOG).open("wb") as output:  # Ctrl-C is for the run alone
            self._process = subprocess.Popen(
                command,
                env=staging.single_process_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End the push under way: what the repository holds stays whole; an empty new one goes."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self.folder / STAGED, ignore_errors=True)
        self._created.close()

    def finish(self) -> pushing.Pushed:
        """Wait for the push under way, then push the model of the finished run.

        Raises:
            ValueError: it does not load, or the Hub refuses; a new repository without any is gone.
        """
        with self._created:
            if self._process is not None:
                self._process.wait()
                self._log_failure()
            shutil.rmtree(self.folder / STAGED, ignore_errors=True)
            try:
                pushed = pushing.push(self.folder, self.repository, private=self.private)
            except ValueError as error:
                again = f"The run is complete; push its model by `genkit push {self.folder}"
                raise ValueError(f"{error}. {again} {self.repository}`") from None
            self._created.pop_all()  # it stays
            return pushed

    def _log_failure(self) -> None:
        """Log how the last push ended, if it failed."""
        if self._process is not None and self._process.returncode:
            lines = (self.folder / LOG).read_text(errors="replace").splitlines()
            self.log(f"not pushed: {lines[-1] if lines else 'no message'}")
        self._process = None
