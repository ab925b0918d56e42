"""The folder of a run: locked while it trains, the model at its top, its log beside it.

runs/mybook/
  config.json, model.safetensors, tokenizer.json, …   the model, as transformers loads it
  run.json         settings, and the data by hash
  metrics.jsonl    one line an entry
  loss.png, samples.md
  checkpoints/     see genkit/training/checkpoints.py
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from genkit.files import (
    make_empty,
    named_write_errors,
    read_object,
    read_regular,
    reason,
    sync,
    write_text,
)
from genkit.hub import gallery
from genkit.training import checkpoints
from genkit.training.launch import HOW_TO

RUN_FILE, LOG_FILE, LOCK = "run.json", "metrics.jsonl", ".lock"
MODEL = ("config.json", "model_index.json", "README.md", "*.safetensors", "*/*.safetensors")
ELSEWHERE = "put back a copy of it, or start in another folder"


class RunFolder:
    """A run's folder, for the one process that writes in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log_file = path / LOG_FILE
        self.start: tuple[Path | None, list[str]] = None, []  # of a resumed run; see `newest`
        self._lock = filelock.FileLock(path / LOCK)
        self._created: list[Path] = []  # by `claim`: the lock, and folders from the inside

    def claim(self, resume: bool) -> None:
        """Create and lock the folder; the lock goes with the process, however it ends.

        Raises:
            ValueError: it cannot be written, another process trains in it, it holds another run, or
                the one to resume cannot go on.
        """
        paths = (self.path / LOCK, self.path, *self.path.parents)
        try:
            self._created = [path for path in paths if not path.exists()]
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
        try:
            self._check_paths()
            if resume:
                self.log()  # which must be readable, before anything is set aside
                self.start = self.newest()
            else:
                self._check_empty()
            checkpoints.remove_leftovers(self.checkpoints)
        except BaseException:
            self.release()
            raise

    def _check_paths(self) -> None:
        """Refuse folders that have the names of files of the run, before a step is made."""
        for name in (RUN_FILE, LOG_FILE, "loss.png", *list_model(self.path)):
            if (self.path / name).is_dir():
                raise ValueError(f"output_dir: {self.path / name} is a folder; move it elsewhere")

    def _check_empty(self) -> None:
        """Refuse what a new run would overwrite; delete a run that never made a step.

        Raises:
            ValueError: there is a log, a checkpoint or a model, whatever else is missing.
        """
        saved = checkpoints.list_checkpoints(self.checkpoints)
        unstarted = (self.path / RUN_FILE).exists() and not any(map(checkpoints.step_of, saved))
        if self._logged() or (saved and not unstarted):
            raise ValueError(
                f"output_dir: {self.path} holds another run. Go on with it by --resume, name "
                "another folder, or delete it"
            )
        model = list_model(self.path)
        if model:
            raise ValueError(
                f"output_dir: {self.path} holds {', '.join(model)}, which a run would overwrite; "
                "name another folder"
            )
        for checkpoint in saved:
            checkpoints.delete_checkpoint(checkpoint)

    def _logged(self) -> bool:
        return self.log_file.exists() and self.log_file.stat().st_size > 0

    def newest(self) -> tuple[Path | None, list[str]]:
        """Find the checkpoint to go on from, and set aside those that are newer and damaged.

        Returns:
            Its path, or None if the run has not made a step, and a line for each set aside.

        Raises:
            ValueError: something cannot be read, or the run has made steps and no checkpoint of it
                is whole: to start again would replace its log and its model.
        """
        found, problems = checkpoints.find_newest(self.checkpoints)
        if found is None and (problems or self._has_begun()):
            what = "; ".join(problems) or f"{self.checkpoints} holds no checkpoint"
            raise ValueError(
                f"resume: {what}. Nothing was changed: put back a copy of a checkpoint (is a disk "
                f"away?), or start in another folder, or delete {self.path} and start again"
            )
        lines = []
        for line, damaged in zip(
            problems, checkpoints.list_checkpoints(self.checkpoints), strict=False
        ):
            aside = checkpoints.set_aside(damaged)
            lines.append(f"{line}; it is now {aside.name}, and an earlier one is used")
        return found, lines

    def _has_begun(self) -> bool:
        """Whether the run has made a step, by its log, or by a model without a log."""
        if self.log_file.exists():
            return any(line["step"] > 0 for line in self.log())
        return bool(list_model(self.path))

    def release(self) -> None:
        """Give the lock back; of a run that failed before it began, nothing is left."""
        if self._lock.is_locked and not (self.path / RUN_FILE).is_file():
            with contextlib.suppress(OSError):  # there are other files, or the disk refuses
                for path in self._created:
                    path.rmdir() if path.is_dir() else path.unlink()
        self._lock.release()

    def identify(self, facts: dict[str, Any], accept: bool) -> None:
        """Compare the run's input with what it was started with.

        Raises:
            ValueError: the folder's run had other input, and `accept` is false.
        """
        record = self.path / RUN_FILE
        if record.exists():
            old = read_record(self.path)["facts"]
            changed = [n for n in facts if old.get(n) != facts[n]]
            if changed and not accept:
                listed = ", ".join(f"{n} {old.get(n)!r} -> {facts[n]!r}" for n in changed)
                raise ValueError(
                    f"resume: the run in {self.path} was started with other input: {listed}. "
                    "Give it the same, or pass --accept_changes"
                )

    def record(self, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write down the run's settings and input."""
        write_text(
            self.path / RUN_FILE, json.dumps({"settings": settings, "facts": facts}, indent=2)
        )

    def append(self, line: dict[str, float]) -> None:
        """Add a line to the log; numbers that are not finite, which JSON cannot hold, as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in line.items()}
        data = f"{json.dumps(finite)}\n".encode()
        with named_write_errors(self.log_file), self.log_file.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and (file.seek(size - 1), file.read(1))[1] != b"\n":  # cut short by a crash
                self._write_log(self.log())
                return self.append(line)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise

    def log(self) -> list[dict[str, Any]]:
        """Read the log; a last line cut short by a crash is left out.

        Raises:
            ValueError: it cannot be read, or another line is damaged.
        """
        try:
            written = read_regular(self.log_file) if self.log_file.exists() else b""
        except OSError as error:
            raise ValueError(f"{self.log_file} cannot be read ({reason(error)})") from None
        *lines, last = written.split(b"\n")
        entries = [_entry(line) for line in lines]
        if None in entries:
            raise ValueError(
                f"{self.log_file} is damaged: line {entries.index(None) + 1} is not an entry of "
                "a step; delete that line"
            )
        return [entry for entry in (*entries, _entry(last)) if entry is not None]

    def _write_log(self, lines: list[dict[str, Any]]) -> None:
        write_text(self.log_file, "".join(json.dumps(line) + "\n" for line in lines))

    def forget_after(self, step: int) -> None:
        """Drop the log lines and the samples of steps that will be done again."""
        self._write_log([line for line in self.log() if line["step"] <= step])
        for sample in gallery.list_samples(self.path):
            if gallery.step_of(sample) > step:
                sample.unlink()

    def sync_log(self) -> None:
        """Push the log to the disk."""
        if self.log_file.exists():
            sync(self.log_file)

    def write(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        path = self.path / name
        with named_write_errors(path):
            path.parent.mkdir(exist_ok=True)
        write_text(path, text)

    def write_samples(self, step: int, page: str) -> None:
        """Write a page of samples of a step, in Markdown."""
        self.write(f"samples/step-{step:08d}.md", page)

    def publish(self, write: Callable[[Path], None]) -> None:
        """Put a model's files into the folder: `write` fills an empty one, then each file moves.

        Raises:
            WriteError: the disk refused; the files that were there are untouched.
        """
        scratch = self.path / ".publishing"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            with named_write_errors(self.path, "the model in "):
                scratch.mkdir()
                write(scratch)
                self._move_in(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _move_in(self, scratch: Path) -> None:
        files = [file for file in scratch.rglob("*") if file.is_file()]
        mode = make_empty(scratch / ".mode")
        for file in files:
            file.chmod(mode)
            sync(file)
        targets = [self.path / file.relative_to(scratch) for file in files]
        folders = {self.path, *(target.parent for target in targets)}
        for folder in folders:
            folder.mkdir(exist_ok=True)
        for file, target in zip(files, targets, strict=True):
            file.replace(target)
        for folder in folders:
            sync(folder)


def list_model(folder: Path) -> list[str]:
    """Name the files that make a folder that of a model."""
    found: Iterator[Path] = (file for pattern in MODEL for file in folder.glob(pattern))
    return [str(file.relative_to(folder)) for file in found]


def read_record(folder: Path) -> dict[str, Any]:
    """Read run.json: the "settings" of a run and the "facts" of its data.

    Raises:
        ValueError: it is missing in the folder of a run, or damaged; or there is no run.
    """
    file = folder / RUN_FILE
    if not os.path.lexists(file):
        kept = [*checkpoints.list_checkpoints(folder / "checkpoints"), *folder.glob(LOG_FILE)]
        if not kept and not list_model(folder):
            raise ValueError(f"output_dir: there is no run to resume in {folder}")
        raise ValueError(f"output_dir: {file} is missing, the settings of the run; {ELSEWHERE}")
    record = read_object(file, ELSEWHERE)
    for part in ("settings", "facts"):
        if not isinstance(record.get(part), dict):
            raise ValueError(f"{file} is damaged (it holds no {part}); {ELSEWHERE}")
    return record


def _entry(line: bytes) -> dict[str, Any] | None:
    """Read a line of the log: a step, and numbers or nulls."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return None
    numbers = all(value is None or type(value) in (int, float) for value in entry.values())
    return entry if numbers else None
