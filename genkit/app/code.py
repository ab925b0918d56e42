"""The code that makes a result of the page again: a command, and the same in Python."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from typing import Any


def format_code(verb: str, given: str, options: dict[str, Any]) -> str:
    """Show how a verb makes a result again: by its command, and in Python.

    Args:
        verb: of genkit and of its command.
        given: its first argument.
        options: the others by name; those that are None are left out.
    """
    return fold(command(verb, given, options), python(verb, [given], options))


def fold(*texts: str) -> str:
    """Show programs, folded until they are asked for."""
    blocks = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
    return f'<details class="code"><summary>Show code</summary>{blocks}</details>'


def python(verb: str, given: Sequence[Any], options: dict[str, Any]) -> str:
    """Write the call of a verb in Python; options that are None are left out."""
    named = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    return f"import genkit\n\nprint(genkit.{verb}({', '.join([*map(repr, given), *named])}))"


def command(verb: str, given: str, options: dict[str, Any]) -> str:
    """Write the command of a verb; options that are None are left out."""
    named = {name: value for name, value in options.items() if value is not None}
    words = [word for name, value in named.items() for word in (_flag(name), str(value))]
    # what begins like a flag stands behind a mark that no more of them follow
    first, last = ([], ["--", given]) if given.startswith("-") else ([given], [])
    return shlex.join(["genkit", verb, *first, *words, *last])


def _flag(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
