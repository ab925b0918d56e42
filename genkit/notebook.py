"""How records show themselves in a notebook: Jupyter asks for `_repr_html_` and `_repr_png_`."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

STYLE = "white-space: pre-wrap; overflow-wrap: anywhere"


class TextRecord:
    """A record that a notebook shows as the text that `print` shows."""

    def _repr_html_(self) -> str:
        return f'<pre style="{STYLE}">{html.escape(str(self))}</pre>'


class _Drawn(Protocol):
    def save(self, path: str | Path) -> None: ...


class DrawnRecord:
    """A record that a notebook shows as the picture that its `save` writes."""

    def _repr_png_(self: _Drawn) -> bytes:
        return as_png(self.save)


def as_png(write: Callable[[Path], None]) -> bytes:
    """Return the bytes of the picture that a function writes to a path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.png")
        write(path)
        return path.read_bytes()


def framed(page: str) -> str:
    """Return a whole page as an HTML fragment, so that neither changes the other's style."""
    style = "width: 100%; height: 24em; border: 0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}"></iframe>'
