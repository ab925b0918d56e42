"""genkit search-errors: how often a beam misses the most likely sequence."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit search-errors runs/seq2seq --data pairs.jsonl
  genkit search-errors runs/seq2seq --data pairs.jsonl --beams 1 --beams 4 --output errors.png
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", help="folder or Hub id of an encoder-decoder")
    parser.add_argument("--data", required=True, help="a table with columns source and target")
    flags.add(parser, flags.from_verb("genkit.text.search_errors", "search_errors"))
    parser.add_argument("--output", help="a PNG, for the picture of errors by width")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print the table, and draw the picture."""
    options = common.written_options(arguments)
    as_json, output = options.pop("json"), options.pop("output", None)
    path = common.check_output(output) if output else None
    from genkit.data.parallel import read_examples
    from genkit.text.search_errors import search_errors

    console.silence_libraries()
    pairs = [(each.source, each.target) for each in read_examples(options.pop("data"))]
    record = search_errors(options.pop("model"), pairs, **options)
    if path:
        record.save(path)
    common.print_json(record) if as_json else print(record)
