"""The recipes, as modules: `genkit.recipes.train_charlm` is the file recipes/train_charlm.py.

In a source tree they lie in its own folder recipes/, in an installed package beside this file.
"""

from __future__ import annotations

from pathlib import Path

INSTALLED = Path(__file__).with_suffix("")
FOLDER = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1] / "recipes"
__path__ = [str(FOLDER)]  # a module that has one is a package: imports look there


def find_recipes() -> dict[str, Path]:
    """Return the files of all recipes by name: that of train_charlm.py is charlm.

    Others than those that train from scratch keep their verb, but for finetune_gpt2.py, gpt2.
    """
    files = sorted(FOLDER.glob("[!_]*.py"))
    names = {"finetune_gpt2": "gpt2"}
    return {names.get(path.stem, path.stem.removeprefix("train_")): path for path in files}
