"""genkit.push: a model to the Hub, in one commit that holds all of it or does not happen."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
from genkit.hub import card, download, hub_errors, model_files, spaces, staging, vendoring
from genkit.hub.download import check_name
from genkit.notebook import TextRecord

MODEL, SPACE = "model", "space"  # types of repositories
# one of which every model has, of whatever origin
ANY_MODEL = (*model_files.ROOTS, *model_files.WEIGHTS, "*.bin")
# which a push of genkit may have put at the top of a repository
PUSHED = (
    *(*model_files.SETTINGS, *model_files.WEIGHTS, "*.jinja", "*.model", "vocab.txt", "merges.txt"),
    *("*.jsonl", "*.png", "*.gif", *(f"{family}.py" for family in vendoring.FAMILIES)),
)
FRESH = {".gitattributes", card.FILE}  # which the Hub puts into a new Space


@dataclass(frozen=True)
class Pushed(TextRecord):
    """A model or a Space on the Hub, at the commit that holds all of it."""

    repository: str
    commit: str
    url: str
    files: list[str] = field(repr=False)
    bytes: int
    space: Pushed | None = None  # that serves the page for the model

    def __str__(self) -> str:
        line = (
            f"{self.repository} at {self.commit[:7]}: {len(self.files)} files, "
            f"{self.bytes / 1e6:,.1f} MB · {self.url}"
        )
        return line if self.space is None else f"{line}\n{self.space}"


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    space: str | None = None,
) -> Pushed:
    """Push a saved model to the Hub, in one commit that holds all of it or does not happen.

    A clean copy is staged: the model, its card, curves, pictures and samples, and the file of its
    class where that is genkit's own. It is loaded in a fresh process, once without genkit, before
    anything is sent. The same commit deletes the files of an earlier model that genkit pushed, and
    keeps all others. A push that was interrupted can be repeated; of two at once, the second is
    refused.

    With `space`, a Hugging Face Space serves the page for the model after that: its own copy of the
    model and all that it needs, in one commit, too. It is started once on this machine before
    anything is sent.

    Args:
        folder: a saved model of any kind, or a run: its best model so far.
        repository: its name on the Hub, "user/name"; created if there is none.
        private: visible to you alone; needs a new repository, or one that is private already.
        revision: a branch, created if there is none; None for the default branch.
        space: the name of the Space, "user/name"; created if there is none. It is private if
            `private` is set.

    Returns:
        Where the model is on the Hub, and the Space.

    Raises:
        ValueError: there is no such model, it does not load, the repository holds a model that
            genkit did not push, the page does not start, or the Hub refuses.
    """
    check_name(repository)
    check_branch(revision)
    if space is not None:
        check_name(space, "space")
    source, kind = staging.find_source(folder)
    if space is not None:
        spaces.check_kind(kind, "space")
    with files.scratch_folder() as scratch:
        title = repository.rpartition("/")[2]
        staged = spaces.model_folder(scratch, title)
        staging.stage(source, staged, repository, revision)
        staging.validate(staged, kind)
        if space is not None:
            spaces.write(scratch, space.rpartition("/")[2], repository, repository)
            spaces.check_start(scratch, title)
            check_repository(space, private, repo_type=SPACE)
        with prepare_repository(repository, private, revision) as created:
            pushed = _commit(staged, repository, revision)
            created.pop_all()  # it stays
        download.forget_commits()
        if space is not None:
            pushed = replace(pushed, space=_push_space(scratch, space, private, pushed))
    return pushed


def _push_space(folder: Path, space: str, private: bool, model: Pushed) -> Pushed:
    """Send the folder of a Space whose model has been pushed.

    Raises:
        ValueError: the Hub refuses; a new Space is gone, and the model stays.
    """
    try:
        with prepare_repository(space, private, repo_type=SPACE) as created:
            pushed = _commit(folder, space, None, SPACE)
            created.pop_all()
    except ValueError as error:
        raise ValueError(f"{error}. The model was pushed: {model}") from error
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


def check_repository(
    repository: str, private: bool = False, revision: str | None = None, repo_type: str = MODEL
) -> bool:
    """Check, changing nothing, that a repository can be created or written.

    Returns:
        Whether it exists.

    Raises:
        ValueError: the Hub refuses, a repository that was to be private is public, or it holds a
            model or a Space that genkit did not push.
    """
    with _refusals(repository, repo_type):
        client = HfApi()
        try:
            found = client.repo_info(repository, repo_type=repo_type)
        except RepositoryNotFoundError:  # or a hidden one, which the Hub will refuse to create
            client.whoami()
            return False
        client.auth_check(repository, repo_type=repo_type, write=True)
        head = _find_head(client, repository, revision, repo_type) or found.sha
        _list_pushed(repository, head, repo_type)
    if private and not found.private:
        raise ValueError(f"private: {repository} exists and is public; nothing was pushed")
    return True


def _find_head(
    client: HfApi, repository: str, revision: str | None, repo_type: str = MODEL
) -> str | None:
    """Return the newest commit of a branch; None if there is no such branch yet."""
    try:
        return client.repo_info(repository, revision=revision, repo_type=repo_type).sha
    except RevisionNotFoundError:
        return None


def prepare_repository(
    repository: str, private: bool = False, revision: str | None = None, repo_type: str = MODEL
) -> contextlib.ExitStack:
    """Create a repository, and a branch, where there is none.

    Returns:
        What deletes again, when it is closed, what was created here and nobody has changed since.

    Raises:
        ValueError: see `check_repository`.
    """
    exists = check_repository(repository, private, revision, repo_type)
    with _refusals(repository, repo_type), contextlib.ExitStack() as created:
        client = HfApi()
        if not exists:
            sdk = spaces.SDK if repo_type == SPACE else None
            client.create_repo(repository, private=private, repo_type=repo_type, space_sdk=sdk)
            first = client.repo_info(repository, repo_type=repo_type).sha
            created.callback(_delete_unchanged, client, repository, first, repo_type=repo_type)
        if revision is not None and _find_head(client, repository, revision) is None:
            client.create_branch(repository, branch=revision)
            first = client.repo_info(repository, revision=revision).sha
            created.callback(_delete_unchanged, client, repository, first, revision)
        return created.pop_all()


def _delete_unchanged(
    client: HfApi,
    repository: str,
    first: str | None,
    branch: str | None = None,
    repo_type: str = MODEL,
) -> None:
    """Delete a new branch, or a new repository, unless its newest commit is another by now."""
    with contextlib.suppress(OSError, httpx2.HTTPError):  # the refusal itself is what is reported
        if _find_head(client, repository, branch, repo_type) == first:
            if branch is None:
                client.delete_repo(repository, repo_type=repo_type)
            else:
                client.delete_branch(repository, branch=branch)


def _commit(staged: Path, repository: str, revision: str | None, repo_type: str = MODEL) -> Pushed:
    """Send a staged model or Space on top of the commit that was checked, and of no other."""
    sent = sorted(file for file in staged.rglob("*") if file.is_file())
    names = [file.relative_to(staged).as_posix() for file in sent]
    adds = [CommitOperationAdd(name, file) for name, file in zip(names, sent, strict=True)]
    with _refusals(repository, repo_type):
        client = HfApi()
        head = client.repo_info(repository, revision=revision, repo_type=repo_type).sha
        old = [name for name in _list_pushed(repository, head, repo_type) if name not in names]
        done = client.create_commit(
            repository,
            [*adds, *map(CommitOperationDelete, old)],
            commit_message=f"{repo_type.capitalize()} by genkit {__version__}",
            repo_type=repo_type,
            revision=revision,
            parent_commit=head,
        )
    size = sum(file.stat().st_size for file in sent)
    return Pushed(repository, done.oid, done.repo_url.url, names, size)


def _list_pushed(repository: str, commit: str, repo_type: str = MODEL) -> list[str]:
    """List the files of the model or the Space that genkit pushed to a repository before.

    Raises:
        ValueError: the repository holds one that genkit did not push.
    """
    there = HfApi().list_repo_files(repository, revision=commit, repo_type=repo_type)
    if repo_type == SPACE:
        found = not FRESH.issuperset(there)
    else:
        found = any(fnmatch.fnmatch(name, pattern) for name in there for pattern in ANY_MODEL)
    if not found:
        return []
    if card.FILE not in there or "genkit" not in _read_tags(repository, commit, repo_type):
        raise ValueError(f"it holds a {repo_type} that genkit did not push; choose another name.")
    if repo_type == SPACE:
        return [name for name in there if name.startswith(f"{spaces.MODELS}/")]
    parts: list[str] = []
    if "model_index.json" in there:
        index = hf_hub_download(repository, "model_index.json", revision=commit)
        parts = list(json.loads(Path(index).read_text(encoding="utf-8")))
    tops = {name for name in there if "/" not in name}
    stale = {name for name in tops for pattern in PUSHED if fnmatch.fnmatch(name, pattern)}
    samples = {name for name in there if name.startswith("samples/step-")}
    inner = {name for name in there if name.split("/")[0] in parts} - tops
    return sorted(stale | inner | samples)


def _read_tags(repository: str, commit: str, repo_type: str) -> list[str]:
    text = Path(hf_hub_download(repository, card.FILE, revision=commit, repo_type=repo_type))
    return ModelCard(text.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.tags or []


@contextlib.contextmanager
def _refusals(repository: str, repo_type: str = MODEL) -> Iterator[None]:
    """Turn an error of the Hub, or of the connection, into one line."""
    argument = "space" if repo_type == SPACE else "repository"
    try:
        yield
    except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:
        raise ValueError(
            f"{argument}: {repository} cannot be pushed to: {hub_errors.describe(error)}; its "
            "files are unchanged"
        ) from error
