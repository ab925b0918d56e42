"""The folder of a run: locked while it trains, the model at its top, its log beside it.

runs/mybook/
  config.json, model.safetensors, tokenizer.json, …   the model, as transformers loads it
  run.json         settings, and the data by hash
  metrics.jsonl    one line an entry
  loss.png, samples.md
  checkpoints/     see genkit/checkpoints.py
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from genkit import checkpoints
from genkit.launch import HOW_TO

RUN_FILE, LOG_FILE = "run.json", "metrics.jsonl"


class RunFolder:
    """A run's folder, for the one process that writes in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log_file = path / LOG_FILE
        self._lock = filelock.FileLock(path / ".lock")

    def claim(self, resume: bool) -> None:
        """Create and lock the folder; the lock goes with the process, however it ends.

        Raises:
            ValueError: it cannot be written, another process trains in it, or it holds another run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"output_dir: another process is training in {self.path}. If one launch was "
                f"meant to be several processes, they are not connected. {HOW_TO}"
            ) from None
        except OSError as error:
            raise ValueError(
                f"output_dir: cannot write in {self.path} ({error.strerror}); "
                "name a folder that can be created or written"
            ) from None
        problem = None if resume else self._occupied()
        if problem:
            self.release()
            raise ValueError(f"output_dir: {self.path} {problem}")
        checkpoints.clean(self.checkpoints)

    def _occupied(self) -> str | None:
        """Say what a new run would overwrite; one that never made a step is nothing, and goes."""
        if not (self.path / RUN_FILE).exists():
            known = ("config.json", "model_index.json", "README.md")
            found = [n for n in known if (self.path / n).exists()]
            found += [file.name for file in self.path.glob("*.safetensors")]
            what = f"holds {', '.join(found)}, which a run would overwrite; name another folder"
            return what if found else None
        if self.log():
            return "holds another run. Go on with it by --resume, name another folder, or delete it"
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        return None

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def identify(self, settings: dict[str, Any], facts: dict[str, Any], accept: bool) -> None:
        """Record the run's settings and input.

        Raises:
            ValueError: the folder's run had other input, and `accept` is false.
        """
        record = self.path / RUN_FILE
        if record.exists():
            old = json.loads(record.read_text())["facts"]
            changed = [n for n in facts if old.get(n) != facts[n]]
            if changed and not accept:
                listed = ", ".join(f"{n} {old.get(n)!r} -> {facts[n]!r}" for n in changed)
                raise ValueError(
                    f"resume: the run in {self.path} was started with other input: {listed}. "
                    "Give it the same, or pass --accept_changes"
                )
        write_text(record, json.dumps({"settings": settings, "facts": facts}, indent=2))

    def append(self, line: dict[str, float]) -> None:
        """Add a line to the log; numbers that are not finite, which JSON cannot hold, as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in line.items()}
        with self.log_file.open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def log(self) -> list[dict[str, Any]]:
        """Read the log; a last line cut short by a crash is left out."""
        lines = []
        for line in self.log_file.read_text().splitlines() if self.log_file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    def forget_after(self, step: int) -> None:
        """Drop the log lines and the samples of steps that will be done again."""
        kept = [line for line in self.log() if line["step"] <= step]
        write_text(self.log_file, "".join(json.dumps(line) + "\n" for line in kept))
        for sample in self.path.glob("samples/step-*"):
            if int(sample.stem.removeprefix("step-")) > step:
                sample.unlink()

    def write(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)

    def publish(self, write: Callable[[Path], None]) -> None:
        """Put a model's files into the folder: `write` fills an empty one, then each file moves.

        Raises:
            OSError: the disk refused; the files that were there are untouched.
        """
        scratch = self.path / ".publishing"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            write(scratch)
            files = [file for file in scratch.rglob("*") if file.is_file()]
            for file in files:
                checkpoints.sync(file)
            for file in files:
                place = self.path / file.relative_to(scratch)
                place.parent.mkdir(exist_ok=True)
                file.replace(place)
            for folder in {self.path, *(file.parent for file in self.path.glob("*/config.json"))}:
                checkpoints.sync(folder)
        finally:
            shutil.rmtree(scratch)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_text(text, encoding="utf-8")
    checkpoints.sync(scratch)
    scratch.replace(path)
