"""genkit generate: continue texts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from genkit import console, garbage
from genkit.commands import common, flags

if TYPE_CHECKING:
    from genkit.text.language_model import LanguageModel

EXAMPLES = """\
  genkit generate "The " --model runs/charlm --temperature 0.5 --seed 1
  genkit generate "I am a" --strategy beam --beams 5 --n-best 3
  cat prompts.txt | genkit generate - --model runs/charlm --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "prompt", nargs="+", help="one text or several; - reads lines of standard input"
    )
    own = ("trust_remote_code", "overflow")  # added by add_loading; of chats
    flags.add(parser, flags.from_verb("genkit.text.generation", "generate", skip=own))
    common.add_loading(parser)
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print prompts with their completions; a single one while it is written."""
    options = common.written_options(arguments)
    as_json, prompts = options.pop("json"), common.read_texts("prompt", options.pop("prompt"))
    with garbage.paused():
        from genkit.text.generation import generate
        from genkit.text.language_model import DEFAULT, load_language_model
        from genkit.text.options import LOAD

    console.silence_libraries()
    loading = {name: options.pop(name) for name in LOAD if name in options}
    language = load_language_model(options.pop("model", DEFAULT), **loading)
    if "draft" in options:
        loading.pop("revision", None)
        options["draft"] = load_language_model(options["draft"], **loading, argument="draft")
    if as_json:
        common.print_json(generate(prompts, model=language, **options))
    elif len(prompts) > 1 or options.get("n_best"):
        rows = generate(prompts, model=language, **options)
        print("\n\n".join(str(record) for row in rows for record in (row, *row.alternatives)))
    else:
        _print_stream(prompts[0], language, options)


def _print_stream(prompt: str, language: LanguageModel, options: dict[str, Any]) -> None:
    """Print a prompt, then the pieces of its completion as they come."""
    from genkit.text.generation import stream

    pieces = stream(prompt, model=language, **options)
    if not language.model.config.is_encoder_decoder:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
