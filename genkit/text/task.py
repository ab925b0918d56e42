"""A call of genkit.generate: its arguments checked, its prompts encoded, its strategy started."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from genkit.data import characters
from genkit.engine import decoder
from genkit.errors import panics_are_errors
from genkit.seeds import row_seeds
from genkit.text import kv_cache, logits, strategies, token_names
from genkit.text.beam_search import beam
from genkit.text.language_model import LanguageModel, load_language_model
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
    prompts: list[str]
    rows: list[list[int]]  # the prompts as tokens
    prefix: list[int]
    seeds: tuple[int, ...] | None
    options: GenerationOptions
    draft: LanguageModel | None


def prepare_task(
    prompt: str | Sequence[str], model: str | Path | LanguageModel, **given: Any
) -> Task:
    """Check the arguments of a call, load its model and encode its prompts.

    Args:
        given: arguments of `generate`, by name; those left out have their defaults.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    prompts = _as_texts(prompt)
    loading = {name: given.pop(name) for name in LOAD if name in given}
    options = with_defaults(check_options(GenerationOptions(**given)))
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
    rows = [encode_prompt(text, model) for text in prompts]
    prefix = _plain(options.prefix, model, "prefix")
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
    return Task(model, prompts, rows, prefix, seeds, options, draft)


def _as_texts(prompt: str | Iterable[str]) -> list[str]:
    """Return prompts as a list, each of them a text."""
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | dict):
        raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r:.80}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt: [] is empty; give at least one text")
    for i, text in enumerate(prompts):
        check_text("prompt" if isinstance(prompt, str) else f"prompt[{i}]", text)
    return prompts


def check_text(name: str, text: Any) -> None:
    """Raise ValueError for what is no text, or has half a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None


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
def encode_prompt(prompt: str, language: LanguageModel) -> list[int]:
    """Turn a prompt into the tokens that the model reads.

    Raises:
        ValueError: it is empty, too long, or has characters that a character model does not know.
    """
    check_text("prompt", prompt)
    tokens = _plain(prompt, language, "prompt", special=True)
    if not tokens:
        tokens = language.possible(language.tokenizer.bos_token_id)
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


def start_strategy(
    task: Task, trace: list[list[logits.Candidate]] | None = None
) -> strategies.CompletionStream:
    """Read the prompts and start the strategy.

    Args:
        trace: of a beam search: gets a list of candidates for every step, best first.
    """
    options, rules = task.options, _rules(task)
    contrastive = options.strategy == "contrastive"
    reader = kv_cache.read_prompts(task.language.stepper, task.rows, hidden=contrastive)
    if contrastive:
        assert options.top_k is not None and options.alpha is not None, "defaults are filled in"
        return strategies.contrastive(reader, rules, options.top_k, options.alpha)
    if options.strategy in BEAMS:
        return beam(reader, rules, beam_options(options), trace)
    names = [f.name for f in fields(logits.Filters)]
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    starts = tuple(len(lines[0]) for lines in reader.lines)
    sampler = strategies.TokenSampler(rules, logits.Filters(**asked), task.seeds, starts)
    return strategies.sample(reader, sampler, _make_proposer(task, sampler))


def _make_proposer(task: Task, sampler: strategies.TokenSampler) -> strategies.Propose | None:
    """Return what proposes tokens for the model to verify: a draft model, or the text so far."""
    if task.draft and max(map(len, task.rows)) <= kv_cache.context_length(task.draft.model):
        return strategies.Draft(kv_cache.Tree(task.draft.stepper, task.rows), sampler, length=5)
    return strategies.prompt_lookup(task.options.lookup) if task.options.lookup else None


def _rules(task: Task) -> strategies.Rules:
    options, settings = task.options, task.language.model.generation_config
    possible = task.language.possible
    banned = [words[0] for words in settings.bad_words_ids or () if len(words) == 1]
    last = possible(settings.forced_eos_token_id)
    seq2seq = task.language.model.config.is_encoder_decoder
    return strategies.Rules(
        longest=options.max_new_tokens,
        shortest=options.min_new_tokens,
        ends=frozenset(possible(settings.eos_token_id)),
        never=tuple(possible([*(settings.suppress_tokens or ()), *banned])),
        stops=tuple(options.stop),
        banned=tuple(options.bad_words),
        prefix=tuple(task.prefix),
        last=last[0] if seq2seq and last else None,
        penalties=logits.Penalties(
            options.repetition_penalty, options.frequency_penalty, options.no_repeat_ngram
        ),
        special=token_names.special_tokens(task.language.tokenizer),
        decode=_completion_decoder(task),
    )


def _completion_decoder(task: Task) -> Callable[[list[int]], str]:
    """Return a function that decodes the tokens of a completion, as they follow its prompt."""
    decode = functools.partial(token_names.decode_whole, task.language.tokenizer)
    seq2seq = task.language.model.config.is_encoder_decoder
    # some tokenizers drop the first token's space: a token before it that has a text of its own
    before = () if seq2seq else ([token] for token in reversed(task.rows[0]))
    anchor = next((ids for ids in before if decode(ids).strip("\ufffd")), [])
    start = len(decode(anchor))
    return lambda tokens: decode(anchor + tokens)[start:]
