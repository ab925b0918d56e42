"""Read UTF-8 text piece by piece, from regular files and pipes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from genkit.files import open_regular

PIECE = 1 << 22  # bytes read at a time
LINE_END = re.compile("\r\n|\n|\r")
UTF16 = "is UTF-16, not UTF-8; convert it, for example by iconv -f utf-16 -t utf-8"


def read_pieces(path: Path, name: str) -> Iterator[str]:
    """Read a UTF-8 file piece by piece, without a change but for a byte-order mark, left out.

    Args:
        name: name of the argument, for errors.

    Raises:
        ValueError: the file cannot be read, or it is not UTF-8 text.
    """
    try:
        with open_regular(path) as file:
            yield from decode_pieces(file, f"{name}: {path}")
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from None


def decode_pieces(file: BinaryIO, name: str) -> Iterator[str]:
    """Decode a file or a pipe piece by piece, without its byte-order mark.

    Args:
        name: names of the argument and of the file, for errors.

    Raises:
        ValueError: it is not UTF-8 text.
    """
    decoder, position, start = codecs.getincrementaldecoder("utf-8")(), 0, 0
    try:
        while data := file.read(PIECE):
            if not position and is_utf16(data):
                raise ValueError(f"{name} {UTF16}")
            if not position and data.startswith(codecs.BOM_UTF8):
                position, data = len(codecs.BOM_UTF8), data.removeprefix(codecs.BOM_UTF8)
            if b"\0" in data:
                at = position + data.index(b"\0")
                raise ValueError(f"{name} is binary, not text: byte {at} is zero")
            start = position - len(decoder.getstate()[0])  # of a character that was cut
            position += len(data)
            yield decoder.decode(data)
        start = position - len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 at byte {start + error.start} ({error.reason}); convert it, for "
            "example by iconv -f latin1 -t utf-8"
        ) from None


def is_utf16(start: bytes) -> bool:
    """Whether a file is UTF-16: by its byte-order mark, or by every second byte being zero.

    Args:
        start: its first bytes; Latin letters are looked for in the first eight.
    """
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return True
    halves = [part.count(0) / max(1, len(part)) for part in (start[:8:2], start[1:8:2])]
    return sorted(halves) == [0, 1]


def split_lines(text: str) -> list[str]:
    r"""Split a text into lines, which end at \n, \r\n or \r; U+2028 and form feeds end none."""
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]
