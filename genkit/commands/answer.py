"""genkit answer: find the answers to questions in a text."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from genkit import console
from genkit.commands import common, flags

if TYPE_CHECKING:
    from genkit.qa.answering import Answer


EXAMPLES = """\
  genkit answer --context course.txt "What weight is the exam?"
  cat course.txt | genkit answer --context - "When is it due?" --top-k 3 --json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("question", nargs="+", help="one question or several")
    parser.add_argument("--context", required=True, help="file with the text; - reads the input")
    own = ("trust_remote_code",)  # a flag of loading
    flags.add(parser, flags.from_verb("genkit.qa.answering", "answer", skip=own))
    common.add_loading(parser)
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Print each answer in its sentence, with its scores."""
    options = common.written_options(arguments)
    as_json, questions = options.pop("json"), options.pop("question")
    context = common.read_text("context", options.pop("context"))
    from genkit.qa.answering import answer

    console.silence_libraries()
    rows = answer(questions, context, **options)
    if as_json:
        records = common.as_json_value(rows)
        for record in records:  # without the text, which the user has
            for each in (record, *record["alternatives"]):
                del each["context"]
        common.print_json(records)
        return
    form = "terminal" if console.has_colours(sys.stdout) else "text"
    for row in rows:
        if len(rows) > 1:
            print(row.question)
        for record in (row, *row.alternatives):
            print(f"{record.highlight(form)}  {_format_scores(record)}")


def _format_scores(record: Answer) -> str:
    score = f"score {record.score:.3f}"
    return score if record.confidence is None else f"{score}, confidence {record.confidence:.3f}"
