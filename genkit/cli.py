"""The genkit command: each subcommand a thin shell over a verb, imported only when asked for."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genkit.qa import Answer


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
    _add_answer(commands.add_parser("answer", help="find answers in a text"))
    arguments = parser.parse_args(argv)
    with clean_errors():
        {"generate": _generate, "answer": _answer}[arguments.command](arguments)


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
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--eager", action="store_true", help="never compile")
    speed.add_argument("--compile", action="store_true", help="compile before anything else")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's code")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was said; of compiling, nothing if it is to be done when it pays."""
    options = {name: value for name, value in vars(arguments).items() if value is not None}
    del options["command"]
    if options.pop("eager"):
        options["compile"] = False
    elif not options["compile"]:
        del options["compile"]
    return options


def _generate(arguments: argparse.Namespace) -> None:
    options = _options(arguments)
    prompts = options.pop("prompt")
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


# The same of `genkit.answer`
_ANSWER_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("model", str, "folder or Hub id; DistilBERT trained on SQuAD unless told"),
    ("revision", str, "branch, tag or commit on the Hub"),
    ("top-k", int, "how many answers to print for a question"),
    ("max-seq-len", int, "tokens read at once, with the question; 384 unless told"),
    ("doc-stride", int, "tokens read again with the next ones; 128 unless told"),
    ("max-answer-len", int, "longest answer in tokens; 15 unless told"),
    ("threshold", float, "log-odds of no answer above which there is none"),
    ("dtype", str, "float32, bfloat16; on a GPU float16, too"),
    ("quantize", str, "int8, on a CPU"),
)


def _add_answer(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'genkit answer --context course.txt "What weight is the exam?"'
    parser.add_argument("question", nargs="+", help="one question or several")
    parser.add_argument("--context", required=True, help="file with the text; - reads the input")
    for name, kind, text in _ANSWER_FLAGS:
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument(
        "--handle-impossible",
        action=argparse.BooleanOptionalAction,
        help="whether there may be no answer; unless told, if the model was trained for it",
    )
    _add_loading(parser)


def _answer(arguments: argparse.Namespace) -> None:
    options = _options(arguments)
    questions = options.pop("question")
    context = _read(options.pop("context"))
    from transformers.utils import logging

    from genkit.qa import answer

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rows = answer(questions, context, **options)
    form = "terminal" if sys.stdout.isatty() else "text"
    for row in rows:
        if len(rows) > 1:
            print(row.question)
        for record in (row, *row.alternatives):
            print(f"{record.highlight(form)}  {_figures(record)}")


def _read(path: str) -> str:
    """Read a text as it is, so that places in it are those of the file."""
    raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"context: {path} is not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"context: {path} is empty; give a text")
    return text


def _figures(record: Answer) -> str:
    score = f"score {record.score:.3f}"
    return score if record.confidence is None else f"{score}, confidence {record.confidence:.3f}"
