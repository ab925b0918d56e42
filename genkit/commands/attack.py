"""genkit attack: an input that is changed a little, so that a model is wrong about it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit attack cat.png --model runs/classifier --epsilon 0.03 --target dog --output fooled.png
  genkit attack test.parquet --model runs/classifier --restarts 10     # accuracy under attack
  genkit attack "The film was a delight." --model user/sentiment
  genkit attack "The exam is on Friday." --question "When is the exam?" --model runs/qa
"""
VERBS = (
    ("genkit.vision.attacks", "attack_image"),
    ("genkit.vision.robustness", "measure_robustness"),
    ("genkit.text.attacks", "attack_text"),
    ("genkit.qa.attacks", "attack_answer"),
)
PYTHON_ONLY = ("model",)  # parameters that are no flags


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "given", help="an image file, images with labels, or a text; - reads standard input"
    )
    parser.add_argument("--model", required=True, help="folder or Hub id; its kind decides")
    parser.add_argument("--question", help="that a model answers from the text")
    flags.add(parser, list(_merged_flags().values()))
    parser.add_argument("--output", help="file of the image, .png (default: fooled.png)")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print a record, and write the image if there is one."""
    from genkit import attacking

    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, output = options.pop("json"), options.pop("output", None)
    given = options.pop("given")
    given = common.read_text("given", "-") if given == "-" else given
    module, verb = attacking.find_attack(given, options["model"], options.get("revision"))
    known = {flag.name for flag in flags.from_verb(module, verb)} | {"question", "context"}
    for name in sorted(set(options) - known):
        raise ValueError(f"--{name.replace('_', '-')} is no option of {verb}; leave it out")
    path = None
    if verb == "attack_image":
        path = common.check_output(output or "fooled.png")
    elif output is not None:
        raise ValueError(f"--output {output}: {verb} draws no picture; leave it out")
    importlib.import_module(module)
    console.silence_libraries()
    record: Any = attacking.attack(given, **options)
    if path is not None:
        record.save(path)
    if as_json:
        shown = common.as_json_value(record)
        common.print_json(shown if path is None else shown | {"output": str(path)})
    else:
        print(record if path is None else f"{record}\n{path}")


def _merged_flags() -> dict[str, flags.Flag]:
    """Return the flags of all attacks by name, without defaults, which differ."""
    merged: dict[str, flags.Flag] = {}
    for module, verb in VERBS:
        for flag in flags.from_verb(module, verb, skip=PYTHON_ONLY):
            merged.setdefault(flag.name, dataclasses.replace(flag, default=None))
    return merged
