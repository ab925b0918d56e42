"""The genkit command: each subcommand a thin shell over a verb, imported only when asked for."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Turn a bad argument, or a disk or a file that refuses, into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main(argv: list[str] | None = None) -> None:
    """Run the genkit command."""
    parser = argparse.ArgumentParser(prog="genkit", description="Generative models, made plain.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_generate(commands.add_parser("generate", help="continue a text"))
    arguments = parser.parse_args(argv)
    with clean_errors():
        _generate(arguments)


# Flag, type and help of the options that `genkit.generate` documents in full
_FLAGS: tuple[tuple[str, type, str], ...] = (
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


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'genkit generate "The " --model runs/charlm --temperature 0.5 --seed 1'
    parser.add_argument("prompt", nargs="+", help="one text or several")
    for name, kind, text in _FLAGS:
        action = "append" if name in ("stop", "bad-words") else "store"
        parser.add_argument(f"--{name}", type=kind, action=action, help=text)
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--eager", action="store_true", help="no packing, no compiled step")
    speed.add_argument("--compile", action="store_true", help="compile before the first token")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's code")


def _generate(arguments: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(arguments).items() if value is not None}
    prompts, _ = options.pop("prompt"), options.pop("command")
    if options.pop("eager"):
        options["compile"] = False
    elif not options["compile"]:
        del options["compile"]  # when it pays
    if options.get("early_stopping") == "yes":
        options["early_stopping"] = True
    from transformers.utils import logging

    from genkit.generation import generate, load, stream
    from genkit.language import DEFAULT
    from genkit.options import LOAD

    logging.disable_progress_bar()
    loading = {name: options.pop(name) for name in LOAD if name in options}
    language = load(options.pop("model", DEFAULT), **loading)
    if "draft" in options:
        loading.pop("revision", None)
        options["draft"] = load(options["draft"], **loading)
    if len(prompts) > 1 or options.get("n_best"):
        rows = generate(prompts, model=language, **options)
        print("\n\n".join(str(record) for row in rows for record in (row, *row.alternatives)))
        return
    pieces = stream(prompts[0], model=language, **options)
    if not language.model.config.is_encoder_decoder:
        print(prompts[0], end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
