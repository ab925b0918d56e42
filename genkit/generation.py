"""genkit.generate: text from any causal language model, the same for the same seed."""

from __future__ import annotations

import functools
import json
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from genkit import charlm, decoding

STRATEGIES = ("greedy", "stochastic", "sample", "beam")


@dataclass(frozen=True)
class Generation:
    """One generated text and what there is to know about it."""

    prompt: str
    completion: str
    tokens: list[int] = field(repr=False)  # of the completion
    log_probabilities: list[float] = field(repr=False)  # of each token, under the model itself
    score: float  # their sum; for beams divided by the length penalty
    finish: str  # "length" or "eos"
    seed: int | None  # generate(prompt, seed=seed, …) gives this text again; None: nothing drawn

    @property
    def text(self) -> str:
        """Prompt and completion."""
        return self.prompt + self.completion

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class LanguageModel:
    """A causal model with its tokenizer, loaded once and used often."""

    model: PreTrainedModel
    tokenizer: Any
    name: str

    @functools.cached_property
    def by_character(self) -> bool:
        """Whether a token is a character, so that others mean nothing to the model."""
        return charlm.is_character_tokenizer(self.tokenizer)


def generate(
    prompt: str | Sequence[str],
    *,
    model: str | Path | LanguageModel,
    strategy: str = "sample",
    max_new_tokens: int = 200,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    seed: int | Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> Generation | list[Generation]:
    """Continue a prompt, or each of several.

    A row's text depends on the row's prompt and seed alone, not on the batch that it is in. Global
    random state is neither read nor changed.

    Args:
        prompt: a text or several.
        model: folder, Hub id, or what `load` returned.
        strategy: "greedy", the most likely token each time; "stochastic", the model's own
            distribution; "sample", that distribution reshaped by temperature, top_k and top_p;
            "beam", the most likely of several texts kept at once.
        max_new_tokens: the longest completion.
        temperature: for "sample"; below 1 more predictable, above 1 more surprising.
        top_k: for "sample", the k most likely tokens only.
        top_p: for "sample", the fewest tokens that have this probability together, in (0, 1].
        beams: for "beam", how many texts are kept; 4 unless told.
        length_penalty: for "beam", a text's log-probability is divided by its length to this
            power; 1 unless told.
        seed: a number, then row i has seed + i; or one number a row. None draws one.
        trust_remote_code: run code that the model brings along.

    Returns:
        A record for one prompt, a list of records for several.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt: an empty list; give at least one text")
    _check_strategy(strategy, temperature, top_k, top_p, beams, length_penalty)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    seeds = _row_seeds(seed, len(prompts))
    language = model if isinstance(model, LanguageModel) else load(model, trust_remote_code)
    rows = [_encode(text, language) for text in prompts]
    if strategy == "beam":
        found = [
            _beam(language.model, row, max_new_tokens, beams or 4, length_penalty) for row in rows
        ]
    else:
        choose = _greedy if strategy == "greedy" else _sampler(temperature, top_k, top_p)
        found = _decode(language.model, rows, seeds, max_new_tokens, choose)
    drawn = seeds if strategy in ("stochastic", "sample") else [None] * len(rows)
    records = [_record(language, *each) for each in zip(prompts, rows, found, drawn, strict=True)]
    return records[0] if isinstance(prompt, str) else records


def load(model: str | Path, trust_remote_code: bool = False) -> LanguageModel:
    """Load a causal language model and its tokenizer from a folder or the Hub.

    Raises:
        ValueError: there is no such model, or its files cannot be trusted.
    """
    name, folder = str(model), Path(model)
    _check_shards(folder)
    stamp = max((f.stat().st_mtime_ns for f in folder.glob("*.safetensors")), default=0)
    return _load(name, stamp, trust_remote_code)


@functools.lru_cache(maxsize=4)
def _load(name: str, stamp: int, trust_remote_code: bool) -> LanguageModel:
    options = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: cannot load {name!r}: {error} Train one with "
            "`accelerate launch recipes/train_charlm.py --output_dir NAME`, or give the folder or "
            "the Hub id of a causal language model in safetensors"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LanguageModel(model.to(device).eval(), tokenizer, name)


def _check_shards(folder: Path) -> None:
    """Refuse a shard index that points outside its folder: transformers joins it unchecked."""
    for index in folder.glob("*.index.json"):
        for shard in json.loads(index.read_text())["weight_map"].values():
            if Path(shard).name != shard:
                raise ValueError(f"model: {index} names a shard outside its folder: {shard!r}")


# ---------------------------------------------------------------------------------------------
# Arguments


def _check_strategy(
    strategy: str,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    beams: int | None,
    length_penalty: float | None,
) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    options = {
        "temperature": (temperature, "sample"),
        "top_k": (top_k, "sample"),
        "top_p": (top_p, "sample"),
        "beams": (beams, "beam"),
        "length_penalty": (length_penalty, "beam"),
    }
    for name, (value, owner) in options.items():
        if value is not None and strategy != owner:
            raise ValueError(f"{name}={value} is for strategy={owner!r}, not for {strategy!r}")
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be above 0, got {temperature}; "
            "for the most likely token each time use strategy='greedy'"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if beams is not None and beams < 1:
        raise ValueError(f"beams must be 1 or more, got {beams}")


def _row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(31)
    seeds = list(seed) if isinstance(seed, Sequence) else [int(seed) + i for i in range(rows)]
    if len(seeds) != rows:
        raise ValueError(f"seed: {len(seeds)} seeds for {rows} prompts; give one each, or a number")
    if any(s < 0 for s in seeds):
        raise ValueError(f"seed must be 0 or more, got {min(seeds)}")
    return seeds


def _encode(prompt: str, language: LanguageModel) -> list[int]:
    tokenizer = language.tokenizer
    if language.by_character:
        unknown = charlm.unknown_characters(tokenizer, prompt)
        if unknown:
            raise ValueError(
                f"prompt: {language.name} has never seen {', '.join(map(repr, unknown))}; "
                "leave such characters out, or fine-tune it on text that has them"
            )
    tokens = tokenizer(prompt).input_ids
    if not tokens and tokenizer.bos_token_id is not None:
        tokens = [tokenizer.bos_token_id]
    if not tokens:
        raise ValueError("prompt is empty, and this model has no start token; give some text")
    context = decoding.context_length(language.model)
    if len(tokens) > context:
        raise ValueError(
            f"prompt: {len(tokens)} tokens are more than the model's context of {context}; "
            f"give the last {context} of them"
        )
    return tokens


# ---------------------------------------------------------------------------------------------
# Strategies


# logits, uniforms -> tokens, and which of them no rounding could have changed
Choose = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Found = tuple[list[int], list[float], float]  # tokens, their log-probabilities, score


def _greedy(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return decoding.most_likely(logits)


def _sampler(temperature: float | None, top_k: int | None, top_p: float | None) -> Choose:
    return functools.partial(
        decoding.sample, temperature=temperature or 1.0, top_k=top_k, top_p=top_p or 1.0
    )


def _decode(
    model: PreTrainedModel, prompts: list[list[int]], seeds: list[int], length: int, choose: Choose
) -> list[Found]:
    """Continue rows one token at a time; a row leaves the batch when it ends."""
    texts, ends = decoding.Texts(model, prompts), _end_tokens(model)
    uniforms = decoding.noise(seeds, length).to(model.device)
    tokens: list[list[int]] = [[] for _ in prompts]
    logs: list[list[float]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for step in range(length):
        logits = texts.logits()
        chosen, sure = choose(logits, uniforms[alive, step])
        for i in (~sure).nonzero().flatten().tolist():  # so close that the batch could decide it
            chosen[i], _ = choose(texts.logits_alone(i), uniforms[alive[i : i + 1], step])
        each = logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
        for row, token, log in zip(alive, chosen.tolist(), each.tolist(), strict=True):
            tokens[row].append(token)
            logs[row].append(log)
        texts.append(chosen.tolist())
        staying = [i for i, row in enumerate(alive) if tokens[row][-1] not in ends]
        if not staying:
            break
        if len(staying) < len(alive):
            texts.select(staying)
            alive = [alive[i] for i in staying]
    return [(t, p, sum(p)) for t, p in zip(tokens, logs, strict=True)]


def _beam(
    model: PreTrainedModel, prompt: list[int], length: int, beams: int, penalty: float | None
) -> Found:
    """Keep the `beams` most likely texts; a text that ends is set aside with its score."""
    power = 1.0 if penalty is None else penalty
    texts, ends = decoding.Texts(model, [prompt]), _end_tokens(model)
    totals, logs = torch.zeros(1), [[]]  # type: tuple[torch.Tensor, list[list[float]]]
    finished: list[Found] = []
    for step in range(1, length + 1):
        each = texts.logits().log_softmax(-1).cpu()
        best = (
            (totals[:, None] + each)
            .flatten()
            .topk(min((1 + max(1, len(ends))) * beams, each.numel()))
        )
        kept: list[tuple[int, int, float]] = []  # beam, token, total
        for rank, (total, place) in enumerate(zip(*map(torch.Tensor.tolist, best), strict=True)):
            beam, token = divmod(place, each.shape[-1])
            if token not in ends:
                kept.append((beam, token, total))
            elif rank < beams:
                text = [*texts.rows[beam][len(prompt) :], token]
                finished.append(
                    (text, [*logs[beam], each[beam, token].item()], total / step**power)
                )
        kept = kept[:beams]
        finished = sorted(finished, key=lambda f: -f[2])[:beams]
        logs = [[*logs[beam], each[beam, token].item()] for beam, token, _ in kept]
        texts.select([beam for beam, _, _ in kept])
        texts.append([token for _, token, _ in kept])
        totals = torch.tensor([total for _, _, total in kept])
        if len(finished) == beams and finished[-1][2] >= totals[0].item() / step**power:
            return finished[0]
    running = [
        (row[len(prompt) :], log, total / length**power)
        for row, log, total in zip(texts.rows, logs, totals.tolist(), strict=True)
    ]
    return max(finished + running, key=lambda f: f[2])


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _record(
    language: LanguageModel, prompt: str, row: list[int], found: Found, seed: int | None
) -> Generation:
    tokens, logs, score = found
    decode = functools.partial(language.tokenizer.decode, skip_special_tokens=True)
    completion = decode(row + tokens)[len(decode(row)) :]  # some tokenizers join at the border
    finish = "eos" if tokens[-1] in _end_tokens(language.model) else "length"
    return Generation(prompt, completion, tokens, logs, score, finish, seed)
