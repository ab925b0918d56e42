"""genkit app: the page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

EXAMPLES = """\
  genkit app                      # everything in runs/
  genkit app runs/charlm user/digits --port 8000
  genkit app runs --host 0.0.0.0  # for others, who need the token that is printed
  genkit app runs --host 0.0.0.0 --token_file secret.txt

The token is read from --token_file, else from the variable GENKIT_TOKEN, else drawn for others than
this machine. It is no option, as everybody on a machine can read the command lines of all.
"""
LONGEST = 1000  # characters of a token's file


def add(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("models", nargs="*", default=["runs"], help="folders or Hub ids; runs")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; this machine only unless told"
    )
    parser.add_argument("--port", type=int, default=7860, help="7860 unless told")
    parser.add_argument("--token_file", type=Path, help="whose only line requests must bring")


def run(arguments: dict[str, Any]) -> None:
    """Serve the page until it is stopped."""
    from genkit.app import serve

    file = arguments.pop("token_file")
    token = os.environ.get("GENKIT_TOKEN") if file is None else read_token(file)
    serve(arguments.pop("models"), token=token, **arguments)


def read_token(file: Path) -> str:
    """Read a token.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(LONGEST).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"token_file: cannot read {str(file)!r} ({error})") from None
