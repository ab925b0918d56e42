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
    flags.add(parser, flags.from_verb("genkit.text.comparison", "compare"))
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print the comparison."""
    from genkit.text.comparison import compare

    options = {name: value for name, value in arguments.items() if value is not None}
    as_json = options.pop("json")
    for name in ("prompts", "reward"):
        if name not in options:
            raise ValueError(f"--{name} is missing; give it")
    console.silence_libraries()
    record = compare(options.pop("model"), options.pop("reference"), **options)
    if as_json:
        common.print_json(record)
    else:
        print(record)
