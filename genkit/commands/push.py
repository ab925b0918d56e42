"""genkit push: share a model on the Hub."""

from __future__ import annotations

import argparse
from typing import Any

from genkit.commands import common

EXAMPLES = """\
  genkit push runs/vae user/digits
  genkit push runs/charlm user/mybook --private --revision draft
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("folder", help="of a model, or of a run: its best model so far")
    parser.add_argument("repository", help="its name on the Hub, user/name")
    parser.add_argument("--private", action="store_true", help="for yourself only, if it is new")
    parser.add_argument("--revision", help="a branch; the default one unless told")
    common.add_json(parser)


def run(arguments: dict[str, Any]) -> None:
    """Push, and say where the model is."""
    as_json = arguments.pop("json")
    from genkit.hub.pushing import push

    pushed = push(arguments.pop("folder"), arguments.pop("repository"), **arguments)
    common.print_json(pushed) if as_json else print(pushed)
