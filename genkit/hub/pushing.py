"""genkit.push: a model to the Hub, in one commit that holds all of it or does not happen."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
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

from genkit import __version__, files
from genkit.hub import download, hub_errors, kinds, model_files, names, staging, vendoring
from genkit.hub.download import check_name
from genkit.notebook import TextRecord

# one of which every model has, of whatever origin
ANY_MODEL = (*model_files.ROOTS, *model_files.WEIGHTS, "*.bin")
# which a push of genkit may have put at the top of a repository
PUSHED = (
    *(*model_files.SETTINGS, *model_files.WEIGHTS, "*.jinja", "*.model", "vocab.txt", "merges.txt"),
    *("*.jsonl", "*.png", "*.gif", *(f"{family}.py" for family in vendoring.FAMILIES)),
)


@dataclass(frozen=True)
class Pushed(TextRecord):
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
    class where that is genkit's own. It is loaded in a fresh process, once without genkit, before
    anything is sent. The same commit deletes the files of an earlier model that genkit pushed, and
    keeps all others. A push that was interrupted can be repeated; of two at once, the second is
    refused.

    Args:
        folder: a saved model of any kind, or a run: its best model so far.
        repository: its name on the Hub, "user/name"; created if there is none.
        private: visible to you alone; needs a new repository, or one that is private already.
        revision: a branch, created if there is none; None for the default branch.

    Returns:
        Where the model is on the Hub.

    Raises:
        ValueError: there is no such model, it does not load, the repository holds a model that
            genkit did not push, or the Hub refuses.
    """
    check_name(repository)
    check_branch(revision)
    name = kinds.as_name(folder, "folder")
    source = names.as_path(name, "folder")
    if not source.is_dir():
        download.refuse_missing(name, "folder")
    kind = kinds.kind_of(source, "folder")
    with files.scratch_folder() as scratch:
        staged = scratch / "model"
        staged.mkdir()
        staging.stage(source, staged, repository, revision)
        staging.validate(staged, kind)
        with prepare_repository(repository, private, revision) as created:
            pushed = _commit(staged, repository, revision)
            created.pop_all()  # it stays
    download.forget_commits()
    return pushed


def check_branch(revision: str | None) -> None:
    """Refuse a name that no branch can have.

    Raises:
        ValueError: it is no such name.
    """
    if revision is None:
        return
    plain = re.fullmatch(r"\w[\w./-]*", revision) and ".." not in revision
    if not plain or revision.startswith("refs/"):
        raise ValueError(f"revision must be the name of a branch, got {revision!r}")


def check_repository(repository: str, private: bool = False, revision: str | None = None) -> bool:
    """Check, changing nothing, that a repository can be created or written.

    Returns:
        Whether it exists.

    Raises:
        ValueError: the Hub refuses, a repository that was to be private is public, or it holds a
            model that genkit did not push.
    """
    with _refusals(repository):
        client = HfApi()
        try:
            found = client.repo_info(repository)
        except RepositoryNotFoundError:  # or a hidden one, which the Hub will refuse to create
            client.whoami()
            return False
        client.auth_check(repository, write=True)
        _list_pushed(repository, _find_head(client, repository, revision) or found.sha)
    if private and not found.private:
        raise ValueError(f"private: {repository} exists and is public; nothing was pushed")
    return True


def _find_head(client: HfApi, repository: str, revision: str | None) -> str | None:
    """Return the newest commit of a branch; None if there is no such branch yet."""
    try:
        return client.repo_info(repository, revision=revision).sha
    except RevisionNotFoundError:
        return None


def prepare_repository(
    repository: str, private: bool = False, revision: str | None = None
) -> contextlib.ExitStack:
    """Create a repository, and a branch, where there is none.

    Returns:
        What deletes again, when it is closed, what was created here and nobody has changed since.

    Raises:
        ValueError: see `check_repository`.
    """
    exists = check_repository(repository, private, revision)
    with _refusals(repository), contextlib.ExitStack() as created:
        client = HfApi()
        if not exists:
            client.create_repo(repository, private=private)
            first = client.repo_info(repository).sha
            created.callback(_delete_unchanged, client, repository, first)
        if revision is not None and _find_head(client, repository, revision) is None:
            client.create_branch(repository, branch=revision)
            first = client.repo_info(repository, revision=revision).sha
            created.callback(_delete_unchanged, client, repository, first, revision)
        return created.pop_all()


def _delete_unchanged(
    client: HfApi, repository: str, first: str | None, branch: str | None = None
) -> None:
    """Delete a new branch, or a new repository, unless its newest commit is another by now."""
    with contextlib.suppress(OSError, httpx2.HTTPError):  # the refusal itself is what is reported
        if client.repo_info(repository, revision=branch).sha == first:
            if branch is None:
                client.delete_repo(repository)
            else:
                client.delete_branch(repository, branch=branch)


def _commit(staged: Path, repository: str, revision: str | None) -> Pushed:
    """Send a staged model on top of the commit that was checked, and of no other."""
    sent = sorted(file for file in staged.rglob("*") if file.is_file())
    names = [file.relative_to(staged).as_posix() for file in sent]
    adds = [CommitOperationAdd(name, file) for name, file in zip(names, sent, strict=True)]
    with _refusals(repository):
        client = HfApi()
        head = client.repo_info(repository, revision=revision).sha
        old = [name for name in _list_pushed(repository, head) if name not in names]
        done = client.create_commit(
            repository,
            [*adds, *map(CommitOperationDelete, old)],
            commit_message=f"Model by genkit {__version__}",
            revision=revision,
            parent_commit=head,
        )
    size = sum(file.stat().st_size for file in sent)
    return Pushed(repository, done.oid, done.repo_url.url, names, size)


def _list_pushed(repository: str, commit: str) -> list[str]:
    """List the files of the model that genkit pushed to a repository before.

    Raises:
        ValueError: the repository holds a model that genkit did not push.
    """
    there = HfApi().list_repo_files(repository, revision=commit)
    if not any(fnmatch.fnmatch(name, pattern) for name in there for pattern in ANY_MODEL):
        return []
    if "README.md" not in there or "genkit" not in _read_tags(repository, commit):
        raise ValueError("it holds a model that genkit did not push; choose another name.")
    parts: list[str] = []
    if "model_index.json" in there:
        index = hf_hub_download(repository, "model_index.json", revision=commit)
        parts = list(json.loads(Path(index).read_text(encoding="utf-8")))
    tops = {name for name in there if "/" not in name}
    stale = {name for name in tops for pattern in PUSHED if fnmatch.fnmatch(name, pattern)}
    samples = {name for name in there if name.startswith("samples/step-")}
    inner = {name for name in there if name.split("/")[0] in parts} - tops
    return sorted(stale | inner | samples)


def _read_tags(repository: str, commit: str) -> list[str]:
    text = Path(hf_hub_download(repository, "README.md", revision=commit))
    return ModelCard(text.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.tags or []


@contextlib.contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Turn an error of the Hub, or of the connection, into one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:
        raise ValueError(
            f"repository: {repository} cannot be pushed to: {hub_errors.describe(error)}; its "
            "files are unchanged"
        ) from error
