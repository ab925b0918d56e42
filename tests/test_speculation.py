"""Guesses of the next tokens: what is guessed, when, and that no text changes."""

import random

import pytest
import torch
from builders import small_model

import genkit
from genkit.engine.decoder import Stepper
from genkit.text import kv_cache
from genkit.text.speculation import LONGEST_GUESS, PromptLookup


def continuation(line: list[int], length: int) -> list[int]:
    """What follows the last place where the last three, two or one tokens were before."""
    for size in (3, 2, 1):
        for i in range(len(line) - size - 1, -1, -1):
            if line[i : i + size] == line[-size:]:
                return line[i + size : i + size + length]
    return []


@pytest.mark.parametrize("tokens", [2, 5, 40])
def test_a_guess_follows_the_last_place_of_the_last_tokens(tokens):
    """While a text grows by some tokens at a time."""
    rng = random.Random(tokens)
    lookup, line = PromptLookup(4), [rng.randrange(tokens)]
    for _ in range(200):
        assert lookup([7], [line]) == [continuation(line, 4)]
        line = line + [rng.randrange(tokens) for _ in range(rng.randrange(1, 6))]


def guess_lengths(line: list[int], first: int) -> list[int]:
    lookup = PromptLookup(None)
    return [len(lookup([0], [line[:end]])[0]) for end in range(first, len(line))]


def test_nothing_is_guessed_before_guesses_would_have_been_right():
    rng = random.Random(0)
    assert set(guess_lengths([rng.randrange(20) for _ in range(300)], 1)) == {0}
    again = list(range(50)) * 2 + [rng.randrange(100, 120) for _ in range(100)]
    lengths = guess_lengths(again, 50)
    assert lengths[0] == 0 and lengths[40] == LONGEST_GUESS  # in the second of two equal halves
    assert set(lengths[-50:]) == {0}


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("strategy", ["greedy", "stochastic"])
def test_guesses_by_default_change_no_text_and_save_steps(monkeypatch, kind, strategy):
    """A large model goes step by step: here one that is called large. Its text repeats itself."""
    language = small_model("llama", context=600)
    torch.nn.init.zeros_(language.model.model.layers[-1].mlp.down_proj.weight)
    stepper = Stepper(language.model, kind)
    monkeypatch.setattr(stepper, "_steps_at_once", 0)
    monkeypatch.setattr(type(language), "stepper", stepper)
    steps, whole = [], kv_cache.Tree.step
    monkeypatch.setattr(
        kv_cache.Tree, "step", lambda self, *a, **k: (steps.append(1), whole(self, *a, **k))[1]
    )
    seed = {"seed": 3} if strategy == "stochastic" else {}
    options = {"strategy": strategy, "max_new_tokens": 300, "min_new_tokens": 300} | seed
    guessed = genkit.generate("abcabcabc", model=language, **options)
    count = len(steps)
    plain, _ = genkit.generate(["abcabcabc", "b"], model=language, **options)
    assert guessed == plain
    assert len(steps) - count == 299
    assert guessed == genkit.generate("abcabcabc", model=language, lookup=0, **options)
    assert len(steps) - count == 2 * 299
    if strategy == "greedy":
        assert count < 200
