"""The genkit command: each subcommand a thin shell over a verb, imported only when asked for."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Turn a bad argument, or a disk or a file that refuses, into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main(argv: list[str] | None = None) -> None:
    """Run the genkit command."""
    parser = argparse.ArgumentParser(prog="genkit", description="Generative models, made plain.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_generate(commands.add_parser("generate", help="continue a text"))
    arguments = parser.parse_args(argv)
    with clean_errors():
        _generate(arguments)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'genkit generate "The " --model runs/charlm --temperature 0.5 --seed 1'
    parser.add_argument("prompt", nargs="+", help="one text or several")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--strategy", default="sample", help="greedy, stochastic, sample or beam")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest completion")
    parser.add_argument("--temperature", type=float, help="below 1 more predictable; sample")
    parser.add_argument("--top-k", type=int, help="the k most likely tokens only; sample")
    parser.add_argument("--top-p", type=float, help="the likely tokens of this probability; sample")
    parser.add_argument("--beams", type=int, help="texts kept at once; beam")
    parser.add_argument("--length-penalty", type=float, help="power of the length; beam")
    parser.add_argument("--seed", type=int, help="row i has seed + i; drawn unless given")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's code")


def _generate(arguments: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(arguments).items() if k not in ("command", "prompt")}
    from transformers.utils import logging

    from genkit.generation import generate

    logging.disable_progress_bar()
    records = generate(arguments.prompt, **options)
    assert isinstance(records, list), "a list of prompts gives a list of records"
    print("\n\n".join(map(str, records)))
