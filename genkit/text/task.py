"""A call of genkit.generate: its arguments checked, its prompts encoded, its strategy started."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from genkit.data import characters
from genkit.data.messages import Chat
from genkit.data.tokens import control_tokens, encode_text
from genkit.engine import decoder
from genkit.errors import panics_are_errors
from genkit.seeds import row_seeds
from genkit.text import chats, kept_keys, kv_cache, logits, speculation, strategies, token_names
from genkit.text.beam_search import beam
from genkit.text.language_model import LanguageModel, as_language_model, load_language_model
from genkit.text.options import (
    BEAMS,
    DRAWS,
    LOAD,
    GenerationOptions,
    beam_options,
    check_options,
    with_defaults,
)

# ---------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class Task:
    """A call whose arguments have been checked, and whose model is loaded."""

    language: LanguageModel
    single: bool  # one prompt was given, and not a list
    prompts: list[str]
    histories: list[chats.History]  # of chats
    rows: list[list[int]]  # the prompts as tokens
    prefix: list[int]
    seeds: tuple[int, ...] | None
    options: GenerationOptions
    draft: LanguageModel | None


def prepare_task(
    prompt: str | Chat | Sequence[str] | Sequence[Chat],
    model: str | Path | LanguageModel,
    **given: Any,
) -> Task:
    """Check the arguments of a call, load its model and encode its prompts.

    Args:
        given: arguments of `generate`, by name; those left out have their defaults.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    prompts, asked = chats.split_prompts(prompt)
    loading = {name: given.pop(name) for name in LOAD if name in given}
    options = with_defaults(check_options(GenerationOptions(**given)))
    drawn = options.strategy in DRAWS
    count = len(prompts or asked)
    seeds = tuple(row_seeds(options.seed, count, "a prompt")) if drawn else None
    if prompts and options.overflow != "error":
        raise ValueError(f"overflow={options.overflow!r} is for chats, and prompt is a text")
    if asked and not options.parse_special:
        raise ValueError("parse_special=False is for texts; in a chat every content is text anyway")
    model = as_language_model(model, **loading)
    draft = options.draft
    if draft is not None and not isinstance(draft, LanguageModel):
        own = {"revision": None, "device": str(model.model.device), "argument": "draft"}
        draft = load_language_model(draft, **loading | own)
    limits = options.overflow, options.max_new_tokens
    histories = [chats.read_chat(chat, name, model, *limits) for name, chat in asked.items()]
    prompts = prompts or [history.text for history in histories]
    single = isinstance(prompt, str) or "prompt" in asked
    rows = [h.tokens for h in histories] or [
        encode_prompt(text, model, options.parse_special, "prompt" if single else f"prompt[{i}]")
        for i, text in enumerate(prompts)
    ]
    prefix = _encode_prefix(options.prefix, model)
    first = model.model.generation_config.forced_bos_token_id
    if model.model.config.is_encoder_decoder:
        prefix = [*model.possible(first), *prefix]
    if len(prefix) > options.max_new_tokens:
        raise ValueError(
            f"prefix: {len(prefix)} tokens are more than max_new_tokens={options.max_new_tokens}"
        )
    _check_speculation(model, draft, options.lookup)
    read = (1 if model.model.config.is_encoder_decoder else max(map(len, rows))) - 1
    context = kv_cache.context_length(model.model)
    if read + options.max_new_tokens > context:
        _warn_beyond(model.name, context)
    return Task(model, single, prompts, histories, rows, prefix, seeds, options, draft)


@functools.cache
def _warn_beyond(name: str, context: int) -> None:
    """Warn, once for each model, that texts may outgrow its context."""
    logging.getLogger(__name__).warning(
        f"max_new_tokens: with the prompt a text may outgrow the context of {name}, {context} "
        "tokens; the model then goes on from the later half of its context"
    )


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
def encode_prompt(
    prompt: str, language: LanguageModel, parse_special: bool = True, name: str = "prompt"
) -> list[int]:
    """Turn a prompt into the tokens that the model reads.

    Args:
        parse_special: find special tokens in it; without, it is text throughout.
        name: of the prompt, for messages of errors.

    Raises:
        ValueError: it is empty, too long, or has characters that a character model does not know.
    """
    _check_known(name, prompt, language)
    if parse_special:
        tokens = list(language.tokenizer(prompt).input_ids)
    else:
        tokens = encode_text(language.tokenizer, prompt, ends=True)
    if not tokens:
        tokens = language.possible(language.tokenizer.bos_token_id)
    if not tokens:
        raise ValueError(f"{name} is empty, and this model has no start token; give some text")
    context = kv_cache.context_length(language.model)
    if len(tokens) > context:
        raise ValueError(
            f"{name}: {len(tokens)} tokens are more than the model's context of {context}; "
            f"give the last {context} of them"
        )
    return tokens


@panics_are_errors()
def _encode_prefix(prefix: str, language: LanguageModel) -> list[int]:
    """Turn a prefix into tokens of text: all of it is in the completion."""
    _check_known("prefix", prefix, language)
    if not prefix:
        return []
    tokenizer = language.tokenizer
    tokens = encode_text(tokenizer, prefix)
    before = [] if language.model.config.is_encoder_decoder else token_names.anchor(tokenizer)
    start = len(token_names.decode(tokenizer, before))
    if token_names.decode(tokenizer, before + tokens)[start:] == prefix:
        return tokens
    line = encode_text(tokenizer, "\n")  # in the midst of a text SentencePiece adds no space
    whole = encode_text(tokenizer, "\n" + prefix)
    return whole[len(line) :] if whole[: len(line)] == line else tokens


def _check_known(name: str, text: str, language: LanguageModel) -> None:
    """Raise ValueError for characters that a character model does not know."""
    if language.by_character:
        unknown = characters.unknown_characters(language.tokenizer, text)
        if unknown:
            raise ValueError(
                f"{name}: {language.name} has never seen {', '.join(map(repr, unknown))}; "
                "leave such characters out, or fine-tune it on text that has them"
            )


# ---------------------------------------------------------------------------------------------
# Writing


def start_strategy(
    task: Task, trace: list[list[logits.Candidate]] | None = None
) -> strategies.CompletionStream:
    """Read the prompts and start the strategy; of chats, keys that are kept are not made again.

    Args:
        trace: of a beam search: gets a list of candidates for every step, best first.
    """
    options, rules = task.options, make_rules(task)
    kept: kept_keys.KeptTexts | None = None
    if task.histories:
        kept = task.language.kept if kept_keys.keys_stay(task.language.model) else None
    states = options.strategy == "contrastive"
    reader = kv_cache.read_prompts(task.language.stepper, task.rows, states, kept)
    completions = _start(task, reader, rules, trace)
    if kept is None or isinstance(reader, kv_cache.Rows):
        return completions
    return _keep_keys(completions, task.rows, reader, kept)


def _start(
    task: Task,
    reader: strategies.TextReader,
    rules: strategies.Rules,
    trace: list[list[logits.Candidate]] | None,
) -> strategies.CompletionStream:
    options = task.options
    if options.strategy == "contrastive":
        assert options.top_k is not None and options.alpha is not None, "defaults are filled in"
        return strategies.contrastive(reader, rules, options.top_k, options.alpha)
    if options.strategy in BEAMS:
        return beam(reader, rules, beam_options(options), trace)
    names = [f.name for f in fields(logits.Filters)]
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    starts = tuple(len(lines[0]) for lines in reader.lines)
    sampler = strategies.TokenSampler(rules, logits.Filters(**asked), task.seeds, starts)
    return strategies.sample(reader, sampler, _make_proposer(task, reader, sampler))


def _keep_keys(
    completions: strategies.CompletionStream,
    rows: list[list[int]],
    reader: kv_cache.Tree,
    kept: kept_keys.KeptTexts,
) -> strategies.CompletionStream:
    """Pass completions on, and keep the keys of each text when it ends or nobody wants more."""
    going: dict[int, list[int]] = {row: [] for row in reader.texts}
    try:
        for row, own in completions:
            going[row] = own[0].tokens
            if own[0].finish:
                line = rows[row] + going.pop(row)
                kept.add(reader.copy_keys(reader.texts.index(row), line))
            yield row, own
    except GeneratorExit:  # between two steps, so that all keys are written
        for row, tokens in going.items():
            kept.add(reader.copy_keys(reader.texts.index(row), rows[row] + tokens))
        raise


def _make_proposer(
    task: Task, reader: strategies.TextReader, sampler: strategies.TokenSampler
) -> strategies.Propose | None:
    """Return what proposes tokens for the model to verify: a draft model, or the text so far."""
    if task.draft and max(map(len, task.rows)) <= kv_cache.context_length(task.draft.model):
        return speculation.Draft(kv_cache.Tree(task.draft.stepper, task.rows), sampler, length=5)
    length = task.options.lookup
    if length or (length is None and _may_guess(reader)):
        return speculation.PromptLookup(length)
    return None


def _may_guess(reader: strategies.TextReader) -> bool:
    """Whether guesses that come true save time, and the others cannot change a text."""
    if not isinstance(reader, kv_cache.Tree) or len(reader.lines) > 1:
        return False
    return reader.stepper.is_exact and reader.steps_at_once() < 2


def make_rules(task: Task) -> strategies.Rules:
    """Return what every completion of a call must satisfy, by options and settings."""
    options, settings = task.options, task.language.model.generation_config
    possible = task.language.possible
    banned = [words[0] for words in settings.bad_words_ids or () if len(words) == 1]
    last = possible(settings.forced_eos_token_id)
    seq2seq = task.language.model.config.is_encoder_decoder
    ends = frozenset(possible(settings.eos_token_id))
    if task.histories:
        ends |= chats.end_of_turn(task.language)
    control = control_tokens(task.language.tokenizer).values()  # not all are marked as special
    return strategies.Rules(
        longest=options.max_new_tokens,
        shortest=options.min_new_tokens,
        ends=ends,
        never=tuple(possible([*(settings.suppress_tokens or ()), *banned])),
        stops=tuple(options.stop),
        banned=tuple(options.bad_words),
        prefix=tuple(task.prefix),
        last=last[0] if seq2seq and last else None,
        penalties=logits.Penalties(
            options.repetition_penalty, options.frequency_penalty, options.no_repeat_ngram
        ),
        special=token_names.special_tokens(task.language.tokenizer) | ends.intersection(control),
        bytes=token_names.byte_tokens(task.language.tokenizer),
        decode=_completion_decoder(task),
    )


def _completion_decoder(task: Task) -> Callable[[list[int]], str]:
    """Return a function that decodes the tokens of a completion, as they follow its prompt."""
    decode = functools.partial(token_names.decode_whole, task.language.tokenizer)
    seq2seq = task.language.model.config.is_encoder_decoder
    anchor = [] if seq2seq else token_names.anchor(task.language.tokenizer)
    start = len(decode(anchor))
    return lambda tokens: decode(anchor + tokens)[start:]
