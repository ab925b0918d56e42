"""Models by name: a folder of this machine, or a repository of the Hub and its cache."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id

from genkit.hub import model_files

# beside a language model, and not fetched: other formats, and its weights once more
OTHER_FORMATS = ("*/*", "consolidated*")
HINT = "Give the folder of a model that a recipe trained, or the id of one on the Hub"


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
        argument, hint: for messages: the name of the argument, and what would do.
        code: also fetch the Python files that a model brings along.

    Raises:
        ValueError: there is no such model.
    """
    settings = fetch_settings(model, revision, argument=argument, hint=hint)
    if Path(model).is_dir():
        return settings
    patterns = (*model_files.MODEL, "*.py") if code else model_files.MODEL
    ignored = () if (settings / "model_index.json").exists() else OTHER_FORMATS
    return _fetch(str(model), settings.name, patterns, ignored, argument, hint)


def fetch_settings(
    model: str | Path, revision: str | None = None, *, argument: str = "model", hint: str = HINT
) -> Path:
    """Return the folder of a model; of one on the Hub, only its JSON files are fetched.

    Raises:
        ValueError: there is no such model.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision: {revision!r} is for a model on the Hub, and {str(model)!r} is a folder"
            )
        return folder
    return _fetch(str(model), revision, model_files.SETTINGS, (), argument, hint)


def _fetch(
    name: str,
    revision: str | None,
    patterns: tuple[str, ...],
    ignored: tuple[str, ...],
    argument: str,
    hint: str,
) -> Path:
    try:
        return _snapshot(name, revision, patterns, ignored)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise ValueError(
            f"{argument}: cannot load {name!r}, neither from a folder nor from the Hub or its "
            f"cache: {error} {hint}"
        ) from error


def find_model(name: str | Path) -> Path | None:
    """Return the folder of a model, fetched if it is on the Hub; None if no model has the name."""
    folder = Path(name)
    if model_files.is_model(folder):
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return None
    try:
        return fetch(name) if model_files.is_model(fetch_settings(name)) else None
    except ValueError:
        return None


def forget_commits() -> None:
    """From now on, look up again which commits names stand for."""
    _snapshot.cache_clear()


@functools.cache
def _snapshot(
    name: str, revision: str | None, patterns: tuple[str, ...], ignored: tuple[str, ...]
) -> Path:
    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored)
        )
    )


def check_name(repository: str, argument: str = "repository") -> None:
    """Refuse a name that no repository can have.

    Args:
        repository: "user/name".
        argument: the name of its argument, for the message.

    Raises:
        ValueError: it is no such name.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"{argument} must be user/name, got {repository!r}: {error}") from error
