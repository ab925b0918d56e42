"""The reference of the site, from the code: verbs, records, commands with their flags, recipes."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

import genkit
from genkit import cli, recipes
from genkit.arguments import Parser
from genkit.training import image_data, settings

ROOT = Path(__file__).parents[2]
Rows = Iterable[tuple[str, ...]]


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages; links lead to the files of recipes, the navigation does not."""
    found = recipes.find_recipes()
    shown = {
        "verbs": write_verbs(),
        "records": write_records(),
        "commands": write_commands(),
        "recipes": write_recipes(found),
    }
    linked = {path.stem: write_source(path) for path in found.values()}
    for pages, level in ((shown, InclusionLevel.INCLUDED), (linked, InclusionLevel.NOT_IN_NAV)):
        for name, content in pages.items():
            address = f"reference/{name}.md"
            files.append(File.generated(config, address, content=content, inclusion=level))
    return files


# ---- verbs and records


def write_verbs() -> str:
    """Write the page of all verbs, in the order of `genkit.__all__`."""
    start = "# Verbs\n\nFunctions of `genkit`; each returns a [record](records.md).\n\n"
    return start + "\n".join(f"::: {genkit._HOMES[name]}.{name}\n" for name in genkit.__all__)


def write_records() -> str:
    """Write the page of the records that verbs return."""
    package = griffe.load("genkit", search_paths=[ROOT], allow_inspection=False)
    found = {path: None for name in genkit.__all__ for path in find_records(package, name)}
    start = "# Records\n\nWhat verbs return: frozen dataclasses, which print.\n\n"
    return start + "\n".join(f"::: {path}\n" for path in found)


def find_records(package: Any, verb: str) -> Iterator[str]:
    """Yield the full names of the dataclasses that a verb is annotated to return."""
    function = package[f"{genkit._HOMES[verb]}.{verb}".removeprefix("genkit.")]
    for each in (function, *(function.overloads or ())):
        for part in each.returns.iterate():
            path = part.canonical_path if isinstance(part, griffe.ExprName) else ""
            if path.startswith("genkit."):
                record = package.modules_collection[path]
                if "dataclass" in record.labels:
                    yield record.canonical_path


# ---- commands


def write_commands() -> str:
    """Write the page of all commands, with their flags and examples."""
    start = "# Commands and flags\n\nFlags take dashes or underscores.\n"
    return start + "".join(write_command(name, text) for name, text in cli.COMMANDS.items())


def write_command(name: str, text: str) -> str:
    """Write the section of one command."""
    module = cli._module(name)
    parser = Parser(prog=f"genkit {name}")
    module.add(parser)
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    rows = [(_spell(action), _explain(action, parser)) for action in actions]
    examples = "\n".join(line[2:] for line in module.EXAMPLES.splitlines() if line[:2] == "  ")
    usage = parser.format_usage().removeprefix("usage: ")
    blocks = [f"## genkit {name}", text.capitalize() + ".", f"```\n{usage}```"]
    return "\n\n".join(["", *blocks, _table(("argument", ""), rows), f"```\n{examples}\n```", ""])


def _spell(action: argparse.Action) -> str:
    return ", ".join(f"`{flag}`" for flag in action.option_strings or [action.dest])


def _explain(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    return parser._get_formatter()._expand_help(action)


def _table(head: tuple[str, ...], rows: Rows) -> str:
    lines = [head, ("---",) * len(head), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


# ---- recipes


def write_recipes(found: dict[str, Path]) -> str:
    """Write the page of all recipes, with the settings of each."""
    shared = {"All recipes": settings.RunSettings, "Recipes of images": image_data.ImageSettings}
    blocks = [
        "# Recipes and settings",
        "`genkit train NAME --SETTING VALUE`. A default that depends on the machine or on other "
        "settings is shown by `genkit train NAME --help`.",
    ]
    for title, cls in shared.items():
        blocks += [f"## {title}", write_settings(cls)]
    for name, path in found.items():
        module = importlib.import_module(f"genkit.recipes.{path.stem}")
        source = f"Its file: [recipes/{path.name}]({path.stem}.md)."
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        blocks += [
            f"## {name}",
            docstring.partition("\n")[0],
            source,
            write_settings(module.Settings),
        ]
    return "\n\n".join(blocks) + "\n"


def write_settings(cls: type) -> str:
    """Write a table of the settings that a class has and its bases have not, or otherwise."""
    above = {field.name: field for base in cls.__mro__[1:-1] for field in dataclasses.fields(base)}
    rows = []
    for field in dataclasses.fields(cls):
        old = above.get(field.name)
        if old is None or (old.default, old.metadata) != (field.default, field.metadata):
            rows.append((f"`--{field.name}`", _describe(field)))
    return _table(("setting", ""), rows)


def _describe(field: dataclasses.Field[Any]) -> str:
    """Return the help of a setting, with its values, and its default if that is always the same."""
    text, allowed = field.metadata["help"], field.metadata.get("allowed")
    notes = [str(allowed)] if allowed is not None else []
    if isinstance(field.default, bool):
        notes.append(f"default: {'yes' if field.default else 'no'}")
    elif field.default is not None:  # else there is none, or it is the preset's
        notes.append(f"default: `{field.default}`")
    return f"{text} ({'; '.join(notes)})" if notes else text


def write_source(path: Path) -> str:
    """Write the page of a recipe's file."""
    return f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
