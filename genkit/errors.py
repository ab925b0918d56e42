"""Errors that are none: what extensions raise past every `except Exception`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def is_panic(error: BaseException) -> bool:
    """Tell a panic of an extension in Rust, which Python takes for the end of the program."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def panics_are_errors(argument: str = "model") -> Iterator[None]:
    """Turn what a model's tokenizer raises, such as at a regex that tries too long, into an error.

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
    """Turn a bad argument, or a disk or a file that refuses, into one line and exit code 2."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except BaseException as error:
        if not isinstance(error, ValueError | OSError) and not is_panic(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
