"""genkit imagine: draw what a text says."""

from __future__ import annotations

import argparse
import re
from typing import Any

from genkit.commands import common

EXAMPLES = """\
  genkit imagine "a watercolour of a red fox in snow" --seed 1 --output fox.png
  cat prompts.txt | genkit imagine - --size 512x768     # picture.png, picture-2.png, …
"""
FLAGS: common.Flags = (
    ("model", str, "folder or Hub id; Stable Diffusion 1.5 unless told"),
    ("revision", str, "branch, tag or commit on the Hub"),
    ("seed", int, "picture i has seed + i; drawn unless given"),
    ("negative", str, "what is to be avoided"),
    ("steps", int, "as the pipeline has it unless told"),
    ("guidance", float, "above 1: closer to the text"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("prompt", nargs="+", help="one text or several; - for the input's lines")
    common.add_flags(parser, FLAGS)
    parser.add_argument("--size", help="width x height in pixels, such as 512x768")
    parser.add_argument("--output", default="picture.png", help="file; those after it are numbered")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's code")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write a picture for each text, and say how it was drawn."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, output = options.pop("json"), common.picture(options.pop("output"))
    prompts = common.lines("prompt", options.pop("prompt"))
    if "size" in options:
        options["size"] = _size(options["size"])
    from genkit.vision.imagining import imagine

    common.quiet()
    told = []
    for i, picture in enumerate(imagine(prompts, **options)):
        place = output if i == 0 else output.with_stem(f"{output.stem}-{i + 1}")
        picture.save(place)
        told.append(common.plain(picture) | {"output": str(place)})
        if not as_json:
            print(f"{picture}\n{place}")
    if as_json:
        common.print_json(told)


def _size(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", given)
    if found is None:
        raise ValueError(f"size must be width x height, such as 512x768, got {given!r}")
    return int(found[1]), int(found[2])
