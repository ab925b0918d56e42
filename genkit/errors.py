"""Errors as the user sees them: panics of extensions become errors, errors become one line."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

PATIENCE = 60.0  # seconds that a process leaves the first one of its launch to report an error


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a Rust extension, which `except Exception` does not catch."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def panics_are_errors(argument: str = "model") -> Iterator[None]:
    """Turn a panic of a model's tokenizer, such as of a regex that gives up, into an error.

    Raises:
        ValueError: it panicked, or raised a bare Exception, as tokenizers does.
    """
    try:
        yield
    except BaseException as error:
        if not is_panic(error) and type(error) is not Exception:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{argument}: its tokenizer cannot read this text: {reason}") from None


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Turn errors of arguments, files and disks into one line and exit code 2; Ctrl-C into 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of the output has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except BaseException as error:
        if int(os.environ.get("RANK", "0")) and isinstance(error, Exception):
            # the first process has the same error, or has caused this one: it reports, and its end
            # makes the launcher end this process
            time.sleep(PATIENCE)
        if not isinstance(error, ValueError | OSError) and not is_panic(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
