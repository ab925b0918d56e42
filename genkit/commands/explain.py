"""genkit explain: look inside a language model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit explain "I am a"                             # how likely the next tokens are
  genkit explain "I am a" --show temperatures         # one text for each temperature
  genkit explain "I am a" --show beams --output beams.png
  genkit explain "I am a fox" --show alternatives --output text.html
"""
VERBS = {  # --show: module and name of the verb
    "next": ("genkit.text.explain", "next_tokens"),
    "temperatures": ("genkit.text.explain", "temperature_series"),
    "beams": ("genkit.text.explain", "beam_tree"),
    "alternatives": ("genkit.text.alternatives", "alternatives"),
}
PYTHON_ONLY = ("temperatures", "prompt", "length_penalty")  # parameters that are no flags


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("text", help="one text; - reads standard input")
    parser.add_argument("--show", choices=VERBS, default="next", help="default: next")
    flags.add(parser, list(_merged_flags().values()))
    parser.add_argument("--output", help="picture to write (.png); for alternatives a page (.html)")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print a record, and write its picture or page if --output is given."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, show, output = options.pop("json"), options.pop("show"), options.pop("output", None)
    text = options.pop("text")
    text = common.read_text("text", "-") if text == "-" else text
    path = None if output is None else _check_path(output, show)
    module, verb = VERBS[show]
    for name in sorted(set(options) - {flag.name for flag in flags.from_verb(module, verb)}):
        raise ValueError(f"{name} has no meaning for --show {show}; leave it out")
    console.silence_libraries()
    record = getattr(importlib.import_module(module), verb)(text, **options)
    if path is not None:
        record.html(path) if show == "alternatives" else record.save(path)
    if as_json:
        common.print_json(record)
    elif show == "alternatives" and path is None:
        record.show()
    else:
        print(record if path is None else f"{record}\n{path}")


def _merged_flags() -> dict[str, flags.Flag]:
    """Return the flags of all verbs by name; their help lists the default of each verb."""
    merged: dict[str, flags.Flag] = {}
    for show, (module, verb) in VERBS.items():
        for flag in flags.from_verb(module, verb, skip=PYTHON_ONLY):
            text = flag.help
            if flag.default is not None:
                start = f"{merged[flag.name].help}," if flag.name in merged else f"{text}; default:"
                text = f"{start} {flag.default} for {show}"
            merged[flag.name] = dataclasses.replace(flag, default=None, help=text)
    return merged


def _check_path(output: str, show: str) -> Path:
    page = show == "alternatives"
    return common.check_output(output, (".html",) if page else common.PICTURES)
