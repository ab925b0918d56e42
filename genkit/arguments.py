"""Command lines whose mistakes are one line: the argument, and what would do."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a ValueError of one line where argparse prints its usage."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse all arguments.

        Raises:
            ValueError: an argument is unknown or missing, or its value cannot be read.
        """
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self._describe_unknown(rest))
        return found

    def error(self, message: str) -> NoReturn:
        """Raise a message of argparse's, with one spelling of the argument that it names."""
        raise ValueError(re.sub(r"\Aargument ([^\s/]+)\S*:", r"\1:", message))

    def _describe_unknown(self, rest: list[str]) -> str:
        """Name the first unknown argument and, for a flag, the most similar one."""
        flag = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
        if flag is None:
            return f"{rest[0]!r}: unexpected argument; flags begin with --"
        known = {spelling.replace("_", "-"): name for spelling, name in self._flags()}
        near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1)
        hint = f"the most similar is {known[near[0]]}" if near else "--help lists all"
        return f"{flag}: unknown flag; {hint}"

    def _flags(self) -> Iterator[tuple[str, str]]:
        """Yield each long flag, of subcommands too, with its first spelling."""
        for action in self._actions:
            long = [name for name in action.option_strings if name.startswith("--")]
            yield from ((spelling, long[0]) for spelling in long)
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._flags()
