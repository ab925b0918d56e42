"""The tab of chats: replies that stream in, by seed, each with its tokens in colours on demand."""

from __future__ import annotations

import html
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from genkit.app import chapters, code, events, jobs, model_index, parts, write
from genkit.app.model_index import ModelIndex
from genkit.text import chat_history

if TYPE_CHECKING:
    from genkit.text.chat_history import Entry
    from genkit.text.generation import Generation


LONGEST = 1000  # tokens of a reply
TALL = 560  # pixels of the conversation, beyond which it scrolls
HINT = (
    "No language model with a chat template was named. Start the page with one, such as a folder "
    "or a Hub id of a model that is fine-tuned for instructions: "
    "<code>genkit app user/model</code>."
)
OTHERS = "Models without a chat template are in the tab Write: "
# a button of a reply copies its text, or asks for its tokens
CLICKS = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-reply]");
  if (!button) return;
  if (button.dataset.reply === "copy") {
    genkit.copyText(genkit.textOf(button.closest(".message").querySelector(".content")));
  } else {
    trigger("click", { reply: Number(button.dataset.reply) });
  }
});
"""


@dataclass(frozen=True)
class Turn:
    """A message as the page keeps it."""

    entry: Entry
    record: Generation | None = None  # of a reply that was not stopped
    # that it was written with; the model by its name in the page
    options: dict[str, Any] = field(default_factory=dict)
    colours: str = ""  # HTML of its tokens, if they are shown


def tab(index: ModelIndex) -> None:
    """Build the tab."""
    chapters.add_help(
        "Talk to a model, and see how likely each token of a reply was.", "sampling", "transformers"
    )
    names = index.names(model_index.CHAT)
    others = [name for name in index.names(model_index.TEXT) if name not in names]
    listed = parts.hint(OTHERS + html.escape(", ".join(others)) + ".") if others else ""
    if not names:
        parts.canvas("no-chat", parts.hint(HINT) + listed)
        return
    with gr.Row():
        model = parts.chooser(names)
        system = gr.Textbox("", label="System message", lines=1, max_lines=6, min_width=300)
    if listed:
        parts.canvas("not-chat", listed)
    view = parts.canvas(
        "chat", format_chat([]), js_on_load=CLICKS, autoscroll=True, max_height=TALL
    )
    turns = gr.State([])
    message = gr.Textbox(
        "", label="Message", lines=1, max_lines=12, max_length=parts.LONGEST,
        placeholder="Enter sends, Shift and Enter begins a new line",
    )  # fmt: skip
    send, stop, again, another, forget, clear, download = _add_buttons()
    seed, *options = _add_options()
    given, shown = [model, turns, system, seed, *options], [view, turns, message]
    skipped = [gr.skip(), gr.skip()]
    ask = events.make_stream(
        _send, index, skipped, lambda _, name, turns, *rest: format_chat(turns)
    )
    gr.on(
        [send.click, message.submit],
        ask, [message, *given], shown, api_name="chat", **events.EVENT,
    )  # fmt: skip
    regenerate = events.make_stream(
        _regenerate, index, skipped, lambda name, turns, *rest: format_chat(turns)
    )
    again.click(regenerate, given, shown, api_name="regenerate", **events.EVENT)
    drawn = another.click(lambda: secrets.randbits(31), None, seed, api_name=False, queue=False)
    drawn.then(regenerate, given, shown, api_name=False, **events.EVENT)
    for do in (_send, _regenerate):
        stop.click(events.make_stop(do), queue=False, api_name=f"stop{do.__name__}")
    local: dict[str, Any] = {"api_name": False, "queue": False, **events.EVENT}
    forget.click(_undo, turns, shown, **local)
    clear.click(lambda: (format_chat([]), [], ""), None, shown, **local)
    download.click(None, js="() => genkit.save('#chat .json', 'chat.json')", api_name=False)
    _add_colours(index, view, turns)


def _add_buttons() -> list[gr.Button]:
    """Add a row of buttons: for the next message, for the last reply, for the whole chat."""
    with gr.Row():
        return [
            gr.Button("Send", variant="primary", min_width=90),
            gr.Button("Stop", min_width=90),
            gr.Button("Regenerate", min_width=130),
            gr.Button("New seed", min_width=110),
            gr.Button("Undo", min_width=90),
            gr.Button("New chat", min_width=110),
            gr.Button("Download", min_width=110),
        ]


def _add_options() -> list[gr.Number | gr.Slider]:
    """Add a row of options: seed, tokens, temperature and top-p."""
    with gr.Row():
        return [
            parts.seed_box(),
            gr.Slider(1, LONGEST, 200, step=1, label="Tokens", min_width=150),
            gr.Slider(0.05, 2, 0.7, step=0.05, label="Temperature", min_width=150),
            gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", min_width=150),
        ]


def _add_colours(index: ModelIndex, view: gr.HTML, turns: gr.State) -> None:
    """Let the buttons in the conversation colour the tokens of a reply."""
    colour = events.make_event(_colour, index, [gr.skip()])

    def clicked(request: gr.Request, event: gr.EventData, history: list[Turn]) -> Any:
        return colour(request, history, event._data)

    view.click(clicked, [turns], [view, turns], api_name=False, **events.EVENT)


# ---------------------------------------------------------------------------------------------
# Replies

State = tuple[str, list[Turn], Any]  # the conversation as HTML, its turns, the box of the message


def _send(
    index: ModelIndex, message: Any, name: str, turns: list[Turn], *fields: Any
) -> Iterator[State]:
    """Answer a message; until the reply begins, it is neither kept nor taken out of its box."""
    if not parts.check_length("Message", message).strip():
        raise ValueError("Message is empty")
    asked = [*turns, Turn({"role": "user", "content": message})]
    yield format_chat(asked, "…"), turns, gr.skip()
    yield from _answer(index, name, asked, *fields)


def _regenerate(index: ModelIndex, name: str, turns: list[Turn], *fields: Any) -> Iterator[State]:
    """Answer the last message again; until the reply begins, the last one is kept."""
    if len(turns) < 2:
        raise ValueError("there is no reply yet")
    yield format_chat(turns[:-1], "…"), turns, gr.skip()
    yield from _answer(index, name, turns[:-1], *fields)


def _answer(
    index: ModelIndex,
    name: str,
    turns: list[Turn],
    system: Any,
    seed: Any,
    longest: Any,
    temperature: Any,
    top_p: Any,
) -> Iterator[State]:
    """Yield a conversation while the reply to its last message is written."""
    from genkit.text import generation

    seed, longest = parts.check_seed(seed), parts.check_count("Tokens", longest, 1, LONGEST)
    options = {"strategy": "sample", "seed": seed, "max_new_tokens": longest}
    options["temperature"] = parts.check_number("Temperature", temperature, 0.05, 2)
    options["top_p"] = parts.check_number("Top-p", top_p, 0.05, 1)
    turns = _with_system(turns, parts.check_length("System message", system))
    messages = chat_history.as_messages([turn.entry for turn in turns])
    length = sum(len(message["content"]) for message in messages)
    jobs.QUEUE.claim(min(length, jobs.BUDGET // 2), "characters")  # older turns may be dropped
    jobs.QUEUE.claim(longest, "tokens times texts")
    model = write.load_language_model(index, name)
    if model.tokenizer.chat_template is None:
        raise ValueError(
            f"Model: {name} has no chat template; choose another, or use it in the tab Write"
        )
    reply = Turn({"role": "assistant", "content": "", "seed": seed, "stopped": True})
    options["overflow"] = "drop_oldest"
    for piece in generation.stream(messages, model=model, **options):
        entry = {**reply.entry, "content": reply.entry["content"] + piece.text}
        if piece.record:
            del entry["stopped"]
        reply = Turn(entry, piece.record, {"model": name, **options})
        now = [*turns, reply]
        yield format_chat(now), now, ""


def _with_system(turns: list[Turn], system: str) -> list[Turn]:
    """Return a conversation with this system message; without one if it is empty."""
    rest = [turn for turn in turns if turn.entry["role"] != "system"]
    return [Turn({"role": "system", "content": system}), *rest] if system.strip() else rest


def _undo(turns: list[Turn]) -> State:
    """Forget the last message and its reply, and put the message back into its box."""
    kept, last = turns[:-2], turns[-2:]
    return format_chat(kept), kept, last[0].entry["content"] if len(last) == 2 else gr.skip()


def _colour(index: ModelIndex, turns: list[Turn], clicked: Any) -> tuple[str, list[Turn]]:
    """Show the tokens of a reply in colours, or no longer."""
    from genkit.text import alternatives, pages

    number = clicked.get("reply") if isinstance(clicked, dict) else None
    i = parts.check_count("reply", number, 0, len(turns) - 1)
    record, colours = turns[i].record, ""
    if record and not turns[i].colours:
        jobs.QUEUE.claim(len(record.prompt) + len(record.completion), "characters")
        model = write.load_language_model(index, turns[i].options["model"])
        seen = alternatives.alternatives(record, model=model)
        colours = pages.fragment(replace(seen, prompt=""))
    turns = [*turns[:i], replace(turns[i], colours=colours), *turns[i + 1 :]]
    return format_chat(turns), turns


# ---------------------------------------------------------------------------------------------
# HTML


def format_chat(turns: list[Turn], pending: str = "") -> str:
    """Show a conversation, all of whose contents are text.

    Args:
        pending: stands for the reply that has not begun.
    """
    messages = "".join(_message(i, turn) for i, turn in enumerate(turns))
    if pending:
        messages += f'<div class="message assistant"><div class="content">{pending}</div></div>'
    if not messages:
        return parts.hint("Write a message below.")
    file = chat_history.as_json([turn.entry for turn in turns])
    again = _code(turns) if turns and turns[-1].record else ""
    return (
        f'<div class="messages">{messages}</div><pre class="json" hidden>{html.escape(file)}</pre>'
        f"{again}"
    )


def _code(turns: list[Turn]) -> str:
    """Show the Python that makes the last reply again."""
    messages = chat_history.as_messages([turn.entry for turn in turns[:-1]])
    return code.fold(code.python("generate", [messages], turns[-1].options))


def _message(i: int, turn: Turn) -> str:
    role = html.escape(turn.entry["role"])
    content = html.escape(turn.entry["content"])
    if turn.colours:
        content = f'<div class="written"><div class="text">{turn.colours}</div></div>'
    foot = f"<p>{_foot(i, turn)}</p>" if role == "assistant" else ""
    return f'<div class="message {role}"><div class="content">{content}</div>{foot}</div>'


def _foot(i: int, turn: Turn) -> str:
    """Name the seed of a reply, and offer what can be done with it."""
    facts = [f"seed {turn.entry['seed']}"]
    buttons = [("copy", "Copy")]
    if turn.record:
        facts.append(f"{len(turn.record.tokens)} tokens")
        dropped = len(turn.record.dropped)
        facts += [f"without the oldest {dropped} messages, which did not fit"] if dropped else []
        facts += ["cut off by Tokens"] if turn.record.finish == "length" else []
        buttons.append((str(i), "Plain text" if turn.colours else "Tokens in colours"))
    else:
        facts.append("unfinished")
    return " · ".join(facts) + "".join(
        f' <button type="button" data-reply="{value}">{text}</button>' for value, text in buttons
    )
