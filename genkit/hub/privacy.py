"""What identifies this machine, and must not leave it: paths, its name, its user."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import struct
from pathlib import Path
from typing import Any

from genkit.hub import names

PICTURES = (".png", ".gif")  # whose bytes may be any
VOCABULARY = re.compile(r"(tokenizer|vocab|added_tokens)\.json|(vocab|merges)\.txt|.*\.model")
# keys by which transformers and diffusers note where a model came from, and which they never read
ORIGINS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")


def check(staged: Path, source: Path, repository: str | None) -> None:
    """Refuse to push files that identify this machine.

    Args:
        staged: the folder that is pushed.
        source: the folder that it is a copy of.
        repository: its name on the Hub, in which the user's name is fine; None without one.

    Raises:
        ValueError: a file does; it is named, with what it says.
    """
    paths = _paths(source)
    for file in sorted(file for file in staged.rglob("*") if file.is_file()):
        if VOCABULARY.fullmatch(file.name):  # which may hold any word
            continue
        patterns = paths if file.suffix in PICTURES else [*paths, *_names()]
        content = _read_content(file)
        if repository is not None:
            content = content.replace(repository.encode(), b"")
        found = re.search("|".join(patterns).encode(), content)
        if found:
            raise ValueError(
                f"folder: {file.relative_to(staged)} identifies this machine by "
                f"{found[0].decode(errors='replace')!r}; write a base name there"
            )


def base_names(text: str, words: list[str]) -> str:
    """Return a text with paths of files replaced by their base names.

    Args:
        words: that may hold such paths, such as those of a command line.
    """
    given = {part for word in words for part in (word, word.partition("=")[2]) if "/" in part}
    for path in sorted(given, key=len, reverse=True):
        name = Path(path).name
        if name and (path.startswith(("/", "~", ".")) or os.path.lexists(path)):
            text = text.replace(path, name)
    return text


def shorten_origins(staged: Path) -> None:
    """Leave base names of the paths by which libraries note where a model came from.

    Args:
        staged: the folder that is pushed, whose settings are changed.
    """
    for file in staged.rglob("*.json"):
        if VOCABULARY.fullmatch(file.name) is None:
            settings = json.loads(file.read_bytes())
            short = json.loads(file.read_bytes(), object_hook=_short_origins)
            if short != settings:
                file.write_text(json.dumps(short, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _short_origins(settings: dict[str, Any]) -> dict[str, Any]:
    noted = {name: settings[name] for name in ORIGINS if isinstance(settings.get(name), str)}
    paths = {name: path for name, path in noted.items() if names.is_path(path)}
    return settings | {name: Path(path).name for name, path in paths.items()}


def _read_content(file: Path) -> bytes:
    """Read a file; of weights, the header."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with file.open("rb") as opened:
        return opened.read(struct.unpack("<Q", opened.read(8))[0])


def _paths(source: Path) -> list[str]:
    """Return patterns of paths of this machine."""
    found = {Path.home(), Path.cwd(), source.resolve(), source.resolve().parent}
    rooted = [re.escape(str(path)) for path in sorted(found) if len(path.parts) > 1]
    return [rf"(?<![\w.:/-]){path}(?![\w.-])" for path in rooted]


def _names() -> list[str]:
    """Return patterns of this machine's name and its user's, where they cannot be mere words."""
    user, host = re.escape(getpass.getuser()), re.escape(socket.gethostname())
    patterns = [rf"(?<=[/\\]){user}(?=[/\\])|\b{user}@\w", rf"(?<=@){host}\b"]
    return [*patterns, rf"\b{host}\b"] if re.search(r"[\d-]", host) else patterns
