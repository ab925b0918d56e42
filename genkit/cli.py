"""The genkit command: each subcommand a thin shell over a verb, imported only when asked for."""

from __future__ import annotations

import argparse
import importlib
import sys

from genkit.commands.flags import with_dashes
from genkit.errors import clean_errors

# Subcommand and its line in --help; a module of genkit/commands each
COMMANDS = {
    "generate": "continue a text",
    "answer": "find answers in a text",
    "sample": "draw images from a model that a recipe trained",
    "imagine": "draw a picture of what a text says",
    "explain": "look inside a language model",
    "evaluate": "measure a model",
    "push": "share a model on the Hub",
    "app": "open the page: write, answer, draw, watch runs",
}


def main(argv: list[str] | None = None) -> None:
    """Run the genkit command."""
    words = with_dashes(sys.argv[1:] if argv is None else argv)
    asked = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="genkit", description="Generative models, made plain.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == asked:
            module = importlib.import_module(f"genkit.commands.{name}")
            module.add(command)
            command.epilog = f"examples:\n{module.EXAMPLES}"
            command.add_argument("--debug", action="store_true", help="show where an error arose")
    arguments = vars(parser.parse_args(words))
    run = importlib.import_module(f"genkit.commands.{arguments.pop('command')}").run
    if arguments.pop("debug"):
        run(arguments)
        return
    with clean_errors():
        try:
            run(arguments)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except (ValueError, OSError):
            raise
        except Exception as error:
            told = " ".join(str(error).split())
            print(f"error: {type(error).__name__}: {told}; --debug shows where", file=sys.stderr)
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
