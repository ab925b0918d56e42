"""genkit push: share a model on the Hub."""

from __future__ import annotations

import argparse
from typing import Any

from genkit import console
from genkit.commands import common

EXAMPLES = """\
  genkit push runs/vae user/digits
  genkit push runs/charlm user/mybook --private --revision draft
  genkit push runs/vae user/digits --space user/digits-demo  # and a Space with the page for it
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folder", help="a saved model, or a run: its best model so far")
    parser.add_argument("repository", help="its name on the Hub, user/name")
    parser.add_argument("--private", action="store_true", help="visible to you alone")
    parser.add_argument("--revision", help="a branch (default: the main one)")
    text = "also push a Space, user/name, that serves the page for the model"
    parser.add_argument("--space", help=text)
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Push, and print the model's address."""
    as_json = arguments.pop("json")
    from genkit.hub.pushing import push

    console.silence_libraries()
    pushed = push(arguments.pop("folder"), arguments.pop("repository"), **arguments)
    common.print_json(pushed) if as_json else print(pushed)
