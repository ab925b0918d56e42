"""genkit stylize: paint an image in the style of another."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit stylize harbour.png --style wave.png --model runs/classifier --output painted.png
  genkit stylize harbour.png --style wave.png --model runs/classifier --animation film.gif
  genkit stylize harbour.png --model runs/stylizer      # one pass: train_stylizer has its style
"""
FRAMES = 40  # of an animation


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("image", help="image to paint")
    parser.add_argument(
        "--model", required=True, help="folder or Hub id of an image classifier, or of a stylizer"
    )
    flags.add(parser, flags.from_verb("genkit.vision.style", "stylize", skip=("model", "frames")))
    parser.add_argument("--output", default="stylized.png", help="file of the picture")
    parser.add_argument("--animation", help="GIF of how the picture emerges")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write the picture, and print how it came to be."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, output = options.pop("json"), common.check_output(options.pop("output"))
    animation = options.pop("animation", None)
    if animation is not None:
        _check_animation(animation)
        options["frames"] = FRAMES
    from genkit.vision.style import stylize

    console.silence_libraries()
    painted = stylize(options.pop("image"), **options)
    painted.save(output)
    if animation is not None:
        painted.save_animation(animation)
    if as_json:
        record = common.as_json_value(dataclasses.replace(painted, frames=[]))
        common.print_json(record | {"output": str(output), "animation": animation})
    else:
        print(f"{painted}\n{output}")


def _check_animation(path: str) -> None:
    file = Path(path)
    if file.suffix.lower() != ".gif":
        raise ValueError(f"--animation must end in .gif, got {path!r}")
    if not file.parent.is_dir():
        raise ValueError(f"--animation: the folder {str(file.parent)!r} does not exist")
