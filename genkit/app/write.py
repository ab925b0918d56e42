"""The tab that generates text: the next token by temperature, a text in colours, its beams."""

from __future__ import annotations

import functools
import html
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from genkit.app import chapters, code, events, jobs, model_index, parts
from genkit.app.model_index import ModelIndex
from genkit.hub import card

if TYPE_CHECKING:
    from genkit.text.explain import BeamTree, NextTokens
    from genkit.text.generation import Generation
    from genkit.text.language_model import LanguageModel


TEMPERATURES = [round(0.05 * i, 2) for i in range(1, 41)]
TOP = 10
LONGEST = 400  # tokens of a text
MOST_BEAMS = 16
STRATEGIES = ["sample", "greedy", "stochastic", "beam", "diverse_beam", "contrastive"]
BEAMS = ("beam", "diverse_beam")
TOP_P = 0.9  # to begin with: without it, unlikely tokens come too often for a text to read well
HINT = (
    "No language model was named. Train one with "
    "<code>genkit train charlm</code>, then start the page with its folder: "
    "<code>genkit app runs/charlm</code>."
)


def tab(index: ModelIndex, page: gr.Blocks) -> None:
    """Build the tab."""
    chapters.add_help(
        "See how the temperature changes the next token, and what a model writes.",
        "language-models",
        "sampling",
    )
    names = index.names(model_index.TEXT)
    if not names:
        parts.canvas("no-write", parts.hint(HINT))
        return
    first = card.example_prompt(Path(index.resolve(model_index.TEXT, names[0]))) or "The "
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            model = parts.chooser(names)
            prompt = gr.Textbox(
                first, label="Prompt", lines=3, max_lines=12, max_length=parts.LONGEST
            )
            with gr.Row():
                strategy = gr.Dropdown(STRATEGIES, value="sample", label="Strategy", min_width=130)
                longest = gr.Slider(1, LONGEST, 100, step=1, label="Tokens", min_width=150)
                seed = parts.seed_box()
            limits = _add_limits(strategy)
            with gr.Row():
                write = gr.Button("Write", variant="primary", min_width=90)
                another = gr.Button("New seed", min_width=90)
                beams = gr.Button("Beams", min_width=90)
                stop = gr.Button("Stop", min_width=90)
        with gr.Column(scale=2, min_width=300):
            temperature = gr.Slider(
                TEMPERATURES[0], TEMPERATURES[-1], 1.0, step=0.05, label="Temperature"
            )
            bars = parts.canvas("bars")
    with gr.Row():
        parts.add_copy("#text :is(.text, .beams)", "text.txt")
    text = parts.canvas("text")
    inputs = [model, prompt, temperature]
    _show_next(index, page, inputs, bars, text)
    options = [model, prompt, strategy, temperature, longest, seed, *limits]
    compose = events.make_stream(_write, index)
    drawn = another.click(lambda: secrets.randbits(31), None, seed, api_name=False, queue=False)
    for start, name in ((write.click, "write"), (drawn.then, False)):
        start(None, None, text, js=parts.busy("text", "Writing"), api_name=False)
        start(compose, options, text, api_name=name, **events.EVENT)
    tree = [model, prompt, strategy, longest, limits[-1]]
    beams.click(None, None, text, js=parts.busy("text", "Searching"), api_name=False)
    beams.click(events.make_job(_beams, index), tree, text, api_name="beams", **events.EVENT)
    for do in (_write, _beams):
        stop.click(events.make_stop(do), queue=False, api_name=f"stop{do.__name__}")


def _add_limits(strategy: gr.Dropdown) -> list[Any]:
    """Build the fields that not all strategies use; some are shown with the strategies that do."""
    with gr.Row():
        top_p = gr.Slider(0.05, 1, TOP_P, step=0.05, label="Top-p", min_width=150)
        top_k = gr.Number(0, label="Top-k", info="0: all", precision=0, minimum=0, min_width=90)
        beams = gr.Number(
            4, label="Beams", precision=0, minimum=1, maximum=MOST_BEAMS, min_width=90
        )

    def show(strategy: str) -> list[Any]:
        used = (strategy == "sample", strategy in ("sample", "contrastive"))
        return [gr.update(visible=each) for each in used]

    strategy.input(show, strategy, [top_p, top_k], api_name=False, queue=False)
    return [top_p, top_k, beams]


def _show_next(
    index: ModelIndex, page: gr.Blocks, inputs: list[Any], bars: gr.HTML, text: gr.HTML
) -> None:
    """Draw the next token anew whenever an input changes; inputs begin with the model."""
    model, prompt, temperature = inputs
    model.change(None, model, [bars, text], js=parts.loading(2), api_name=False)
    redraw = events.make_event(_redraw, index)
    gr.on(
        [temperature.input, prompt.change], redraw, inputs, bars,
        api_name="next_tokens", **events.LIVE,
    )  # fmt: skip
    gr.on(
        [page.load, model.change], events.make_job(_redraw, index), inputs, bars,
        api_name=False, trigger_mode="always_last", **events.EVENT,
    )  # fmt: skip


def load_language_model(index: ModelIndex, name: str) -> LanguageModel:
    """Load a model by its name in the page."""
    return _load(index.resolve(model_index.TEXT, name))


def _load(model: str) -> LanguageModel:
    """Load a model, once."""
    from genkit.text import language_model

    return events.load_once(language_model.load_language_model, model)


# ---------------------------------------------------------------------------------------------
# The next token


def _redraw(index: ModelIndex, name: str, prompt: str, temperature: float) -> str:
    model = index.resolve(model_index.TEXT, name)
    temperature = parts.check_number("Temperature", temperature, TEMPERATURES[0], TEMPERATURES[-1])
    if round(temperature, 2) not in TEMPERATURES:
        raise ValueError(f"Temperature must be a multiple of 0.05, got {temperature}")
    return format_bars(next_tokens(model, prompt), TEMPERATURES.index(round(temperature, 2)))


def next_tokens(model: str, prompt: str) -> NextTokens:
    """Return the likeliest next tokens at every temperature of the slider, by one forward pass."""
    from genkit.hub import model_files

    jobs.QUEUE.claim(len(parts.check_length("Prompt", prompt)), "characters")
    return _next_tokens(model, model_files.last_written(Path(model)), prompt)


@functools.lru_cache(maxsize=64)
def _next_tokens(model: str, written: int, prompt: str) -> NextTokens:
    from genkit.text import explain

    loaded = _load(model)
    top = min(TOP, loaded.model.config.vocab_size)
    return explain.next_tokens(prompt, model=loaded, temperatures=TEMPERATURES, top=top)


def format_bars(record: NextTokens, which: int) -> str:
    """Draw the distribution at one of the temperatures as bars."""
    from genkit.text import token_names

    rows = "".join(
        f'<div class="next"><bdi>{html.escape(name)}</bdi>'
        f'<span class="track"><span style="width: {share:.2%}"></span></span>'
        f"<span>{token_names.percent(share)}</span></div>"
        for name, share in zip(record.names, record.probabilities[which], strict=True)
    )
    entropy = record.entropies[which]
    return f'<div class="nexts">{rows}<p>entropy {entropy:.2f} bits</p></div>'


# ---------------------------------------------------------------------------------------------
# A text


def _write(
    index: ModelIndex,
    name: str,
    prompt: str,
    strategy: str,
    temperature: float,
    longest: int,
    seed: int | None,
    *limits: Any,
) -> Iterator[str]:
    """Yield a text while it is written, and at its end with its tokens in colours."""
    from genkit.text import generation

    longest = parts.check_count("Tokens", longest, 1, LONGEST)
    options = _options(strategy, temperature, seed, *limits)
    model = load_language_model(index, name)
    jobs.QUEUE.claim(len(parts.check_length("Prompt", prompt)), "characters")
    jobs.QUEUE.claim(longest * _texts(strategy, limits[-1]), "tokens times texts")
    text = "" if model.model.config.is_encoder_decoder else prompt
    record = None
    for piece in generation.stream(prompt, model=model, max_new_tokens=longest, **options):
        text, record = text + piece.text, piece.record
        yield format_text("writing …", html.escape(text))
    assert record is not None, "a stream ends with its record"
    seeded = "" if record.seed is None else f"seed {record.seed} · "
    head, text = coloured(record, model) if record.continues else ("", html.escape(record.text))
    again = {"model": name, "max_new_tokens": longest, **options}
    yield format_text(seeded + head, text, code.format_code("generate", prompt, again))


def _options(
    strategy: str, temperature: float, seed: int | None, top_p: float, top_k: int, beams: int
) -> dict[str, Any]:
    """Return the options of a strategy, from fields that may hold anything."""
    found: dict[str, Any] = {"strategy": strategy}
    if strategy == "sample":
        found["temperature"] = parts.check_number("Temperature", temperature, 0.05, 2)
        found["top_p"] = parts.check_number("Top-p", top_p, 0.05, 1)
    if strategy in ("sample", "contrastive"):
        found["top_k"] = parts.check_count("Top-k", top_k, 0, 1 << 20) or None
    if strategy in ("sample", "stochastic"):
        found["seed"] = parts.check_seed(seed)
    if strategy in BEAMS:
        found["beams"] = parts.check_count("Beams", beams, 1, MOST_BEAMS)
    return found


def _texts(strategy: str, beams: int) -> int:
    """Return how many texts a strategy keeps at once."""
    return int(beams) if strategy in BEAMS else 4 if strategy == "contrastive" else 1


def format_text(head: str, text: str, above: str = "") -> str:
    """Show a text, given as HTML, with a line and other HTML above it.

    Nothing is below it, where the panels of its tokens are.
    """
    line = f"<p>{html.escape(head)}</p>"
    return f'<div class="written">{line}{above}<div class="text">{text}</div></div>'


def coloured(record: Generation, model: LanguageModel) -> tuple[str, str]:
    """Colour the tokens that fit into the model's context; return an explanation, and HTML."""
    from genkit.text import alternatives, kv_cache, pages

    given = len(alternatives.prompt_tokens(record, model))
    room = kv_cache.context_length(model.model) + 1 - given
    seen = alternatives.alternatives(replace(record, tokens=record.tokens[:room]), model=model)
    head = f"{seen.summary}. Red unlikely, green likely; point at a token for the others."
    rest = record.completion[len(seen.text) :] if len(record.tokens) > room else ""
    head += " Tokens beyond the model's context have no colours." if rest else ""
    return head, pages.fragment(seen) + html.escape(rest)


def _beams(
    index: ModelIndex, name: str, prompt: str, strategy: str, longest: int, beams: int
) -> str:
    from genkit.text import explain

    longest = parts.check_count("Tokens", longest, 1, LONGEST)
    beams = parts.check_count("Beams", beams, 1, MOST_BEAMS)
    if strategy == "diverse_beam":
        raise ValueError("Strategy: the groups of diverse_beam have no common tree; choose beam")
    model = load_language_model(index, name)
    jobs.QUEUE.claim(len(parts.check_length("Prompt", prompt)), "characters")
    jobs.QUEUE.claim(longest * beams, "tokens times texts")
    options: dict[str, Any] = {"beams": beams, "max_new_tokens": longest}
    tree = explain.beam_tree(prompt, model=model, **options)
    again = {"model": name, **options}
    shown = code.fold(
        code.command("explain", prompt, {"show": "beams", **again}),
        code.python("beam_tree", [prompt], again),
    )
    return shown + format_tree(tree, beams)


def format_tree(record: BeamTree, beams: int) -> str:
    """Draw the tree of beams: continuations are below their text, the best first."""
    from genkit.text import token_names

    prompt = html.escape(token_names.one_line(record.prompt[-60:]))
    legend = (
        f"A beam search that keeps {beams} texts, for {len(record.steps)} tokens. The winner is "
        "blue, ■ has ended, grey was dropped; with the log-probability of the text."
    )
    below = f"<ul>{_branch(record, 0, 0, record.winners())}</ul>"
    scrolls = 'role="group" aria-label="tree of beams" tabindex="0"'
    return f'<div class="beams" {scrolls}><p>{legend}</p><b>{prompt} …</b>{below}</div>'


def _branch(record: BeamTree, depth: int, parent: int, winners: list[int]) -> str:
    """Draw what follows a kept candidate, as items of a list; an only child is not indented.

    Args:
        winners: empty off the winner's path.
    """
    if depth == len(record.steps):
        return ""
    step, kept, items, dropped, after = record.steps[depth], -1, "", "", ""
    only = sum(c.parent == parent and c.fate != "dropped" for c in step) == 1
    for i, candidate in enumerate(step):
        kept += candidate.fate == "kept"  # the number by which its children name this one
        if candidate.parent != parent:
            continue
        won = winners[depth : depth + 1] == [i]
        end = " ■" if candidate.fate == "finished" else ""
        name = f"<bdi>{html.escape(record.names[depth][i])}</bdi>{end}"
        text = f"{name} <small>{candidate.total:.2f}</small>"
        if candidate.fate == "dropped":
            dropped += f"<span>{text}</span> "
            continue
        deeper = winners if won else []
        below = _branch(record, depth + 1, kept, deeper) if candidate.fate == "kept" else ""
        nested, after = ("", below) if only else (f"<ul>{below}</ul>" if below else "", "")
        items += f"<li{' class=won' if won else ''}>{text}{nested}</li>"
    return items + (f'<li class="dropped">{dropped}</li>' if dropped else "") + after
