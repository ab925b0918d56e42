"""What tells of this machine, and is not to leave it: paths, its name, its user."""

from __future__ import annotations

import getpass
import re
import socket
import struct
from pathlib import Path

PICTURES = (".png", ".gif")  # whose bytes may be any
WORDS = re.compile(r"(tokenizer|vocab|added_tokens)\.json|(vocab|merges)\.txt|.*\.model")


def check(staged: Path, source: Path, repository: str) -> None:
    """Refuse what is to be pushed if a file of it tells of this machine.

    Args:
        staged: the folder that is pushed.
        source: the folder that it was made of.
        repository: its name on the Hub, which may be that of the user here.

    Raises:
        ValueError: one does; it is named, with what it tells.
    """
    paths = _paths(source)
    for file in sorted(file for file in staged.rglob("*") if file.is_file()):
        if WORDS.fullmatch(file.name):  # a vocabulary may hold any word
            continue
        signs = paths if file.suffix in PICTURES else [*paths, *_names()]
        found = re.search(
            "|".join(signs).encode(), _content(file).replace(repository.encode(), b"")
        )
        if found:
            raise ValueError(
                f"folder: {file.relative_to(staged)} tells of this machine: "
                f"{found[0].decode(errors='replace')!r}; write a base name there"
            )


def base_names(text: str, words: list[str]) -> str:
    """Return a text in which files go by their base names.

    Args:
        words: in which paths of files may be, such as those of a command line.
    """
    given = {part for word in words for part in (word, word.partition("=")[2]) if "/" in part}
    for path in sorted(given, key=len, reverse=True):
        name = Path(path).name
        if name and (Path(path).is_absolute() or Path(path).exists()):
            text = text.replace(path, name)
    return text


def _content(file: Path) -> bytes:
    """Read a file; of weights, the head."""
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
    """Return patterns of this machine's name and its user's, where they can be nothing else."""
    user, host = re.escape(getpass.getuser()), re.escape(socket.gethostname())
    patterns = [rf"(?<=[/\\]){user}(?=[/\\])|\b{user}@\w", rf"(?<=@){host}\b"]
    return [*patterns, rf"\b{host}\b"] if re.search(r"[\d-]", host) else patterns
