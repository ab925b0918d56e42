"""Character language models: tokenizer, fast encoding of a corpus, stock models, loss.

The tokenizer is byte-pair encoding without a single merge: one token a character, and the bytes of
those that were not in the corpus. Any string comes back exactly as it went in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from genkit.checkpoints import sync
from genkit.data import documents

EOS = "<eos>"  # between documents, and where generation may stop
SEPARATOR = 0x110000  # between documents: one past the last code point
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# ---------------------------------------------------------------------------------------------
# Tokenizer


def make_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a set of characters: ids are <eos>, 256 bytes, then the characters."""
    return _tokenizer([EOS, *BYTES, *characters])


def extend(tokenizer: PreTrainedTokenizerFast, characters: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer that also knows `characters`; ids that exist keep their meaning."""
    known = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    return _tokenizer(known + [c for c in characters if c not in set(known)])


def _tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=EOS,
        split_special_tokens=True,  # "<eos>" in a text is five characters
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that transformers 4 and other tools know, too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def is_character_tokenizer(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether it is one of ours: bytes for unknown characters, and no merges."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model.get("merges") == [] and set(BYTES) <= model["vocab"].keys()


def unknown_characters(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """List the characters of a text that a character tokenizer does not know."""
    return sorted(set(text) - tokenizer.get_vocab().keys())


# ---------------------------------------------------------------------------------------------
# Encoding a corpus: a table from code point to id, not a tokenizer, does the work


@dataclass(frozen=True)
class Survey:
    """What one pass over a corpus tells: its content hash and its distinct characters."""

    sha256: str
    characters: str


def cache_folder() -> Path:
    """Where surveys and encoded corpora are kept: $GENKIT_CACHE, or ~/.cache/genkit."""
    return Path(os.environ.get("GENKIT_CACHE") or Path.home() / ".cache" / "genkit")


def survey(source: str, column: str = "text") -> Survey:
    """Hash a corpus and collect its characters; the second time, only hash it.

    Raises:
        ValueError: the source is missing, empty or not text.
    """
    digest = hashlib.sha256()
    for _ in _pieces(source, column, digest):
        pass
    path = cache_folder() / f"{digest.hexdigest()}.json"
    if not path.exists():
        seen = np.zeros(SEPARATOR + 1, dtype=bool)
        for codes in _code_points(source, column, digest.hexdigest()):
            seen[codes] = True
        characters = "".join(map(chr, np.flatnonzero(seen[:SEPARATOR])))
        if not characters:
            raise ValueError(f"text: {source!r} is empty; give a text to learn from")
        with _written_whole(path) as scratch:
            scratch.write_text(json.dumps(characters))
    return Survey(digest.hexdigest(), json.loads(path.read_text()))


def encode(
    source: str, surveyed: Survey, tokenizer: PreTrainedTokenizerFast, column: str = "text"
) -> np.ndarray:
    """Encode a corpus into a memory-mapped array of ids, (length,), with <eos> between documents.

    Equal to the tokenizer's own ids, in constant memory, kept in the cache by content hash.

    Raises:
        ValueError: the corpus is no longer the one that was surveyed.
    """
    vocabulary = tokenizer.get_vocab()
    dtype = np.dtype("<u2" if len(vocabulary) < 1 << 16 else "<u4")
    key = hashlib.sha256(f"{surveyed.sha256} {vocabulary_hash(tokenizer)}".encode()).hexdigest()
    path = cache_folder() / f"{key}.{dtype.name}"
    if not path.exists():
        table = _table(vocabulary, dtype)
        with _written_whole(path) as scratch, scratch.open("wb") as file:
            for codes in _code_points(source, column, surveyed.sha256):
                file.write(_encode(codes, table, vocabulary).data)
    return np.memmap(path, dtype=dtype, mode="r")


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of which token has which id."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A text ready for training: its tokenizer and the ids of its two parts."""

    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray  # (length,), memory-mapped
    val: np.ndarray
    facts: dict[str, Any]  # which data it is, by content hash


def read(
    source: str,
    column: str,
    val_source: str | None,
    val_fraction: float,
    context: int,
    base: PreTrainedTokenizerFast | None = None,
) -> Corpus:
    """Read a text, make or extend its tokenizer, encode it and split it by position.

    The tokenizer knows every character of both parts, so that each id is one character.

    Args:
        source: see `data.documents`.
        val_source: another text to validate on; the end of `source` without one.
        val_fraction: part of `source` to validate on.
        context: characters in a window; each part must have at least one window.
        base: a character tokenizer to extend by the characters it does not know.

    Raises:
        ValueError: a text is missing, empty, not text, or too short.
    """
    whole = survey(source, column)
    facts: dict[str, Any] = {"text_sha256": whole.sha256}
    judged = survey(val_source, column) if val_source else whole
    characters = "".join(sorted(set(whole.characters) | set(judged.characters)))
    tokenizer = extend(base, characters) if base else make_tokenizer(characters)
    facts["vocabulary_sha256"] = vocabulary_hash(tokenizer)
    ids = encode(source, whole, tokenizer, column)
    if val_source:
        facts["val_text_sha256"] = judged.sha256
        train, val = ids, encode(val_source, judged, tokenizer, column)
    else:
        border = int(len(ids) * (1 - val_fraction))
        train, val = ids[:border], ids[border:]
    for name, part in (("text", train), ("val_text" if val_source else "val_fraction", val)):
        if len(part) < context + 1:
            raise ValueError(
                f"{name}: {len(part):,} characters to {'train' if part is train else 'validate'} "
                f"on are less than one window, {context + 1} for context {context}; "
                "give more text or a smaller context"
            )
    return Corpus(tokenizer, train, val, facts)


def _pieces(source: str, column: str, digest: hashlib._Hash) -> Iterator[str | None]:
    """Yield the corpus in pieces, and None between two documents, and hash what goes by."""
    for i, document in enumerate(documents(source, column)):
        if i:
            digest.update(b"\xff")  # which is in no UTF-8
            yield None
        for piece in document:
            digest.update(_utf8(piece))
            yield piece


def _code_points(source: str, column: str, sha256: str) -> Iterator[np.ndarray]:
    """Yield the corpus as code points, (n,) each, uint8 where ASCII suffices."""
    digest = hashlib.sha256()
    for piece in _pieces(source, column, digest):
        if piece is None:
            yield np.array([SEPARATOR], dtype=np.uint32)
        elif piece.isascii():
            yield np.frombuffer(piece.encode("ascii"), dtype=np.uint8)
        else:
            yield np.frombuffer(piece.encode("utf-32-le"), dtype="<u4")
    if digest.hexdigest() != sha256:
        raise ValueError(f"text: {source!r} changed while it was read; try again when it is whole")


def _table(vocabulary: dict[str, int], dtype: np.dtype) -> np.ndarray:
    """Build the map from code point to id; the largest number of the type means unknown."""
    table = np.full(SEPARATOR + 1, np.iinfo(dtype).max, dtype=dtype)
    for token, i in vocabulary.items():
        if len(token) == 1:
            table[ord(token)] = i
    table[SEPARATOR] = vocabulary[EOS]
    return table


def _encode(codes: np.ndarray, table: np.ndarray, vocabulary: dict[str, int]) -> np.ndarray:
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


def _utf8(piece: str) -> bytes:
    try:
        return piece.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text: half a surrogate pair in the dataset: {error}") from None


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Give a scratch file that becomes `path` if all went well, also when two processes write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".writing-*"):  # of a process that was killed
        if time.time() - leftover.stat().st_mtime > 3600:
            leftover.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        sync(Path(name))
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# Model


def make_model(
    architecture: str,
    vocab_size: int,
    context: int,
    depth: int,
    width: int,
    heads: int,
    dropout: float,
) -> PreTrainedModel:
    """Build a stock model with random weights and tied embeddings.

    Args:
        architecture: "llama" or "gpt2".
        context: characters it is trained to see at once.
        depth: layers.
        width: size of a layer's vectors.
        heads: attention heads.
        dropout: of attention weights; for gpt2 of embeddings and residual branches, too.

    Raises:
        ValueError: the width does not divide among the heads.
    """
    if width % heads or width // heads % 2:
        raise ValueError(f"width: {width} does not divide into {heads} heads of even size")
    common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 0}
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_positions=context,
                n_embd=width,
                n_layer=depth,
                n_head=heads,
                attn_pdrop=dropout,
                embd_pdrop=dropout,
                resid_pdrop=dropout,
                **common,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            max_position_embeddings=context,
            hidden_size=width,
            intermediate_size=-(-8 * width // 3 // 32) * 32,  # as many weights as 4 x GELU
            num_hidden_layers=depth,
            num_attention_heads=heads,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            **common,
        )
    )


def loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of the next character; inputs and targets are (batch, context)."""
    logits = model(input_ids=inputs, use_cache=False).logits  # (batch, context, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.inference_mode()
def total_loss(
    model: PreTrainedModel, ids: np.ndarray, context: int, windows: range
) -> torch.Tensor:
    """Sum the loss over windows of a text that follow each other without overlap.

    Args:
        ids: the text, (length,).
        windows: which of the ceil((length - 1) / context) windows; the last may be short.

    Returns:
        Nats and characters, (2,) float64, so that several processes can add theirs up.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for inputs, targets in _window_batches(ids, context, windows):
        nats = loss(model, inputs.to(model.device), targets.to(model.device)).double().cpu()
        total += torch.tensor([nats * targets.numel(), targets.numel()])
    return total


def _window_batches(
    ids: np.ndarray, context: int, windows: range, batch: int = 64
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets, (≤ batch, context) each; a short last window comes by itself."""
    whole = min(windows.stop, (len(ids) - 1) // context)
    for first in range(windows.start, whole, batch):
        last = min(first + batch, whole)
        part = torch.from_numpy(ids[first * context : last * context + 1].astype(np.int64))
        yield part[:-1].view(-1, context), part[1:].view(-1, context)
    if whole < windows.stop:
        part = torch.from_numpy(ids[whole * context :].astype(np.int64))
        yield part[None, :-1], part[None, 1:]


def grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Give a model embeddings for the tokens that its tokenizer was extended by."""
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return model
