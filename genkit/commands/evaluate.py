"""genkit evaluate: measure a model of images, text or tables, or generated images."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit evaluate runs/vae --data test.parquet --extractor runs/classifier --count 2000
  genkit evaluate pictures --data test.parquet --extractor runs/classifier     # a folder of images
  genkit evaluate runs/private --data test.parquet --task classify    # what the samples teach
  genkit evaluate runs/charlm --data sequel.txt --stride 64
  genkit evaluate runs/table --data test.csv --train policies.csv --output columns.png
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", help="folder or Hub id of a model; or generated images")
    parser.add_argument(
        "--data", required=True, help="real images, a table, or a text file; - for standard input"
    )
    skip = ("labels", "sampler", "evaluations")  # of images that are given in Python
    flags.add(parser, flags.from_verb("genkit.vision.evaluation", "evaluate", skip=skip))
    parser.add_argument("--output", help="a PNG, for a picture of each column of a table")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print figures with their protocol."""
    as_json, model, data = arguments.pop("json"), arguments.pop("model"), arguments.pop("data")
    output = arguments.pop("output")
    path = common.check_output(output) if output else None
    texts = [common.read_text("data", "-")] if data == "-" else data
    from genkit.tabular.evaluation import TableEvaluation
    from genkit.vision.evaluation import evaluate

    console.silence_libraries()
    record = evaluate(model, texts, **arguments)
    if path:
        if not isinstance(record, TableEvaluation):
            raise ValueError(f"--output {output} is for models of tables; leave it out")
        record.save(path)
    common.print_json(record) if as_json else print(record)
