"""genkit recipe: print the file of a recipe."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import recipes

EXAMPLES = """\
  genkit recipe charlm > my_recipe.py    # then: python my_recipe.py --text book.txt
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    names = recipes.find_recipes()
    parser.add_argument("recipe", choices=names, metavar="recipe", help=", ".join(names))


def run(arguments: dict[str, Any]) -> None:
    """Print the source of a recipe."""
    print(recipes.find_recipes()[arguments["recipe"]].read_text(encoding="utf-8"), end="")
