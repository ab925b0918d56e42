"""genkit sample: sample images from a saved model."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit sample runs/vae
  genkit sample runs/diffusion -n 16 --seed 1 --label 3 --steps 10 --guidance 1.3
  genkit sample user/gan --output digits.png --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("-n", type=int, default=64, help="number of images (default: 64)")
    flags.add(parser, flags.from_verb("genkit.vision.sampling", "sample"))
    parser.add_argument("--output", default="samples.png", help="file of the grid")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write a grid of images, and print how they were sampled."""
    as_json, output = arguments.pop("json"), common.check_output(arguments.pop("output"))
    from genkit.vision.sampling import sample

    console.silence_libraries()
    samples = sample(arguments.pop("model"), arguments.pop("n"), **arguments)
    samples.save_grid(output)
    if as_json:
        common.print_json(common.as_json_value(samples) | {"output": str(output)})
    else:
        print(f"{samples}\n{output}")
