"""genkit features: turn rows of a table into features for another model."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit features policies.csv --model runs/dae
  genkit features test.csv --model runs/dae --output test-features.csv
"""
ENDINGS = (".parquet", ".csv")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("data", help="a table: a file, a dataset or a Hub id")
    parser.add_argument(
        "--model", required=True, help="folder or Hub id of an autoencoder of tables"
    )
    flags.add(parser, flags.from_verb("genkit.tabular.features", "features", skip=("model",)))
    parser.add_argument("--output", default="features.parquet", help="file of the features")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write the features, and print how many there are."""
    as_json = arguments.pop("json")
    output = common.check_output(arguments.pop("output"), ENDINGS)
    from genkit.tabular.features import features

    console.silence_libraries()
    found = features(arguments.pop("data"), **arguments)
    found.save(output)
    if as_json:
        rows, count = found.values.shape
        facts = {"rows": rows, "features": count, "notes": found.notes, "output": str(output)}
        common.print_json(facts)
    else:
        print(f"{found}\n{output}")
