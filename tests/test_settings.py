"""Settings of every recipe: declared ranges and choices, presets, --help."""

import dataclasses
import importlib
import math
from types import ModuleType, NoneType
from typing import get_args, get_type_hints

import pytest
from builders import ROOT

from genkit.training.settings import CHOSEN, Allowed, RunSettings, parse, setting

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
LIMITED = {name: f for name, f in RunSettings.__dataclass_fields__.items() if f.metadata["allowed"]}


@pytest.fixture(params=NAMES)
def recipe(request) -> ModuleType:
    return importlib.import_module(f"recipes.{request.param}")


def outside(allowed: Allowed, whole: bool) -> list:
    """Values just outside of each bound, and no numbers."""
    if allowed.choices is not None:
        return ["no such choice"]
    step = 1 if whole else 1e-9
    values = [] if whole else [math.nan, math.inf, -math.inf]
    values += [allowed.least - step] if allowed.least is not None else []
    values += [allowed.above] if allowed.above is not None else []
    values += [allowed.below] if allowed.below is not None else []
    values += [allowed.most + step] if allowed.most is not None else []
    return values


def inside(allowed: Allowed, whole: bool) -> list:
    """The bounds that are included, and values just inside of the others."""
    if allowed.choices is not None:
        return list(allowed.choices)
    step = 1 if whole else 1e-9
    values = [bound for bound in (allowed.least, allowed.most) if bound is not None]
    values += [allowed.above + step] if allowed.above is not None else []
    values += [allowed.below - step] if allowed.below is not None else []
    return values


def test_each_bound_is_checked_and_the_message_names_flag_value_and_range(recipe):
    hints = get_type_hints(recipe.Settings)
    fields = [f for f in dataclasses.fields(recipe.Settings) if f.metadata["allowed"]]
    assert len(fields) > len(LIMITED)
    for field in fields:
        allowed, text = field.metadata["allowed"], str(hints[field.name])
        whole, listed = "float" not in text, "list" in text
        for value in outside(allowed, whole):
            with pytest.raises(ValueError) as refused:
                recipe.Settings(**{field.name: [value] if listed else value})
            message = str(refused.value)
            assert f"--{field.name} " in message and repr(value) in message, message
            assert str(allowed) in message and "\n" not in message
        for value in inside(allowed, whole):
            assert allowed.includes(value), (field.name, value)


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_a_preset_chooses_all_that_a_run_needs(recipe, device):
    """Settings of a recipe's own may also be chosen by the data or by the model it starts from."""
    given, hints = recipe.Settings(), get_type_hints(RunSettings)
    chosen = recipe.preset(given, device)
    needed = [f.name for f in dataclasses.fields(RunSettings) if f.default is CHOSEN]
    needed = [name for name in needed if NoneType not in get_args(hints[name])]
    assert len(needed) == 8
    assert all(getattr(given, name) is not CHOSEN or chosen[name] is not None for name in needed)


def test_help_shows_ranges_choices_and_the_default_chosen_here(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        parse(recipe.Settings, recipe.preset, ["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    chosen = recipe.preset(recipe.Settings(), "cpu")
    assert f"(1 or more; default: {chosen['batch_size']})" in text
    assert all(f"--{f.name} " in text for f in dataclasses.fields(recipe.Settings))


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ({"least": 1}, "1 or more"),
        ({"above": 0, "below": 1}, "above 0 and below 1"),
        ({"least": 0, "most": 1}, "0 or more and 1 or less"),
        ({"choices": ("a", "b", "c")}, "a, b or c"),
        ({"choices": ("a",)}, "a"),
    ],
)
def test_a_range_in_words(bounds, text):
    assert str(setting(None, "", **bounds).metadata["allowed"]) == text
