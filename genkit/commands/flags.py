"""Flags of a command from the signature and the docstring of its verb, without importing it.

A keyword-only parameter is a flag: its type and default come from the signature, its help from the
parameter's entry in the docstring's Args. So a command needs no table of its own:

    def add(parser):
        flags.add(parser, flags.from_verb("genkit.text.generation", "generate", skip=("overflow",)))

The arguments that `run` is given hold only what the user wrote, by the parameter's name, ready to
be passed on: `verb(text, **arguments)`. The source is parsed, not imported, so --help is quick.

| parameter | flag |
|---|---|
| `int`, `float`; anything else, and what may also be a text, is text | `--name VALUE` |
| `X | Sequence[X]` | `--name VALUE`, which may be repeated: once gives X, more a list |
| `Sequence[X]` | the same, always a list |
| `bool = False` | `--name` |
| `bool = True`, `bool | None` | `--name` and `--no-name` |
| `bool | Literal["never"]` | `--name yes`, `no` or `never` |
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES: dict[str, type] = {"float": float, "int": int}  # all others are text
FLAG = re.compile(r"\A--[a-z][a-z0-9_-]*(?==|$)")
WORDS: dict[str, bool] = {"yes": True, "no": False}


@dataclass(frozen=True)
class Flag:
    """One parameter of a verb, and what its signature and docstring say about it."""

    name: str  # as in Python, with underscores
    annotation: str
    default: Any  # the constant in the signature; None for any other expression
    help: str


def from_verb(module: str, verb: str, skip: Iterable[str] = ()) -> list[Flag]:
    """Read the keyword-only parameters of a function from its source.

    Args:
        module: full name, such as "genkit.text.generation".
        verb: a function at its top level.
        skip: parameters that the command does not offer, or adds by itself.

    Raises:
        ValueError: a parameter has no entry in the docstring's Args.
    """
    function = _parse_function(module, verb)
    texts = _parse_args(ast.get_docstring(function, clean=False) or "")
    flags = []
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if argument.arg in skip:
            continue
        if argument.arg not in texts:
            raise ValueError(f"{module}.{verb}: {argument.arg} has no entry in Args")
        annotation = ast.unparse(argument.annotation) if argument.annotation else "str"
        constant = default.value if isinstance(default, ast.Constant) else None
        flags.append(Flag(argument.arg, annotation, constant, texts[argument.arg]))
    return flags


def _parse_function(module: str, name: str) -> ast.FunctionDef:
    """Parse the source of a module and return a function at its top level."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} has no source"
    tree = ast.parse(Path(spec.origin).read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    return functions[-1]  # the overloads come before it


def add(parser: argparse.ArgumentParser, flags: Sequence[Flag]) -> None:
    """Add flags to a command; those that the user leaves out are no arguments of its `run`."""
    for flag in flags:
        options = _options(flag.annotation, flag.default)
        text = flag.help.replace("%", "%%")
        if "action" not in options and flag.default not in (None, ""):
            text += f"; default: {flag.default}"
        if options.get("action") in (_Append, "extend"):
            text += "; may be repeated"
        parser.add_argument(
            f"--{flag.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options
        )


def with_dashes(words: Sequence[str]) -> list[str]:
    """Write the flags of a command line with dashes: `--top_k=3` becomes `--top-k=3`."""
    end = words.index("--") if "--" in words else len(words)
    flags = [FLAG.sub(lambda found: found[0].replace("_", "-"), word) for word in words[:end]]
    return [*flags, *words[end:]]


def _parse_args(docstring: str) -> dict[str, str]:
    """Return the description of each argument in a docstring's Args; `a, b: …` is that of both."""
    texts: dict[str, str] = {}
    lines = docstring.partition("Args:\n")[2].splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    names: list[str] = []
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if not line.strip() or depth < indent:
            break
        if depth == indent:
            listed, _, line = line.partition(":")
            names = [name.strip() for name in listed.split(",")]
        for name in names:
            texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return {name: text.removesuffix(".") for name, text in texts.items()}


def _options(annotation: str, default: Any) -> dict[str, Any]:
    """Choose how argparse takes a parameter of this type."""
    parts = {part.strip() for part in re.split(r"\|(?![^\[]*\])", annotation)} - {"None"}
    if parts == {"bool"}:
        switch = default is False
        return {"action": "store_true" if switch else argparse.BooleanOptionalAction}
    if "bool" in parts:
        names = re.findall(r"[\"'](\w+)[\"']", annotation)
        return {"type": _as_bool, "metavar": "|".join((*WORDS, *names))}
    many = {part[9:-1] for part in parts if part.startswith("Sequence[")}
    known = {name.strip() for part in parts | many for name in part.split("|")}
    kind = next((TYPES[name] for name in TYPES if name in known and "str" not in known), str)
    if not many:
        return {"type": kind}
    return {"type": kind, "action": _Append if parts & many else "extend", "nargs": 1}


def _as_bool(word: str) -> bool | str:
    return WORDS.get(word, word)


class _Append(argparse.Action):
    """Keep one value as it is, and several as a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add a value to those before it."""
        earlier = getattr(namespace, self.dest, [])
        given = [*(earlier if isinstance(earlier, list) else [earlier]), *values]
        setattr(namespace, self.dest, given if len(given) > 1 else given[0])
