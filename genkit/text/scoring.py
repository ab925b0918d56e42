"""Log-probabilities of given texts under a language model, and the checks around them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from genkit.data.tokens import encode_texts
from genkit.engine.decoder import cache_argument
from genkit.errors import panics_are_errors
from genkit.text import kv_cache, token_names
from genkit.text.language_model import LanguageModel, as_language_model
from genkit.text.logits import COLDEST

BATCH_LOGITS = 1 << 24  # the most logits of a batch

# ---------------------------------------------------------------------------------------------
# Next-token distributions


def as_language(model: str | Path | LanguageModel, device: str | None = None) -> LanguageModel:
    """Load a causal language model; raise ValueError for an encoder-decoder."""
    language = as_language_model(model, device=device)
    if language.model.config.is_encoder_decoder:
        raise ValueError(f"model: {language.name} is an encoder-decoder; give a causal model")
    return language


@torch.inference_mode()
def next_logits(language: LanguageModel, row: list[int]) -> torch.Tensor:
    """Next-token logits after every token of a row, (tokens, vocabulary), float32, on the CPU."""
    ids = torch.tensor([row], device=language.model.device)
    return language.model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def gather_tokens(logs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Look up the log-probability of each token: (…, vocabulary) and (…) to (…)."""
    return logs.gather(-1, tokens[..., None]).squeeze(-1)


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Turn logits into the probabilities of a temperature, both (…, vocabulary), float64."""
    return (logits.double() / temperature).softmax(-1)


def bits(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions, (…, vocabulary) to (…), in bits."""
    return torch.special.entr(probabilities).sum(-1) / math.log(2)


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Raise ValueError for temperatures that are not positive and finite."""
    if not len(temperatures):
        raise ValueError("temperatures: [] is empty; give at least one")
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperatures must be above 0, got {temperature}")
        if temperature < COLDEST:
            raise ValueError(f"temperatures must be {COLDEST:g} or more, got {temperature}")


def check_top(top: int, language: LanguageModel) -> None:
    """Raise ValueError for a number of tokens that the vocabulary does not have."""
    vocabulary = language.model.config.vocab_size
    if not 1 <= top <= vocabulary:
        raise ValueError(f"top must be between 1 and the vocabulary's {vocabulary}, got {top}")


def check_context(name: str, length: int, language: LanguageModel) -> None:
    """Raise ValueError for a text whose last token has more context than the model reads."""
    context = kv_cache.context_length(language.model)
    if length - 1 > context:
        raise ValueError(
            f"{name}: {length} tokens with the prompt are more than the {context + 1} that the "
            "model can score; give fewer"
        )


# ---------------------------------------------------------------------------------------------
# The probability of a text


def start_token(language: LanguageModel) -> int:
    """Return the token that the model reads before a text; see `log_probabilities`."""
    tokenizer = language.tokenizer
    if language.by_character and "\n" in tokenizer.get_vocab():
        return tokenizer.get_vocab()["\n"]
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if language.possible(token):
            return int(token)
    raise ValueError(f"model: {language.name} has neither a start token nor an end token")


@panics_are_errors()
def encode_after_start(texts: list[str], language: LanguageModel) -> list[list[int]]:
    """Encode texts, each after the start token."""
    start = start_token(language)
    encoded = encode_texts(language.tokenizer, texts)
    return [[start, *row] for row in encoded]


def _look_up(logs: torch.Tensor, tokens: torch.Tensor, language: LanguageModel) -> torch.Tensor:
    """Look up each token's log-probability.

    An unknown word's token stands for all words that the model does not know. They share its
    probability, and are taken to be as many as those that it knows.

    Args:
        logs: log-probabilities of all tokens, (rows, length, vocabulary).
        tokens: (rows, length).

    Returns:
        (rows, length).
    """
    each = gather_tokens(logs, tokens)
    unknown = language.tokenizer.unk_token_id
    return each if unknown is None else each - (tokens == unknown) * math.log(logs.shape[-1])


def log_probabilities(texts: list[str], language: LanguageModel) -> list[float]:
    """Compute the log-probability of each text, in nats.

    The first token counts, too: the model reads its start token before it. A model without one
    reads its end token, which separates documents; but a character model of genkit reads a
    newline, which every text of several lines teaches it, whereas a text of one document holds no
    <eos>. A text beyond the model's context is read in windows, each from the middle of the one
    before.
    """
    rows = encode_after_start(texts, language)
    windows = _cut_windows(rows, kv_cache.context_length(language.model))
    windows.sort(key=lambda window: len(window[1]))  # batches have similar lengths
    totals = [0.0] * len(texts)
    while windows:
        longest, vocabulary = len(windows[-1][1]), language.model.config.vocab_size
        size = max(1, BATCH_LOGITS // (longest * vocabulary))
        batch, windows = windows[-size:], windows[:-size]
        read = ScoringReader(language).start([tokens for _, tokens, _ in batch])
        for (i, _, count), logs in zip(batch, read, strict=True):
            totals[i] += sum(logs[len(logs) - count :])
    return totals


def _cut_windows(rows: list[list[int]], context: int) -> list[tuple[int, list[int], int]]:
    """Cut rows of tokens into windows that overlap by half the context.

    Returns:
        For each window the index of its row, its tokens, and how many of them are scored.
    """
    windows, step = [], context - context // 2
    for i, row in enumerate(rows):
        windows.append((i, row[:context], len(row[:context]) - 1))
        for end in range(context, len(row), step):
            tokens = row[end - context // 2 : end + step]
            windows.append((i, tokens, len(row[end : end + step])))
    return windows


class ScoringReader:
    """Token rows that the model has read, with the key-value cache to extend them."""

    def __init__(self, language: LanguageModel) -> None:
        self.language, self.model = language, language.model
        self.context = kv_cache.context_length(language.model)
        self.rows: list[list[int]] = []
        self._positioned = "position_ids" in inspect.signature(self.model.forward).parameters
        self._argument, self._cache = cache_argument(self.model), DynamicCache()
        self._mask = torch.empty(0)  # (rows, tokens read and padding between them)
        self._next = torch.empty(0)  # (rows, vocabulary): log-probabilities of what comes next

    def start(self, rows: list[list[int]]) -> list[list[float]]:
        """Read rows; return the log-probability of each token, and 0 for each row's first."""
        device, vocabulary = self.model.device, self.model.config.vocab_size
        self._cache = DynamicCache(config=self.model.config)
        self._mask = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
        self._next = torch.zeros(len(rows), vocabulary, device=device)
        self.rows = rows
        return self._read(rows)

    def extend(self, parents: list[int], rows: list[list[int]]) -> list[list[float]]:
        """Replace the rows by longer ones, row i by one that begins like the row parents[i].

        A tokenizer may join the end of a row with what follows; the row is then read again up to
        there. Rows that would outgrow the model's context go on with the later half of it.

        Returns:
            The log-probabilities of the tokens that are new in each row, or new in another that
            begins like the same row.
        """
        shared = [len(row) for row in self.rows]
        for parent, row in zip(parents, rows, strict=True):
            shared[parent] = min(shared[parent], _common(self.rows[parent], row))
        new = [row[shared[parent] :] for parent, row in zip(parents, rows, strict=True)]
        room = self.context - max(map(len, new))
        if room < 1:
            raise ValueError(
                f"model: {self.language.name} sees {self.context} tokens at once, which is too "
                "few for a word and what follows it; use a model with a longer context"
            )
        joined = any(s < len(row) for s, row in zip(shared, self.rows, strict=True))
        if joined or self._mask.sum(1).max() > room:
            last = room if max(shared) <= room else min(room, self.context // 2)
            self.start([row[:s][-last:] for s, row in zip(shared, self.rows, strict=True)])
        self.keep(parents)
        self.rows = rows
        return self._read(new)

    def keep(self, index: list[int]) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        chosen = torch.tensor(index, device=self.model.device)
        self.rows = [self.rows[i] for i in index]
        self._cache.batch_select_indices(chosen)
        self._mask, self._next = self._mask[chosen], self._next[chosen]

    @torch.inference_mode()
    def _read(self, new: list[list[int]]) -> list[list[float]]:
        """Read tokens, padded on the right; return their log-probabilities."""
        longest = max(map(len, new))
        if not longest:
            return [[] for _ in new]
        device = self.model.device
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in new], device=device)
        lengths = torch.tensor([len(row) for row in new], device=device)
        real = torch.arange(longest, device=device) < lengths[:, None]
        self._mask = torch.cat([self._mask, real.long()], dim=1)
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": self._mask}
        if self._positioned:
            inputs["position_ids"] = (self._mask.cumsum(-1) - 1)[:, -longest:]
        inputs[self._argument] = self._cache
        output = self.model(**inputs, use_cache=True)
        logs = output.logits.float().log_softmax(-1)  # (rows, longest, vocabulary)
        logs = torch.cat([self._next[:, None], logs], dim=1)
        self._next = logs[torch.arange(len(new), device=device), lengths]
        each = _look_up(logs[:, :-1], tokens, self.language).tolist()
        return [log[: len(row)] for log, row in zip(each, new, strict=True)]


def _common(first: list[int], second: list[int]) -> int:
    """Count the tokens that two rows begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


# ---------------------------------------------------------------------------------------------
# Tables


def table(rows: list[list[str]]) -> str:
    """Align the first column to the left, the others to the right."""
    widths = [max(map(token_names.width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, wide) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (wide - token_names.width(cell))
            cells.append(gap + cell if i else cell + gap)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
