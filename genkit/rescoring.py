"""A language model repairs transcriptions: it ranks whole ones, and corrects words within one.

Both follow Hannun et al. 2014 (Deep Speech, arXiv 1412.5567, section 2.2): of all transcriptions c
of what was heard, x, take the one with the largest

    Q(c) = log P(c|x) + alpha log P_lm(c) + beta word_count(c)

The text's first token counts, too: the model reads its start token before it. A model without one
reads its end token, which separates documents; but a character model of genkit reads a newline,
which every text of several lines teaches it, whereas a text of one document holds no <eos>.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import TypeAlias, cast

import torch
from tqdm import tqdm
from transformers import DynamicCache

from genkit import charlm, reading
from genkit.errors import panics_are_errors
from genkit.generation import LanguageModel, load
from genkit.lexicon import WORD, Lexicon

LOGITS = 1 << 24  # in a batch, at most
UNIT = 32  # characters between two words that the model reads at once

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
    _check_weights(alpha=alpha, beta=beta)
    several = not isinstance(candidates[0][0], str)
    utterances = cast(Sequence[Sequence[Scored]], candidates if several else [candidates])
    pairs = [pair for utterance in utterances for pair in utterance]
    _check_pairs(pairs)
    if not isinstance(model, LanguageModel):
        model = load(model, trust_remote_code=trust_remote_code)
    language = model
    _check_characters([text for text, _ in pairs], language)
    logs = iter(_log_language([text for text, _ in pairs], language))
    ranked = []
    for utterance in utterances:
        records = [_ranked(text, float(log), next(logs), alpha, beta) for text, log in utterance]
        ranked.append(sorted(records, key=lambda record: -record.score))
    return ranked if several else ranked[0]


def _ranked(text: str, channel: float, language: float, alpha: float, beta: float) -> Ranked:
    words = len(text.split())
    return Ranked(text, channel, language, words, channel + alpha * language + beta * words)


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not math.isfinite(weight) or (name == "alpha" and weight < 0):
            least = "0 or more" if name == "alpha" else "a finite number"
            raise ValueError(f"{name} must be {least}, got {weight}")


def _check_pairs(pairs: list[Scored]) -> None:
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Real):
            raise ValueError(f"candidates: {pair!r} is not a pair of a text and its log P(c|x)")
        if not math.isfinite(pair[1]):
            raise ValueError(f"candidates: {pair[0]!r} has the log-probability {pair[1]}")


def _check_characters(texts: list[str], language: LanguageModel) -> None:
    if language.by_character:
        unknown = charlm.unknown_characters(language.tokenizer, "".join(texts))
        if unknown:
            raise ValueError(
                f"candidates: {language.name} has never seen {', '.join(map(repr, unknown))}; "
                "leave such characters out, or fine-tune it on text that has them"
            )


# ---------------------------------------------------------------------------------------------
# The probability of a text


def _start_token(language: LanguageModel) -> int:
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
    start = _start_token(language)
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
    context = reading.context_length(language.model)
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
        read = _Reader(language).start([tokens for _, tokens, _ in batch])
        for (i, _, count), logs in zip(batch, read, strict=True):
            totals[i] += sum(logs[len(logs) - count :])
    return totals


class _Reader:
    """Token rows that the model has read, with its key-value cache, to go on from."""

    def __init__(self, language: LanguageModel) -> None:
        self.language, self.model = language, language.model
        self.context = reading.context_length(language.model)
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
# Correcting a text


@dataclass(frozen=True)
class Change:
    """A word that was replaced."""

    start: int  # its place in the text that was given
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before} -> {self.after} (at {self.start})"


@dataclass(frozen=True)
class Correction:
    """A corrected text, and what was changed."""

    source: str
    text: str
    changes: list[Change]
    score_before: float  # of channel and lexicon, plus alpha log P_lm(source)
    score_after: float  # the same of the corrected text, never less

    def __str__(self) -> str:
        scores = f"score {self.score_before:.2f} -> {self.score_after:.2f}"
        return "\n".join([self.text, *(f"  {change}" for change in self.changes), f"  {scores}"])


def correct(
    text: str | Sequence[str],
    *,
    model: str | Path | LanguageModel,
    lexicon: Iterable[str] | Lexicon,
    alpha: float = 0.6,
    beams: int = 4,
    max_edits: int = 2,
    candidates: int = 8,
    keep: float = 0.95,
    edit_cost: float = 5.0,
    unknown: float = 0.01,
    trust_remote_code: bool = False,
) -> Correction | list[Correction]:
    """Correct the misspelled words of a text, or of each of several.

    Every word may stay, whether the lexicon has it or not, or be replaced by a word of the lexicon
    a few edits away. The channel is that of Kernighan, Church and Gale 1990 with every edit equally
    likely, as in Norvig 2009 (Natural Language Corpus Data):

        log P(word seen | word meant) = log keep                       if they are the same
                                        log(1 - keep) - edit_cost n    if they are n edits apart

    A language model of characters or of parts of words finds misspelled words too likely. So a
    word meant has the further log-probability log unknown if the lexicon does not have it, and
    log(1 - unknown) if it does. A beam search from the first word to the last finds the text with
    about the largest sum of these and alpha log P_lm. Words are neither split nor joined, so that
    the word count of Q would add the same to every text; there is no beta.

    Spaces, punctuation and the case of words stay. So do words with digits, underscores or mixed
    case, which are seldom prose, and words or signs with a character that a character model has
    never seen; it reads the text as if that character were not there. A text without a word, even
    an empty one, comes back as it is.

    Args:
        text: a text or several.
        model: folder, Hub id, or what `genkit.load` returned; of any kind of token.
        lexicon: words that a correction may consist of; a `Lexicon` is made once and used often.
        alpha: weight of the language model; 0 changes nothing.
        beams: how many beginnings are kept at each word.
        max_edits: edits between a word and what replaces it.
        candidates: replacements tried for a word, the closest and most frequent.
        keep: probability that a word was written as it was meant, in (0, 1).
        edit_cost: minus the log-probability of one edit among those of a word, in nats.
        unknown: probability that a word that was meant is not in the lexicon, in (0, 1). The
            smaller, the more misspellings are found, and rare names taken for one.
        trust_remote_code: run code that the model brings along.

    Returns:
        A record for one text, a list of records for several.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text: an empty list; give at least one text")
    for each in texts:
        if not isinstance(each, str):
            raise ValueError(f"text: {each!r} is not a text")
    _check_weights(alpha=alpha)
    for name, value in {"beams": beams, "max_edits": max_edits, "candidates": candidates}.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    for name, share in {"keep": keep, "unknown": unknown}.items():
        if not 0 < share < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {share}")
    if not 0 <= edit_cost < math.inf:
        raise ValueError(f"edit_cost must be 0 or more, got {edit_cost}")
    listed = lexicon if isinstance(lexicon, Lexicon) else Lexicon(lexicon)
    if not isinstance(model, LanguageModel):
        model = load(model, trust_remote_code=trust_remote_code)
    language = model
    channel = _Channel(listed, _View(language), max_edits, candidates, keep, edit_cost, unknown)
    bar = tqdm(texts, desc="correcting", disable=None if len(texts) > 1 else True)
    found = [_correct(each, channel, language, alpha, beams) for each in bar]
    return found[0] if isinstance(text, str) else found


class _View:
    """What a model sees of a text: a character model not the characters that it does not know."""

    def __init__(self, language: LanguageModel) -> None:
        self.known = language.tokenizer.get_vocab().keys() if language.by_character else None

    def __call__(self, text: str) -> str:
        return text if self.known is None else "".join(c for c in text if c in self.known)


@dataclass(frozen=True)
class _Channel:
    """What a word that was seen may have been meant as."""

    lexicon: Lexicon
    view: _View
    max_edits: int
    candidates: int
    keep: float
    edit_cost: float
    unknown: float

    def choices(self, word: str) -> list[tuple[str, float]]:
        """List words with the log-probability that they were meant, the word itself first."""
        listed = math.log(1 - self.unknown)
        prior = listed if word in self.lexicon else math.log(self.unknown)
        stays = (word, math.log(self.keep) + prior)
        if self.view(word) != word or _in_case(word.lower(), word) != word:
            return [stays]
        error = math.log(1 - self.keep) + listed
        near = [
            (_in_case(other, word), error - self.edit_cost * edits)
            for other, edits in self.lexicon.neighbours(word, self.max_edits)
        ]
        return [stays, *[pair for pair in near if self.view(pair[0]) == pair[0]][: self.candidates]]


def _in_case(word: str, like: str) -> str:
    """Write a word in lower case as another is: lower, UPPER, or with a Capital."""
    if like == like.lower():
        return word
    if like == like.upper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:]


@dataclass(frozen=True)
class _Unit:
    """A word, what it may have been meant as, and the text up to the next word."""

    start: int
    word: str
    choices: list[tuple[str, float]]
    after: str


def _units(text: str, channel: _Channel) -> list[_Unit]:
    """Cut a text into units; text before the first word, and long text without one, has no word."""
    found = {match.start(): match[0] for match in WORD.finditer(text) if len(match[0]) <= UNIT}
    units = []
    for start, end in pairwise(sorted({0, *found, len(text)})):
        word = found.get(start, "")
        choices = channel.choices(word) if word else [("", 0.0)]
        first = start + len(word)
        units.append(_Unit(start, word, choices, text[first : min(first + UNIT, end)]))
        for cut in range(first + UNIT, end, UNIT):
            units.append(_Unit(cut, "", [("", 0.0)], text[cut : min(cut + UNIT, end)]))
    return units


@dataclass(frozen=True)
class _Hypothesis:
    """The beginning of a corrected text."""

    words: list[str]  # one of each unit
    seen: str  # the text, as the model sees it
    log_channel: float
    logs: list[float]  # of each token, under the model; 0 of the start token

    def score(self, alpha: float) -> float:
        """Q without its constant."""
        return self.log_channel + alpha * sum(self.logs)


def _correct(
    text: str, channel: _Channel, language: LanguageModel, alpha: float, beams: int
) -> Correction:
    """Search, and score what was found and what was given in the same way."""
    units = _units(text, channel)
    log_kept = sum(unit.choices[0][1] for unit in units)
    kept = _Hypothesis([unit.word for unit in units], channel.view(text), log_kept, [])
    best = _search(units, channel.view, language, alpha, beams)
    logs = _log_language([kept.seen, best.seen], language)
    before, after = replace(kept, logs=logs[:1]), replace(best, logs=logs[1:])
    if after.score(alpha) < before.score(alpha):  # the beam had lost the text as it was
        after = before
    changes = [
        Change(unit.start, unit.word, word)
        for unit, word in zip(units, after.words, strict=True)
        if word != unit.word
    ]
    corrected = "".join(word + unit.after for unit, word in zip(units, after.words, strict=True))
    return Correction(text, corrected, changes, before.score(alpha), after.score(alpha))


def _search(
    units: list[_Unit], view: _View, language: LanguageModel, alpha: float, beams: int
) -> _Hypothesis:
    """Keep the `beams` best beginnings while the text is read unit by unit."""
    reader, kept = _Reader(language), [_Hypothesis([], "", 0.0, [0.0])]
    reader.start(_rows([""], language))
    for i, unit in enumerate(units, start=1):
        grown, parents, after = [], [], view(unit.after)
        for parent, old in enumerate(kept):
            for word, log in unit.choices:
                seen = old.seen + view(word) + after
                grown.append(_Hypothesis([*old.words, word], seen, old.log_channel + log, old.logs))
                parents.append(parent)
        # only a character is a token of its own: other tokens hold the space before a word
        whole = language.by_character or i == len(units)
        rows = _rows([new.seen if whole else new.seen.rstrip() for new in grown], language)
        for j, (row, logs) in enumerate(zip(rows, reader.go_on(parents, rows), strict=True)):
            read = grown[j].logs[: len(row) - len(logs)]
            grown[j] = replace(grown[j], logs=read + logs)
        best = sorted(range(len(grown)), key=lambda j: -grown[j].score(alpha))[:beams]
        reader.keep(best)
        kept = [grown[j] for j in best]
    return kept[0]


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
