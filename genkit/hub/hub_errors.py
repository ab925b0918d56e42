"""What the Hub, or the way to it, refused, in one line with what would do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

AGAIN = "somebody else has changed the repository at the same time: try again"
ADVICE = {
    401: "log in by `hf auth login`",
    403: "use a token that may do this, or another repository",
    404: "check the name",
    409: AGAIN,
    412: AGAIN,
    429: "wait a minute, then try again",
}


def describe(error: Exception) -> str:
    """Describe an error of the Hub's client in one line, without addresses and request ids."""
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so that the Hub is not asked"
        if isinstance(cause, LocalTokenNotFoundError):
            return f"no token is saved on this machine: {ADVICE[401]}"
        if isinstance(cause, httpx2.TransportError):
            return f"the Hub cannot be reached ({_line(cause)}): check the connection"
        if isinstance(cause, httpx2.HTTPError) and getattr(cause, "response", None) is not None:
            return _answer(cause)
    return _line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: Any) -> str:
    """Describe an answer of the Hub by its status and its own message."""
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        login = ", then log in by `hf auth login`" if status == 401 else ""
        return f"it is gated: ask for access on its page{login}"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        hidden = " (to see a private one, log in by `hf auth login`)" if status == 401 else ""
        return f"the Hub has no such repository{hidden}"
    said = getattr(error, "server_message", None) or error.response.reason_phrase
    advice = ADVICE.get(status) or ("try again later" if status >= 500 else "")
    line = f"{' '.join(said.split()).rstrip('.'):.200} (status {status})"
    return f"{line}: {advice}" if advice else line


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__


def is_missing(error: Exception) -> bool:
    """Whether the Hub, or the cache where the Hub is not asked, has no such repository."""
    known, causes = (RepositoryNotFoundError, OfflineModeIsEnabled), list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):  # a kind of the first
        return False
    return any(isinstance(cause, known) for cause in causes)
