"""Files read and written safely.

Read: regular files alone, never a pipe or a device, and where it matters none outside a folder.
Written: whole or not at all. Beside that: scratch folders, which go with their process, and the
cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROC = Path("/proc/self/fd")  # on Linux: links to the open files of this process
PREFIX = "genkit-scratch-"  # of scratch folders
CACHED = re.compile(r"[0-9a-f]{64}\.|\.writing-")  # how the names of files in the cache begin
STALE = 3600.0  # seconds after which a scratch file in the cache is one of a killed process


# ---------------------------------------------------------------------------------------------
# Reading regular files


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for a pipe or a device.

    Raises:
        OSError: it cannot be opened, or it is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path) -> bytes:
    """Read a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        way_out: what the user can do if the file is damaged, for the message.

    Raises:
        ValueError: it cannot be read, or it holds something else.
    """
    try:
        found = json.loads(read_regular(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)}); {way_out}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it is no JSON object); {way_out}")
    return found


# ---------------------------------------------------------------------------------------------
# Reading inside a folder


def open_inside(file: Path, folder: Path) -> BufferedReader:
    """Open a regular file that lies in a folder.

    A link counts by its target, which must lie inside the folder or, in a snapshot of the Hub's
    cache, among the blobs of that cache.

    Raises:
        ValueError: it is not a regular file, or it is a link that leads out of the folder.
        OSError: it cannot be read.
    """
    target = _resolve_inside(file, folder)
    try:
        regular = stat.S_ISREG(target.lstat().st_mode)
    except NotADirectoryError:
        regular = False
    if not regular:
        raise ValueError(f"{file} is not a regular file")
    opened = open_regular(target)
    try:
        if PROC.is_dir():  # a folder of the path may have been replaced since
            _resolve_inside(descriptor_path(opened.fileno()), folder, file)
    except BaseException:
        opened.close()
        raise
    return opened


def read_inside(file: Path, folder: Path, limit: int) -> bytes:
    """Read a regular file that lies in a folder; see `open_inside`.

    Args:
        limit: the most bytes that it may have.

    Raises:
        ValueError: it is not a regular file, leads out of the folder, or is larger.
        OSError: it cannot be read.
    """
    with open_inside(file, folder) as opened:
        found = opened.read(limit + 1)
    if len(found) > limit:
        raise ValueError(f"{file} has more than {limit:,} bytes")
    return found


def check_inside(file: Path, folder: Path) -> None:
    """Refuse a file, of any type, that is a link out of its folder.

    Raises:
        ValueError: it is.
    """
    _resolve_inside(file, folder)


def descriptor_path(handle: int) -> Path:
    """Return a path by which an open file can be opened again, whatever became of its own path."""
    return (PROC if PROC.is_dir() else Path("/dev/fd")) / str(handle)


def _resolve_inside(file: Path, folder: Path, name: Path | None = None) -> Path:
    """Return the path of a file with all links resolved; `name` is for the message."""
    try:
        home, target = folder.resolve(strict=True), file.resolve()
    except RuntimeError:  # a circle of links
        raise ValueError(f"{name or file} is a link that leads nowhere") from None
    blobs = home.parent.parent / "blobs"  # of the Hub's cache, whose snapshots are links to them
    in_cache = home.parent.name == "snapshots" and target.parent == blobs
    if not target.is_relative_to(home) and not in_cache:
        raise ValueError(f"{name or file} is a link that leads out of its folder")
    return target


# ---------------------------------------------------------------------------------------------
# Writing whole


class WriteError(OSError):
    """The disk refused to write a file; what was there before is as it was."""


def reason(error: Exception) -> str:
    """Return in one line why reading or writing failed."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


@contextlib.contextmanager
def named_write_errors(path: Path, what: str = "") -> Iterator[None]:
    """Turn the disk's refusal to write a file into an error that names the file.

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
    """Distinguish the disk's refusal to write below a folder from errors of the content."""
    if not isinstance(error, OSError):
        # safetensors and tokenizers have exceptions of their own, with the cause in the text alone
        return "os error" in str(error)
    if error.errno is None:  # a process that was ended, a stream that stopped
        return False
    named = error.filename
    folder = os.fsdecode(path if path.is_dir() else path.parent)
    return not isinstance(named, str | bytes) or os.fsdecode(named).startswith(folder)


@contextlib.contextmanager
def written_whole(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a scratch file beside `path` that replaces it once all of its bytes are on the disk.

    Args:
        shared: other processes may write the same file at the same time, as in the cache; its
            folder is made if there is none.

    Raises:
        WriteError: the disk refused; the file that was there is as it was.
    """
    with named_write_errors(path):
        scratch = _shared_scratch(path) if shared else path.with_name(f".{path.name}.writing")
        try:
            scratch.unlink(missing_ok=True)  # of a process that was killed
            mode = make_empty(scratch)
            yield scratch
            scratch.chmod(mode)
            sync(scratch)
            scratch.replace(path)
            sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Yield a scratch folder beside `path` that becomes it once all of its files are on the disk.

    Args:
        path: there is nothing of this name yet; the folders above it are made.

    Raises:
        WriteError: the disk refused; nothing is left of what was written.
    """
    with named_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.writing")
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir()
        try:
            yield scratch
            for written in (*scratch.iterdir(), scratch):
                sync(written)
            scratch.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def _shared_scratch(path: Path) -> Path:
    """Return a name that no other process uses, and delete the files of killed processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".writing-*"):
        with contextlib.suppress(FileNotFoundError):  # another process has finished or deleted it
            if time.time() - leftover.stat().st_mtime > STALE:
                leftover.unlink()
    return path.with_name(f".writing-{uuid.uuid4().hex}{path.suffix}")


def make_empty(file: Path) -> int:
    """Make an empty file, and return its mode, which is the umask's.

    A file that safetensors then writes under its name can be read by its owner alone until it is
    given this mode.
    """
    file.touch()
    return stat.S_IMODE(file.stat().st_mode)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Push a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------
# Scratch folders


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder, deleted with the block; those of killed processes are deleted first.

    A process holds a lock on its folder, which the system gives back when the process ends.
    """
    for leftover in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover)
    with contextlib.ExitStack() as stack:
        folder = _make_locked_folder(stack)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _make_locked_folder(stack: contextlib.ExitStack) -> Path:
    """Make a folder and lock it, anew if another process has deleted it in between."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            stack.enter_context(_locked(folder))
            return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a scratch folder.

    Raises:
        OSError: another process holds it, it is another user's, or it has just been deleted.
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


# ---------------------------------------------------------------------------------------------
# The cache and its keys


def cache_folder() -> Path:
    """Return the folder of the cache: $GENKIT_CACHE, or ~/.cache/genkit."""
    return Path(os.environ.get("GENKIT_CACHE") or Path.home() / ".cache" / "genkit")


def weights_hash(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's weights, by name."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def list_cached() -> list[Path]:
    """Return the files of the cache, those that killed processes left included, and no others."""
    folder = cache_folder()
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if CACHED.match(path.name) and path.is_file()]


def count_bytes(paths: Iterable[Path]) -> int:
    """Return how many bytes files have together; those that are gone by now have none."""
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total
