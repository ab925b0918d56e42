"""genkit sample: draw images from a saved model."""

from __future__ import annotations

import argparse
from typing import Any

from genkit.commands import common

EXAMPLES = """\
  genkit sample runs/vae
  genkit sample runs/diffusion -n 16 --seed 1 --label 3 --steps 10 --guidance 1.3
  genkit sample user/gan --output digits.png --json
"""
FLAGS: common.Flags = (
    ("label", int, "class of all images; of a model that is told classes"),
    ("seed", int, "image i has seed + i; drawn unless given"),
    ("steps", int, "of a diffusion model"),
    ("scheduler", str, "ddpm, ddim, dpm++, unipc, heun or euler; of a flow euler or heun"),
    ("guidance", float, "above 1: shows the class more clearly"),
    ("dtype", str, "float32, or bfloat16 for the network of a diffusion model"),
    ("revision", str, "branch, tag or commit on the Hub"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("-n", type=int, default=64, help="how many images; 64 unless told")
    common.add_flags(parser, FLAGS)
    parser.add_argument("--output", default="samples.png", help="file of the grid")
    parser.add_argument("--compile", action="store_true", help="compile the network first")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write a grid of images, and say what it shows."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, output = options.pop("json"), common.picture(options.pop("output"))
    from genkit.vision.sampling import sample

    common.quiet()
    samples = sample(options.pop("model"), options.pop("n"), **options)
    samples.save_grid(output)
    if as_json:
        common.print_json(common.plain(samples) | {"output": str(output)})
    else:
        print(f"{samples}\n{output}")
