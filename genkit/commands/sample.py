"""genkit sample: sample images, or rows of a table, from a saved model."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common, flags

EXAMPLES = """\
  genkit sample runs/vae
  genkit sample runs/diffusion -n 16 --seed 1 --label 3 --steps 10 --guidance 1.3
  genkit sample user/gan --output digits.png --json
  genkit sample runs/table -n 10000 --seed 0 --where "region=north" --output synthetic.csv
"""
IMAGES = 64  # by default
OF_TABLES = (".csv", ".parquet")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("-n", type=int, default=IMAGES, help=f"how many (default: {IMAGES})")
    flags.add(parser, flags.from_verb("genkit.vision.sampling", "sample"))
    skip = ("seed", "revision", "device")
    flags.add(parser, flags.from_verb("genkit.tabular.sampling", "sample_table", skip=skip))
    text = "file of the grid of images, or of the rows (default: samples.png, synthetic.csv)"
    parser.add_argument("--output", help=text)
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Write a grid of images, or a table, and print how they were sampled."""
    as_json, output = arguments.pop("json"), arguments.pop("output")
    model, count = arguments.pop("model"), arguments.pop("n")
    if output:
        common.check_output(output, (*common.PICTURES, *OF_TABLES))
    from genkit.hub import kinds
    from genkit.loading import kind_of_model

    console.silence_libraries()
    if kind_of_model(model, arguments.get("revision")) == kinds.TABLE:
        path = common.check_output(output or "synthetic.csv", OF_TABLES)
        from genkit.tabular.sampling import sample_table

        rows = sample_table(model, count, **arguments)
        rows.save(path)
        record, shown = {"rows": rows.rows, "seeds": rows.seeds}, str(rows)
    else:
        path = common.check_output(output or "samples.png")
        from genkit.vision.sampling import sample

        if "where" in arguments:
            raise ValueError(f"--where is for models of tables; {model!r} draws images")
        samples = sample(model, count, **arguments)
        samples.save_grid(path)
        record, shown = common.as_json_value(samples), str(samples)
    common.print_json(record | {"output": str(path)}) if as_json else print(f"{shown}\n{path}")
