"""Models by name: a folder of this machine, or a repository of the Hub and its cache."""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import os
from pathlib import Path
from typing import NoReturn

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id

from genkit.hub import hub_errors, kinds, model_files, names

# beside a language model, and not fetched: other formats, and its weights once more
OTHER_FORMATS = ("*/*", "consolidated*")
HINT = "Give the folder of a model that a recipe trained, or the id of one on the Hub"
SEARCHED, SHOWN = 1000, 5  # entries of a folder that are searched for models, and models shown


class NoModelError(ValueError):
    """The Hub has no model of this name."""


def fetch(
    model: str | Path,
    revision: str | None = None,
    *,
    argument: str = "model",
    hint: str = HINT,
    code: bool = False,
) -> Path:
    """Return the folder of a model, fetched from the Hub if it is a Hub id.

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
    name = kinds.as_name(model, argument)
    if names.is_folder(name):
        return settings
    patterns = (*model_files.MODEL, "*.py") if code else model_files.MODEL
    ignored = () if (settings / "model_index.json").exists() else OTHER_FORMATS
    return _fetch(name, settings.name, patterns, ignored, argument, hint)


def fetch_settings(
    model: str | Path, revision: str | None = None, *, argument: str = "model", hint: str = HINT
) -> Path:
    """Return the folder of a model; of one on the Hub, only its JSON files are fetched.

    Raises:
        ValueError: there is no such model.
    """
    name = kinds.as_name(model, argument)
    if names.is_folder(name):
        if revision is not None:
            raise ValueError(
                f"revision: {revision!r} is for a model on the Hub, and {name!r} is a folder"
            )
        return Path(name)
    check_exists(name, argument, hint)
    folder = _fetch(name, revision, model_files.SETTINGS, (), argument, hint)
    if not model_files.is_model(folder):
        raise NoModelError(
            f"{argument}: {name!r} holds no model at the revision {revision or 'main'!r}; give the "
            "revision, a branch, tag or commit, of one"
        )
    return folder


def fetch_adapter(adapter: str | Path, argument: str = "adapter") -> Path:
    """Return the folder of an adapter of a text-to-image pipeline, fetched if it is a Hub id.

    Args:
        adapter: folder or Hub id.
        argument: its name, for messages.

    Raises:
        ValueError: there is no such adapter.
    """
    hint = "Give the output folder of finetune_text2image, or the id of one on the Hub"
    name = kinds.as_name(adapter, argument)
    check_exists(name, argument, hint)
    patterns = model_files.ADAPTERS
    local = names.is_folder(name)
    folder = Path(name) if local else _fetch(name, None, patterns, (), argument, hint)
    if not any((folder / pattern).exists() for pattern in patterns):
        raise NoModelError(f"{argument}: {name!r} holds none of {', '.join(patterns)}. {hint}")
    return folder


def check_exists(name: str | None, argument: str = "model", hint: str = HINT) -> None:
    """Refuse a name that is no Hub id unless there is such a folder; the Hub is not asked.

    Args:
        name: folder or Hub id; None for no model, which is not refused.
        argument, hint: see `fetch`.

    Raises:
        ValueError: there is no such folder; the models beside it are named.
    """
    if name is None:
        return
    path = os.path.expanduser(name)  # noqa: PTH111  Path's own raises for unknown users
    if names.is_path(path) and not names.is_folder(path):
        refuse_missing(name, argument, hint)


def check_revision(name: str | None, revision: str | None) -> None:
    """Refuse a revision for a folder, which has none.

    Raises:
        ValueError: `name`, of --init_from, is a folder here, and --init_revision is given.
    """
    if revision and name and names.is_folder(os.path.expanduser(name)):  # noqa: PTH111  as above
        raise ValueError(
            f"--init_revision {revision} requires a model on the Hub, --init_from {name} is a "
            "folder"
        )


def refuse_missing(name: str, argument: str = "model", hint: str = HINT) -> NoReturn:
    """Raise the error of a folder that does not exist; see `check_exists`."""
    what = "it is a file" if os.path.lexists(name) else "there is no such folder"
    raise ValueError(f"{argument}: cannot load {names.quote(name)}: {what}{_others(name, hint)}")


def _others(name: str, hint: str) -> str:
    """Name the saved models that are beside a missing one, and say what would do."""
    found = _list_models(Path(name).parent) or _list_models(Path(names.RUNS))
    nearest = difflib.get_close_matches(name, found, n=SHOWN, cutoff=0.0)
    if not nearest:
        return f". {hint}"
    listed = ", ".join(nearest) + (", …" if len(found) > SHOWN else "")
    return f"; there {'is' if len(found) == 1 else 'are'} {listed}. {hint}"


def _list_models(folder: Path) -> list[str]:
    """List the folders of saved models in a folder."""
    with contextlib.suppress(OSError):
        entries = itertools.islice(folder.iterdir(), SEARCHED)
        return [str(entry) for entry in entries if model_files.is_model(entry)]
    return []


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
        where = f" at the revision {revision!r}" if revision else ""
        known = NoModelError if hub_errors.is_missing(error) else ValueError
        raise known(
            f"{argument}: cannot load {name!r}, neither from a folder nor from the Hub or its "
            f"cache{where}: {hub_errors.describe(error)}{_others(name, hint)}"
        ) from error


def find_model(name: str | Path) -> Path | None:
    """Return the folder of a model, fetched if it is on the Hub; None if no model has the name.

    Raises:
        ValueError: the Hub cannot be asked.
    """
    folder = names.as_path(str(name), "model")
    if model_files.is_model(folder):
        return folder
    if names.is_path(str(name)) or "/" not in str(name):
        return None
    try:
        fetch_settings(name)
    except NoModelError:
        return None
    return fetch(name)


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
