"""The tokenizer of character language models.

The tokenizer is byte-pair encoding without merges: one token a character, and the bytes of
characters that are not in the vocabulary. Decoding gives any string back exactly.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

EOS = "<eos>"  # between documents, and where generation may stop
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def make_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a set of characters: ids are <eos>, 256 bytes, then the characters."""
    return _make_tokenizer([EOS, *BYTES, *characters])


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerFast, characters: str
) -> PreTrainedTokenizerFast:
    """Make a tokenizer with further characters in its vocabulary; old tokens keep their ids."""
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    return _make_tokenizer(tokens + [c for c in characters if c not in set(tokens)])


def _make_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
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


def is_character_tokenizer(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a tokenizer is one by `make_tokenizer`: with bytes and without merges."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    backend = tokenizer.backend_tokenizer
    if any(backend.token_to_id(token) is None for token in BYTES):
        return False  # before a large vocabulary is written as JSON
    model = json.loads(backend.to_str())["model"]
    return model.get("merges") == [] and set(BYTES) <= model["vocab"].keys()


def unknown_characters(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """List the characters of a text that are not in a character tokenizer's vocabulary."""
    return sorted(set(text) - tokenizer.get_vocab().keys())
