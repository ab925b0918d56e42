"""Hugging Face Spaces that serve the page for a model: their folders, and a start of one here."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import SpaceCardData

from genkit import __version__, files
from genkit.hub import card, kinds, names, staging
from genkit.notebook import TextRecord

APP, REQUIREMENTS = "app.py", "requirements.txt"
MODELS = "models"  # the folder of a Space that holds the folder of its model
SDK = "gradio"
# besides genkit itself; of what reads a model, the versions that it was loaded with here
PINNED = ("accelerate", "diffusers", "gradio", "torch", "transformers")
PATIENCE = 300.0  # seconds for a page to start
SECRETS = ("GENKIT_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PROGRAM = f'''"""Serve genkit's page for the model in {MODELS}/."""

import os

from genkit.app import serve

space = os.environ.get("SPACE_HOST")  # set in a Space, whose page is for everybody
serve(
    ["{MODELS}"],
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0" if space else "127.0.0.1"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    space=space,
)
'''
README = """---
{metadata}
---

# {title}

The page of genkit for the model {model}, of which `{models}/` holds a copy. On your own machine:

```bash
pip install -r {requirements}
python {app}
```
"""


@dataclass(frozen=True)
class Exported(TextRecord):
    """A folder that Hugging Face Spaces can run."""

    folder: str
    files: list[str] = field(repr=False)
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {len(self.files)} files, {self.bytes / 1e6:,.1f} MB; it was started "
            f"once, and {APP} serves the page"
        )


def export(model: str | Path, folder: str | Path) -> Exported:
    """Write a folder that Hugging Face Spaces can run: the page for a model, and the model.

    It is started once on this machine before it is there.

    Args:
        model: the folder of a saved model that the page has a tab for, or of a run.
        folder: a new folder.

    Returns:
        What was written.

    Raises:
        ValueError: there is no such model, the folder exists, or the page does not start.
    """
    target = names.as_path(str(folder), "--export")
    if target.exists() or target.is_symlink():
        raise ValueError(f"--export: {str(folder)!r} exists; give the name of a new folder")
    source, kind = staging.find_source(model, "models")
    check_kind(kind, "models")
    title = source.resolve().name
    with files.scratch_folder() as scratch:
        staged = model_folder(scratch, title)
        staging.stage(source, staged)
        staging.validate(staged, kind)
        write(scratch, title, title)
        check_start(scratch, title)
        with files.folder_written_whole(target) as made:
            shutil.copytree(scratch, made, dirs_exist_ok=True)
    written = sorted(file for file in target.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in written)
    return Exported(str(folder), [file.relative_to(target).as_posix() for file in written], size)


def check_kind(kind: str, argument: str) -> None:
    """Refuse to make a Space for a model that the page has no tab for.

    Args:
        argument: the name of the model's argument, for the message.

    Raises:
        ValueError: there is none, or the page is not installed.
    """
    if kind not in kinds.ON_PAGE:
        raise ValueError(f"{argument}: the page has no tab for a model of the kind {kind}")
    if importlib.util.find_spec(SDK) is None:
        raise ValueError(f"{argument}: a Space is started here first: pip install 'hf-genkit[app]'")


def model_folder(space: Path, name: str) -> Path:
    """Make the folder of a Space's model, by whose name the page shows it."""
    made = space / MODELS / name
    made.mkdir(parents=True)
    return made


def write(space: Path, title: str, model: str, repository: str | None = None) -> None:
    """Write what a Space needs beside its model.

    Args:
        space: its folder.
        title: its heading.
        model: the name of the model, for readers.
        repository: where the Hub has the model; None if it has not.
    """
    head: Any = SpaceCardData(
        title=title,
        sdk=SDK,
        sdk_version=version(SDK),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file=APP,
        models=[repository] if repository else None,
        tags=["genkit"],
    )
    text = README.format(
        metadata=head.to_yaml(line_break="\n"),
        title=title,
        model=model,
        models=MODELS,
        requirements=REQUIREMENTS,
        app=APP,
    )
    (space / card.FILE).write_text(text, encoding="utf-8")
    (space / APP).write_text(PROGRAM, encoding="utf-8")
    (space / REQUIREMENTS).write_text(requirements(), encoding="utf-8")


def requirements() -> str:
    """Return the packages that a Space installs, in the versions of this machine."""
    # without a build's own mark, such as +cpu, which no registry of packages knows
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in PINNED]
    return "".join(f"{line}\n" for line in (f"hf-genkit[app]=={__version__}", *pins))


# ---------------------------------------------------------------------------------------------
# A start


def check_start(space: Path, model: str) -> None:
    """Start a Space's folder in a fresh process, as Spaces do, and ask for the page.

    Args:
        space: its folder.
        model: the name by which the page shows the model.

    Raises:
        ValueError: the page does not answer; the process's last line is in the message.
    """
    host = f"{re.sub('[^a-z0-9]+', '-', model.lower())}.hf.space"
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, APP],
            cwd=space,
            env=_environment(host),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            starts = (line for line in process.stdout if line.startswith("genkit is at "))
            started = next(starts, "")
            problem = _ask(started.split()[-1], host, model) if started else None
        finally:
            timer.cancel()
            process.kill()
        if not started:
            errors.seek(0)
            problem = (errors.read().strip().splitlines() or ["no message"])[-1]
    if problem:
        raise ValueError(f"the page of the Space does not start in a fresh process: {problem}")


def _environment(host: str) -> dict[str, str]:
    """Return the environment of a Space at a host, except that it listens on loopback."""
    own = {
        "SYSTEM": "spaces",
        "SPACE_HOST": host,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    inherited = staging.single_process_environment()
    return {name: value for name, value in inherited.items() if name not in SECRETS} | own


def _ask(address: str, host: str, model: str) -> str | None:
    """Ask for a page as the proxy of Spaces does; return what is wrong, or None."""
    headers = {"Host": host, "Origin": f"https://{host}"}
    try:
        for path in ("", "config"):
            answer = httpx2.get(address + path, headers=headers, trust_env=False, timeout=60)
            answer.raise_for_status()
    except httpx2.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    offered = json.dumps(model, ensure_ascii=False) in answer.text
    return None if offered else f"it does not offer the model {model}"
