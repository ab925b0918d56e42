"""Files that are what they seem: regular, inside their folder, and read as they were checked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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


class WriteError(OSError):
    """The disk refused to write a file; what was there before is as it was."""


def reason(error: Exception) -> str:
    """Say in one line why the disk refused."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(told.split())


@contextlib.contextmanager
def refusals_named(path: Path, what: str = "") -> Iterator[None]:
    """Name the file when the disk refuses to write it.

    Raises:
        WriteError: the disk is full, read-only, …
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if not _is_refusal(error, path):
            raise
        raise WriteError(
            f"could not write {what}{path}: {reason(error)}. What was there before is as it was; "
            "make room or change the disk, then try again"
        ) from error


def _is_refusal(error: Exception, path: Path) -> bool:
    """Tell the disk's refusal to write below a folder from an error of what was to be written."""
    if not isinstance(error, OSError):
        # safetensors and tokenizers have exceptions of their own that only tell it in words
        return "os error" in str(error)
    if error.errno is None:  # a process that was ended, a stream that stopped
        return False
    named = error.filename
    folder = os.fsdecode(path if path.is_dir() else path.parent)
    return not isinstance(named, str | bytes) or os.fsdecode(named).startswith(folder)


@contextlib.contextmanager
def written_whole(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Give a scratch file beside `path` that becomes it once all of its bytes are on the disk.

    Args:
        scratch: of a name that no other process uses, where several may write the same file.

    Raises:
        WriteError: the disk refused; the file that was there is as it was.
    """
    scratch = scratch or path.with_name(f".{path.name}.writing")
    with refusals_named(path):
        try:
            scratch.unlink(missing_ok=True)  # of a process that was killed
            scratch.touch()
            mode = scratch.stat().st_mode
            yield scratch
            scratch.chmod(mode)  # the umask's: safetensors lets nobody else read
            sync(scratch)
            scratch.replace(path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Push a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> bytes:
    """Read a regular file; a pipe or a device, which may never end, is refused."""
    with open_regular(path) as file:
        return file.read()


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        way_out: what to do where the file is damaged.

    Raises:
        ValueError: it cannot be read, or it holds something else.
    """
    try:
        found = json.loads(read(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)}); {way_out}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it is no JSON object); {way_out}")
    return found


# ---------------------------------------------------------------------------------------------
# The cache


def cache_folder() -> Path:
    """Where surveys and encoded corpora are kept: $GENKIT_CACHE, or ~/.cache/genkit."""
    return Path(os.environ.get("GENKIT_CACHE") or Path.home() / ".cache" / "genkit")


@contextlib.contextmanager
def cached_whole(path: Path) -> Iterator[Path]:
    """Give a scratch file that becomes `path` if all went well, also when two processes write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".writing-*"):  # of a process that was killed
        if time.time() - leftover.stat().st_mtime > 3600:
            leftover.unlink(missing_ok=True)
    with written_whole(path, path.with_name(f".writing-{uuid.uuid4().hex}")) as scratch:
        yield scratch


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights, by name."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().cpu().numpy().data)
    return digest.hexdigest()
