"""Tokens as a reader can see them: whitespace marked, and every byte accounted for."""

from __future__ import annotations

import codecs
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

MARKS = {" ": "␣", "\n": "↵", "\t": "⇥"}
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of SentencePiece that is a byte


def visible(text: str) -> str:
    """Write a text on one line, with marks for whitespace, controls and bytes of no character.

    Bytes of no character are what the error handler "surrogateescape" makes of them.
    """
    return "".join(MARKS.get(c) or _visible(c) for c in text)


def printable(text: str) -> str:
    """Write a text with its spaces and line breaks, and marks for what would steer a terminal."""
    return "".join(c if c in " \n" else visible(c) for c in text)


def one_line(text: str) -> str:
    """Write a text on one line, leaving single spaces between words as they are."""
    return re.sub("(?<=[^␣])␣(?=[^␣])", " ", visible(text))


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return chr(0x2400 + code) if code < 0x20 else "␡"
    if 0xDC80 <= code <= 0xDCFF:
        return f"⟨{code - 0xDC00:02X}⟩"
    if unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zs", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return character


def width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def percent(share: float) -> str:
    """Write a probability for a table."""
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Name tokens: the visible text of each, or its bytes, as in ⟨F0⟩⟨9F⟩."""
    before = anchor(tokenizer)
    start = len(decode(tokenizer, before))
    found = []
    for i in ids:
        text = decode(tokenizer, [*before, i], skip_special_tokens=False)[start:]
        if "\ufffd" in text:
            text = _bytes_of(tokenizer.convert_ids_to_tokens(i)).decode(errors="surrogateescape")
        found.append(visible(text) or f"⟨{i}⟩")
    return found


def anchor(tokenizer: Any) -> list[int]:
    """Return a token of text to decode others after: some tokenizers drop the first one's space."""
    found: list[int] = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    return found


def spans(tokenizer: Any, given: list[int], tokens: list[int]) -> list[tuple[str, list[int]]]:
    """Cut tokens into the shortest runs that are whole characters.

    Args:
        given: the tokens before.
        tokens: those to cut.

    Returns:
        The text of each run and its tokens; a special token has no text. The texts together are
        the text of the tokens, so that bytes that are no character, U+FFFD, are with what follows.
    """
    whole, start = decode(tokenizer, given + tokens), len(decode(tokenizer, given))
    before = given
    run: list[int] = []
    found: list[tuple[str, list[int]]] = []
    for token in tokens:
        run = [*run, token]
        text = decode(tokenizer, before + run)[len(decode(tokenizer, before)) :]
        if whole.startswith(text, start) and not text.endswith("\ufffd"):
            found.append((text, run))
            start += len(text)
            before, run = (run if text else before + run), []  # nothing before: a space is dropped
    return [*found, (whole[start:], run)] if run else found


def decode(tokenizer: Any, ids: list[int], skip_special_tokens: bool = True) -> str:
    """Decode tokens without cleaning up spaces."""
    return str(
        tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    )


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that have no text, such as those that start and end one."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the tokens of SentencePiece that are bytes; a run of them is decoded together."""
    found = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return frozenset(found) - {None, tokenizer.unk_token_id}


def decode_whole(tokenizer: Any, ids: list[int]) -> str:
    """Decode tokens up to the last character of which all bytes are there; see `decode`.

    Decoders write U+FFFD for half a character at the end, which a text may also contain as such.
    """
    text = decode(tokenizer, ids)
    return text[: len(text) - _count_pending(tokenizer, ids)] if text[-1:] == "\ufffd" else text


def _count_pending(tokenizer: Any, ids: list[int]) -> int:
    """Count the U+FFFD at the end of a text that stand for the first bytes of a character."""
    special = special_tokens(tokenizer)
    seen = (token for token in reversed(ids) if token not in special)
    names = (tokenizer.convert_ids_to_tokens(token) or "" for token in seen)  # "": it lacks it
    first = next(names)
    if BYTE.fullmatch(first):  # each byte of a run is U+FFFD unless all are characters
        run = [first, *itertools.takewhile(BYTE.fullmatch, names)]
        data = b"".join(map(_bytes_of, reversed(run)))
        return len(data) if _is_half(data, "strict") else 0
    last = [first, *itertools.islice(names, 2)]  # three bytes: a fourth makes a character whole
    of_bytes = list(itertools.takewhile(lambda name: set(name) <= _ALPHABET.keys(), last))
    return int(_is_half(b"".join(map(_bytes_of, reversed(of_bytes))), "replace"))


def _is_half(data: bytes, errors: str) -> bool:
    """Whether bytes end within a character of UTF-8; never if they are strict and wrong before."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return False
    return bool(decoder.getstate()[0])


def _byte_alphabet() -> dict[str, int]:
    """Map the characters of byte-level tokens to their bytes (Radford et al. 2019, GPT-2)."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(b): b for b in themselves} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """Return the bytes of a token that does not decode by itself, as the vocabulary writes it."""
    if BYTE.fullmatch(token):
        return bytes.fromhex(token[3:5])
    if set(token) <= _ALPHABET.keys():
        return bytes(_ALPHABET[c] for c in token)
    return token.encode()  # the character U+FFFD itself
