"""genkit anomalies: the unlikely rows of a table."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit anomalies claims.csv --model runs/table
  genkit anomalies claims.csv --model runs/table --count 50 --output surprises.csv
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("data", help="a table, or a series: a file, a dataset or a Hub id")
    parser.add_argument("--model", required=True, help="folder or Hub id of a table model")
    flags.add(parser, flags.from_verb("genkit.tabular.anomalies", "anomalies", skip=("model",)))
    parser.add_argument("--output", help="a CSV, for how surprising each row is")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print the unlikely rows, and write how surprising each row is."""
    as_json, output = arguments.pop("json"), arguments.pop("output")
    path = common.check_output(output, (".csv",)) if output else None
    from genkit.tabular.anomalies import anomalies

    console.silence_libraries()
    record = anomalies(arguments.pop("data"), **arguments)
    if path:
        record.save(path)
    common.print_json(record) if as_json else print(record)
