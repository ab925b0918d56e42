"""genkit compare: two language models on the same prompts, by a reward of what they write."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit compare runs/aligned runs/sft --prompts prompts.txt --reward runs/reward
  genkit compare runs/aligned runs/sft --prompts prompts.txt --reward sentiment --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", help="folder or Hub id of a language model")
    parser.add_argument("reference", help="folder or Hub id of the one to compare with")
    parser.add_argument("--prompts", required=True, help="a text file, one a line, or a table")
    parser.add_argument(
        "--reward",
        required=True,
        help="sentiment, length=N, format=REGEX, mymodule:function, or a reward model's folder",
    )
    skip = ("prompts", "reward")
    flags.add(parser, flags.from_verb("genkit.text.comparison", "compare", skip=skip))
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print the comparison."""
    from genkit.text.comparison import compare

    options = {name: value for name, value in arguments.items() if value is not None}
    as_json = options.pop("json")
    console.silence_libraries()
    record = compare(options.pop("model"), options.pop("reference"), **options)
    if as_json:
        common.print_json(record)
    else:
        print(record)
