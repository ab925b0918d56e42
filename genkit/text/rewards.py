"""Rewards of completions: a model's, a function's, or one of those that are built in.

sentiment           how positive the words are, -1 to 1, by the VADER lexicon
length=200          0 for a completion of 200 characters, -1 for an empty or a twice as long one
format=REGEX        the share of a completion's lines that match the expression as a whole
mymodule:function   function(prompts, completions), two lists, gives a list of numbers; a
                    completion is a text, a prompt a text or a list of messages
runs/reward         the folder or Hub id of a reward model: one number a text; ./length is the
                    folder of that name
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import numbers
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from genkit import files
from genkit.data.dialogues import Prompt
from genkit.engine.encoder import token_limit
from genkit.hub import kinds
from genkit.text.dialogue_tokens import encode_whole
from genkit.text.encoders import collate, load_encoder, similar_lengths
from genkit.text.language_model import LanguageModel

Function = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
KINDS = "sentiment, length=N, format=REGEX, mymodule:function, or the folder of a reward model"
REFERENCE = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Reward:
    """A reward: a number for each completion of a prompt, the larger the better."""

    name: str  # as the user gave it
    function: Function
    sha256: str  # of what decides: weights, the function's source, or the name
    language: LanguageModel | None = None  # a model, which reads chats by its own template

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Score completions.

        Raises:
            ValueError: the reward is not one finite number a completion; the first is named.
        """
        found = self.function(prompts, completions)
        scores = found.tolist() if hasattr(found, "tolist") else list(found)
        if len(scores) != len(completions):
            raise ValueError(
                f"reward: {self.name} gave {len(scores)} numbers for {len(completions)} "
                "completions; it must give one each"
            )
        for score, text in zip(scores, completions, strict=True):
            if not isinstance(score, numbers.Real) or not math.isfinite(score):
                raise ValueError(
                    f"reward: {self.name} gave {score!r:.40} for {text!r:.60}; it must be a "
                    "finite number"
                )
        return [float(score) for score in scores]


def load_reward(name: str | Reward, device: str | None = None) -> Reward:
    """Load a reward by its name, as this module's description lists them, or return a loaded one.

    Args:
        device: of a model: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such reward.
    """
    if isinstance(name, Reward):
        return name
    kind, _, value = name.partition("=")
    if kind in BUILT_IN:
        return Reward(name, BUILT_IN[kind](value), hashlib.sha256(name.encode()).hexdigest())
    if found := REFERENCE.fullmatch(name):
        function = _import_function(*found.groups())
        source = inspect.getsource(function)
        return Reward(name, function, hashlib.sha256(source.encode()).hexdigest())
    return _load_model(name, device)


def check_chats(reward: Reward, prompts: Sequence[Prompt]) -> None:
    """Refuse chats that a reward model cannot read, before anything is drawn.

    Raises:
        ValueError: it has no chat template, or one that refuses a chat; the first is named.
    """
    if reward.language is not None:
        for i, prompt in enumerate(prompts):
            encode_whole(prompt, "", reward.language, f"prompts: prompt {i}")


def describe_reading(reward: Reward, prompts: Sequence[Prompt], tokenizer: Any) -> str | None:
    """Say how a reward model reads what a policy has written, if it is not as the policy reads it.

    Args:
        prompts: all of them texts, or all of them chats.
        tokenizer: the policy's.
    """
    if reward.language is None:
        return None
    own = reward.language.tokenizer
    if not isinstance(prompts[0], str) and own.chat_template != tokenizer.chat_template:
        return f"reward {reward.name} has another chat template: it reads chats by its own"
    if not tokenizer.get_vocab().items() <= own.get_vocab().items():  # it may have padding besides
        return f"reward {reward.name} has another tokenizer: it reads completions as text"
    return None


# ---------------------------------------------------------------------------------------------
# Built in


def _sentiment(value: str) -> Function:
    if value:
        raise ValueError(f"reward: sentiment takes no value, got {value!r}")
    if importlib.util.find_spec("vaderSentiment") is None:
        raise ValueError("reward: sentiment requires VADER: pip install 'hf-genkit[align]'")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda _, completions: [analyzer.polarity_scores(c)["compound"] for c in completions]


def _length(value: str) -> Function:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"reward: length=N takes a number of characters, got length={value}")
    wanted = int(value)
    return lambda _, completions: [-abs(len(c) - wanted) / wanted for c in completions]


def _format(value: str) -> Function:
    try:
        line = re.compile(value)
    except re.error as error:
        raise ValueError(f"reward: format={value!r} is no regular expression: {error}") from None

    def share(completion: str) -> float:
        lines = completion.splitlines() or [""]
        return sum(bool(line.fullmatch(each)) for each in lines) / len(lines)

    return lambda _, completions: [share(completion) for completion in completions]


BUILT_IN = {"sentiment": _sentiment, "length": _length, "format": _format}


# ---------------------------------------------------------------------------------------------
# Functions and models


def _import_function(module: str, name: str) -> Function:
    """Import a function of the user's, from the working folder too."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: cannot import {module}:{name}: {error}") from error
    if not inspect.isfunction(function):
        raise ValueError(f"reward: {module}:{name} is no function, got {function!r:.60}")
    return function


def _load_model(name: str, device: str | None) -> Reward:
    """Load a reward model, which reads a prompt and its completion as one text."""
    model, tokenizer, _ = load_encoder(
        AutoModelForSequenceClassification,
        name,
        kinds.REWARD,
        revision=None,
        device=device,
        argument="reward",
    )
    if model.config.num_labels != 1:
        raise ValueError(
            f"reward: {name!r} has {model.config.num_labels} labels, a reward model has one; give "
            f"{KINDS}"
        )
    if model.config.pad_token_id == tokenizer.eos_token_id and tokenizer.eos_token_id is not None:
        raise ValueError(
            f"reward: {name!r} pads with its end token, so that its reward would be read before "
            "the end; give it a token for padding of its own"
        )

    language, most = LanguageModel(model, tokenizer, name), token_limit(model, tokenizer)

    @torch.inference_mode()
    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        rows = [encode_whole(prompt, text, language, "reward") for prompt, text in pairs]
        if max(map(len, rows)) > most:
            _warn_of_cutting(name, most)
        rows = [row[-most:] for row in rows]
        found = torch.empty(len(rows))
        for group in similar_lengths(model, rows):
            inputs = collate(model, [rows[i] for i in group])
            found[group] = model(**inputs).logits[:, 0].float().cpu()
        return found.tolist()

    return Reward(name, score, files.weights_hash(model), language)


@functools.cache
def _warn_of_cutting(name: str, most: int) -> None:
    """Warn, once for each model, that it does not read a text from its beginning."""
    logging.getLogger(__name__).warning(
        f"reward: {name} reads {most} tokens, and a prompt with its completion has more; of such "
        "texts it reads the end"
    )
