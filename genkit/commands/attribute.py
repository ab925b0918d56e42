"""genkit attribute: which pixels of an image speak for a class."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit attribute cat.png --model runs/classifier
  genkit attribute cat.png --model user/resnet --method integrated_gradients --target tabby
  genkit attribute cat.png --model runs/classifier --method saliency --measure --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", help="an image file")
    parser.add_argument("--model", required=True, help="image classifier: folder or Hub id")
    flags.add(parser, flags.from_verb("genkit.vision.attribution", "attribute", skip=("model",)))
    parser.add_argument("--output", default="attribution.png", help="file of the picture")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write a picture of the map, and print what it is of."""
    as_json, output = arguments.pop("json"), common.check_output(arguments.pop("output"))
    from genkit.vision.attribution import attribute

    console.silence_libraries()
    record = attribute(arguments.pop("image"), **arguments)
    record.save(output)
    if as_json:
        common.print_json(common.as_json_value(record) | {"output": str(output)})
    else:
        print(f"{record}\n{output}")
