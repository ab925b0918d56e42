"""The code that makes a result of the page again: a command, and the same in Python."""

from __future__ import annotations

import html
import shlex
from typing import Any


def format_code(verb: str, given: str, options: dict[str, Any]) -> str:
    """Show how a verb makes a result again, folded until it is asked for.

    Args:
        verb: of genkit and of its command.
        given: its first argument.
        options: the others by name; those that are None are left out.
    """
    named = {name: value for name, value in options.items() if value is not None}
    arguments = ", ".join([repr(given), *(f"{name}={value!r}" for name, value in named.items())])
    python = f"import genkit\n\nprint(genkit.{verb}({arguments}))"
    blocks = "".join(
        f"<pre>{html.escape(text)}</pre>" for text in (command(verb, given, named), python)
    )
    return f'<details class="code"><summary>Show code</summary>{blocks}</details>'


def command(verb: str, given: str, options: dict[str, Any]) -> str:
    """Write the command of a verb."""
    words = [word for name, value in options.items() for word in (_flag(name), str(value))]
    # what begins like a flag stands behind a mark that no more of them follow
    first, last = ([], ["--", given]) if given.startswith("-") else ([given], [])
    return shlex.join(["genkit", verb, *first, *words, *last])


def _flag(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
