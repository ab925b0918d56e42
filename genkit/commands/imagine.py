"""genkit imagine: generate images from prompts."""

from __future__ import annotations

import argparse
import re
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit imagine "a watercolour of a red fox in snow" --seed 1 --output fox.png
  cat prompts.txt | genkit imagine - --size 512x768     # picture.png, picture-2.png, …
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "prompt", nargs="+", help="one prompt or several; - for the lines of standard input"
    )
    flags.add(parser, flags.from_verb("genkit.vision.imagining", "imagine", skip=("size",)))
    parser.add_argument("--size", help="width x height in pixels, such as 512x768")
    parser.add_argument("--output", default="picture.png", help="file; further ones are numbered")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write a picture for each prompt, and print how it was generated."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, output = options.pop("json"), common.check_output(options.pop("output"))
    prompts = common.read_texts("prompt", options.pop("prompt"))
    if "size" in options:
        options["size"] = _size(options["size"])
    from genkit.vision.imagining import imagine

    console.silence_libraries()
    records = list[dict[str, Any]]()
    for i, picture in enumerate(imagine(prompts, **options)):
        path = output if i == 0 else output.with_stem(f"{output.stem}-{i + 1}")
        picture.save(path)
        records.append(common.as_json_value(picture) | {"output": str(path)})
        if not as_json:
            print(f"{picture}\n{path}")
    if as_json:
        common.print_json(records)


def _size(given: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", given)
    if match is None:
        raise ValueError(f"size must be width x height, such as 512x768, got {given!r}")
    return int(match[1]), int(match[2])
