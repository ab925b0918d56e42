"""From and to the Hub: models are fetched, and pushed as a whole."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import validate_repo_id

from genkit import card, kinds, safety

SETTINGS = ("*.json",)
MODEL = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # never pickles
FAMILIES = ("autoencoder", "gan", "diffusion")  # files that hold classes of their own
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
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument}: cannot load {name!r}, neither from a folder nor from the Hub or its "
            f"cache: {error} {hint}"
        ) from error


@functools.cache
def _snapshot(
    name: str, revision: str | None, files: tuple[str, ...], ignored: tuple[str, ...]
) -> Path:
    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=list(files), ignore_patterns=list(ignored)
        )
    )


# ---------------------------------------------------------------------------------------------
# A folder that loads without genkit


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save a pipeline in diffusers' layout, with the file of its class.

    Where there is no genkit, `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`
    loads it by that file; genkit's own loaders never run it.
    """
    pipeline.save_pretrained(folder)
    family = Path(inspect.getfile(type(pipeline)))
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index["_class_name"] = [family.stem, type(pipeline).__name__]
    shutil.copyfile(family, folder / family.name)
    for name, component in pipeline.components.items():
        if inspect.getfile(type(component)) == str(family):
            index[name] = [family.stem, type(component).__name__]
            shutil.copyfile(family, folder / name / family.name)
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# To the Hub


@dataclass(frozen=True)
class Pushed:
    """A model on the Hub, at the commit that holds all of it."""

    repository: str
    commit: str
    url: str
    files: list[str] = field(repr=False)
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.repository} at {self.commit[:7]}: {len(self.files)} files, "
            f"{self.bytes / 1e6:,.1f} MB · {self.url}"
        )


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
) -> Pushed:
    """Push a saved model to the Hub, in one commit that holds all of it or does not happen.

    A clean copy is staged: the model, its card, curves, pictures and last samples, and the file of
    its class where that is ours. It is loaded in a fresh process, once without genkit, before
    anything is sent. Files of an earlier model go with the same commit. A push that was interrupted
    can be repeated.

    Args:
        folder: of a model of any kind; of a run, its best model so far.
        repository: its name on the Hub, "user/name"; made if there is none.
        private: only for yourself, in a new repository or one that is so already.
        revision: a branch, made if there is none; the default branch unless told.

    Returns:
        Where it is.

    Raises:
        ValueError: there is no such model, it does not load, or the Hub refuses.
    """
    check_name(repository)
    source = Path(folder)
    kind = kinds.kind_of(source)
    safety.check(source)
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        stage(source, staged, repository)
        validate(staged, kind)
        prepare(repository, private, revision)
        return _upload(staged, repository, revision)


def check_name(repository: str, argument: str = "repository") -> None:
    """Refuse what cannot be a repository's name; `argument` is what an error calls it.

    Raises:
        ValueError: it cannot.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"{argument} must be user/name, got {repository!r}: {error}") from error


# ---- the copy that is pushed

KEPT = (*MODEL, "LICENSE*", "metrics.jsonl", "*.png", "*.gif")  # at the top of a folder
LEFT = ("run.json",)  # it names files of this machine
STALE = (*MODEL, "*.py", "*.jsonl", "*.png", "*.gif", "samples/*")  # of an earlier model there


def stage(source: Path, staged: Path, repository: str) -> None:
    """Fill a folder with what is pushed of a model.

    Args:
        source: the model's folder.
        staged: an empty one.
        repository: by which the card loads the model.
    """
    for file in _files(source):
        _link(file, staged / file.relative_to(source))
    vendor(staged)
    written = source / card.FILE
    text = written.read_text(encoding="utf-8") if written.exists() else card.plain(source.name)
    (staged / card.FILE).write_text(card.renamed(text, repository), encoding="utf-8")


def _files(source: Path) -> list[Path]:
    """List the files of a model that are pushed, but for card and code."""
    found = [file for pattern in KEPT for file in source.glob(pattern) if file.name not in LEFT]
    for part in _index(source):
        found += [file for pattern in MODEL for file in (source / part).glob(pattern)]
    found += sorted(source.glob("samples/step-*.*"))[-1:]
    return sorted({file for file in found if file.is_file()})


def _index(folder: Path) -> dict[str, Any]:
    """Return the parts of a pipeline; none of another model."""
    index = folder / "model_index.json"
    return json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}


def _link(file: Path, place: Path) -> None:
    """Give a file a second name, or copy it where the disk is another one."""
    place.parent.mkdir(exist_ok=True)
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)


def vendor(folder: Path) -> None:
    """Put the files of classes that are ours beside a pipeline, as genkit has them now."""
    for part, kind in _index(folder).items():
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
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"folder: the model does not load in a fresh process: {last}")


# ---- the upload


def prepare(repository: str, private: bool = False, revision: str | None = None) -> None:
    """Make a repository, and a branch, where there is none.

    Raises:
        ValueError: the Hub refuses, or others see a repository that was to be private.
    """
    check_name(repository)
    with _refusals(repository):
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        public = private and not hub.repo_info(repository).private
        if revision is not None:
            hub.create_branch(repository, branch=revision, exist_ok=True)
    if public:
        raise ValueError(f"private: {repository} is there already, and public; nothing was pushed")


def _upload(staged: Path, repository: str, revision: str | None) -> Pushed:
    with _refusals(repository):
        done = HfApi().upload_folder(
            repo_id=repository,
            folder_path=staged,
            revision=revision,
            commit_message=f"Model by genkit {version('genkit')}",
            delete_patterns=list(STALE),
        )
    files = [file for file in staged.rglob("*") if file.is_file()]
    names = sorted(str(file.relative_to(staged)) for file in files)
    size = sum(file.stat().st_size for file in files)
    return Pushed(repository, done.oid, done.repo_url.url, names, size)


@contextlib.contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Turn what the Hub, or the way there, refuses into one line."""
    try:
        yield
    except (OSError, httpx2.HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"repository: {repository} cannot be pushed to: {reason:.300} Log in by `hf auth "
            "login` with a token that may write; what was there is untouched"
        ) from error
