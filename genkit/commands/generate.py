"""genkit generate: continue texts."""

from __future__ import annotations

import argparse
from typing import Any

from genkit.commands import common

EXAMPLES = """\
  genkit generate "The " --model runs/charlm --temperature 0.5 --seed 1
  genkit generate "I am a" --strategy beam --beams 5 --n-best 3
  cat prompts.txt | genkit generate - --model runs/charlm --json
"""
# Flag, type and help of the options that `genkit.generate` documents in full
FLAGS: common.Flags = (
    ("model", str, "folder or Hub id; GPT-2 unless told"),
    ("revision", str, "branch, tag or commit on the Hub"),
    ("dtype", str, "float32, bfloat16; on a GPU float16, too"),
    ("quantize", str, "int8, on a CPU"),
    ("strategy", str, "sample (default), greedy, stochastic, beam, diverse_beam, contrastive"),
    ("max-new-tokens", int, "longest completion; 200 unless told"),
    ("min-new-tokens", int, "shortest completion"),
    ("stop", str, "ends the text; may be given again"),
    ("bad-words", str, "never written; may be given again"),
    ("prefix", str, "what the completion begins with"),
    ("repetition-penalty", float, "above 1: less of what was said"),
    ("frequency-penalty", float, "above 0: less of what was said often"),
    ("no-repeat-ngram", int, "no sequence of so many tokens twice"),
    ("temperature", float, "below 1 more predictable, above 1 more surprising; sample"),
    ("top-k", int, "the k most likely tokens only; sample, contrastive"),
    ("top-p", float, "the most likely tokens of this probability; sample"),
    ("min-p", float, "tokens at least this share as likely as the likeliest; sample"),
    ("typical-p", float, "tokens of the most expected surprise; sample"),
    ("seed", int, "row i has seed + i; drawn unless given; sample, stochastic"),
    ("lookup", int, "guess so many tokens from the text so far: the same text, sooner"),
    ("draft", str, "guess by this smaller model: the same text, sooner"),
    ("beams", int, "texts kept at once; beam, diverse_beam"),
    ("length-penalty", float, "power of the length in a beam's score"),
    ("early-stopping", str, "of a beam: never; or yes, when enough texts have ended"),
    ("n-best", int, "how many texts of a beam to print"),
    ("groups", int, "of beams that avoid each other; diverse_beam"),
    ("diversity", float, "what a token costs that another group took; diverse_beam"),
    ("alpha", float, "weight of unlikeness; contrastive"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("prompt", nargs="+", help="one text or several; - for the input's lines")
    common.add_flags(parser, FLAGS, often=("stop", "bad-words"))
    common.add_loading(parser)
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print prompts with their completions; a single one while it is written."""
    options = common.said(arguments)
    as_json, prompts = options.pop("json"), common.lines("prompt", options.pop("prompt"))
    if options.get("early_stopping") == "yes":
        options["early_stopping"] = True
    from genkit.text.generation import generate, stream
    from genkit.text.language_model import DEFAULT, load_language_model
    from genkit.text.options import LOAD

    common.quiet()
    loading = {name: options.pop(name) for name in LOAD if name in options}
    language = load_language_model(options.pop("model", DEFAULT), **loading)
    if "draft" in options:
        loading.pop("revision", None)
        options["draft"] = load_language_model(options["draft"], **loading)
    if as_json:
        common.print_json(generate(prompts, model=language, **options))
    elif len(prompts) > 1 or options.get("n_best"):
        rows = generate(prompts, model=language, **options)
        print("\n\n".join(str(record) for row in rows for record in (row, *row.alternatives)))
    else:
        pieces = stream(prompts[0], model=language, **options)
        if not language.model.config.is_encoder_decoder:
            print(prompts[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
