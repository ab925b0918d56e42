"""The tab that answers questions about a text."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import gradio as gr

from genkit.app import finding, parts, work
from genkit.app.finding import ModelIndex

if TYPE_CHECKING:
    from genkit.qa.answering import Answer
    from genkit.qa.reader import Reader


BEST = 5  # answers in the table
CONTEXT = (
    "The course has lectures on Monday at noon and exercises on Thursday. The exam counts 60 % of "
    "the mark, the homework 40 %. Homework is due on Friday."
)
HINT = (
    "No model that answers questions was named. Train one with "
    "<code>accelerate launch recipes/train_qa.py</code>, then start the page with its folder."
)


def tab(shelf: ModelIndex) -> None:
    """Build the tab."""
    names = shelf.names(finding.ANSWERS)
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
    found = parts.canvas("answer")
    respond = parts.event(_answer, shelf)
    gr.on(
        [ask.click, question.submit], respond, [model, question, context], found, api_name="answer"
    )


def load(shelf: ModelIndex, name: str) -> Reader:
    """Load a model by its name in the page."""
    from genkit.qa import reader

    return parts.loaded(reader.load_reader, shelf.resolve(finding.ANSWERS, name), compile=False)


def _answer(shelf: ModelIndex, name: str, question: str, context: str) -> str:
    from genkit.qa import answering

    model = load(shelf, name)
    parts.limited("question", question)
    work.DESK.claim(len(parts.limited("text", context)), "characters")
    return show(answering.answer(question, context, model=model, top_k=BEST))


def show(record: Answer) -> str:
    """Write an answer in its text, and the other ones below."""
    rows = "".join(map(_row, (record, *record.alternatives)))
    none = "" if record.null_score is None else f"no answer at all: {record.null_score:.1%}"
    return (
        f'<div class="answer"><div class="answered">{record.highlight("html", whole=True)}</div>'
        "<table><thead><tr><th>answer</th><th>score</th><th>confidence</th></tr></thead>"
        f"<tbody>{rows}</tbody></table><p>{none}</p></div>"
    )


def _row(record: Answer) -> str:
    sure = "not calibrated" if record.confidence is None else f"{record.confidence:.1%}"
    return f"<tr><td>{html.escape(str(record))}</td><td>{record.score:.1%}</td><td>{sure}</td></tr>"
