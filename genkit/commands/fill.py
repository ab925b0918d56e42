"""genkit fill: fill the gaps of a table."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit fill policies.csv --model runs/table --output filled.csv
  genkit fill policies.csv --model runs/table --draws 100 --seed 1 --cells cells.csv
"""
ENDINGS = (".csv",)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("data", help="a table with gaps: a file, a dataset or a Hub id")
    parser.add_argument("--model", required=True, help="folder or Hub id of a model of tables")
    flags.add(parser, flags.from_verb("genkit.tabular.filling", "fill", skip=("model",)))
    parser.add_argument("--output", default="filled.csv", help="file of the table")
    parser.add_argument("--cells", help="a CSV, for each filled cell with its interval")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write the table, and print what was filled."""
    as_json, cells = arguments.pop("json"), arguments.pop("cells")
    output = common.check_output(arguments.pop("output"), ENDINGS)
    cells = common.check_output(cells, ENDINGS) if cells else None
    from genkit.tabular.filling import fill

    console.silence_libraries()
    filled = fill(arguments.pop("data"), **arguments)
    filled.save(output)
    if cells:
        filled.save_cells(cells)
    if as_json:
        common.print_json({"cells": filled.cells, "notes": filled.notes, "output": str(output)})
    else:
        print(f"{filled}\n{output}")
