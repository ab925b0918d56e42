"""genkit answer: find answers in a text."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from genkit.commands import common

if TYPE_CHECKING:
    from genkit.qa.answering import Answer


EXAMPLES = """\
  genkit answer --context course.txt "What weight is the exam?"
  cat course.txt | genkit answer --context - "When is it due?" --top-k 3 --json
"""
FLAGS: common.Flags = (
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


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("question", nargs="+", help="one question or several")
    parser.add_argument("--context", required=True, help="file with the text; - reads the input")
    common.add_flags(parser, FLAGS)
    parser.add_argument(
        "--handle-impossible",
        action=argparse.BooleanOptionalAction,
        help="whether there may be no answer; unless told, if the model was trained for it",
    )
    common.add_loading(parser)
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print each answer in its sentence, with its figures."""
    options = common.said(arguments)
    as_json, questions = options.pop("json"), options.pop("question")
    context = common.read("context", options.pop("context"))
    from genkit.qa.answering import answer

    common.quiet()
    rows = answer(questions, context, **options)
    if as_json:
        found = common.plain(rows)
        for record in found:  # of which each has the text that was given
            for each in (record, *record["alternatives"]):
                del each["context"]
        common.print_json(found)
        return
    form = "terminal" if sys.stdout.isatty() else "text"
    for row in rows:
        if len(rows) > 1:
            print(row.question)
        for record in (row, *row.alternatives):
            print(f"{record.highlight(form)}  {_figures(record)}")


def _figures(record: Answer) -> str:
    score = f"score {record.score:.3f}"
    return score if record.confidence is None else f"{score}, confidence {record.confidence:.3f}"
