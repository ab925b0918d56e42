"""genkit translate: translate an image by a trained model."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit translate old.png --model runs/translation
  genkit translate old.png --model runs/translation --seed 0 1 2 3 --output colours.png
  genkit translate torn.png --mask hole.png --model runs/translation
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", help="image to translate")
    parser.add_argument(
        "--model", required=True, help="folder or Hub id of a model by train_translation"
    )
    options = flags.from_verb("genkit.vision.translating", "translate", skip=("model", "seed"))
    text = "of the image, or of each of several; default: random"
    parser.add_argument("--seed", type=int, nargs="+", default=argparse.SUPPRESS, help=text)
    flags.add(parser, options)
    parser.add_argument("--output", default="translated.png", help="file; further ones follow")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write an image for each seed, and print how they were made."""
    as_json, output = arguments.pop("json"), common.check_output(arguments.pop("output"))
    from genkit.vision.translating import translate

    console.silence_libraries()
    made = translate(arguments.pop("image"), **arguments)
    paths = list(map(str, made.save_each(output)))
    if as_json:
        record = common.as_json_value(dataclasses.replace(made, images=[]))
        common.print_json(record | {"output": paths})
    else:
        print("\n".join([str(made), *paths]))
