"""Looking inside decoding: next tokens, temperatures, beams, and what else could have been said."""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from genkit import generation, pages, plots, reading, tokens
from genkit.decoding import Candidate
from genkit.errors import panics_are_errors
from genkit.generation import Generation, LanguageModel
from genkit.language import DEFAULT

# ---------------------------------------------------------------------------------------------
# The next token


@dataclass(frozen=True)
class NextTokens:
    """The likeliest next tokens of a prompt, at several temperatures."""

    prompt: str
    temperatures: list[float]
    ids: list[int]  # the likeliest first
    names: list[str]  # their texts, whitespace visible
    probabilities: list[list[float]]  # (temperatures, tokens)
    entropies: list[float]  # of each whole distribution, in bits

    def __str__(self) -> str:
        head = ["temperature", *(f"{t:g}" for t in self.temperatures)]
        rows = [
            [name, *map(tokens.percent, column)]
            for name, column in zip(self.names, zip(*self.probabilities, strict=True), strict=True)
        ]
        foot = ["entropy (bits)", *(f"{e:.2f}" for e in self.entropies)]
        return f"{tokens.one_line(self.prompt)} …\n\n" + _table([head, *rows, foot])

    def save(self, path: str | Path) -> None:
        """Draw the distributions as bars, a panel a temperature, into a PNG."""
        plots.next_tokens(
            tokens.one_line(self.prompt),
            self.names,
            self.temperatures,
            self.probabilities,
            self.entropies,
            Path(path),
        )


def next_tokens(
    prompt: str,
    *,
    model: str | Path | LanguageModel = DEFAULT,
    temperatures: Sequence[float] = (0.25, 0.5, 1.0, 1.5),
    top: int = 10,
) -> NextTokens:
    """Tell how likely each next token is, at several temperatures.

    Args:
        prompt: a text.
        model: folder, Hub id, or what `load` returned.
        temperatures: each divides the logits, above 0.
        top: how many of the likeliest tokens to tell.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    _check_temperatures(temperatures)
    language = _language(model)
    _check_top(top, language)
    logits = _logits(language, generation.encode(prompt, language))[-1:]
    distributions = [_tempered(logits, temperature)[0] for temperature in temperatures]
    ids = logits[0].topk(top).indices
    return NextTokens(
        prompt,
        list(temperatures),
        ids.tolist(),
        tokens.names(language.tokenizer, ids.tolist()),
        [distribution[ids].tolist() for distribution in distributions],
        [_bits(distribution).item() for distribution in distributions],
    )


# ---------------------------------------------------------------------------------------------
# One text a temperature


@dataclass(frozen=True)
class TemperatureText:
    """What a model writes at one temperature, and how varied that is."""

    temperature: float
    generation: Generation
    entropy: float  # of the distributions drawn from, mean over the tokens, in bits
    distinct_1: float  # distinct tokens, as a share of all tokens
    distinct_2: float  # distinct pairs of neighbours, as a share of all pairs
    repetition: float  # share of the runs of four tokens that occurred before

    def __str__(self) -> str:
        lines = tokens.printable(self.generation.completion).split("\n")
        text = "\n".join(textwrap.indent(textwrap.fill(line, 88), "    ") for line in lines)
        return (
            f"temperature {self.temperature:g}   entropy {self.entropy:.2f} bits   "
            f"distinct-1 {self.distinct_1:.2f}   distinct-2 {self.distinct_2:.2f}   "
            f"repetition {self.repetition:.2f}\n\n{text}"
        )


@dataclass(frozen=True)
class TemperatureSeries:
    """One text a temperature, all from the same prompt and seed."""

    prompt: str
    texts: list[TemperatureText]

    def __str__(self) -> str:
        return "\n\n".join([f"{tokens.one_line(self.prompt)} …", *map(str, self.texts)])

    def save(self, path: str | Path) -> None:
        """Draw the measures by temperature into a PNG."""
        plots.temperature_series(
            tokens.one_line(self.prompt),
            [text.temperature for text in self.texts],
            [text.entropy for text in self.texts],
            {
                "distinct-1": [text.distinct_1 for text in self.texts],
                "distinct-2": [text.distinct_2 for text in self.texts],
                "repetition": [text.repetition for text in self.texts],
            },
            Path(path),
        )


def temperature_series(
    prompt: str,
    temperatures: Sequence[float] = (0.01, 0.25, 0.5, 1.0, 1.5),
    *,
    model: str | Path | LanguageModel = DEFAULT,
    max_new_tokens: int = 60,
    seed: int = 0,
) -> TemperatureSeries:
    """Continue a prompt at several temperatures, and measure how varied the texts are.

    Distinct-n is the share of distinct n-grams (Li et al. 2016), and repetition is 1 - distinct-4
    (Welleck et al. 2020), both over the tokens of the completion; a text too short for a single
    n-gram repeats nothing.

    Args:
        prompt: a text.
        temperatures: each divides the logits, above 0.
        model: folder, Hub id, or what `load` returned.
        max_new_tokens: the longest completion.
        seed: of every text, so that they differ by temperature alone.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    _check_temperatures(temperatures)
    language = _language(model)
    given = generation.encode(prompt, language)
    _check_context("max_new_tokens", len(given) + max_new_tokens, language)
    texts = []
    for temperature in tqdm(temperatures, desc="temperatures", leave=False, disable=None):
        record = generation.generate(
            prompt,
            model=language,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        logits = _logits(language, given + record.tokens[:-1])[len(given) - 1 :]
        texts.append(
            TemperatureText(
                temperature,
                record,
                _bits(_tempered(logits, temperature)).mean().item(),
                distinct(record.tokens, 1),
                distinct(record.tokens, 2),
                1 - distinct(record.tokens, 4),
            )
        )
    return TemperatureSeries(prompt, texts)


def distinct(sequence: Sequence[int], n: int) -> float:
    """Share of the n-grams of a sequence that are distinct; 1 if it has none."""
    grams = list(zip(*(sequence[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


# ---------------------------------------------------------------------------------------------
# The tree of beam search


@dataclass(frozen=True)
class BeamTree:
    """Every text that beam search weighed: kept, dropped or finished."""

    prompt: str
    steps: list[list[Candidate]]  # of each step, the best first
    names: list[list[str]]  # text of each candidate's token, whitespace visible
    best: Generation  # the text that won

    def winners(self) -> list[int]:
        """Find the candidate of each step that the winning text goes through."""
        path: list[int] = []
        parent = 0
        for step, token in zip(self.steps, self.best.tokens, strict=False):
            path.append([(c.parent, c.token) for c in step].index((parent, token)))
            parent = _kept_before(step, path[-1])
        return path

    def __str__(self) -> str:
        head = f"{tokens.one_line(self.prompt)} …\n"
        foot = "\n\n● the winner   ○ kept   ■ finished   ✕ dropped;   log-probability of the text"
        return head + "\n".join(self._branch(0, 0, "", self.winners())) + foot

    def _branch(self, depth: int, parent: int, indent: str, winners: list[int]) -> list[str]:
        """Write what follows a kept candidate, a line each, the best first."""
        if depth == len(self.steps):
            return []
        step, lines = self.steps[depth], []
        children = [i for i, candidate in enumerate(step) if candidate.parent == parent]
        for i in children:
            won = winners[depth : depth + 1] == [i]
            mark = "●" if won else {"kept": "○", "finished": "■", "dropped": "✕"}[step[i].fate]
            tee, bar = ("└ ", "  ") if i == children[-1] else ("├ ", "│ ")
            lines.append(f"{indent}{tee}{mark} {self.names[depth][i]}  {step[i].total:.2f}")
            if step[i].fate == "kept":
                deeper = (depth + 1, _kept_before(step, i), indent + bar, winners if won else [])
                lines += self._branch(*deeper)
        return lines

    def save(self, path: str | Path) -> None:
        """Draw the tree from left to right, a column a step, into a PNG."""
        prompt = tokens.one_line(self.prompt)
        title = f"{prompt} … {tokens.one_line(self.best.completion)}   score {self.best.score:.2f}"
        plots.beam_tree(prompt, title, self.steps, self.names, self.winners(), Path(path))


def _kept_before(step: list[Candidate], i: int) -> int:
    """Count the kept candidates before one: what its children call it."""
    return sum(candidate.fate == "kept" for candidate in step[:i])


def beam_tree(
    prompt: str,
    *,
    model: str | Path | LanguageModel = DEFAULT,
    beams: int = 4,
    max_new_tokens: int = 10,
    length_penalty: float | None = None,
) -> BeamTree:
    """Search with beams, and keep what the search saw.

    Args:
        prompt: a text.
        model: folder, Hub id, or what `load` returned.
        beams: how many texts are kept at once.
        max_new_tokens: the longest completion.
        length_penalty: a text's log-probability is divided by its length to this power; 1 unless
            told.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    language = _language(model)
    steps, best = generation.trace_beams(
        prompt,
        model=language,
        beams=beams,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
    )
    names = [tokens.names(language.tokenizer, [c.token for c in step]) for step in steps]
    return BeamTree(prompt, steps, names, best)


# ---------------------------------------------------------------------------------------------
# What else could have been said


@dataclass(frozen=True)
class Option:
    """A token that could come next."""

    token: int
    name: str  # its text, whitespace visible
    probability: float


@dataclass(frozen=True)
class Choice:
    """A token of a text, and the likeliest that could have been in its place."""

    token: int
    name: str
    log_probability: float
    rank: int  # 1: no token was likelier
    options: list[Option]  # the likeliest first

    @property
    def probability(self) -> float:
        """How likely it was."""
        return math.exp(self.log_probability)


@dataclass(frozen=True)
class Span:
    """The shortest run of tokens that is whole characters: most often a single token."""

    text: str
    choices: list[Choice]

    @property
    def probability(self) -> float:
        """Of its tokens together."""
        return math.prod(choice.probability for choice in self.choices)

    @property
    def name(self) -> str:
        """What to show of tokens that have no text, such as the one that ends a text."""
        return "".join(choice.name for choice in self.choices)


@dataclass(frozen=True)
class Alternatives:
    """How likely each token of a text was, and which others were."""

    prompt: str
    spans: list[Span]

    @property
    def text(self) -> str:
        """The text that was looked at, without the prompt."""
        return "".join(span.text for span in self.spans)

    @property
    def choices(self) -> list[Choice]:
        """Every token in order."""
        return [choice for span in self.spans for choice in span.choices]

    @property
    def summary(self) -> str:
        """The figures of the whole text, in a line."""
        choices = self.choices
        bits = -sum(c.log_probability for c in choices) / len(choices) / math.log(2)
        first = sum(c.rank == 1 for c in choices) / len(choices)
        return f"{len(choices)} tokens, {bits:.2f} bits each, {first:.0%} the model's first choice"

    def __str__(self) -> str:
        rows = [
            [c.name, tokens.percent(c.probability), str(c.rank), *(_option(o) for o in c.options)]
            for c in self.choices
        ]
        head = ["token", "probability", "rank", "likeliest", *[""] * (len(rows[0]) - 4)]
        return f"{tokens.one_line(self.prompt)} …\n\n{_table([head, *rows])}\n\n{self.summary}"

    def ansi(self) -> str:
        """Write the text for a terminal, on backgrounds from red, unlikely, to green, likely."""
        parts = [f"\x1b[2m{tokens.printable(self.prompt)}\x1b[0m"]
        for span in self.spans:
            red, green, blue = pages.colour(span.probability)
            style = f"\x1b[30;48;2;{red};{green};{blue}m"
            shown = tokens.printable(span.text) or span.name
            parts.append(style + shown.replace("\n", f"↵\x1b[0m\n{style}") + "\x1b[0m")
        return "".join(parts)

    def show(self) -> None:
        """Print in colours where they are welcome: on a terminal, without NO_COLOR set."""
        welcome = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(self.ansi() if welcome else self)

    def html(self, path: str | Path) -> None:
        """Write a page that needs nothing else: likely tokens green, and the others on hover."""
        pages.alternatives(self, Path(path))


def alternatives(
    text: str | Generation,
    *,
    model: str | Path | LanguageModel = DEFAULT,
    prompt: str = "",
    top: int = 5,
) -> Alternatives:
    """Tell how likely each token of a finished text was, and which others were.

    The model reads the text once and is asked at every token (teacher forcing). Without a prompt,
    a model that has no start token is given the first character of the text as its prompt.

    Args:
        text: a text, or what `generate` returned.
        model: folder, Hub id, or what `load` returned.
        prompt: what comes before the text; a record brings its own.
        top: how many tokens to tell in each place.

    Raises:
        ValueError: an argument cannot work, or the text is longer than the model's context.
    """
    if isinstance(text, Generation) and prompt:
        raise ValueError(f"prompt: the record brings its own, got {prompt!r}; leave it out")
    language = _language(model)
    _check_top(top, language)
    if isinstance(text, Generation):
        prompt, given, chosen = text.prompt, generation.encode(text.prompt, language), text.tokens
    else:
        given, chosen = _split(text, prompt, language)
        prompt = prompt or tokens.decode(language.tokenizer, given)
    _check_context("text", len(given) + len(chosen), language)
    logits = _logits(language, given + chosen[:-1])[len(given) - 1 :]
    choices = iter(_choices(logits, chosen, top, language))
    runs = tokens.spans(language.tokenizer, given, chosen)
    return Alternatives(prompt, [Span(t, [next(choices) for _ in run]) for t, run in runs])


@panics_are_errors()
def _split(text: str, prompt: str, language: LanguageModel) -> tuple[list[int], list[int]]:
    """Encode what is given to the model, and the text that it is asked about."""
    if not text:
        raise ValueError("text is empty; give at least one character")
    tokenizer = language.tokenizer
    whole = tokenizer(prompt + text).input_ids
    if prompt:
        given = generation.encode(prompt, language)
        if whole[: len(given)] != given:
            raise ValueError(
                f"prompt: {prompt!r} ends within a token; end it where one ends, "
                "for example before a space"
            )
        return given, whole[len(given) :]
    start = tokenizer.bos_token_id
    if start is not None:
        return [start], whole[1:] if whole[0] == start else whole
    first = len(tokens.spans(tokenizer, [], whole)[0][1])
    if len(whole) == first:
        raise ValueError(f"text: {text!r} is one token, and this model has no start token; add one")
    return whole[:first], whole[first:]


def _choices(
    logits: torch.Tensor, chosen: list[int], top: int, language: LanguageModel
) -> list[Choice]:
    """Look up chosen tokens, and those likelier, in logits of (tokens, vocabulary)."""
    logs = logits.log_softmax(-1)
    taken = logs.gather(-1, torch.tensor(chosen, device=logs.device)[:, None])
    best, ids = logs.topk(top)
    shown = sorted({*chosen, *ids.flatten().tolist()})
    name = dict(zip(shown, tokens.names(language.tokenizer, shown), strict=True))
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


# ---------------------------------------------------------------------------------------------
# What all of them need


def _language(model: str | Path | LanguageModel) -> LanguageModel:
    language = model if isinstance(model, LanguageModel) else generation.load(model)
    if language.model.config.is_encoder_decoder:
        raise ValueError(f"model: {language.name} answers a text; give one that continues it")
    return language


@torch.inference_mode()
def _logits(language: LanguageModel, row: list[int]) -> torch.Tensor:
    """Next-token logits after every token of a row, (tokens, vocabulary), float32."""
    ids = torch.tensor([row], device=language.model.device)
    return language.model(input_ids=ids, use_cache=False).logits[0].float()


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Turn logits into the probabilities of a temperature, both (…, vocabulary), float64."""
    return (logits.double() / temperature).softmax(-1)


def _bits(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions, (…, vocabulary) to (…), in bits."""
    return torch.special.entr(probabilities).sum(-1) / math.log(2)


def _check_temperatures(temperatures: Sequence[float]) -> None:
    if not len(temperatures):
        raise ValueError("temperatures is empty; give at least one")
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperatures must be above 0, got {temperature}")


def _check_top(top: int, language: LanguageModel) -> None:
    vocabulary = language.model.config.vocab_size
    if not 1 <= top <= vocabulary:
        raise ValueError(f"top must be between 1 and the vocabulary's {vocabulary}, got {top}")


def _check_context(name: str, length: int, language: LanguageModel) -> None:
    """Refuse a text whose last token would be predicted from more than the model can see."""
    context = reading.context_length(language.model)
    if length - 1 > context:
        raise ValueError(
            f"{name}: {length} tokens with the prompt are more than the model can look at, "
            f"{context + 1}; give less"
        )


def _option(option: Option) -> str:
    return f"{option.name} {tokens.percent(option.probability)}"


def _table(rows: list[list[str]]) -> str:
    """Align the first column to the left, the others to the right."""
    widths = [max(map(tokens.width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, wide) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (wide - tokens.width(cell))
            cells.append(gap + cell if i else cell + gap)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
