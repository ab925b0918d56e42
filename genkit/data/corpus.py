"""A text as a memory-mapped sequence of ids: hashed, split by position, encoded, cached.

This is for any tokenizer of transformers, in constant memory; `character_corpus` has a faster way
for character tokenizers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from genkit import console
from genkit.data import tables, tokens
from genkit.data.text import read_documents
from genkit.errors import panics_are_errors
from genkit.files import cache_folder, written_whole

BLOCK = 1 << 18  # characters encoded at a time
WORD_END = re.compile(r"(?<=[^\W_])(?=[ \n])")

# ---------------------------------------------------------------------------------------------
# Hashing and splitting


def hash_pieces(
    source: str, column: str, digest: hashlib._Hash, table_memory: int = tables.MEMORY
) -> Iterator[str | None]:
    """Yield a text in pieces, and None between two documents, and update `digest` with it."""
    for i, document in enumerate(read_documents(source, column, table_memory)):
        if i:
            digest.update(b"\xff")  # a byte that no UTF-8 text has
            yield None
        for piece in document:
            digest.update(_encode_utf8(piece))
            yield piece


def _encode_utf8(piece: str) -> bytes:
    try:
        return piece.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text: half a surrogate pair in the dataset: {error}") from None


@dataclass(frozen=True)
class Part:
    """Characters `start` to `stop` of a text; a border inside a word moves to the word's end.

    The border between two documents counts as a character.
    """

    source: str
    column: str
    sha256: str  # of the whole text
    start: int
    stop: int
    table_memory: int = tables.MEMORY


def measure_corpus(source: str, column: str = "text", table_memory: int = tables.MEMORY) -> Part:
    """Hash a text and count its characters; return all of it as one part.

    Raises:
        ValueError: the source is missing, empty or not text.
    """
    digest, length = hashlib.sha256(), 0
    for piece in hash_pieces(source, column, digest, table_memory):
        length += 1 if piece is None else len(piece)
    if not length:
        raise ValueError(f"text: {source!r} is empty; give a text to learn from")
    return Part(source, column, digest.hexdigest(), 0, length, table_memory)


def split_corpus(
    source: str,
    column: str,
    val_source: str | None,
    val_fraction: float,
    table_memory: int = tables.MEMORY,
) -> tuple[Part, Part]:
    """Split a text into the part to train on and the part to validate on.

    Args:
        source: see `text.read_documents`.
        val_source: another text to validate on; default: the end of `source`.
        val_fraction: part of `source` to validate on.
        table_memory: see `text.read_documents`.

    Raises:
        ValueError: a text is missing, empty or not text.
    """
    text = measure_corpus(source, column, table_memory)
    if val_source:
        return text, measure_corpus(val_source, column, table_memory)
    border = int(text.stop * (1 - val_fraction))
    return dataclasses.replace(text, stop=border), dataclasses.replace(text, start=border)


def read_blocks(part: Part, doing: str) -> Iterator[str | None]:
    """Yield a part in blocks of about BLOCK characters, and None between two documents.

    A block ends with a letter or a digit, before white space. A word ends there, and a token of
    byte-level tokenizers begins, so that cutting the text there changes no id.

    Args:
        doing: label of the progress bar.

    Raises:
        ValueError: the text is no longer the one that was measured.
    """
    position = 0
    with console.bar(None, doing, part.stop, " characters", unit_scale=True) as bar:
        for block in _cut_blocks(part):
            size = 1 if block is None else len(block)
            first, last = (
                _index_in_block(block, border - position) for border in (part.start, part.stop)
            )
            position += size
            bar.update(size)
            if first < last:
                yield block and block[first:last]


def _cut_blocks(part: Part) -> Iterator[str | None]:
    digest, rest = hashlib.sha256(), ""
    for piece in hash_pieces(part.source, part.column, digest, part.table_memory):
        if piece is None:
            yield from (rest, None) if rest else (None,)
            rest = ""
            continue
        rest += piece
        while cut := WORD_END.search(rest, BLOCK):
            yield rest[: cut.start()]
            rest = rest[cut.start() :]
    if rest:
        yield rest
    if digest.hexdigest() != part.sha256:
        raise ValueError(
            f"text: {part.source!r} changed while it was read; try again when it is whole"
        )


def _index_in_block(block: str | None, border: int) -> int:
    """Return the index of a border in a block: an end of it, or the end of the word there."""
    size = 1 if block is None else len(block)
    if block is None or not 0 < border < size:
        return min(max(border, 0), size)
    cut = WORD_END.search(block, border)
    return cut.start() if cut else size


# ---------------------------------------------------------------------------------------------
# Encoding


@dataclass(frozen=True)
class Corpus:
    """A text ready for training: its tokenizer and the ids of its two parts."""

    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray  # (length,), memory-mapped
    val: np.ndarray
    val_characters: int
    facts: dict[str, Any]  # content hashes of the data


def read_corpus(train: Part, val: Part, tokenizer: PreTrainedTokenizerFast, context: int) -> Corpus:
    """Encode the two parts of a text.

    Args:
        context: tokens of a window; each part must have at least one window.

    Raises:
        ValueError: a part is too short.
    """
    facts = {"text_sha256": train.sha256, "tokenizer_sha256": tokenizer_hash(tokenizer)}
    if val.sha256 != train.sha256:
        facts["val_text_sha256"] = val.sha256
    ids, _ = encode_corpus(train, tokenizer)
    val_ids, val_characters = encode_corpus(val, tokenizer)
    check_lengths(len(ids), len(val_ids), context, "tokens", split=val.start > 0)
    return Corpus(tokenizer, ids, val_ids, val_characters, facts)


def check_lengths(train: int, val: int, context: int, unit: str, split: bool) -> None:
    """Check that a text has a window to train on and one to validate on.

    Args:
        train, val: lengths of the two parts.
        unit: what they are counted in.
        split: they are parts of one text, by val_fraction.

    Raises:
        ValueError: a part is too short; it names the argument that helps, and a value if it can.
    """
    window, whole = context + 1, train + val
    if min(train, val) >= window:
        return
    part, verb = (train, "train") if train < window else (val, "validate")
    name, advice = "text", "give more text or a smaller context"
    if split and whole >= 2 * window:
        least, most = math.ceil(100 * window / whole), math.floor(100 * (whole - window) / whole)
        percent = most if verb == "train" else least
        name, advice = "val_fraction", f"about {percent / 100} would do"
    elif verb == "validate" and not split:
        name = "val_text"
    raise ValueError(
        f"{name}: {part:,} {unit} to {verb} on are less than one window, {window:,} for context "
        f"{context:,}; {advice}"
    )


def encode_corpus(part: Part, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, int]:
    """Encode a part, with <eos> between documents, and count its characters.

    The ids are kept in the cache by content hash.

    Returns:
        A memory-mapped array, (length,), and the number of characters that it encodes.
    """
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    controls = sorted(tokens.control_tokens(tokenizer))
    content = f"{part.sha256} {part.start} {part.stop} {tokenizer_hash(tokenizer)} {controls}"
    path = cache_folder() / f"{hashlib.sha256(content.encode()).hexdigest()}.{dtype.name}"
    count = path.with_suffix(".characters.json")
    if not count.exists():
        characters = 0
        with (
            panics_are_errors("init_from"),
            written_whole(path, shared=True) as scratch,
            scratch.open("wb") as file,
        ):
            for block in read_blocks(part, "encoding"):
                end = [tokenizer.eos_token_id]
                new = end if block is None else tokens.encode_text(tokenizer, block)
                file.write(np.array(new, dtype).data)
                characters += 1 if block is None else len(block)
        with written_whole(count, shared=True) as scratch:
            scratch.write_text(json.dumps(characters))
    ids = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
    return ids, json.loads(count.read_text())


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of a tokenizer's serialised backend."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
