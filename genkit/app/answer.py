"""The tab that answers questions about a text."""

from __future__ import annotations

import html
import shlex
from typing import TYPE_CHECKING

import gradio as gr

from genkit.app import chapters, code, events, jobs, model_index, parts
from genkit.app.model_index import ModelIndex

if TYPE_CHECKING:
    from genkit.qa.answering import Answer
    from genkit.qa.reader import Reader


TOP = 5  # answers in the table
CONTEXT = (
    "The course has lectures on Monday at noon and exercises on Thursday. The exam counts 60 % of "
    "the mark, the homework 40 %. Homework is due on Friday."
)
HINT = (
    "No model that answers questions was named. Train one with "
    "<code>genkit train qa</code>, then start the page with its folder."
)


def tab(index: ModelIndex) -> None:
    """Build the tab."""
    chapters.add_help("Ask about a text: the model marks the answer in it.", "transformers")
    names = index.names(model_index.ANSWERS)
    if not names:
        parts.canvas("no-answer", parts.hint(HINT))
        return
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            context = gr.Textbox(
                CONTEXT, label="Text", lines=8, max_lines=20, max_length=parts.LONGEST
            )
        with gr.Column(scale=2, min_width=300):
            model = parts.chooser(names)
            question = gr.Textbox("When is homework due?", label="Question", max_length=1000)
            ask = gr.Button("Answer", variant="primary")
            with gr.Row():
                parts.add_copy("#answer td", "answer.txt")
    shown = parts.canvas("answer")
    starts, respond = [ask.click, question.submit], events.make_job(_answer, index)
    gr.on(starts, None, None, shown, js=parts.busy("answer", "Reading"), api_name=False)
    gr.on(starts, respond, [model, question, context], shown, api_name="answer", **events.EVENT)


def load_reader(index: ModelIndex, name: str) -> Reader:
    """Load a model by its name in the page."""
    from genkit.qa import reader

    return events.load_once(reader.load_reader, index.resolve(model_index.ANSWERS, name))


def _answer(index: ModelIndex, name: str, question: str, context: str) -> str:
    from genkit.qa import answering

    model = load_reader(index, name)
    parts.check_length("Question", question)
    jobs.QUEUE.claim(len(parts.check_length("Text", context)), "characters")
    record = answering.answer(question, context, model=model, top_k=TOP)
    return format_answer(record) + _code(name, question, context)


def _code(name: str, question: str, context: str) -> str:
    """Show the command, which reads the text from a pipe, and the Python."""
    options = {"model": name, "top_k": TOP}
    piped = f"printf %s {shlex.quote(context)} | "
    asked = piped + code.command("answer", question, {"context": "-", **options})
    return code.fold(asked, code.python("answer", [question, context], options))


def format_answer(record: Answer) -> str:
    """Mark an answer in its text, with a table of the alternatives below."""
    rows = "".join(map(_row, (record, *record.alternatives)))
    null = "" if record.null_score is None else f"no answer at all: {record.null_score:.1%}"
    return (
        f'<div class="answer"><div class="answered">{record.highlight("html", whole=True)}</div>'
        "<table><thead><tr><th>answer</th><th>score</th><th>confidence</th></tr></thead>"
        f"<tbody>{rows}</tbody></table><p>{null}</p></div>"
    )


def _row(record: Answer) -> str:
    confidence = "not calibrated" if record.confidence is None else f"{record.confidence:.1%}"
    cells = (html.escape(str(record)), f"{record.score:.1%}", confidence)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
