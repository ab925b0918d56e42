"""Files that are what they seem: regular, inside their folder, and read as they were checked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

PREFIX = "genkit-scratch-"  # of folders that last no longer than their process
PROC = Path("/proc/self/fd")  # on Linux: links to what is open


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, and never wait for a pipe or a device.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(handle, "rb")


def open_inside(file: Path, folder: Path) -> BufferedReader:
    """Open a regular file that lies in a folder.

    A link counts by where it leads: inside the folder or, in a snapshot of the Hub's cache, to the
    blobs of that cache.

    Raises:
        ValueError: it is no regular file, or a link that leads out of the folder.
        OSError: it cannot be read.
    """
    target = _inside(file, folder)
    try:
        regular = stat.S_ISREG(target.lstat().st_mode)
    except NotADirectoryError:
        regular = False
    if not regular:
        raise ValueError(f"{file} is no regular file")
    opened = open_regular(target)
    try:
        if PROC.is_dir():  # a folder on the way may be another by now
            _inside(by_descriptor(opened.fileno()), folder, file)
    except BaseException:
        opened.close()
        raise
    return opened


def read_inside(file: Path, folder: Path, limit: int) -> bytes:
    """Read a regular file that lies in a folder, as `open_inside` does.

    Args:
        limit: the most bytes that it may have.

    Raises:
        ValueError: it is no regular file, leads out of the folder, or is larger.
        OSError: it cannot be read.
    """
    with open_inside(file, folder) as opened:
        found = opened.read(limit + 1)
    if len(found) > limit:
        raise ValueError(f"{file} has more than {limit:,} bytes")
    return found


def by_descriptor(handle: int) -> Path:
    """Return a name by which an open file can be opened again, whatever became of its own name."""
    return (PROC if PROC.is_dir() else Path("/dev/fd")) / str(handle)


def check_inside(file: Path, folder: Path) -> None:
    """Refuse a file, of any type, that is a link out of its folder.

    Raises:
        ValueError: it is.
    """
    _inside(file, folder)


def _inside(file: Path, folder: Path, name: Path | None = None) -> Path:
    """Return where a file lies, with all links resolved."""
    try:
        home, target = folder.resolve(strict=True), file.resolve()
    except RuntimeError:  # a circle of links
        raise ValueError(f"{name or file} is a link that leads nowhere") from None
    blobs = home.parent.parent / "blobs"  # of the Hub's cache, whose snapshots are links to them
    of_cache = home.parent.name == "snapshots" and target.parent == blobs
    if not target.is_relative_to(home) and not of_cache:
        raise ValueError(f"{name or file} is a link that leads out of its folder")
    return target


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder that goes with the block; those of killed processes go first."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)
    with contextlib.ExitStack() as stack:
        folder = _locked_folder(stack)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _locked_folder(stack: contextlib.ExitStack) -> Path:
    """Make a folder and lock it; another process may delete it in between, which is seen."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            stack.enter_context(_locked(folder))
            return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder of ours, which the end of the process gives back.

    Raises:
        OSError: another holds it, it is another user's, or it has just been deleted.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError(f"{folder} is another user's")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), folder.lstat()):
            raise FileNotFoundError(f"{folder} has been deleted")
        yield
    finally:
        os.close(handle)
