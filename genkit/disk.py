"""Files on a disk that may be full, away or damaged: written whole, and read with care."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genkit.files import open_regular


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
