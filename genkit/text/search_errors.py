"""genkit.search_errors: how often a beam misses the most likely sequence, and what that one is.

A search error is a sequence that is less likely than another one that the model could have written.
The most likely sequence itself may be wrong, or empty: that is an error of the model (Stahlberg and
Byrne 2019, https://aclanthology.org/D19-1331).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genkit import console
from genkit.arguments import explain_names
from genkit.data.parallel import Example, make_example, read_examples
from genkit.notebook import TextRecord
from genkit.seeds import is_whole
from genkit.text import pictures, token_names
from genkit.text.exact_search import Decoder, find_most_likely
from genkit.text.generation import generate
from genkit.text.kv_cache import context_length
from genkit.text.language_model import LanguageModel, as_language_model
from genkit.text.parallel_tokens import check_encoder_decoder, encode_target
from genkit.text.scoring import table
from genkit.text.task import encode_prompt, make_rules, prepare_task

NEAR = 1e-3  # nats by which rounding may change the log-probability of a sequence
ROWS = 256  # of a beam search, at once
EXACT, REFERENCE = "exact", "reference"


@dataclass(frozen=True)
class Output:
    """A sequence of a source."""

    text: str
    tokens: list[int] = field(repr=False)  # its end included, if it has one
    score: float  # log-probability, in nats


@dataclass(frozen=True)
class Searched:
    """A source, its target, and what each search found."""

    source: str
    target: str
    outputs: dict[str, Output]  # by "1", "2", … beams, "exact" and "reference"
    is_exact: bool  # False: the exact search ran out of its budget
    nodes: int  # prefixes that the exact search looked at

    def misses(self, name: str, by: str | None = None) -> bool:
        """Whether a search found a less likely sequence than another one, or than any other.

        Args:
            name: of the search.
            by: the name of the other; default: any.
        """
        others = self.outputs.values() if by is None else [self.outputs[by]]
        own = self.outputs[name]
        return any(each.score > own.score + NEAR for each in others if each.tokens != own.tokens)


@dataclass(frozen=True)
class SearchErrors(TextRecord):
    """What searches of several widths, and the exact one, find; each figure by their names.

    The names are "1", "2", … for beams, "exact", and "reference" for the targets that were given.
    """

    errors: dict[str, float]  # share of pairs: less likely than another sequence that is known
    below_reference: dict[str, float]  # share of pairs: less likely than the target
    wrong: dict[str, float]  # share of pairs: another text than the target
    empty: dict[str, float]  # share of pairs: no text
    length: dict[str, float]  # mean, in tokens
    score: dict[str, float]  # mean log-probability of a sequence, in nats
    solved: int  # pairs whose exact search ended; of others, errors may be more
    rows: list[Searched] = field(repr=False)
    settings: dict[str, Any]

    def __str__(self) -> str:
        head = ["", "search errors", "below target", "wrong", "empty", "tokens", "log p"]
        lines = [head]
        for name in self.errors:
            shares = (self.errors, self.below_reference, self.wrong, self.empty)
            figures = [token_names.percent(share[name]) for share in shares]
            figures += [f"{self.length[name]:.1f}", f"{self.score[name]:.3f}"]
            lines.append([f"beam {name}" if name.isdigit() else name, *figures])
        rest = len(self.rows) - self.solved
        open_ones = f"; the exact search ran out of its budget on {rest:,}" if rest else ""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{table(lines)}\n\n{len(self.rows):,} pairs{open_ones}; {settings}"

    def save(self, path: str | Path) -> None:
        """Draw errors and lengths by the width of the beam into a PNG."""
        figures = self.errors, self.wrong, self.empty, self.length
        pictures.search_errors(self.settings["beams"], *figures, Path(path))


@explain_names
def search_errors(
    model: str | Path | LanguageModel,
    pairs: str | Path | Sequence[tuple[str, str]],
    *,
    beams: Sequence[int] = (1, 2, 4, 8, 16),
    count: int = 100,
    max_new_tokens: int | None = None,
    budget: int = 10_000,
    device: str | None = None,
) -> SearchErrors:
    """Measure how often beam search misses the most likely sequence of an encoder-decoder.

    Sequences are compared by their log-probability, without a length penalty. All searches look for
    the best of the same sequences: those that end, and those of `max_new_tokens` tokens.

    Args:
        model: folder or Hub id, or what `genkit.load` returned.
        pairs: a table with columns `source` and `target`; in Python also a list of (source,
            target).
        beams: widths of beam search; 1 takes the most likely token each time.
        count: at most so many of the pairs, the first ones.
        max_new_tokens: tokens of the longest sequence; default: twice those of the longest target.
        budget: prefixes after which the exact search of a pair stops.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid.
    """
    widths = _check_numbers(beams, count, max_new_tokens, budget)
    language = as_language_model(model, device=device)
    check_encoder_decoder(language)
    examples = _read(pairs)[:count]
    sources = [
        encode_prompt(e.source, language, False, f"pairs[{i}]") for i, e in enumerate(examples)
    ]
    targets = [encode_target(example.target, language) for example in examples]
    limit = _choose_limit(max_new_tokens, max(map(len, targets)), language)
    found = {str(width): _search(language, examples, width, limit) for width in widths}
    rows = []
    with console.bar(None, "exact search", len(examples), " pairs") as bar:
        for i, example in enumerate(examples):
            known = {name: each[i] for name, each in found.items()} | {REFERENCE: targets[i]}
            rows.append(_compare(language, example, sources[i], known, limit, budget))
            bar.update(1)
    settings = {"model": language.name, "beams": list(widths), "max_new_tokens": limit}
    return _summarize(rows, settings | {"budget": budget})


def _check_numbers(
    beams: Sequence[int], count: int, max_new_tokens: int | None, budget: int
) -> list[int]:
    """Check the numbers of a call; return the widths, each once, the least first."""
    given = [("beams", width) for width in beams] + [("count", count), ("budget", budget)]
    if max_new_tokens is not None:
        given.append(("max_new_tokens", max_new_tokens))
    for name, value in given:
        if not is_whole(value) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r:.80}")
    if not len(beams):
        raise ValueError("beams: [] is empty; give at least one width")
    return sorted(set(beams))


def _choose_limit(max_new_tokens: int | None, longest: int, language: LanguageModel) -> int:
    """Return the most tokens of a sequence: what is given, or what leaves room for errors."""
    context = context_length(language.model)
    limit = min(2 * longest, context) if max_new_tokens is None else max_new_tokens
    if not longest <= limit <= context:
        most = "" if context == sys.maxsize else f", the decoder writes {context} at most"
        raise ValueError(f"max_new_tokens={limit}: the longest target has {longest} tokens{most}")
    return limit


def _read(pairs: str | Path | Sequence[tuple[str, str]]) -> list[Example]:
    if isinstance(pairs, str | Path):
        return read_examples(str(pairs), argument="pairs")
    if not len(pairs):
        raise ValueError("pairs: [] is empty; give at least one")
    rows = []
    for i, pair in enumerate(pairs):
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"pairs[{i}] must be a source and a target, got {pair!r:.60}")
        rows.append(make_example({"source": pair[0], "target": pair[1]}, f"pairs[{i}]"))
    return rows


def _search(
    language: LanguageModel, examples: Sequence[Example], width: int, limit: int
) -> list[list[int]]:
    """Return the tokens that a beam of a width finds for each source."""
    size = max(1, ROWS // width)
    options: dict[str, Any] = {"strategy": "beam", "beams": width, "length_penalty": 0.0}
    found = []
    for start in range(0, len(examples), size):
        sources = [example.source for example in examples[start : start + size]]
        rows = generate(
            sources, model=language, parse_special=False, max_new_tokens=limit, **options
        )
        found += [row.tokens for row in rows]
    return found


def _compare(
    language: LanguageModel,
    example: Example,
    source: list[int],
    known: dict[str, list[int]],
    limit: int,
    budget: int,
) -> Searched:
    """Search exactly, from the best sequence that is known, and score all alike."""
    decoder = Decoder(language.model, source)
    scores = decoder.score(list(known.values()))
    best = max(zip(scores, known.values(), strict=True), key=lambda each: each[0])[1]
    options: dict[str, Any] = {"strategy": "greedy", "max_new_tokens": limit}
    task = prepare_task(example.source, language, parse_special=False, **options)
    exact = find_most_likely(decoder, make_rules(task), best, budget)
    sequences = known | {EXACT: exact.tokens}
    outputs = {
        name: Output(_text(language, tokens), tokens, score)
        for (name, tokens), score in zip(
            sequences.items(), decoder.score(list(sequences.values())), strict=True
        )
    }
    return Searched(example.source, example.target, outputs, exact.is_exact, exact.nodes)


def _text(language: LanguageModel, tokens: list[int]) -> str:
    return token_names.decode(language.tokenizer, tokens)


def _summarize(rows: list[Searched], settings: dict[str, Any]) -> SearchErrors:
    widths = [str(width) for width in settings["beams"]]
    names = [*widths, EXACT, REFERENCE]

    def mean(figure: Any) -> dict[str, float]:
        return {name: sum(figure(row, name) for row in rows) / len(rows) for name in names}

    return SearchErrors(
        errors=mean(lambda row, name: row.misses(name)),
        below_reference=mean(lambda row, name: row.misses(name, REFERENCE)),
        wrong=mean(lambda row, name: row.outputs[name].text.strip() != row.target.strip()),
        empty=mean(lambda row, name: not row.outputs[name].text.strip()),
        length=mean(lambda row, name: len(row.outputs[name].tokens)),
        score=mean(lambda row, name: row.outputs[name].score),
        solved=sum(row.is_exact for row in rows),
        rows=rows,
        settings=settings,
    )
