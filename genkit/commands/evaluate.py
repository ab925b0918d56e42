"""genkit evaluate: measure a model of images, or of text."""

from __future__ import annotations

import argparse
from typing import Any

from genkit.commands import common
from genkit.hub import kinds

EXAMPLES = """\
  genkit evaluate runs/vae --data test.parquet --extractor runs/classifier --count 2000
  genkit evaluate pictures --data test.parquet --extractor runs/classifier     # a folder of images
  genkit evaluate runs/charlm --data sequel.txt --stride 64
"""
IMAGES: common.Flags = (
    ("extractor", str, "classifier to look through: a folder, a Hub id or inception; images"),
    ("count", int, "images to draw; images"),
    ("k", int, "the neighbour of precision, recall and coverage; images"),
    ("seed", int, "image i is drawn with seed + i; images"),
)
TEXT: common.Flags = (("stride", int, "tokens a window moves at a time; text"),)


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("model", help="folder or Hub id of a model; or generated images")
    parser.add_argument("--data", required=True, help="real images, or a file of text; - the input")
    common.add_flags(parser, IMAGES + TEXT)
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print figures with their protocol."""
    options = {name: value for name, value in arguments.items() if value is not None}
    as_json, model, data = options.pop("json"), options.pop("model"), options.pop("data")
    from genkit.hub import download

    folder = download.find_model(model)
    text = folder is not None and kinds.kind_of(folder) == kinds.TEXT
    for name, *_ in IMAGES if text else TEXT:
        if name in options:
            other = "images" if text else "text"
            raise ValueError(f"{name} is for models of {other}; leave it out")
    common.quiet()
    record = _perplexity(model, data, options) if text else _judged(model, data, options)
    common.print_json(record) if as_json else print(record)


def _perplexity(model: str, data: str, options: dict[str, Any]) -> Any:
    from genkit.text.perplexity import perplexity

    return perplexity(common.read("data", data), model=model, **options)


def _judged(model: str, data: str, options: dict[str, Any]) -> Any:
    if "extractor" not in options:
        raise ValueError("extractor: give the folder of a model by recipes/train_classifier.py")
    from genkit.vision.evaluation import evaluate

    return evaluate(model, data, **options)
