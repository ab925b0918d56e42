"""The clean copy of a model that is pushed, and the proof that it loads."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from genkit import files
from genkit.hub import card, gallery, privacy, safety
from genkit.hub.vendoring import vendor

# what a recipe leaves beside a model
EXTRAS = ("metrics.jsonl", "LICENSE", "LICENSE.md", "LICENSE.txt", *card.PICTURES)
LARGEST = 64 << 20  # bytes of an extra
TRIES = 5
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def stage(source: Path, staged: Path, repository: str) -> None:
    """Fill a folder with what is pushed of a model.

    Args:
        source: the model's folder.
        staged: an empty one.
        repository: by which the card loads the model.

    Raises:
        ValueError: the folder cannot be trusted, a file tells of this machine, or a run writes a
            model there all the time.
    """
    for _ in range(TRIES):
        before = _stamps(source)
        with safety.opened(source, argument="folder") as private:
            _take_model(private, staged)
        _take_extras(source, staged)
        if _stamps(source) == before:
            break
        shutil.rmtree(staged)  # a run has published a better model in between
        staged.mkdir()
    else:
        raise ValueError(f"folder: {source} is written all the time; push it when it is not")
    vendor(staged)
    text = card.renamed(_card(source), repository)
    names = [file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file()]
    (staged / card.FILE).write_text(card.listed(text, names), encoding="utf-8")
    privacy.check(staged, source, repository)


def _take_model(private: Path, staged: Path) -> None:
    """Take the files that loaders read: weights by a second name of theirs, all others copied."""
    for file in sorted(file for file in private.rglob("*") if not file.is_dir()):
        place = staged / file.relative_to(private)
        place.parent.mkdir(exist_ok=True)
        if not (file.is_symlink() and _is_linked(file, place)):
            shutil.copyfile(file, place)


def _is_linked(file: Path, place: Path) -> bool:
    """Give the file behind a link a second name; tell whether this disk has it, and lets us."""
    with contextlib.suppress(OSError):
        # os.link follows links only where it is told a folder to begin at
        home = os.open("/", os.O_RDONLY)
        try:
            os.link(file, place, src_dir_fd=home, follow_symlinks=True)
        finally:
            os.close(home)
        return True
    return False


def _take_extras(source: Path, staged: Path) -> None:
    """Take what the recipe left beside the model, and the samples that the card shows."""
    named = re.findall(r"\((samples/step-\d+\.(?:md|png))\)", _card(source))
    last = [f"samples/{sample.name}" for sample in gallery.find(source)[-1:]]
    for name in (*EXTRAS, *(named or last)):
        if (source / name).is_symlink() or (source / name).exists():
            data = _read(source / name, source)
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_bytes(data)


def _card(source: Path) -> str:
    written = source / card.FILE
    if not written.exists() and not written.is_symlink():
        return card.plain(source.name)
    return _read(written, source).decode("utf-8")


def _read(file: Path, source: Path) -> bytes:
    try:
        return files.read_inside(file, source, LARGEST)
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: {error}") from None


def _stamps(source: Path) -> dict[Path, int]:
    """Tell when the files of a model were written."""
    found = [*source.glob("*"), *source.glob("[!.]*/*")]  # hidden folders are nobody's components
    return {file: file.lstat().st_mtime_ns for file in found if safety.MODEL.fullmatch(file.name)}


def validate(staged: Path, kind: str) -> None:
    """Load a model in a fresh process, without genkit and with it.

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
            env=alone() | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        last = last.replace(str(staged), staged.name)
        raise ValueError(f"folder: the model does not load in a fresh process: {last}")


def alone() -> dict[str, str]:
    """Return an environment for a process that is none of a run's, and leaves it its GPUs."""
    kept = {name: value for name, value in os.environ.items() if name not in RANKS}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}
