"""genkit app: the page."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLES = """\
  genkit app                      # everything in runs/
  genkit app runs/charlm user/digits --port 8000
  genkit app runs --host 0.0.0.0  # for others, who need the token that is printed
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("models", nargs="*", default=["runs"], help="folders or Hub ids; runs")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; this machine only unless told"
    )
    parser.add_argument("--port", type=int, default=7860, help="7860 unless told")
    parser.add_argument("--token", help="for others than this machine; drawn unless given")


def run(arguments: dict[str, Any]) -> None:
    """Serve the page until it is stopped."""
    from genkit.app import serve

    serve(arguments.pop("models"), **arguments)
