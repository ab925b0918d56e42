"""What is shown while work goes on: a bar in a terminal or a notebook, a line at times in a log.

All of it goes to standard error, so that standard output holds nothing but results; `quiet` turns
it off.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import IO, Any

from tqdm import tqdm

DELAY = 2.0  # seconds of work before a bar is shown
GAP, GROWTH = 10.0, 0.1  # least seconds between two lines in a log, and least part of those spent

_quiet = False


@contextlib.contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Show neither bars nor lines in this process; `on=False` changes nothing."""
    global _quiet
    before, _quiet = _quiet, _quiet or on
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether nothing but results and errors is shown."""
    return _quiet


def has_colours(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that may show colours, see https://no-color.org."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def say(text: str) -> None:
    """Print a line on standard error, above the bars."""
    if not _quiet:
        write(text, sys.stderr)


def write(text: str, stream: IO[str]) -> None:
    """Print a line above the bars; a terminal or a pipe that is gone ends no work."""
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def bar(
    items: Iterable[Any] | None = None,
    doing: str = "",
    total: float | None = None,
    unit: str = "",
    hidden: bool = False,
    **style: Any,
) -> Any:
    """Show how far some work is, for as long as it takes.

    Args:
        items: to be yielded, each a unit of work; without them, call `update`.
        doing: what is done, such as "decoding".
        total: number of units; default: that of the items.
        unit: what is counted, such as " images".
        hidden: show nothing.
        style: of a bar, as tqdm takes it.

    Returns:
        A tqdm, or `LogLines`, which has the methods that genkit uses.
    """
    if hidden or not shows_bars():
        return LogLines(items, doing, total, style.get("initial", 0), hidden)
    shown = {"delay": DELAY, "leave": False, "unit": unit} | style
    return (_notebook_bar() if _in_notebook() else tqdm)(items, doing, total, **shown)


def shows_bars() -> bool:
    """Whether standard error shows bars: a terminal or a notebook, that is not quiet."""
    return not _quiet and (_in_notebook() or sys.stderr.isatty())


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this process; IPython is not imported for that."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _notebook_bar() -> type[tqdm[Any]]:
    """Return tqdm's bar for notebooks; without ipywidgets, that for terminals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises to install ipywidgets
        from tqdm.auto import tqdm as notebook_bar
    return notebook_bar


class LogLines:
    """A bar for log files: a line now and then, the rarer the longer it takes.

    Five minutes are about twenty lines, and a day is a hundred.
    """

    def __init__(
        self,
        items: Iterable[Any] | None,
        doing: str,
        total: float | None,
        initial: float = 0,
        hidden: bool = False,
    ) -> None:
        self._items, self._doing = items, doing
        self._total = len(items) if total is None and isinstance(items, Sized) else total
        self.n = self._first = initial
        self._postfix = ""
        self._start = time.monotonic()
        self._due = math.inf if hidden else self._start + GAP

    def __iter__(self) -> Iterator[Any]:
        assert self._items is not None, "call update where there are no items"
        for item in self._items:
            yield item
            self.update()

    def __enter__(self) -> LogLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """Count work that has been done; say so if a line is due."""
        self.n += n
        now = time.monotonic()
        if now >= self._due:
            spent = now - self._start
            self._due = now + max(GAP, GROWTH * spent)
            say(self._describe(spent))

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set the end of the line."""
        self._postfix = text

    def close(self) -> None:
        """End it: the work is done."""

    def _describe(self, spent: float) -> str:
        line = f"{self._doing}: {_duration(spent)} gone"
        if self._total:
            line = f"{self._doing}: {self.n / self._total:.0%}, {_duration(spent)} gone"
            if self.n > self._first:
                left = spent * (self._total - self.n) / (self.n - self._first)
                line += f", {_duration(left)} left"
        return f"{line}, {self._postfix}" if self._postfix else line


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=max(0, round(seconds))))


def silence_libraries() -> None:
    """Turn off bars and advice of transformers, and where no bar is shown those of the others."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not shows_bars():
        import huggingface_hub

        huggingface_hub.utils.disable_progress_bars()
