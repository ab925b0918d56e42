"""genkit.push: a model to the Hub, in one commit that holds all of it or does not happen."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from genkit import files
from genkit.hub import download, kinds, staging, vendoring
from genkit.hub.download import check_name

WEIGHTS = ("config.json", "model_index.json", "*.safetensors", "*.bin")  # of whatever model
# Of an earlier model of genkit's, at the top of its repository
STALE = (
    *("*.json", "*.safetensors", "*.jinja", "*.model", "vocab.txt", "merges.txt"),
    *("*.jsonl", "*.png", "*.gif", *(f"{family}.py" for family in vendoring.FAMILIES)),
)


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

    A clean copy is staged: the model, its card, curves, pictures and samples, and the file of its
    class where that is ours. It is loaded in a fresh process, once without genkit, before anything
    is sent. Files of an earlier model that genkit pushed go with the same commit, others stay. A
    push that was interrupted can be repeated; of two at once, the second is refused.

    Args:
        folder: of a model of any kind; of a run, its best model so far.
        repository: its name on the Hub, "user/name"; made if there is none.
        private: only for yourself, in a new repository or one that is so already.
        revision: a branch, made if there is none; the default branch unless told.

    Returns:
        Where it is.

    Raises:
        ValueError: there is no such model, it does not load, the repository holds a model that
            genkit did not push, or the Hub refuses.
    """
    check_name(repository)
    check_branch(revision)
    source = Path(folder)
    kind = kinds.kind_of(source, "folder")
    with files.scratch_folder() as scratch:
        staged = scratch / "model"
        staged.mkdir()
        staging.stage(source, staged, repository)
        staging.validate(staged, kind)
        prepare(repository, private, revision)
        pushed = _commit(staged, repository, revision)
    download.forget()
    return pushed


def check_branch(revision: str | None) -> None:
    """Refuse what cannot be the name of a branch.

    Raises:
        ValueError: it cannot.
    """
    if revision is None:
        return
    plain = re.fullmatch(r"\w[\w./-]*", revision) and ".." not in revision
    if not plain or revision.startswith("refs/"):
        raise ValueError(f"revision must be the name of a branch, got {revision!r}")


def look(repository: str, private: bool = False, revision: str | None = None) -> None:
    """See, changing nothing, that a repository may be made or written.

    Raises:
        ValueError: the Hub refuses, others see a repository that was to be private, or it holds a
            model that genkit did not push.
    """
    with _refusals(repository):
        client = HfApi()
        try:
            found = client.repo_info(repository)
        except RepositoryNotFoundError:  # or one that nobody may see, where making it is refused
            client.whoami()
            return
        client.auth_check(repository, write=True)
        _old(repository, _head(client, repository, revision) or found.sha)
    if private and not found.private:
        raise ValueError(f"private: {repository} is there already, and public; nothing was pushed")


def _head(client: HfApi, repository: str, revision: str | None) -> str | None:
    """Return the commit that a branch is at; None where there is no such branch yet."""
    try:
        return client.repo_info(repository, revision=revision).sha
    except RevisionNotFoundError:
        return None


def prepare(repository: str, private: bool = False, revision: str | None = None) -> None:
    """Make a repository, and a branch, where there is none.

    Raises:
        ValueError: the Hub refuses, or others see a repository that was to be private.
    """
    look(repository, private, revision)
    with _refusals(repository):
        client = HfApi()
        client.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            client.create_branch(repository, branch=revision, exist_ok=True)


def _commit(staged: Path, repository: str, revision: str | None) -> Pushed:
    """Send a staged model on top of the commit that was looked at, and of no other."""
    sent = sorted(file for file in staged.rglob("*") if file.is_file())
    names = [file.relative_to(staged).as_posix() for file in sent]
    adds = [CommitOperationAdd(name, file) for name, file in zip(names, sent, strict=True)]
    with _refusals(repository):
        client = HfApi()
        head = client.repo_info(repository, revision=revision).sha
        old = [CommitOperationDelete(name) for name in _old(repository, head) if name not in names]
        done = client.create_commit(
            repository,
            [*adds, *old],
            commit_message=f"Model by genkit {version('genkit')}",
            revision=revision,
            parent_commit=head,
        )
    size = sum(file.stat().st_size for file in sent)
    return Pushed(repository, done.oid, done.repo_url.url, names, size)


def _old(repository: str, commit: str) -> list[str]:
    """List the files of the model that genkit pushed to a repository before.

    Raises:
        ValueError: the model there is another's.
    """
    there = HfApi().list_repo_files(repository, revision=commit)
    if not any(fnmatch.fnmatch(name, pattern) for name in there for pattern in WEIGHTS):
        return []
    if "README.md" not in there or "genkit" not in _tags(repository, commit):
        raise ValueError("it holds a model that genkit did not push; choose another name.")
    parts: list[str] = []
    if "model_index.json" in there:
        index = hf_hub_download(repository, "model_index.json", revision=commit)
        parts = list(json.loads(Path(index).read_text(encoding="utf-8")))
    tops = {name for name in there if "/" not in name}
    stale = {name for name in tops for pattern in STALE if fnmatch.fnmatch(name, pattern)}
    drawn = {name for name in there if name.startswith("samples/step-")}
    inner = {name for name in there if name.split("/")[0] in parts} - tops
    return sorted(stale | inner | drawn)


def _tags(repository: str, commit: str) -> list[str]:
    text = Path(hf_hub_download(repository, "README.md", revision=commit))
    return ModelCard(text.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.tags or []


@contextlib.contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Turn what the Hub, or the way there, refuses into one line."""
    try:
        yield
    except (OSError, ValueError, httpx2.HTTPError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        response = getattr(error, "response", None)
        denied = response is not None and response.status_code in (401, 403)
        advice = "; log in by `hf auth login` with a token that may write;" if denied else ";"
        raise ValueError(
            f"repository: {repository} cannot be pushed to: {reason:.300}{advice} what "
            "was there is untouched"
        ) from error
