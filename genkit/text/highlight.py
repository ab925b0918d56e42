"""A span of a text, marked for a terminal or a page."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

from genkit.text import token_names

SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*(?=\s)|[。！？][」』”’）]*|\n\s*\n")
STEERING = re.compile(r"\r(?!\n)|[\0-\b\v\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
REACH = 500  # characters searched on each side; some texts have no sentences
FORMS = ("terminal", "html", "text")
MARKS = {"terminal": ("\x1b[1;32m", "\x1b[0m"), "html": ("<mark>", "</mark>"), "text": ("«", "»")}


def sentence(text: str, start: int, end: int) -> tuple[int, int]:
    """Find the sentence, or the sentences, around a span: the first character and the last."""
    low, high = max(0, start - REACH), min(len(text), end + REACH)
    before = [match.end() for match in SENTENCE_END.finditer(text, low, start)]
    after = [match.end() for match in SENTENCE_END.finditer(text, start, high)]
    first = before[-1] if before else low
    last = next((stop for stop in after if stop >= end), high)
    inside = text[first:last]
    return first + len(inside) - len(inside.lstrip()), last - len(inside) + len(inside.rstrip())


def mark(text: str, start: int, end: int, first: int, last: int, form: str) -> str:
    """Write the characters `first` to `last` of a text with those from `start` to `end` marked.

    Characters with a meaning in HTML are escaped, those that would steer a terminal are shown as
    marks, and all others stay as they are.

    Raises:
        ValueError: form is not one of FORMS.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    writers: dict[str, Callable[[str], str]]
    writers = {"terminal": _harmless, "html": html.escape, "text": str}
    write = writers[form]
    before, inside, after = text[first:start], text[start:end], text[end:last]
    opening, closing = MARKS[form] if inside else ("", "")
    return write(before) + opening + write(inside) + closing + write(after)


def _harmless(text: str) -> str:
    return STEERING.sub(lambda match: token_names.visible(match[0]), text)
