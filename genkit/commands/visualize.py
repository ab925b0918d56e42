"""genkit visualize: images that units of a network respond to."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit visualize google/efficientnet-b0 --output filters.png        # a sheet over the layers
  genkit visualize google/efficientnet-b0 --layer 9 --unit 17 --unit 40
  genkit visualize google/efficientnet-b0 --target daisy --target goldfish
  genkit visualize runs/classifier --target 3 --grey
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", help="folder or Hub id of an image classifier")
    flags.add(parser, flags.from_verb("genkit.vision.filters", "visualize"))
    parser.add_argument(
        "--output", default="units.png", help="picture to write; default: %(default)s"
    )
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write a picture of the units, and print how it was made."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, output = options.pop("json"), common.check_output(options.pop("output"))
    from genkit.vision.filters import visualize

    console.silence_libraries()
    record = visualize(options.pop("model"), **options)
    record.save(output)
    if as_json:
        common.print_json(common.as_json_value(record) | {"output": str(output)})
    else:
        print(f"{record}\n{output}")
