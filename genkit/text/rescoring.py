"""Rescoring: texts proposed by another system, ranked by a language model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TypeAlias, cast

import torch
from transformers import DynamicCache

from genkit.data import characters
from genkit.errors import panics_are_errors
from genkit.text import kv_cache
from genkit.text.generation import LanguageModel
from genkit.text.language_model import load_language_model

LOGITS = 1 << 24  # in a batch, at most

Scored: TypeAlias = tuple[str, float]  # a transcription and its log P(c|x)

# ---------------------------------------------------------------------------------------------
# Ranking transcriptions


@dataclass(frozen=True)
class Ranked:
    """One transcription and what its score is made of."""

    text: str
    log_channel: float  # log P(c|x), as it was given
    log_language: float  # log P_lm(c), in nats
    words: int
    score: float  # log_channel + alpha log_language + beta words

    def __str__(self) -> str:
        terms = f"{self.log_channel:8.2f} {self.log_language:8.2f} {self.words:4d}"
        return f"{self.score:8.2f} = Q({terms} )  {self.text}"


def rescore(
    candidates: Sequence[Scored] | Sequence[Sequence[Scored]],
    *,
    model: str | Path | LanguageModel,
    alpha: float = 1.0,
    beta: float = 1.0,
    trust_remote_code: bool = False,
) -> list[Ranked] | list[list[Ranked]]:
    """Rank the transcriptions of an utterance, or of each of several, by Q(c).

    Choose alpha and beta on utterances whose transcription is known (`word_error_rate`).

    Args:
        candidates: pairs of a text and its log P(c|x), in nats; or a list of such lists.
        model: folder, Hub id, or what `genkit.load` returned; of any kind of token.
        alpha: weight of the language model.
        beta: nats that a word earns, against the language model's preference for few words.
        trust_remote_code: run code that the model brings along.

    Returns:
        Records, the best first; or a list of them for each utterance.

    Raises:
        ValueError: an argument cannot work, or a character model has never seen a character.
    """
    if not candidates or not all(candidates):
        raise ValueError("candidates: an empty list; give (text, log-probability) pairs")
    check_weights(alpha=alpha, beta=beta)
    several = not isinstance(candidates[0][0], str)
    utterances = cast(Sequence[Sequence[Scored]], candidates if several else [candidates])
    pairs = [pair for utterance in utterances for pair in utterance]
    check_pairs(pairs)
    if not isinstance(model, LanguageModel):
        model = load_language_model(model, trust_remote_code=trust_remote_code)
    language = model
    check_characters([text for text, _ in pairs], language)
    logs = iter(_log_language([text for text, _ in pairs], language))
    ranked = []
    for utterance in utterances:
        records = [_ranked(text, float(log), next(logs), alpha, beta) for text, log in utterance]
        ranked.append(sorted(records, key=lambda record: -record.score))
    return ranked if several else ranked[0]


def _ranked(text: str, channel: float, language: float, alpha: float, beta: float) -> Ranked:
    words = len(text.split())
    return Ranked(text, channel, language, words, channel + alpha * language + beta * words)


def check_weights(**weights: float) -> None:
    """Refuse weights of a score that are not finite, and a negative alpha."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or (name == "alpha" and weight < 0):
            least = "0 or more" if name == "alpha" else "a finite number"
            raise ValueError(f"{name} must be {least}, got {weight}")


def check_pairs(pairs: list[Scored]) -> None:
    """Refuse candidates that are not pairs of a text and a finite log-probability."""
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Real):
            raise ValueError(f"candidates: {pair!r} is not a pair of a text and its log P(c|x)")
        if not math.isfinite(pair[1]):
            raise ValueError(f"candidates: {pair[0]!r} has the log-probability {pair[1]}")


def check_characters(texts: list[str], language: LanguageModel) -> None:
    """Refuse texts with characters that a character language model does not know."""
    if language.by_character:
        unknown = characters.unknown_characters(language.tokenizer, "".join(texts))
        if unknown:
            raise ValueError(
                f"candidates: {language.name} has never seen {', '.join(map(repr, unknown))}; "
                "leave such characters out, or fine-tune it on text that has them"
            )


# ---------------------------------------------------------------------------------------------
# The probability of a text


def start_token(language: LanguageModel) -> int:
    """Choose what the model reads before the first token of a text; see the module's docstring."""
    tokenizer = language.tokenizer
    if language.by_character and "\n" in tokenizer.get_vocab():
        return tokenizer.get_vocab()["\n"]
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(f"model: {language.name} has no start token, nor one that ends a text")


@panics_are_errors()
def _rows(texts: list[str], language: LanguageModel) -> list[list[int]]:
    """Encode texts, each after the start token."""
    start = start_token(language)
    encoded = language.tokenizer(texts, add_special_tokens=False).input_ids
    return [[start, *tokens] for tokens in encoded]


def _of_tokens(logs: torch.Tensor, tokens: torch.Tensor, language: LanguageModel) -> torch.Tensor:
    """Look up each token's log-probability.

    An unknown word's token stands for all words that the model does not know. They share its
    probability, and are taken to be as many as those that it knows.

    Args:
        logs: log-probabilities of all tokens, (rows, length, vocabulary).
        tokens: (rows, length).

    Returns:
        (rows, length).
    """
    each = logs.gather(-1, tokens[..., None]).squeeze(-1)
    unknown = language.tokenizer.unk_token_id
    return each if unknown is None else each - (tokens == unknown) * math.log(logs.shape[-1])


def _log_language(texts: list[str], language: LanguageModel) -> list[float]:
    """Compute log P_lm of each text, in nats; batches hold texts of about the same length.

    A text beyond the model's context is read in windows, each from the middle of the one before.
    """
    context = kv_cache.context_length(language.model)
    step = context - context // 2
    windows = []  # text, tokens, how many of them count
    for i, row in enumerate(_rows(texts, language)):
        windows.append((i, row[:context], len(row[:context]) - 1))
        for end in range(context, len(row), step):
            tokens = row[end - context // 2 : end + step]
            windows.append((i, tokens, len(row[end : end + step])))
    windows.sort(key=lambda window: len(window[1]))
    totals = [0.0] * len(texts)
    while windows:
        longest, vocabulary = len(windows[-1][1]), language.model.config.vocab_size
        size = max(1, LOGITS // (longest * vocabulary))
        batch, windows = windows[-size:], windows[:-size]
        read = ScoringReader(language).start([tokens for _, tokens, _ in batch])
        for (i, _, count), logs in zip(batch, read, strict=True):
            totals[i] += sum(logs[len(logs) - count :])
    return totals


class ScoringReader:
    """Token rows that the model has read, with its key-value cache, to go on from."""

    def __init__(self, language: LanguageModel) -> None:
        self.language, self.model = language, language.model
        self.context = kv_cache.context_length(language.model)
        self.rows: list[list[int]] = []
        self._positioned = "position_ids" in inspect.signature(self.model.forward).parameters
        self._cache = DynamicCache()
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

    def go_on(self, parents: list[int], rows: list[list[int]]) -> list[list[float]]:
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
        inputs = {"input_ids": tokens, "attention_mask": self._mask}
        if self._positioned:
            inputs["position_ids"] = (self._mask.cumsum(-1) - 1)[:, -longest:]
        output = self.model(**inputs, past_key_values=self._cache, use_cache=True)
        logs = output.logits.float().log_softmax(-1)  # (rows, longest, vocabulary)
        logs = torch.cat([self._next[:, None], logs], dim=1)
        self._next = logs[torch.arange(len(new), device=device), lengths]
        each = _of_tokens(logs[:, :-1], tokens, self.language).tolist()
        return [log[: len(row)] for log, row in zip(each, new, strict=True)]


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


# ---------------------------------------------------------------------------------------------
# Judging


def word_error_rate(references: str | Sequence[str], hypotheses: str | Sequence[str]) -> float:
    """Insertions, deletions and substitutions of words, over the words of the references.

    Words are what white space separates. The edits of all texts are added up before the division.

    Args:
        references: what is right, a text or several.
        hypotheses: what was heard, as many.

    Raises:
        ValueError: the two do not match, or there is no word to be right.
    """
    right = [references] if isinstance(references, str) else list(references)
    heard = [hypotheses] if isinstance(hypotheses, str) else list(hypotheses)
    if len(right) != len(heard):
        raise ValueError(f"hypotheses: {len(heard)} texts for {len(right)} references")
    total = sum(len(text.split()) for text in right)
    if not total:
        raise ValueError("references: not one word; there is nothing to be right about")
    return sum(_edits(r.split(), h.split()) for r, h in zip(right, heard, strict=True)) / total


def _edits(first: list[str], second: list[str]) -> int:
    """Levenshtein distance of two lists of words."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
