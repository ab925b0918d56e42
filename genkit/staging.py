"""The clean copy of a model that is pushed, and the proof that it loads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from genkit import card, kinds, safety
from genkit.hub import MODEL

# files of genkit that hold classes of pipelines
FAMILIES = tuple(name[0] for name in kinds.PIPELINES if isinstance(name, tuple))
KEPT = (*MODEL, "LICENSE*", "metrics.jsonl", "*.png", "*.gif")  # at the top of a folder
LEFT = ("run.json",)  # it names files of this machine
TRIES = 5
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def stage(source: Path, staged: Path, repository: str) -> None:
    """Fill a folder with what is pushed of a model.

    Args:
        source: the model's folder.
        staged: an empty one.
        repository: by which the card loads the model.

    Raises:
        ValueError: a file is a link out of the folder, or a run writes a model there all the time.
    """
    for _ in range(TRIES):
        files = _files(source)
        before = _stamps(files)
        for file in files:
            safety.check_link(file, source, "folder")
            _link(file, staged / file.relative_to(source))
        if _stamps(_files(source)) == before:
            break
        shutil.rmtree(staged)  # a run has published a better model in between
        staged.mkdir()
    else:
        raise ValueError(f"folder: {source} is written all the time; push it when it is not")
    vendor(staged)
    text = _card(source)
    (staged / card.FILE).write_text(card.renamed(text, repository), encoding="utf-8")


def _files(source: Path) -> list[Path]:
    """List the files of a model that are pushed, but for card and code."""
    found = [file for pattern in KEPT for file in source.glob(pattern) if file.name not in LEFT]
    for part in index(source):
        found += [file for pattern in MODEL for file in (source / part).glob(pattern)]
    named = {source / name for name in re.findall(r"\((samples/step-[\w.]+)\)", _card(source))}
    found += named or sorted(source.glob("samples/step-*.*"))[-1:]
    return sorted({file for file in found if file.is_file() and not file.name.startswith(".")})


def _card(source: Path) -> str:
    written = source / card.FILE
    if not written.exists():
        return card.plain(source.name)
    safety.check_link(written, source, "folder")
    return written.read_text(encoding="utf-8")


def _stamps(files: list[Path]) -> dict[Path, int]:
    """Tell when files were written, but for the log, which grows."""
    return {file: file.stat().st_mtime_ns for file in files if file.suffix != ".jsonl"}


def index(folder: Path) -> dict[str, Any]:
    """Return the parts of a pipeline; none of another model."""
    file = folder / "model_index.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _link(file: Path, place: Path) -> None:
    """Give a file a second name; or copy it, where the disk is another one, or the file grows."""
    place.parent.mkdir(exist_ok=True)
    if file.suffix != ".jsonl":
        with contextlib.suppress(OSError):
            os.link(file.resolve(), place)
            return
    shutil.copyfile(file, place)


def vendor(folder: Path) -> None:
    """Put the files of classes that are ours beside a pipeline, as genkit has them now."""
    for part, kind in index(folder).items():
        if isinstance(kind, list) and kind[0] in FAMILIES:
            home = folder if part == "_class_name" else folder / part
            shutil.copyfile(Path(__file__).parent / f"{kind[0]}.py", home / f"{kind[0]}.py")


def validate(staged: Path, kind: str) -> None:
    """Load a model in a fresh process, without genkit and with it.

    Raises:
        ValueError: it does not load.
    """
    with tempfile.TemporaryDirectory() as modules:
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).with_name("loads.py")), str(staged), kind],
            env=alone() | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"folder: the model does not load in a fresh process: {last}")


def alone() -> dict[str, str]:
    """Return an environment for a process that is none of a run's, and leaves it its GPUs."""
    kept = {name: value for name, value in os.environ.items() if name not in RANKS}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}
