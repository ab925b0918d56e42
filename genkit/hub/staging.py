"""The clean copy of a model that is pushed, and the check that it loads."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from genkit import files, machine
from genkit.hub import card, download, gallery, kinds, model_files, names, privacy, safety
from genkit.hub.vendoring import vendor

# what a recipe writes beside a model
EXTRAS = ("metrics.jsonl", "LICENSE", "LICENSE.md", "LICENSE.txt", *card.PICTURES)
LARGEST = 64 << 20  # bytes of an extra
TRIES = 5
# variables that make a process one of several of a launch
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def find_source(folder: str | Path, argument: str = "folder") -> tuple[Path, str]:
    """Return the folder of a saved model of this machine, and the model's kind.

    Args:
        argument: the name of its argument, for messages.

    Raises:
        ValueError: there is no such folder, or it holds no model.
    """
    name = kinds.as_name(folder, argument)
    source = names.as_path(name, argument)
    if not source.is_dir():
        download.refuse_missing(name, argument)
    return source, kinds.kind_of(source, argument)


def stage(
    source: Path, staged: Path, repository: str | None = None, revision: str | None = None
) -> None:
    """Fill a folder with what is pushed of a model.

    Args:
        source: the model's folder.
        staged: an empty folder.
        repository: the name by which the card loads the model; None for the one it has.
        revision: the branch that it is pushed to; None for the default one.

    Raises:
        ValueError: the folder cannot be trusted, a file identifies this machine, or a run keeps
            writing the model.
    """
    _copy_settled(source, staged)
    vendor(staged)
    privacy.shorten_origins(staged)
    text = _read_card(source)
    if repository is not None:
        text = card.renamed(text, repository, revision)
    listed = [file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file()]
    (staged / card.FILE).write_text(card.listed(text, listed), encoding="utf-8")
    privacy.check(staged, source, repository)


def _copy_settled(source: Path, staged: Path) -> None:
    """Copy a model that no run is writing meanwhile; try again if one is."""
    for _ in range(TRIES):
        before = _write_times(source)
        with safety.opened(source, argument="folder") as private:
            _copy_model(private, staged)
        _copy_extras(source, staged)
        if _write_times(source) == before:
            return
        shutil.rmtree(staged)  # a run has published a better model in between
        staged.mkdir()
    raise ValueError(f"folder: a run keeps writing the model in {source}; push it afterwards")


def _copy_model(private: Path, staged: Path) -> None:
    """Copy the files that loaders read; weights get a hard link where the disk allows it."""
    for file in sorted(file for file in private.rglob("*") if not file.is_dir()):
        target = staged / file.relative_to(private)
        target.parent.mkdir(exist_ok=True)
        if not (file.is_symlink() and _hard_link(file, target)):
            shutil.copyfile(file, target)


def _hard_link(link: Path, target: Path) -> bool:
    """Make a hard link to the file behind a symbolic link; return whether the disk allowed it."""
    with contextlib.suppress(OSError):
        # os.link follows symbolic links only together with src_dir_fd
        home = os.open("/", os.O_RDONLY)
        try:
            os.link(link, target, src_dir_fd=home, follow_symlinks=True)
        finally:
            os.close(home)
        return True
    return False


def _copy_extras(source: Path, staged: Path) -> None:
    """Copy what the recipe wrote beside the model, and the samples that the card shows."""
    named = re.findall(r"\((samples/step-\d+\.(?:md|png))\)", _read_card(source))
    last = [f"samples/{sample.name}" for sample in gallery.list_samples(source)[-1:]]
    for name in (*EXTRAS, *(named or last)):
        if (source / name).is_symlink() or (source / name).exists():
            data = _read_extra(source / name, source)
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_bytes(data)


def _read_card(source: Path) -> str:
    """Return the card of a model; a plain one where it has none."""
    written = source / card.FILE
    if not written.exists() and not written.is_symlink():
        return card.plain(source.name)
    return _read_extra(written, source).decode("utf-8")


def _read_extra(file: Path, source: Path) -> bytes:
    try:
        return files.read_inside(file, source, LARGEST)
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: {error}") from None


def _write_times(source: Path) -> dict[Path, int]:
    """Return when each file of a model was written, in nanoseconds."""
    found = [*source.glob("*"), *source.glob("[!.]*/*")]  # no component is hidden
    return {file: file.lstat().st_mtime_ns for file in found if model_files.is_loaded(file.name)}


def validate(staged: Path, kind: str) -> None:
    """Load a model in a fresh process, with genkit and without it.

    Raises:
        ValueError: it does not load.
    """
    with tempfile.TemporaryDirectory() as modules:
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                str(Path(__file__).with_name("load_check.py")),
                str(staged),
                kind,
            ],
            env=single_process_environment() | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        last = last.replace(str(staged), staged.name)
        raise ValueError(f"folder: the model does not load in a fresh process: {last}")


def single_process_environment() -> dict[str, str]:
    """Return an environment for a process beside a run: not one of its launch, and on a CPU."""
    kept = {name: value for name, value in os.environ.items() if name not in RANKS}
    return kept | machine.hide_accelerators()
