"""The genkit command: each subcommand a thin shell over a verb, imported only when asked for."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import sys
from typing import Any

from genkit import __version__, console
from genkit.arguments import Parser
from genkit.commands.flags import with_dashes
from genkit.errors import clean_errors

# Subcommand and its line in --help; a module of genkit/commands each, with underscores
COMMANDS = {
    "train": "train a model by a recipe",
    "recipe": "print the file of a recipe, to begin your own from",
    "generate": "continue a text",
    "chat": "talk with a language model",
    "answer": "find answers in a text",
    "sample": "draw images or rows from a model that a recipe trained",
    "imagine": "draw a picture of what a text says",
    "attribute": "show which pixels speak for a class",
    "attack": "change an input so that a model is wrong",
    "dream": "show in a picture what a classifier sees in it",
    "visualize": "draw what the units of a classifier respond to",
    "stylize": "paint an image in the style of another",
    "fill": "fill the gaps of a table",
    "features": "turn rows of a table into features for another model",
    "anomalies": "find the unlikely rows of a table",
    "translate": "translate an image, such as grey to colour",
    "explain": "look inside a language model",
    "evaluate": "measure a model",
    "compare": "compare two language models by a reward",
    "search-errors": "count what beam search misses",
    "quantize": "save a language model in 8 or 4 bits",
    "push": "share a model on the Hub",
    "app": "open the page: write, answer, draw, watch runs",
    "demo": "train three small models, and open the page with them",
    "doctor": "check this installation, and say what is fast on this machine",
    "cache": "show or delete what genkit keeps to be quicker the next time",
}


def main(argv: list[str] | None = None) -> None:
    """Run the genkit command."""
    words = sys.argv[1:] if argv is None else argv
    # of a notebook that starts a command: no picture needs a backend, and it may be missing here
    os.environ.pop("MPLBACKEND", None)
    debug = "--debug" in words
    with contextlib.nullcontext() if debug else clean_errors():
        arguments = _parse([word for word in words if word != "--debug"])
        command = arguments.pop("command")
        del arguments["debug"]
        try:
            with console.quiet(arguments.pop("quiet")):
                _module(command).run(arguments)
            sys.stdout.flush()  # the reader of a pipe may be gone
        except (ValueError, OSError):
            raise
        except Exception as error:
            if debug or command == "train":  # where the error arose took long to reach
                raise
            message = " ".join(str(error).split())
            print(f"error: {type(error).__name__}: {message}; --debug shows where", file=sys.stderr)
            raise SystemExit(1) from None


def _module(command: str) -> Any:
    return importlib.import_module(f"genkit.commands.{command.replace('-', '_')}")


def _parse(words: list[str]) -> dict[str, Any]:
    """Parse a command line; only the module of its command is imported."""
    asked = next((word for word in words if not word.startswith("-")), None)
    narrow = functools.partial(argparse.HelpFormatter, indent_increment=1)  # long names fit, too
    description = "Train and use generative models."
    parser = Parser(prog="genkit", description=description, formatter_class=narrow)
    parser.add_argument("--version", action="version", version=f"genkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == asked:
            module = _module(name)
            module.add(command)
            command.epilog = f"examples:\n{module.EXAMPLES}"
            text = "print nothing but results and errors"
            command.add_argument("--quiet", action="store_true", help=text)
            command.add_argument("--debug", action="store_true", help="show where an error arose")
    # the words of a recipe stand in the card of its model as they were written
    return vars(parser.parse_args(words if asked == "train" else with_dashes(words)))


if __name__ == "__main__":
    main()
