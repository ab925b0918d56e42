"""genkit dream: an image in which a network sees more of what it already sees."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit dream beach.png --model runs/classifier --output dream.png
  genkit dream beach.png --model google/efficientnet-b0 --layer 9 --octaves 6 --size 800
  genkit dream beach.png --model google/efficientnet-b0 --guide flower.png
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", help="file of an image")
    flags.add(parser, flags.from_verb("genkit.vision.dreams", "dream", skip=("model",)))
    parser.add_argument("--model", required=True, help="folder or Hub id of an image classifier")
    parser.add_argument(
        "--output", default="dream.png", help="picture to write; default: %(default)s"
    )
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write the image, and print how it was made."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, output = options.pop("json"), common.check_output(options.pop("output"))
    from genkit.vision.dreams import dream

    console.silence_libraries()
    record = dream(options.pop("image"), **options)
    record.save(output)
    if as_json:
        common.print_json(common.as_json_value(record) | {"output": str(output)})
    else:
        print(f"{record}\n{output}")
