"""Models from the Hub, and folders that load without genkit."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import httpx2
from huggingface_hub import (
    snapshot_download,
)
from huggingface_hub.utils import validate_repo_id

from genkit.hub import kinds

SETTINGS = ("*.json",)
MODEL = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # never pickles
INNER = ("*/*", "consolidated*")  # of a language model: other formats, and its weights once more
HINT = "Give the folder of a model that a recipe trained, or the id of one on the Hub"

# ---------------------------------------------------------------------------------------------
# From the Hub


def fetch(
    model: str | Path,
    revision: str | None = None,
    *,
    argument: str = "model",
    hint: str = HINT,
    code: bool = False,
) -> Path:
    """Return the folder of a model, fetched from the Hub if there is no such folder here.

    Within a process a name stands for the same commit. Pickles are never fetched.

    Args:
        model: folder or Hub id.
        revision: a branch, tag or commit on the Hub.
        argument, hint: how an error calls what was given, and what it says would do.
        code: fetch the code that a model brings along, too.

    Raises:
        ValueError: there is none.
    """
    settings = fetch_settings(model, revision, argument=argument, hint=hint)
    if Path(model).is_dir():
        return settings
    files = (*MODEL, "*.py") if code else MODEL
    inner = () if (settings / "model_index.json").exists() else INNER
    return _found(str(model), settings.name, files, inner, argument, hint)


def fetch_settings(
    model: str | Path, revision: str | None = None, *, argument: str = "model", hint: str = HINT
) -> Path:
    """Return the folder of a model; of one on the Hub, its JSON files alone are fetched.

    Raises:
        ValueError: there is none.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision: {revision!r} is of a model on the Hub, not of a folder")
        return folder
    return _found(str(model), revision, SETTINGS, (), argument, hint)


def _found(
    name: str,
    revision: str | None,
    files: tuple[str, ...],
    ignored: tuple[str, ...],
    argument: str,
    hint: str,
) -> Path:
    try:
        return _snapshot(name, revision, files, ignored)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise ValueError(
            f"{argument}: cannot load {name!r}, neither from a folder nor from the Hub or its "
            f"cache: {error} {hint}"
        ) from error


def find_model(name: str | Path) -> Path | None:
    """Return the folder of a model, fetched if it is on the Hub; None where the name is of none."""
    folder = Path(name)
    if kinds.is_model(folder):
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return None
    try:
        return fetch(name) if kinds.is_model(fetch_settings(name)) else None
    except ValueError:
        return None


def forget() -> None:
    """Ask the Hub anew what names stand for."""
    _snapshot.cache_clear()


@functools.cache
def _snapshot(
    name: str, revision: str | None, files: tuple[str, ...], ignored: tuple[str, ...]
) -> Path:
    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=list(files), ignore_patterns=list(ignored)
        )
    )


def stamp(folder: Path) -> int:
    """Tell when a folder's model was last written: what is loaded once is loaded again then."""
    files = (*folder.glob("*.safetensors"), *folder.glob("*.json"))
    return max((file.lstat().st_mtime_ns for file in files), default=0)


def check_name(repository: str, argument: str = "repository") -> None:
    """Refuse what cannot be a repository's name; `argument` is what an error calls it.

    Raises:
        ValueError: it cannot.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"{argument} must be user/name, got {repository!r}: {error}") from error
