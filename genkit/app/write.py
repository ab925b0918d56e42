"""The tab that generates text: the next token by temperature, a text in colours, its beams."""

from __future__ import annotations

import functools
import html
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from genkit.app import jobs, model_index, parts
from genkit.app.model_index import ModelIndex
from genkit.hub import card

if TYPE_CHECKING:
    from genkit.text.explain import BeamTree, NextTokens
    from genkit.text.generation import Generation
    from genkit.text.language_model import LanguageModel


TEMPERATURES = [round(0.05 * i, 2) for i in range(1, 41)]
TOP = 10
STRATEGIES = ["sample", "greedy", "stochastic", "beam", "diverse_beam", "contrastive"]
TEXTS = {"beam": 4, "diverse_beam": 4, "contrastive": 4}  # texts that a strategy keeps at once
HINT = (
    "No language model was named. Train one with "
    "<code>accelerate launch recipes/train_charlm.py</code>, then start the page with its folder: "
    "<code>genkit app runs/charlm</code>."
)


def tab(index: ModelIndex, page: gr.Blocks) -> None:
    """Build the tab."""
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
                longest = gr.Slider(1, 400, 100, step=1, label="Tokens", min_width=150)
                seed = parts.seed_box()
            with gr.Row():
                write = gr.Button("Write", variant="primary", min_width=90)
                another = gr.Button("New seed", min_width=90)
                beams = gr.Button("Beams", min_width=90)
        with gr.Column(scale=2, min_width=300):
            temperature = gr.Slider(
                TEMPERATURES[0], TEMPERATURES[-1], 1.0, step=0.05, label="Temperature"
            )
            bars = parts.canvas("bars")
    text = parts.canvas("text")
    inputs = [model, prompt, temperature]
    options = [model, prompt, strategy, temperature, longest, seed]
    redraw = parts.make_event(_redraw, index)
    compose = parts.make_event(_write, index)
    gr.on(
        [temperature.input, prompt.change, model.input], redraw, inputs, bars,
        api_name="next_tokens", **parts.LIVE,
    )  # fmt: skip
    page.load(redraw, inputs, bars, api_name=False, show_progress="hidden")
    write.click(compose, options, text, api_name="write")
    drawn = another.click(lambda: secrets.randbits(31), None, seed, api_name=False, queue=False)
    drawn.then(compose, options, text, api_name=False)
    beams.click(parts.make_event(_beams, index), [model, prompt], text, api_name="beams")


def load_language_model(index: ModelIndex, name: str) -> LanguageModel:
    """Load a model by its name in the page."""
    return _load(index.resolve(model_index.TEXT, name))


def _load(model: str) -> LanguageModel:
    """Load a model, not compiled: nobody waits for a compiler, and layers can pause for others."""
    from genkit.text import language_model

    return parts.load_once(language_model.load_language_model, model, compile=False)


# ---------------------------------------------------------------------------------------------
# The next token


def _redraw(index: ModelIndex, name: str, prompt: str, temperature: float) -> str:
    model = index.resolve(model_index.TEXT, name)
    if round(temperature, 2) not in TEMPERATURES:
        raise ValueError(f"temperature must be one of {TEMPERATURES}, got {temperature}")
    return format_bars(next_tokens(model, prompt), TEMPERATURES.index(round(temperature, 2)))


def next_tokens(model: str, prompt: str) -> NextTokens:
    """Return the likeliest next tokens at every temperature of the slider, by one forward pass."""
    from genkit.hub import model_files

    jobs.QUEUE.claim(len(parts.check_length("prompt", prompt)), "characters")
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
) -> str:
    from genkit.text import generation
    from genkit.text.options import DRAWS

    model = load_language_model(index, name)
    options: dict[str, Any] = {"strategy": strategy, "max_new_tokens": int(longest)}
    options |= {"temperature": temperature} if strategy == "sample" else {}
    options |= {"seed": seed} if strategy in DRAWS else {}
    jobs.QUEUE.claim(len(parts.check_length("prompt", prompt)), "characters")
    jobs.QUEUE.claim(int(longest) * TEXTS.get(strategy, 1), "tokens times texts")
    record = generation.generate(prompt, model=model, **options)
    seeded = "" if record.seed is None else f"seed {record.seed} · "
    head, text = _coloured(record, model) if record.continues else ("", html.escape(record.text))
    head = html.escape(seeded + head)
    return f'<div class="written"><p>{head}</p><div class="text">{text}</div></div>'


def _coloured(record: Generation, model: LanguageModel) -> tuple[str, str]:
    """Colour the tokens that fit into the model's context; return an explanation, and HTML."""
    from genkit.text import alternatives, kv_cache, pages, task

    room = kv_cache.context_length(model.model) + 1 - len(task.encode_prompt(record.prompt, model))
    seen = alternatives.alternatives(replace(record, tokens=record.tokens[:room]), model=model)
    head = f"{seen.summary}. Red unlikely, green likely; point at a token for the others."
    rest = record.completion[len(seen.text) :] if len(record.tokens) > room else ""
    head += " Tokens beyond the model's context have no colours." if rest else ""
    return head, pages.fragment(seen) + html.escape(rest)


def _beams(index: ModelIndex, name: str, prompt: str) -> str:
    from genkit.text import explain

    model = load_language_model(index, name)
    jobs.QUEUE.claim(len(parts.check_length("prompt", prompt)), "characters")
    return format_tree(explain.beam_tree(prompt, model=model))


def format_tree(record: BeamTree) -> str:
    """Draw the tree of beams: continuations are below their text, the best first."""
    from genkit.text import token_names

    prompt = html.escape(token_names.one_line(record.prompt[-60:]))
    legend = (
        "The winner is blue, ■ has ended, grey was dropped; with the log-probability of the text."
    )
    below = _branch(record, 0, 0, record.winners())
    return f'<div class="beams"><p>{legend}</p><b>{prompt} …</b>{below}</div>'


def _branch(record: BeamTree, depth: int, parent: int, winners: list[int]) -> str:
    """Draw what follows a kept candidate; `winners` is empty off the winner's path."""
    if depth == len(record.steps):
        return ""
    step, kept, items, dropped = record.steps[depth], -1, "", ""
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
        items += f"<li{' class=won' if won else ''}>{text}{below}</li>"
    items += f'<li class="dropped">{dropped}</li>' if dropped else ""
    return f"<ul>{items}</ul>" if items else ""
