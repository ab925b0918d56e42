"""genkit.generate: text from any language model, by any strategy, the same for the same seed."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, overload

from genkit.data import characters
from genkit.engine import decoder
from genkit.errors import panics_are_errors
from genkit.seeds import row_seeds
from genkit.text import kv_cache, logits, strategies
from genkit.text.beam_search import beam
from genkit.text.language_model import DEFAULT, LanguageModel, load_language_model
from genkit.text.options import BEAMS, DRAWS, LOAD, Options, beam_options, read_options

__all__ = ["Generation", "LanguageModel", "Piece", "generate", "stream", "trace_beams"]

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token that is a byte of a character


@dataclass(frozen=True)
class Generation:
    """One generated text and what there is to know about it."""

    prompt: str
    completion: str  # without the string that stopped it
    tokens: list[int] = field(repr=False)  # of the completion
    log_probabilities: list[float] = field(repr=False)  # of each token, under the model itself
    score: float  # their sum; for beams divided by the length penalty
    finish: str  # "length", "eos" or "stop"
    seed: int | None  # generate(prompt, seed=seed, …) gives this text again; None: nothing drawn
    alternatives: list[Generation] = field(default_factory=list, repr=False)  # n_best, from the 2nd
    continues: bool = field(default=True, repr=False)  # the prompt; an encoder-decoder answers it

    @property
    def text(self) -> str:
        """Prompt and completion, or the answer to the prompt."""
        return self.prompt + self.completion if self.continues else self.completion

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Piece:
    """The next piece of a text that is being written."""

    row: int  # which prompt it belongs to
    text: str
    record: Generation | None = None  # with a row's last piece

    def __str__(self) -> str:
        return self.text


@overload
def generate(
    prompt: str, *, model: str | Path | LanguageModel = ..., **options: Any
) -> Generation: ...
@overload
def generate(
    prompt: Sequence[str], *, model: str | Path | LanguageModel = ..., **options: Any
) -> list[Generation]: ...
def generate(
    prompt: str | Sequence[str], *, model: str | Path | LanguageModel = DEFAULT, **options: Any
) -> Generation | list[Generation]:
    """Continue a prompt, or each of several; for an encoder-decoder, answer it.

    A row's text depends on the row's prompt and seed alone, not on the batch that it is in (a beam
    or contrastive search may differ where scores are tied to the last digits). Global random state
    is neither read nor changed. Nothing of a model's own generation settings applies
    but start and end tokens, and tokens that it must never write.

    Args:
        prompt: a text or several.
        model: folder, Hub id, or what `load` returned; GPT-2 unless told.
        revision, dtype, quantize, compile, trust_remote_code: see `load`.
        strategy: "sample", the model's distribution reshaped by what follows; "stochastic", that
            distribution as it is; "greedy", the most likely token each time; "beam", the most
            likely of several texts kept at once; "diverse_beam", such texts in groups that avoid
            each other; "contrastive", likely tokens unlike anything said before.
        max_new_tokens: the longest completion; 200 unless told.
        min_new_tokens: before so many, nothing ends or stops a text.
        stop: strings that end a text; they are not part of its completion.
        bad_words: strings that no completion contains.
        prefix: what every completion begins with.
        repetition_penalty: divides the logits of tokens that were there, if they are positive, and
            multiplies them if not; 1 is none.
        frequency_penalty: is taken off a logit for each time its token is in the completion.
        no_repeat_ngram: no sequence of so many tokens comes twice.
        temperature: for "sample"; below 1 more predictable, above 1 more surprising.
        top_k: for "sample", the k most likely tokens only; for "contrastive", the candidates.
        top_p: for "sample", the fewest most likely tokens with this probability together.
        min_p: for "sample", tokens at least this share as likely as the likeliest.
        typical_p: for "sample", the tokens of the most expected surprise with this probability.
        seed: a number, then row i has seed + i; or one number a row. None draws one.
        lookup: guess so many tokens ahead from what the text has already: the same text, sooner.
        draft: guess by a smaller model of the same vocabulary: the same text, sooner.
        beams: how many texts are kept; 4 unless told.
        length_penalty: a beam's score is its log-probability divided by its length to this power;
            1 unless told.
        early_stopping: True ends when `beams` texts have ended; False (unless told) when none that
            goes on scores better; "never" when none can come to.
        n_best: how many texts of a beam to return: the others are the best one's alternatives.
        groups: of "diverse_beam"; 2 unless told.
        diversity: of "diverse_beam"; what a token that an earlier group has just taken costs, in
            log-probability; 0.5 unless told.
        alpha: of "contrastive", the weight of unlikeness; 0.6 unless told, among 4 candidates.

    Returns:
        A `Generation` for one prompt, a list of them for several.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    task = _prepare(prompt, model, options)
    records: dict[int, Generation] = {}
    for row, completions in _progress(task):
        if completions[0].finish:
            records[row] = _record(task, row, completions)
    rows = [records[i] for i in range(len(task.prompts))]
    return rows[0] if isinstance(prompt, str) else rows


def stream(
    prompt: str | Sequence[str], *, model: str | Path | LanguageModel = DEFAULT, **options: Any
) -> Iterator[Piece]:
    """Yield completions piece by piece while they are written, by any strategy.

    Takes what `generate` takes. The pieces of a row make up its completion, and the last brings the
    record. A beam gives what all the texts that it still weighs have in common.
    """
    return _pieces(_prepare(prompt, model, options))


def trace_beams(
    prompt: str,
    *,
    model: str | Path | LanguageModel = DEFAULT,
    beams: int = 4,
    max_new_tokens: int = 10,
    length_penalty: float | None = None,
) -> tuple[list[list[logits.Candidate]], Generation]:
    """Search a beam, and tell what it weighed: a list of candidates a step, best first."""
    options = {"beams": beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
    task = _prepare(prompt, model, options | {"strategy": "beam", "n_best": beams})
    trace: list[list[logits.Candidate]] = []
    *_, (row, completions) = _progress(task, trace)
    return trace, _record(task, row, completions)


# ---------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class _Task:
    """A call whose arguments have been found good."""

    language: LanguageModel
    prompts: list[str]
    rows: list[list[int]]  # the prompts as tokens
    prefix: list[int]
    seeds: tuple[int, ...] | None
    options: Options
    draft: LanguageModel | None


def _prepare(
    prompt: str | Sequence[str], model: str | Path | LanguageModel, given: dict[str, Any]
) -> _Task:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt: an empty list; give at least one text")
    loading = {name: value for name, value in given.items() if name in LOAD}
    options = read_options({name: value for name, value in given.items() if name not in LOAD})
    drawn = options.strategy in DRAWS
    seeds = tuple(row_seeds(options.seed, len(prompts), "a prompt")) if drawn else None
    if not isinstance(model, LanguageModel):
        model = load_language_model(model, **loading)
    else:
        for name, value in loading.items():
            if value is not None and name != "trust_remote_code":
                raise ValueError(f"{name}={value!r} is for loading; the model given is loaded")
    draft = options.draft
    if draft is not None and not isinstance(draft, LanguageModel):
        draft = load_language_model(draft, **{k: v for k, v in loading.items() if k != "revision"})
    rows = [encode(text, model) for text in prompts]
    prefix = _plain(options.prefix, model, "prefix")
    first = model.model.generation_config.forced_bos_token_id
    if model.model.config.is_encoder_decoder and first is not None:
        prefix = [first, *prefix]
    if len(prefix) > options.max_new_tokens:
        raise ValueError(
            f"prefix: {len(prefix)} tokens are more than max_new_tokens={options.max_new_tokens}"
        )
    _check_speculation(model, draft, options.lookup)
    return _Task(model, prompts, rows, prefix, seeds, options, draft)


def _check_speculation(
    language: LanguageModel, draft: LanguageModel | None, lookup: int | None
) -> None:
    for name, asked, model in (
        ("lookup", lookup, language),
        ("draft", draft, language),
        ("draft", draft, draft),
    ):
        if asked and model and not decoder.takes_trees(model.model):
            raise ValueError(
                f"{name}: {model.name} is no decoder with full attention; leave it out"
            )
    if draft and draft.tokenizer.get_vocab() != language.tokenizer.get_vocab():
        raise ValueError(
            f"draft: {draft.name} has other tokens than {language.name}; give a smaller model of "
            "the same vocabulary"
        )


@panics_are_errors()
def encode(prompt: str, language: LanguageModel) -> list[int]:
    """Turn a prompt into the tokens that the model reads.

    Raises:
        ValueError: it is empty, too long, or has characters that a character model does not know.
    """
    tokens = _plain(prompt, language, "prompt", special=True)
    if not tokens and language.tokenizer.bos_token_id is not None:
        tokens = [language.tokenizer.bos_token_id]
    if not tokens:
        raise ValueError("prompt is empty, and this model has no start token; give some text")
    context = kv_cache.context_length(language.model)
    if len(tokens) > context:
        raise ValueError(
            f"prompt: {len(tokens)} tokens are more than the model's context of {context}; "
            f"give the last {context} of them"
        )
    return tokens


def _plain(text: str, language: LanguageModel, name: str, special: bool = False) -> list[int]:
    if language.by_character:
        unknown = characters.unknown_characters(language.tokenizer, text)
        if unknown:
            raise ValueError(
                f"{name}: {language.name} has never seen {', '.join(map(repr, unknown))}; "
                "leave such characters out, or fine-tune it on text that has them"
            )
    return list(language.tokenizer(text, add_special_tokens=special).input_ids)


# ---------------------------------------------------------------------------------------------
# Writing


def _progress(
    task: _Task, trace: list[list[logits.Candidate]] | None = None
) -> strategies.Progress:
    """Read the prompts and start the strategy."""
    options, rules = task.options, _rules(task)
    contrastive = options.strategy == "contrastive"
    reader = kv_cache.read(task.language.stepper, task.rows, hidden=contrastive)
    if contrastive:
        alpha = 0.6 if options.alpha is None else options.alpha
        return strategies.contrastive(reader, rules, options.top_k or 4, alpha)
    if options.strategy in BEAMS:
        return beam(reader, rules, beam_options(options), trace)
    names = [f.name for f in fields(logits.Filters)]
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    starts = tuple(len(lines[0]) for lines in reader.lines)
    draw = strategies.Draw(rules, logits.Filters(**asked), task.seeds, starts)
    propose: strategies.Propose | None = (
        strategies.lookup(options.lookup) if options.lookup else None
    )
    if task.draft and max(map(len, task.rows)) <= kv_cache.context_length(task.draft.model):
        propose = strategies.Draft(kv_cache.Tree(task.draft.stepper, task.rows), draw, length=5)
    return strategies.sample(reader, draw, propose)


def _rules(task: _Task) -> strategies.Rules:
    options, settings = task.options, task.language.model.generation_config
    ends = settings.eos_token_id
    seq2seq = task.language.model.config.is_encoder_decoder
    banned = [words[0] for words in settings.bad_words_ids or () if len(words) == 1]
    plain = functools.partial(task.language.tokenizer.decode, clean_up_tokenization_spaces=False)
    anchor = [] if seq2seq else task.rows[0][-1:]  # some tokenizers drop the first token's space
    start = len(plain(anchor))

    def decode(tokens: list[int]) -> str:
        return str(plain(anchor + tokens)[start:])

    return strategies.Rules(
        longest=options.max_new_tokens,
        shortest=options.min_new_tokens,
        ends=frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends),
        never=(*(settings.suppress_tokens or ()), *banned),
        stops=tuple(options.stop),
        banned=tuple(options.bad_words),
        prefix=tuple(task.prefix),
        last=settings.forced_eos_token_id if seq2seq else None,
        penalties=logits.Penalties(
            options.repetition_penalty, options.frequency_penalty, options.no_repeat_ngram
        ),
        decode=decode,
    )


def _record(task: _Task, row: int, completions: list[strategies.Completion]) -> Generation:
    first, *others = (
        Generation(
            task.prompts[row],
            _finished_text(task, row, completion),
            completion.tokens,
            completion.logs,
            completion.score,
            completion.finish or "",
            task.seeds[row] if task.seeds else None,
            continues=not task.language.model.config.is_encoder_decoder,
        )
        for completion in completions[: task.options.n_best or 1]
    )
    return replace(first, alternatives=others)


def _text(task: _Task, row: int, tokens: list[int]) -> str:
    decode = functools.partial(
        task.language.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if task.language.model.config.is_encoder_decoder:
        return str(decode(tokens))
    prompt = task.rows[row]
    return str(decode(prompt + tokens)[len(decode(prompt)) :])  # some tokenizers join at the border


def _finished_text(task: _Task, row: int, completion: strategies.Completion) -> str:
    text = _text(task, row, completion.tokens)
    if completion.finish != "stop":
        return text
    before = len(_text(task, row, completion.tokens[:-1]).rstrip("\ufffd"))
    stops = task.options.stop  # one of them was completed by the last token
    places = [text.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _pieces(task: _Task) -> Iterator[Piece]:
    sent = [0] * len(task.prompts)
    for row, completions in _progress(task):
        best = completions[0]
        if best.finish:
            record = _record(task, row, completions)
            yield Piece(row, record.completion[sent[row] :], record)
        else:
            tokens = best.tokens[: best.settled]
            while tokens and BYTE.fullmatch(
                task.language.tokenizer.convert_ids_to_tokens(tokens[-1])
            ):
                tokens.pop()  # bytes in a row are decoded together: another could change them all
            text = _certain(_text(task, row, tokens), task.options.stop)
            if len(text) > sent[row]:
                yield Piece(row, text[sent[row] :])
                sent[row] = len(text)


def _certain(text: str, stops: str | Sequence[str]) -> str:
    """The part of a text that more tokens cannot change: no half character, no half stop."""
    text = text.rstrip("\ufffd")
    for length in range(max(map(len, stops), default=1) - 1, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops) and len(text) >= length:
            return text[:-length]
    return text
