"""Files of folders that others can write in: what is checked is what is read."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path, PurePosixPath

FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe does not wait


def read_regular(folder: Path, name: str, limit: int) -> bytes:
    """Read a regular file below a folder; no link below it is followed, no pipe waited for.

    Args:
        folder: may itself be reached by links.
        name: of the file in it, such as "samples/step-00000010.md".
        limit: the most bytes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a link, pipe, device or folder, is reached by a link, is outside the
            folder or has more bytes.
    """
    *parents, last = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parents or last == "..":
        raise ValueError(f"{name} is not inside {folder}")
    with contextlib.ExitStack() as opened:
        try:
            place = _open(opened, folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, None)
            for part in parents:
                place = _open(opened, part, FLAGS | os.O_DIRECTORY, place)
            file = _open(opened, last, FLAGS, place)
        except FileNotFoundError:
            raise
        except OSError as error:  # such as of a link or a socket
            raise ValueError(f"{name} in {folder} cannot be read ({error.strerror})") from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError(f"{name} in {folder} is no regular file")
        with os.fdopen(os.dup(file), "rb") as reader:
            data = reader.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{name} in {folder} has more than {limit:,} bytes")
    return data


def _open(opened: contextlib.ExitStack, name: str | Path, flags: int, place: int | None) -> int:
    """Open a name in an open folder until the stack ends; return the descriptor."""
    descriptor = os.open(name, flags, dir_fd=place)
    opened.callback(os.close, descriptor)
    return descriptor
