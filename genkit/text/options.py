"""The options of genkit.generate: which strategy takes which, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from genkit.arguments import check_unicode
from genkit.seeds import is_whole
from genkit.text.language_model import LanguageModel
from genkit.text.logits import COLDEST

Strategy = Literal["sample", "greedy", "stochastic", "beam", "diverse_beam", "contrastive"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class GenerationOptions:
    """The options of `genkit.generate`, which documents them; None: the strategy's default."""

    strategy: Strategy = "sample"
    # of every strategy
    max_new_tokens: int = 200
    min_new_tokens: int = 0
    stop: str | Sequence[str] = ()
    bad_words: str | Sequence[str] = ()
    prefix: str = ""
    parse_special: bool = True
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int | None = None
    # of those that draw
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | Sequence[int] | None = None
    # of those that take one token after the other
    lookup: int | None = None
    draft: str | Path | LanguageModel | None = None
    # of those that keep several texts
    beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    n_best: int | None = None
    groups: int | None = None
    diversity: float | None = None
    # of contrastive search
    alpha: float | None = None
    # of chats
    overflow: Literal["error", "drop_oldest"] = "error"


# Which strategies take an option that not all of them take
BEAMS, DRAWS = ("beam", "diverse_beam"), ("sample", "stochastic")
_OWNERS = {
    "temperature": ("sample",),
    "top_k": ("sample", "contrastive"),
    "top_p": ("sample",),
    "min_p": ("sample",),
    "typical_p": ("sample",),
    "seed": DRAWS,
    "lookup": (*DRAWS, "greedy"),
    "draft": (*DRAWS, "greedy"),
    "beams": BEAMS,
    "length_penalty": BEAMS,
    "early_stopping": BEAMS,
    "n_best": BEAMS,
    "groups": ("diverse_beam",),
    "diversity": ("diverse_beam",),
    "alpha": ("contrastive",),
}
FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
MIN_P = 0.1  # of "sample" if no filter is given
# what `load` takes
LOAD = ("revision", "dtype", "quantize", "trust_remote_code", "device")


def check_options(options: GenerationOptions) -> GenerationOptions:
    """Check each option and their combination; return `stop` and `bad_words` as tuples.

    Raises:
        ValueError: an option cannot work; the message names it and its value.
    """
    _check_strategy(options)
    _check_numbers(options)
    texts = {name: getattr(options, name) for name in ("stop", "bad_words")}
    for name, given in texts.items():
        strings = (given,) if isinstance(given, str) else given or ()
        if not isinstance(strings, Sequence) or not all(isinstance(x, str) for x in strings):
            raise ValueError(f"{name} must be a text or a list of texts, got {given!r:.80}")
        for string in strings:
            check_unicode(name, string)
        if "" in strings:
            raise ValueError(f"{name}: an empty string is in every text; leave it out")
        texts[name] = tuple(strings)
    check_unicode("prefix", options.prefix)
    for word in texts["bad_words"]:
        if word in options.prefix:
            raise ValueError(f"bad_words: {word!r} is in the prefix {options.prefix!r}")
    return replace(options, **texts)


def with_defaults(options: GenerationOptions) -> GenerationOptions:
    """Fill in the defaults of the strategy's own options."""
    if options.strategy == "contrastive":
        alpha = 0.6 if options.alpha is None else options.alpha
        return replace(options, top_k=options.top_k or 4, alpha=alpha)
    if options.strategy in BEAMS:
        beams = beam_options(options)
        own: dict[str, Any] = {
            "length_penalty": beams.length_penalty,
            "early_stopping": beams.early_stopping,
        }
        if options.strategy == "diverse_beam":
            own |= {"groups": beams.groups, "diversity": beams.diversity}
        return replace(options, beams=beams.count, **own)
    if options.strategy == "sample" and all(getattr(options, name) is None for name in FILTERS):
        return replace(options, min_p=MIN_P)
    return options


def used_options(options: GenerationOptions) -> dict[str, Any]:
    """Return the strategy and the options, by name, that with the seed repeat a text."""
    used: dict[str, Any] = {"strategy": options.strategy}
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name not in ("seed", "lookup", "draft") and value != option.default:
            used[option.name] = value
    return used


def _check_strategy(options: GenerationOptions) -> None:
    """Check that there is such a strategy, and that no option belongs to another one."""
    if options.strategy not in STRATEGIES:
        names = ", ".join(STRATEGIES)
        raise ValueError(f"strategy must be one of {names}, got {options.strategy!r}")
    if options.overflow not in ("error", "drop_oldest"):
        raise ValueError(f"overflow must be error or drop_oldest, got {options.overflow!r}")
    for name, owners in _OWNERS.items():
        value = getattr(options, name)
        if value is not None and options.strategy not in owners:
            owned = " or ".join(repr(owner) for owner in owners)
            raise ValueError(
                f"{name}={value!r} is for strategy={owned}, not for {options.strategy!r}"
            )


# Option, lowest, highest, and whether it may be the lowest
_RANGES = (
    ("temperature", 0.0, math.inf, False),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, False),
    ("typical_p", 0.0, 1.0, False),
    ("alpha", 0.0, 1.0, True),
    ("diversity", 0.0, math.inf, True),
    ("repetition_penalty", 0.0, math.inf, False),
    ("frequency_penalty", -math.inf, math.inf, False),
    ("length_penalty", -math.inf, math.inf, False),
)
# Beyond these, scores overflow
_EXTREMES = {
    "temperature": (COLDEST, math.inf),
    "repetition_penalty": (1e-6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
    "diversity": (0.0, 1e6),
    "length_penalty": (-20.0, 20.0),
}
_COUNTS = ("max_new_tokens", "top_k", "beams", "n_best", "groups", "lookup", "no_repeat_ngram")


def _check_numbers(options: GenerationOptions) -> None:
    for name, *_ in _RANGES:
        value = getattr(options, name)
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a number, got {value!r:.80}")
    if options.temperature == 0:
        raise ValueError(
            "temperature must be above 0, got 0; for the most likely token each time use "
            "strategy='greedy'"
        )
    for name, low, high, closed in _RANGES:
        value = getattr(options, name)
        above = value is None or value > low or (closed and value == low)
        if value is not None and not (above and value <= high and math.isfinite(value)):
            least = f"{low:g} or more" if closed else f"above {low:g}"
            most = "" if high == math.inf else f" and at most {high:g}"
            bounds = "finite" if low == -math.inf else f"{least}{most}"
            raise ValueError(f"{name} must be {bounds}, got {value}")
    for name, (low, high) in _EXTREMES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            bounds = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
            raise ValueError(f"{name} must be {bounds}, got {value}")
    _check_counts(options)
    if options.early_stopping not in (None, True, False, "never"):
        raise ValueError(
            f"early_stopping must be True, False or 'never', got {options.early_stopping!r}"
        )
    _check_beams(options)
    if options.lookup and options.draft is not None:
        raise ValueError(f"lookup={options.lookup} and draft are both guesses; give one")


def _check_counts(options: GenerationOptions) -> None:
    for name in (*_COUNTS, "min_new_tokens"):
        value = getattr(options, name)
        optional = name not in ("max_new_tokens", "min_new_tokens")
        if not is_whole(value) and not (optional and value is None):
            raise ValueError(f"{name} must be a whole number, got {value!r:.80}")
        least = int(name not in ("min_new_tokens", "lookup"))
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if not 0 <= options.min_new_tokens <= options.max_new_tokens:
        raise ValueError(
            f"min_new_tokens must be between 0 and max_new_tokens={options.max_new_tokens}, "
            f"got {options.min_new_tokens}"
        )


def _check_beams(options: GenerationOptions) -> None:
    beams, groups = beam_options(options).count, beam_options(options).groups
    if beams % groups:
        raise ValueError(f"groups: {beams} beams do not divide into {groups} groups")
    if options.n_best is not None and options.n_best > beams:
        raise ValueError(f"n_best must be at most beams={beams}, got {options.n_best}")


def beam_options(options: GenerationOptions) -> Beams:
    """What the options say of a beam."""
    diverse = options.strategy == "diverse_beam"
    return Beams(
        count=4 if options.beams is None else options.beams,
        groups=(2 if options.groups is None else options.groups) if diverse else 1,
        diversity=(0.5 if options.diversity is None else options.diversity) if diverse else 0.0,
        length_penalty=1.0 if options.length_penalty is None else options.length_penalty,
        early_stopping=options.early_stopping or False,
    )


@dataclass(frozen=True)
class Beams:
    """How a beam is searched.

    Args:
        count: texts kept at once.
        groups: that the texts are divided into; each is pushed away from those before it
            (Vijayakumar et al. 2018).
        diversity: log-probability that a token costs for every earlier group that has just taken
            it; it decides between candidates and is no part of a score.
        length_penalty: a score is the log-probability divided by the length to this power.
        early_stopping: True stops when `count` texts have ended; False when none that goes on is
            better than they are now; "never" when none can become better.
    """

    count: int = 4
    groups: int = 1
    diversity: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
