"""Samples of a run: samples/step-00000900.md or .png, one an evaluation.

Whatever else lies among them is the user's own: it is neither shown nor deleted.
"""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,14})\.(md|png)")  # as f"{step:08d}" writes it


def list_samples(run: Path, suffix: str | None = None) -> list[Path]:
    """List the samples in a run's folder, the earliest first.

    Args:
        suffix: ".md" or ".png", for these alone.
    """
    folder = run / "samples"
    found = [
        file
        for file in (folder.iterdir() if folder.is_dir() else ())
        if NAME.fullmatch(file.name) and suffix in (None, file.suffix)
    ]
    return sorted((f for f in found if f.is_file() and not f.is_symlink()), key=step_of)


def step_of(sample: Path) -> int:
    """Return the step that a sample was drawn after."""
    return int(sample.stem.removeprefix("step-"))
