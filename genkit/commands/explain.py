"""genkit explain: look inside a language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from genkit.commands import common

EXAMPLES = """\
  genkit explain "I am a"                             # how likely the next tokens are
  genkit explain "I am a" --show temperatures         # one text a temperature
  genkit explain "I am a" --show beams --output beams.png
  genkit explain "I am a fox" --show alternatives --output text.html
"""
FLAGS: common.Flags = (
    ("model", str, "folder or Hub id; GPT-2 unless told"),
    ("max-new-tokens", int, "longest completion; temperatures, beams"),
    ("seed", int, "of the texts; temperatures"),
    ("beams", int, "texts kept at once; beams"),
    ("top", int, "how many tokens to tell of; next, alternatives"),
)
VERBS = {
    "next": "next_tokens",
    "temperatures": "temperature_series",
    "beams": "beam_tree",
    "alternatives": "alternatives",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("text", help="a text; - reads the input")
    parser.add_argument("--show", choices=VERBS, default="next", help="next unless told")
    common.add_flags(parser, FLAGS)
    parser.add_argument("--output", help="picture (.png), of alternatives a page (.html)")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print what the model sees in a text, and draw it where that was asked for."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, show, output = options.pop("json"), options.pop("show"), options.pop("output", None)
    text = options.pop("text")
    text = common.read("text", "-") if text == "-" else text
    place = None if output is None else _place(output, show)
    from genkit.text import explain

    common.quiet()
    verb = getattr(explain, VERBS[show])
    known = verb.__kwdefaults__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{unknown[0]} has no meaning for --show {show}; leave it out")
    record = verb(text, **options)
    if place is not None:
        record.html(place) if show == "alternatives" else record.save(place)
    if as_json:
        common.print_json(record)
    elif show == "alternatives" and place is None:
        record.show()
    else:
        print(record if place is None else f"{record}\n{place}")


def _place(output: str, show: str) -> Path:
    page = show == "alternatives"
    return common.picture(output, (".html",) if page else common.PICTURES)
