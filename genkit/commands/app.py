"""genkit app: serve the web page, or write it to disk for a Hugging Face Space."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from genkit import console

EXAMPLES = """\
  genkit app                      # everything in runs/
  genkit app runs/charlm user/digits --port 8000
  genkit app runs --host 0.0.0.0  # for others, who need the token that is printed
  genkit app runs --host 0.0.0.0 --token-file secret.txt
  genkit app runs --root-path https://example.org/genkit  # behind a proxy
  genkit app runs/vae --export demo  # a folder for a Hugging Face Space

The token is read from --token-file, else from the variable GENKIT_TOKEN; else one is drawn if other
machines can reach the page. There is no option for the token itself, as everybody on a machine can
read all command lines.
"""
LONGEST = 1000  # characters of a token file
# of a page that is served, with the values that they have unless they are given
SERVING = {"host": "127.0.0.1", "port": 7860, "device": None, "root_path": "", "token_file": None}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = "folders or Hub ids (default: runs)"
    parser.add_argument("models", nargs="*", default=["runs"], help=text)
    text = "the address to listen at (default: this machine only)"
    parser.add_argument("--host", help=text)
    parser.add_argument("--port", type=int, help="the port to listen at (default: 7860)")
    text = "cpu, or a GPU as torch names it (default: the GPU, if there is one)"
    parser.add_argument("--device", help=text)
    text = "where visitors find the page behind a proxy: /genkit, or https://example.org/genkit"
    parser.add_argument("--root-path", metavar="PATH", help=text)
    parser.add_argument("--token-file", type=Path, help="a file whose only line is the token")
    text = "serve nothing; write the page for one model to a new folder that Spaces can run"
    parser.add_argument("--export", metavar="FOLDER", help=text)
    parser.set_defaults(**SERVING)


def run(arguments: dict[str, Any]) -> None:
    """Serve the page until it is stopped, or write it to disk."""
    target = arguments.pop("export")
    if target is not None:
        export(arguments, target)
        return
    from genkit import machine
    from genkit.app import serve

    machine.start(arguments.pop("device"))
    file = arguments.pop("token_file")
    token = os.environ.get("GENKIT_TOKEN") if file is None else read_token(file)
    serve(arguments.pop("models"), token=token, **arguments)


def export(arguments: dict[str, Any], folder: str) -> None:
    """Write the page for a model to a folder, and print what was written.

    Raises:
        ValueError: more than one model is given, or a flag of a page that is served.
    """
    models = arguments["models"]
    if len(models) != 1:
        raise ValueError(f"--export takes one model, got {' '.join(models)}")
    for name, default in SERVING.items():
        if arguments[name] != default:
            raise ValueError(
                f"--{name.replace('_', '-')} is for a page that is served, not for --export"
            )
    from genkit.hub import spaces

    console.silence_libraries()
    print(spaces.export(models[0], folder))


def read_token(file: Path) -> str:
    """Read a token from a file.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(LONGEST).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file: cannot read {str(file)!r} ({error})") from None
