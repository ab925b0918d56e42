"""A corpus as characters: encoded by a table from code points to ids, in place of the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from genkit.data import tables
from genkit.data.characters import BYTES, EOS, extend_tokenizer, make_tokenizer
from genkit.data.corpus import check_lengths, hash_pieces
from genkit.files import cache_folder, written_whole

SEPARATOR = 0x110000  # between documents: one past the last code point


@dataclass(frozen=True)
class Survey:
    """The content hash and the distinct characters of a corpus."""

    sha256: str
    characters: str


def survey_corpus(source: str, column: str = "text", table_memory: int = tables.MEMORY) -> Survey:
    """Hash a corpus and collect its characters, which are kept in the cache by that hash.

    Raises:
        ValueError: the source is missing, empty or not text.
    """
    digest = hashlib.sha256()
    for _ in hash_pieces(source, column, digest, table_memory):
        pass
    path = cache_folder() / f"{digest.hexdigest()}.json"
    if not path.exists():
        seen = np.zeros(SEPARATOR + 1, dtype=bool)
        for codes in _code_points(source, column, digest.hexdigest(), table_memory):
            seen[codes] = True
        characters = "".join(map(chr, np.flatnonzero(seen[:SEPARATOR])))
        if not characters:
            raise ValueError(f"text: {source!r} is empty; give a text to learn from")
        with written_whole(path, shared=True) as scratch:
            scratch.write_text(json.dumps(characters))
    return Survey(digest.hexdigest(), json.loads(path.read_text()))


def encode_characters(
    source: str,
    surveyed: Survey,
    tokenizer: PreTrainedTokenizerFast,
    column: str = "text",
    table_memory: int = tables.MEMORY,
) -> np.ndarray:
    """Encode a corpus into a memory-mapped array of ids, (length,), with <eos> between documents.

    The ids are those of the tokenizer; they are made in constant memory, and kept in the cache by
    content hash.

    Raises:
        ValueError: the corpus is no longer the one that was surveyed.
    """
    vocabulary = tokenizer.get_vocab()
    dtype = np.dtype("<u2" if len(vocabulary) < 1 << 16 else "<u4")
    key = hashlib.sha256(f"{surveyed.sha256} {vocabulary_hash(tokenizer)}".encode()).hexdigest()
    path = cache_folder() / f"{key}.{dtype.name}"
    if not path.exists():
        table = _make_table(vocabulary, dtype)
        with written_whole(path, shared=True) as scratch, scratch.open("wb") as file:
            for codes in _code_points(source, column, surveyed.sha256, table_memory):
                file.write(_encode_codes(codes, table, vocabulary).data)
    return np.memmap(path, dtype=dtype, mode="r")


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of which token has which id."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@dataclass(frozen=True)
class CharacterCorpus:
    """A text ready for training: its tokenizer and the ids of its two parts."""

    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray  # (length,), memory-mapped
    val: np.ndarray
    facts: dict[str, Any]  # content hashes of the data


def read_characters(
    source: str,
    column: str,
    val_source: str | None,
    val_fraction: float,
    context: int,
    base: PreTrainedTokenizerFast | None = None,
    table_memory: int = tables.MEMORY,
) -> CharacterCorpus:
    """Read a text, make or extend its tokenizer, encode it and split it by position.

    The vocabulary has every character of both parts, so that each id is one character.

    Args:
        source: see `text.read_documents`.
        val_source: another text to validate on; default: the end of `source`.
        val_fraction: part of `source` to validate on.
        context: characters of a window; each part must have at least one window.
        base: a character tokenizer to extend by the characters that it lacks.
        table_memory: see `text.read_documents`.

    Raises:
        ValueError: a text is missing, empty, not text, or too short.
    """
    text = survey_corpus(source, column, table_memory)
    facts: dict[str, Any] = {"text_sha256": text.sha256}
    val_text = survey_corpus(val_source, column, table_memory) if val_source else text
    characters = "".join(sorted(set(text.characters) | set(val_text.characters)))
    tokenizer = extend_tokenizer(base, characters) if base else make_tokenizer(characters)
    facts["vocabulary_sha256"] = vocabulary_hash(tokenizer)
    ids = encode_characters(source, text, tokenizer, column, table_memory)
    if val_source:
        facts["val_text_sha256"] = val_text.sha256
        train, val = ids, encode_characters(val_source, val_text, tokenizer, column, table_memory)
    else:
        border = int(len(ids) * (1 - val_fraction))
        train, val = ids[:border], ids[border:]
    check_lengths(len(train), len(val), context, "characters", split=val_source is None)
    return CharacterCorpus(tokenizer, train, val, facts)


def _code_points(source: str, column: str, sha256: str, table_memory: int) -> Iterator[np.ndarray]:
    """Yield the corpus as code points, (n,) each, uint8 where ASCII suffices."""
    digest = hashlib.sha256()
    for piece in hash_pieces(source, column, digest, table_memory):
        if piece is None:
            yield np.array([SEPARATOR], dtype=np.uint32)
        elif piece.isascii():
            yield np.frombuffer(piece.encode("ascii"), dtype=np.uint8)
        else:
            yield np.frombuffer(piece.encode("utf-32-le"), dtype="<u4")
    if digest.hexdigest() != sha256:
        raise ValueError(f"text: {source!r} changed while it was read; try again when it is whole")


def _make_table(vocabulary: dict[str, int], dtype: np.dtype) -> np.ndarray:
    """Map code points to ids, in an array; the largest number of the type means unknown."""
    table = np.full(SEPARATOR + 1, np.iinfo(dtype).max, dtype=dtype)
    for token, i in vocabulary.items():
        if len(token) == 1:
            table[ord(token)] = i
    table[SEPARATOR] = vocabulary[EOS]
    return table


def _encode_codes(codes: np.ndarray, table: np.ndarray, vocabulary: dict[str, int]) -> np.ndarray:
    ids = table[codes]
    unknown = ids == np.iinfo(table.dtype).max
    if not unknown.any():
        return ids
    text = codes[unknown].astype("<u4").tobytes().decode("utf-32-le")
    byte_ids = np.array([vocabulary[token] for token in BYTES], dtype=table.dtype)
    sizes = np.ones(len(ids), dtype=np.int64)
    sizes[unknown] = [len(character.encode()) for character in text]
    expanded = np.repeat(ids, sizes)
    expanded[np.repeat(unknown, sizes)] = byte_ids[np.frombuffer(text.encode(), dtype=np.uint8)]
    return expanded
