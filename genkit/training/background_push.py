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
        say: prints a line.

    Raises:
        ValueError: the Hub refuses.
    """

    def __init__(
        self, folder: Path, repository: str, private: bool, say: Callable[[str], None]
    ) -> None:
        pushing.prepare_repository(repository, private)
        self.folder, self.repository, self.private, self.say = folder, repository, private, say
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Push the model as it is now, while training goes on; not if the last one is under way."""
        if self._process is not None and self._process.poll() is None:
            return
        self._tell()
        staged = self.folder / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        staging.stage(self.folder, staged, self.repository)
        words = [sys.executable, "-m", "genkit.cli", "push", str(staged), self.repository]
        words += ["--private"] if self.private else []
        with (self.folder / LOG).open("wb") as log:  # Ctrl-C is for the run alone
            self._process = subprocess.Popen(
                words,
                env=staging.single_process_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End what is under way: what the repository holds is whole."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self.folder / STAGED, ignore_errors=True)

    def finish(self) -> None:
        """Wait for what is under way, then push the model of the finished run.

        Raises:
            ValueError: it does not load, or the Hub refuses.
        """
        if self._process is not None:
            self._process.wait()
            self._tell()
        shutil.rmtree(self.folder / STAGED, ignore_errors=True)
        try:
            self.say(str(pushing.push(self.folder, self.repository, private=self.private)))
        except ValueError as error:
            again = f"genkit push {self.folder} {self.repository}"
            raise ValueError(f"{error}. The run is complete; push its model by `{again}`") from None

    def _tell(self) -> None:
        """Say how the last push ended, if it failed."""
        if self._process is not None and self._process.returncode:
            lines = (self.folder / LOG).read_text(errors="replace").splitlines()
            self.say(f"not pushed: {lines[-1] if lines else 'no message'}")
        self._process = None
