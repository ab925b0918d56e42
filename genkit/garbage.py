"""Python's collection of garbage, paused where there is much to make and nothing to collect."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Collect no garbage in this block, such as one that imports torch and transformers.

    These make a million objects that stay. Looking through them again and again takes a sixth of
    the time, and more.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
