"""genkit.generate: text from any language model, by any strategy, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from genkit.arguments import explain_names
from genkit.data.messages import Chat
from genkit.data.tokens import control_tokens
from genkit.notebook import TextRecord
from genkit.text import logits, strategies, token_names
from genkit.text.language_model import DEFAULT, LanguageModel
from genkit.text.options import Strategy, used_options
from genkit.text.task import Task, prepare_task, start_strategy


@dataclass(frozen=True)
class Generation(TextRecord):
    """One generated text, its tokens, their log-probabilities, its score and its seed."""

    prompt: str  # of a chat: as the model's template writes it
    completion: str  # without the string that stopped it
    tokens: list[int] = field(repr=False)  # of the completion
    log_probabilities: list[float] = field(repr=False)  # of each token, under the model itself
    score: float  # their sum; for beams divided by the length penalty
    finish: str  # "length", "eos" or "stop"; "dead_end": the rules left no token
    seed: int | None  # None: nothing was drawn
    # what was used; generate(prompt, seed=seed, model=…, **options) gives the same text
    options: dict[str, Any] = field(default_factory=dict)
    alternatives: list[Generation] = field(default_factory=list, repr=False)  # n_best, 2nd onwards
    continues: bool = field(default=True, repr=False)  # False: a reply, of a chat or an answer
    messages: list[dict[str, str]] | None = field(default=None, repr=False)  # of a chat, with reply
    dropped: list[dict[str, str]] = field(default_factory=list, repr=False)  # see `overflow`

    @property
    def text(self) -> str:
        """Prompt and completion, or the reply to the prompt."""
        return self.prompt + self.completion if self.continues else self.completion

    @property
    def message(self) -> dict[str, str] | None:
        """The reply to a chat, {"role": "assistant", "content": completion}."""
        return self.messages[-1] if self.messages else None

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
def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str], too
    prompt: str | Chat,
    *,
    model: str | Path | LanguageModel = ...,
    revision: str | None = ...,
    dtype: str | None = ...,
    quantize: str | None = ...,
    trust_remote_code: bool = ...,
    device: str | None = ...,
    strategy: Strategy = ...,
    max_new_tokens: int = ...,
    min_new_tokens: int = ...,
    stop: str | Sequence[str] = ...,
    bad_words: str | Sequence[str] = ...,
    prefix: str = ...,
    parse_special: bool = ...,
    repetition_penalty: float = ...,
    frequency_penalty: float = ...,
    no_repeat_ngram: int | None = ...,
    temperature: float | None = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    min_p: float | None = ...,
    typical_p: float | None = ...,
    seed: int | Sequence[int] | None = ...,
    lookup: int | None = ...,
    draft: str | Path | LanguageModel | None = ...,
    beams: int | None = ...,
    length_penalty: float | None = ...,
    early_stopping: bool | Literal["never"] | None = ...,
    n_best: int | None = ...,
    groups: int | None = ...,
    diversity: float | None = ...,
    alpha: float | None = ...,
    overflow: Literal["error", "drop_oldest"] = ...,
) -> Generation: ...
@overload
def generate(
    prompt: Sequence[str] | Sequence[Chat],
    *,
    model: str | Path | LanguageModel = ...,
    revision: str | None = ...,
    dtype: str | None = ...,
    quantize: str | None = ...,
    trust_remote_code: bool = ...,
    device: str | None = ...,
    strategy: Strategy = ...,
    max_new_tokens: int = ...,
    min_new_tokens: int = ...,
    stop: str | Sequence[str] = ...,
    bad_words: str | Sequence[str] = ...,
    prefix: str = ...,
    parse_special: bool = ...,
    repetition_penalty: float = ...,
    frequency_penalty: float = ...,
    no_repeat_ngram: int | None = ...,
    temperature: float | None = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    min_p: float | None = ...,
    typical_p: float | None = ...,
    seed: int | Sequence[int] | None = ...,
    lookup: int | None = ...,
    draft: str | Path | LanguageModel | None = ...,
    beams: int | None = ...,
    length_penalty: float | None = ...,
    early_stopping: bool | Literal["never"] | None = ...,
    n_best: int | None = ...,
    groups: int | None = ...,
    diversity: float | None = ...,
    alpha: float | None = ...,
    overflow: Literal["error", "drop_oldest"] = ...,
) -> list[Generation]: ...
@explain_names
def generate(
    prompt: str | Chat | Sequence[str] | Sequence[Chat],
    *,
    model: str | Path | LanguageModel = DEFAULT,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    strategy: Strategy = "sample",
    max_new_tokens: int = 200,
    min_new_tokens: int = 0,
    stop: str | Sequence[str] = (),
    bad_words: str | Sequence[str] = (),
    prefix: str = "",
    parse_special: bool = True,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    no_repeat_ngram: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    lookup: int | None = None,
    draft: str | Path | LanguageModel | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | Literal["never"] | None = None,
    n_best: int | None = None,
    groups: int | None = None,
    diversity: float | None = None,
    alpha: float | None = None,
    overflow: Literal["error", "drop_oldest"] = "error",
) -> Generation | list[Generation]:
    """Continue a prompt, or each of several; for a chat or an encoder-decoder, answer it.

    A row's text depends on the row's prompt and seed alone, not on the batch that it is in (a beam
    or contrastive search may differ where scores are tied to the last digits). Global random state
    is neither read nor changed. Of a model's own generation settings, only the start and end tokens
    and the tokens that it must never write apply. A text that outgrows the model's context goes on
    from the later half of the context; a warning is logged before. A text ends where the rules
    leave no token.

    Args:
        prompt: one text or several; or one chat or several, each a list of messages such as
            {"role": "user", "content": "Hi"}, the oldest first and the user's last, which the
            model's own chat template writes. A system message may come first.
        model: folder or Hub id of a language model (in Python, also what `load` returned); default:
            GPT-2.
        revision: branch, tag or commit on the Hub.
        dtype: "float32" (default), "bfloat16", or on a GPU "float16"; see `load`.
        quantize: "int8" or "int4", on a CPU; see `load`.
        trust_remote_code: run code that the model brings along.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        strategy: "sample" draws from the model's distribution, reshaped by temperature, top_k,
            top_p, min_p and typical_p, or without any of these five by min_p=0.1; "stochastic"
            draws from that distribution as it is; "greedy"
            takes the most likely token each time; "beam" keeps the most likely texts;
            "diverse_beam" keeps groups of texts that avoid each other; "contrastive" takes likely
            tokens that are unlike the text so far.
        max_new_tokens: tokens of the longest completion.
        min_new_tokens: tokens before which no text ends.
        stop: string that ends a text and is not part of its completion. Special tokens have no
            text, so that no string is found in them.
        bad_words: string that no completion contains.
        prefix: text that every completion begins with.
        parse_special: read what spells a special token in a prompt as that token; without it, a
            prompt is text throughout, as a prefix always is.
        repetition_penalty: divides the logits of tokens that are in the text already if they are
            positive, and multiplies them if not; 1 is no penalty.
        frequency_penalty: is subtracted from a token's logit for each time that the token is in the
            completion.
        no_repeat_ngram: no sequence of so many tokens appears twice.
        temperature: for "sample": below 1 more predictable, above 1 more surprising; 1 alone is
            the model's own distribution.
        top_k: for "sample": keep only the k most likely tokens; for "contrastive": the number of
            candidates (default there: 4).
        top_p: for "sample": keep the fewest most likely tokens with this probability together.
        min_p: for "sample": keep the tokens at least this share as likely as the likeliest one;
            default: 0.1 if no temperature, top_k, top_p, min_p or typical_p is given.
        typical_p: for "sample": keep the tokens whose surprise is closest to the expected one, with
            this probability together.
        seed: for "sample" and "stochastic": row i has seed + i, or its own of a list; default: a
            random one, which the record holds.
        lookup: guess so many tokens ahead by looking them up in the text so far (prompt lookup
            decoding), 0 for none; default: for one text as many as pay. The text is the same, and
            it is faster.
        draft: guess ahead by this smaller model of the same vocabulary (speculative decoding); the
            text is the same, and it is faster.
        beams: for a beam search: how many texts are kept; default: 4.
        length_penalty: for a beam search: a text's score is its log-probability divided by its
            length to this power; default: 1.
        early_stopping: for a beam search: True stops when `beams` texts have ended; False (default)
            when no unfinished text has a better score; "never" when none can reach a better one.
        n_best: for a beam search: how many texts to return, if there are as many; the others are
            the alternatives of the best one.
        groups: for "diverse_beam": how many groups; default: 2.
        diversity: for "diverse_beam": what a token costs, in log-probability, that an earlier group
            has just taken; default: 0.5.
        alpha: for "contrastive": the weight of the penalty on similarity; default: 0.6.
        overflow: for a chat that does not fit into the model's context together with its reply:
            "error", or "drop_oldest" leaves out the oldest messages of user and assistant, which
            the record names.

    Returns:
        A `Generation` for one prompt, a list of them for several.

    Raises:
        ValueError: an argument cannot work; the message names it and its value.
    """
    task = prepare_task(**locals())
    records: dict[int, Generation] = {}
    for row, completions in start_strategy(task):
        if completions[0].finish:
            records[row] = _record(task, row, completions)
    rows = [records[i] for i in range(len(task.prompts))]
    return rows[0] if task.single else rows


@explain_names
def stream(
    prompt: str | Chat | Sequence[str] | Sequence[Chat],
    *,
    model: str | Path | LanguageModel = DEFAULT,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    strategy: Strategy = "sample",
    max_new_tokens: int = 200,
    min_new_tokens: int = 0,
    stop: str | Sequence[str] = (),
    bad_words: str | Sequence[str] = (),
    prefix: str = "",
    parse_special: bool = True,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    no_repeat_ngram: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    lookup: int | None = None,
    draft: str | Path | LanguageModel | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | Literal["never"] | None = None,
    n_best: int | None = None,
    groups: int | None = None,
    diversity: float | None = None,
    alpha: float | None = None,
    overflow: Literal["error", "drop_oldest"] = "error",
) -> Iterator[Piece]:
    """Yield completions piece by piece while they are written, by any strategy.

    Args:
        prompt: one text or chat, or several.

    Every other argument is that of `generate`.

    Returns:
        The pieces of all rows as they come. Those of a row make up its completion, and the last
        one has the record. A beam search yields what all the texts that it still keeps have in
        common.

    Raises:
        ValueError: an argument cannot work; it is raised here, before the first piece is asked for.
    """
    return _pieces(prepare_task(**locals()))


def trace_beams(
    prompt: str,
    *,
    model: str | Path | LanguageModel = DEFAULT,
    beams: int = 4,
    max_new_tokens: int = 10,
    length_penalty: float | None = None,
) -> tuple[list[list[logits.Candidate]], Generation]:
    """Search with beams and also return the candidates of every step, best first."""
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be one text, got {prompt!r:.80}")
    task = prepare_task(
        prompt,
        model,
        strategy="beam",
        beams=beams,
        n_best=beams,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
    )
    trace: list[list[logits.Candidate]] = []
    *_, (row, completions) = start_strategy(task, trace)
    return trace, _record(task, row, completions)


def _record(task: Task, row: int, completions: list[strategies.Completion]) -> Generation:
    history = task.histories[row] if task.histories else None
    found: dict[str, Generation] = {}  # each text once: its tokens or its end may differ
    for completion in completions:
        if len(found) == (task.options.n_best or 1):
            break
        text = _finished_text(task, row, completion)
        record = Generation(
            task.prompts[row],
            text,
            completion.tokens,
            completion.logs,
            completion.score,
            completion.finish or "",
            task.seeds[row] if task.seeds else None,
            used_options(task.options),
            continues=not (history or task.language.model.config.is_encoder_decoder),
            messages=history.answered(text) if history else None,
            dropped=history.dropped if history else [],
        )
        found.setdefault(text, record)
    first, *others = found.values()
    return replace(first, alternatives=others)


def _text(task: Task, row: int, tokens: list[int], ended: bool = False) -> str:
    """Decode a completion; half a character at its end has a text, U+FFFD, once it has ended."""
    tokenizer = task.language.tokenizer
    decode = token_names.decode if ended else token_names.decode_whole
    if task.language.model.config.is_encoder_decoder:
        return decode(tokenizer, tokens)
    prompt = task.rows[row]  # some tokenizers join at the border
    whole = decode(tokenizer, prompt + tokens)
    return whole[len(token_names.decode(tokenizer, prompt)) :]


def _finished_text(task: Task, row: int, completion: strategies.Completion) -> str:
    tokens = completion.tokens
    control = control_tokens(task.language.tokenizer).values()  # not all are marked as special
    if completion.finish == "eos" and tokens[-1] in control:
        tokens = tokens[:-1]
    text = _text(task, row, tokens, ended=True)
    if completion.finish != "stop":
        return text
    before = len(_text(task, row, completion.tokens[:-1]))
    stops = task.options.stop  # one of them was completed by the last token
    starts = [text.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
    return text[: min((start for start in starts if start >= 0), default=len(text))]


def _pieces(task: Task) -> Iterator[Piece]:
    sent = [0] * len(task.prompts)
    for row, completions in start_strategy(task):
        best = completions[0]
        if best.finish:
            record = _record(task, row, completions)
            yield Piece(row, record.completion[sent[row] :], record)
        else:
            tokens = best.tokens[: best.settled]
            while tokens and token_names.BYTE.fullmatch(
                task.language.tokenizer.convert_ids_to_tokens(tokens[-1]) or ""
            ):
                tokens.pop()  # bytes in a row are decoded together: another could change them all
            text = _certain_part(_text(task, row, tokens), task.options.stop)
            if len(text) > sent[row]:
                yield Piece(row, text[sent[row] :])
                sent[row] = len(text)


def _certain_part(text: str, stops: str | Sequence[str]) -> str:
    """The part of a text that more tokens cannot change: no half stop."""
    for length in range(max(map(len, stops), default=1) - 1, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops) and len(text) >= length:
            return text[:-length]
    return text
