"""genkit quantize: save a language model in 8 or 4 bits."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common

EXAMPLES = """\
  genkit quantize runs/charlm --to int8 --output_dir runs/small
  genkit quantize HuggingFaceTB/SmolLM2-135M-Instruct --to int4 --output_dir runs/smollm2
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", help="folder, Hub id, or GGUF file of a language model")
    parser.add_argument(
        "--to", choices=("int8", "int4"), required=True, help="bits of the weights of matrices"
    )
    parser.add_argument("--output-dir", required=True, help="the folder to be made")
    parser.add_argument("--revision", help="a branch, tag or commit on the Hub")
    common.add_loading(parser)
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Load the model quantised, save it, and print where."""
    as_json, folder = arguments.pop("json"), arguments.pop("output_dir")
    quantize = arguments.pop("to")
    from genkit.text.language_model import load_language_model
    from genkit.text.saving import check_folder, save

    console.silence_libraries()
    check_folder(folder, "--output_dir")
    language = load_language_model(
        arguments.pop("model"), quantize=quantize, device="cpu", **arguments
    )
    saved = save(language, folder)
    common.print_json(saved) if as_json else print(saved)
