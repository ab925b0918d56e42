"""How likely each token of a text was, and which others the model preferred; also as a page."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from genkit import console, files, notebook
from genkit.arguments import check_unicode, explain_names
from genkit.data.tokens import encode_text, split_at_control_tokens
from genkit.errors import panics_are_errors
from genkit.hub import names
from genkit.text import chats, pages, task, token_names
from genkit.text.generation import Generation
from genkit.text.language_model import DEFAULT, LanguageModel
from genkit.text.scoring import (
    as_language,
    check_context,
    check_top,
    gather_tokens,
    next_logits,
    table,
)

# ---------------------------------------------------------------------------------------------
# Records


@dataclass(frozen=True)
class Option:
    """A token that could come next."""

    token: int
    name: str  # its text, whitespace visible
    probability: float


@dataclass(frozen=True)
class Choice:
    """A token of a text, and the likeliest tokens at its position."""

    token: int
    name: str
    log_probability: float
    rank: int  # 1: no token was likelier
    options: list[Option]  # the likeliest first

    @property
    def probability(self) -> float:
        """Its probability."""
        return math.exp(self.log_probability)


@dataclass(frozen=True)
class TokenSpan:
    """The shortest run of tokens that is whole characters: most often a single token."""

    text: str
    choices: list[Choice]

    @property
    def probability(self) -> float:
        """The product of its tokens' probabilities."""
        return math.prod(choice.probability for choice in self.choices)

    @property
    def name(self) -> str:
        """Names to show for tokens that have no text, such as the one that ends a text."""
        return "".join(choice.name for choice in self.choices)


@dataclass(frozen=True)
class Alternatives:
    """How likely each token of a text was, and which other tokens were likely."""

    prompt: str
    spans: list[TokenSpan]

    @property
    def text(self) -> str:
        """The text, without the prompt."""
        return "".join(span.text for span in self.spans)

    @property
    def choices(self) -> list[Choice]:
        """Every token in order."""
        return [choice for span in self.spans for choice in span.choices]

    @property
    def summary(self) -> str:
        """The figures of the whole text, on one line."""
        choices = self.choices
        if not choices:
            return "0 tokens"
        bits = -sum(c.log_probability for c in choices) / len(choices) / math.log(2)
        first = sum(c.rank == 1 for c in choices) / len(choices)
        return f"{len(choices)} tokens, {bits:.2f} bits each, {first:.0%} the model's first choice"

    def __str__(self) -> str:
        rows = [
            [
                c.name,
                token_names.percent(c.probability),
                str(c.rank),
                *(_option(o) for o in c.options),
            ]
            for c in self.choices
        ]
        likeliest = max((len(row) - 4 for row in rows), default=0)
        head = ["token", "probability", "rank", "likeliest", *[""] * likeliest]
        return f"{token_names.one_line(self.prompt)} …\n\n{table([head, *rows])}\n\n{self.summary}"

    def ansi(self) -> str:
        """Return the text for a terminal, on backgrounds from red (unlikely) to green (likely)."""
        parts = [f"\x1b[2m{token_names.printable(self.prompt)}\x1b[0m"]
        for span in self.spans:
            red, green, blue = pages.colour(span.probability)
            style = f"\x1b[30;48;2;{red};{green};{blue}m"
            shown = token_names.printable(span.text) or span.name
            parts.append(style + shown.replace("\n", f"↵\x1b[0m\n{style}") + "\x1b[0m")
        return "".join(parts)

    def show(self) -> None:
        """Print; in colours on a terminal, if NO_COLOR is not set."""
        print(self.ansi() if console.has_colours(sys.stdout) else self)

    def html(self, path: str | Path) -> None:
        """Write a self-contained page: likely tokens are green, and hovering shows the others."""
        with files.written_whole(Path(path)) as scratch:
            scratch.write_text(pages.alternatives(self), encoding="utf-8", newline="")

    def _repr_html_(self) -> str:
        return notebook.framed(pages.alternatives(self))


@explain_names
def alternatives(
    text: str | Generation,
    *,
    model: str | Path | LanguageModel = DEFAULT,
    device: str | None = None,
    prompt: str = "",
    top: int = 5,
) -> Alternatives:
    """Compute how likely each token of a finished text was, and which other tokens were likely.

    The model reads the text once and is asked at every token (teacher forcing). Without a prompt,
    a model that has no start token is given the first character of the text as its prompt.

    Args:
        text: a text, or what `generate` returned.
        model: folder or Hub id (in Python, also what `load` returned); default: GPT-2.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        prompt: text before it; a record has its own.
        top: how many of the likeliest tokens to show at each position.

    Raises:
        ValueError: an argument cannot work, or the text is longer than the model's context.
    """
    if isinstance(text, Generation) and prompt:
        raise ValueError(f"prompt={prompt!r} is for a str; a record has its own: leave it out")
    if isinstance(text, str):
        check_unicode("text", text)
        names.check_no_file("text", text)
    check_unicode("prompt", prompt)
    language = as_language(model, device)
    check_top(top, language)
    if isinstance(text, Generation):
        prompt, chosen, given = text.prompt, text.tokens, prompt_tokens(text, language)
    else:
        given, chosen = _split(text, prompt, language)
        prompt = prompt or token_names.decode(language.tokenizer, given)
    check_context("text", len(given) + len(chosen), language)
    logits = next_logits(language, given + chosen[:-1])[len(given) - 1 :][: len(chosen)]
    choices = iter(_choices(logits, chosen, top, language))
    runs = token_names.spans(language.tokenizer, given, chosen)
    return Alternatives(prompt, [TokenSpan(t, [next(choices) for _ in run]) for t, run in runs])


def prompt_tokens(record: Generation, language: LanguageModel) -> list[int]:
    """Return the tokens that the model read before it wrote a text, or a reply of a chat."""
    if record.messages:
        return chats.read_chat(record.messages[:-1], "text", language).tokens
    return task.encode_prompt(record.prompt, language, record.options.get("parse_special", True))


@panics_are_errors()
def _split(text: str, prompt: str, language: LanguageModel) -> tuple[list[int], list[int]]:
    """Encode the prompt, or the start of the text, and the text whose tokens are scored."""
    if not text:
        raise ValueError("text is empty; give at least one character")
    tokenizer = language.tokenizer
    if prompt:
        given = task.encode_prompt(prompt, language)
        # the text follows what the prompt has after its last control token
        last = split_at_control_tokens(tokenizer, prompt)[-1]
        ends = last == prompt
        before = encode_text(tokenizer, last, ends=ends)
        whole = encode_text(tokenizer, last + text, ends=ends)
        if whole[: len(before)] != before:
            raise ValueError(
                f"prompt: {prompt!r} ends within a token; end it where one ends, "
                "for example before a space"
            )
        return given, whole[len(before) :]
    whole = encode_text(tokenizer, text, ends=True)
    start = language.possible(tokenizer.bos_token_id)
    if start:
        return start, whole[1:] if whole[:1] == start else whole
    first = len(token_names.spans(tokenizer, [], whole)[0][1])
    if len(whole) == first:
        raise ValueError(f"text: {text!r} is one token, and this model has no start token; add one")
    return whole[:first], whole[first:]


def _choices(
    logits: torch.Tensor, chosen: list[int], top: int, language: LanguageModel
) -> list[Choice]:
    """Look up chosen tokens and the likeliest ones in logits of (tokens, vocabulary)."""
    logs = logits.log_softmax(-1)
    tokens = torch.tensor(chosen, dtype=torch.int64, device=logs.device)
    taken = gather_tokens(logs, tokens)[:, None]
    best, ids = logs.topk(top)
    shown = sorted({*chosen, *ids.flatten().tolist()})
    name = dict(zip(shown, token_names.names(language.tokenizer, shown), strict=True))
    columns = (
        chosen,
        taken.flatten().tolist(),
        (1 + (logs > taken).sum(-1)).tolist(),
        ids.tolist(),
        best.exp().tolist(),
    )
    return [
        Choice(i, name[i], log, rank, [Option(o, name[o], p) for o, p in zip(*row, strict=True)])
        for i, log, rank, *row in zip(*columns, strict=True)
    ]


def _option(option: Option) -> str:
    return f"{option.name} {token_names.percent(option.probability)}"
