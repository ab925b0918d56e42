"""Looking inside decoding: next-token probabilities, temperatures and beam search."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genkit import console
from genkit.arguments import explain_names
from genkit.notebook import TextRecord
from genkit.text import generation, pictures, task, token_names
from genkit.text.generation import Generation
from genkit.text.language_model import DEFAULT, LanguageModel
from genkit.text.logits import Candidate
from genkit.text.scoring import (
    as_language,
    bits,
    check_context,
    check_temperatures,
    check_top,
    next_logits,
    table,
    tempered,
)

# ---------------------------------------------------------------------------------------------
# The next token


@dataclass(frozen=True)
class NextTokens(TextRecord):
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
            [name, *map(token_names.percent, column)]
            for name, column in zip(self.names, zip(*self.probabilities, strict=True), strict=True)
        ]
        foot = ["entropy (bits)", *(f"{e:.2f}" for e in self.entropies)]
        return f"{token_names.one_line(self.prompt)} …\n\n" + table([head, *rows, foot])

    def save(self, path: str | Path) -> None:
        """Draw the distributions as bars, a panel a temperature, into a PNG."""
        pictures.next_tokens(
            token_names.one_line(self.prompt),
            self.names,
            self.temperatures,
            self.probabilities,
            self.entropies,
            Path(path),
        )


@explain_names
def next_tokens(
    prompt: str,
    *,
    model: str | Path | LanguageModel = DEFAULT,
    device: str | None = None,
    temperatures: Sequence[float] = (0.25, 0.5, 1.0, 1.5),
    top: int = 10,
) -> NextTokens:
    """Compute the probabilities of the likeliest next tokens, at several temperatures.

    Args:
        prompt: one text.
        model: folder or Hub id (in Python, also what `load` returned); default: GPT-2.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        temperatures: each is above 0 and divides the logits.
        top: how many of the likeliest tokens to show at each position.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    check_temperatures(temperatures)
    language = as_language(model, device)
    check_top(top, language)
    logits = next_logits(language, task.encode_prompt(prompt, language))[-1:]
    distributions = [tempered(logits, temperature)[0] for temperature in temperatures]
    ids = logits[0].topk(top).indices
    return NextTokens(
        prompt,
        list(temperatures),
        ids.tolist(),
        token_names.names(language.tokenizer, ids.tolist()),
        [distribution[ids].tolist() for distribution in distributions],
        [bits(distribution).item() for distribution in distributions],
    )


# ---------------------------------------------------------------------------------------------
# One text for each temperature


@dataclass(frozen=True)
class TemperatureText(TextRecord):
    """A completion at one temperature, and how varied it is."""

    temperature: float
    generation: Generation
    entropy: float  # of the distributions drawn from, mean over the tokens, in bits
    distinct_1: float  # distinct tokens, as a share of all tokens
    distinct_2: float  # distinct pairs of neighbours, as a share of all pairs
    repetition: float  # share of the runs of four tokens that occurred before

    def __str__(self) -> str:
        lines = token_names.printable(self.generation.completion).split("\n")
        text = "\n".join(textwrap.indent(textwrap.fill(line, 88), "    ") for line in lines)
        return (
            f"temperature {self.temperature:g}   entropy {self.entropy:.2f} bits   "
            f"distinct-1 {self.distinct_1:.2f}   distinct-2 {self.distinct_2:.2f}   "
            f"repetition {self.repetition:.2f}\n\n{text}"
        )


@dataclass(frozen=True)
class TemperatureSeries(TextRecord):
    """One text for each temperature, all from the same prompt and seed."""

    prompt: str
    texts: list[TemperatureText]

    def __str__(self) -> str:
        return "\n\n".join([f"{token_names.one_line(self.prompt)} …", *map(str, self.texts)])

    def save(self, path: str | Path) -> None:
        """Draw the measures by temperature into a PNG."""
        pictures.temperature_series(
            token_names.one_line(self.prompt),
            [text.temperature for text in self.texts],
            [text.entropy for text in self.texts],
            {
                "distinct-1": [text.distinct_1 for text in self.texts],
                "distinct-2": [text.distinct_2 for text in self.texts],
                "repetition": [text.repetition for text in self.texts],
            },
            Path(path),
        )


@explain_names
def temperature_series(
    prompt: str,
    temperatures: Sequence[float] = (0.01, 0.25, 0.5, 1.0, 1.5),
    *,
    model: str | Path | LanguageModel = DEFAULT,
    device: str | None = None,
    max_new_tokens: int = 60,
    seed: int = 0,
) -> TemperatureSeries:
    """Continue a prompt at several temperatures, and measure how varied the texts are.

    Distinct-n is the share of distinct n-grams (Li et al. 2016), and repetition is 1 - distinct-4
    (Welleck et al. 2020), both over the tokens of the completion; a text too short for a single
    n-gram repeats nothing.

    Args:
        prompt: one text.
        temperatures: each is above 0 and divides the logits.
        model: folder or Hub id (in Python, also what `load` returned); default: GPT-2.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        max_new_tokens: tokens of the longest completion.
        seed: of every text, so that they differ by temperature alone.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    check_temperatures(temperatures)
    language = as_language(model, device)
    given = task.encode_prompt(prompt, language)
    check_context("max_new_tokens", len(given) + max_new_tokens, language)
    texts = []
    for temperature in console.bar(temperatures, "temperatures"):
        record = generation.generate(
            prompt,
            model=language,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        logits = next_logits(language, given + record.tokens[:-1])[len(given) - 1 :]
        texts.append(
            TemperatureText(
                temperature,
                record,
                bits(tempered(logits, temperature)).mean().item(),
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
class BeamTree(TextRecord):
    """Every text that a beam search considered: kept, dropped or finished."""

    prompt: str
    steps: list[list[Candidate]]  # of each step, the best first
    names: list[list[str]]  # text of each candidate's token, whitespace visible
    best: Generation  # the text that won

    def winners(self) -> list[int]:
        """Return the index of the winning text's candidate in each step."""
        path: list[int] = []
        parent = 0
        for step, token in zip(self.steps, self.best.tokens, strict=False):
            path.append([(c.parent, c.token) for c in step].index((parent, token)))
            parent = _kept_before(step, path[-1])
        return path

    def __str__(self) -> str:
        head = f"{token_names.one_line(self.prompt)} …\n"
        foot = "\n\n● the winner   ○ kept   ■ finished   ✕ dropped;   log-probability of the text"
        return head + "\n".join(self._branch(0, 0, "", self.winners())) + foot

    def _branch(self, depth: int, parent: int, indent: str, winners: list[int]) -> list[str]:
        """Return the lines below a kept candidate, the best first."""
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
        prompt = token_names.one_line(self.prompt)
        title = (
            f"{prompt} … {token_names.one_line(self.best.completion)}   score {self.best.score:.2f}"
        )
        pictures.beam_tree(prompt, title, self.steps, self.names, self.winners(), Path(path))


def _kept_before(step: list[Candidate], i: int) -> int:
    """Count the kept candidates before one, which is its index as a parent."""
    return sum(candidate.fate == "kept" for candidate in step[:i])


@explain_names
def beam_tree(
    prompt: str,
    *,
    model: str | Path | LanguageModel = DEFAULT,
    device: str | None = None,
    beams: int = 4,
    max_new_tokens: int = 10,
    length_penalty: float | None = None,
) -> BeamTree:
    """Search with beams, and return every text that the search considered.

    Args:
        prompt: one text.
        model: folder or Hub id (in Python, also what `load` returned); default: GPT-2.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        beams: how many texts are kept at once.
        max_new_tokens: tokens of the longest completion.
        length_penalty: a text's score is its log-probability divided by its length to this power;
            default: 1.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    language = as_language(model, device)
    steps, best = generation.trace_beams(
        prompt,
        model=language,
        beams=beams,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
    )
    names = [token_names.names(language.tokenizer, [c.token for c in step]) for step in steps]
    return BeamTree(prompt, steps, names, best)
