"""One rule for special tokens: a text is text, whatever it spells; a prompt may spell them.

What a model learns from, scores or searches is a text. Its characters become tokens of text, those
of "<|endoftext|>" or "[SEP]" as well. A prompt is read as its tokenizer reads it, which finds
special tokens in it. docs/text.md says which text is read in which way.

`split_special_tokens` of transformers does not suffice: a tokenizer may still find the spelling in
its vocabulary (Unigram does, as may WordLevel and WordPiece), and it is for tokens marked as
special only, which not all are that a chat template writes.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

HIDDEN = "\U0010ffff{}\U0010ffff"  # how no text spells a token: U+10FFFF is no character


def encode_text(tokenizer: Any, text: str, *, ends: bool = False) -> list[int]:
    """Encode a text, in which nothing is a control token; see `encode_texts`."""
    return encode_texts(tokenizer, [text], ends=ends)[0]


def encode_texts(tokenizer: Any, texts: Sequence[str], *, ends: bool = False) -> list[list[int]]:
    """Encode texts, in which nothing is a control token.

    Args:
        tokenizer: of transformers, of any kind.
        ends: add what the tokenizer puts around a text, such as a start token.
    """
    reader = _text_reader(tokenizer)
    return reader(list(texts), add_special_tokens=ends, **AS_TEXT).input_ids


def encode_with_offsets(tokenizer: Any, text: str) -> Any:
    """Encode a text by a fast tokenizer; return transformers' encoding, with `offset_mapping`."""
    reader = _text_reader(tokenizer)
    return reader(text, add_special_tokens=False, return_offsets_mapping=True, **AS_TEXT)


def encode_cut(tokenizer: Any, texts: Sequence[str], longest: int) -> Any:
    """Encode texts by a fast tokenizer, each cut to `longest` tokens with those around it.

    Returns transformers' encoding, with `offset_mapping`.
    """
    reader = _text_reader(tokenizer)
    cut = {"truncation": True, "max_length": longest} if longest < sys.maxsize else {}
    return reader(list(texts), return_offsets_mapping=True, **cut, **AS_TEXT)


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the tokens that steer a model, and are no text, by how they are spelled.

    These are the special tokens, and added tokens that the chat template writes. Those of white
    space alone are text, too.
    """
    template = tokenizer.chat_template or ""
    written = "\n".join(template.values()) if isinstance(template, dict) else template
    special = set(tokenizer.all_special_tokens)
    return {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if not token.content.isspace()
        and (token.special or token.content in special or token.content in written)
    }


def split_at_control_tokens(tokenizer: Any, text: str) -> list[str]:
    """Cut a text at its control tokens: what is before, between and after them, ["…"] without."""
    names = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.split("|".join(map(re.escape, names)), text) if names else [text]


AS_TEXT = {"split_special_tokens": True, "verbose": False}  # longer than the context is no mistake


def _text_reader(tokenizer: Any) -> Any:
    """Return the tokenizer that reads texts: a slow one does, of a fast one a copy."""
    return _hide_control_tokens(tokenizer, len(tokenizer)) if tokenizer.is_fast else tokenizer


@functools.lru_cache(maxsize=8)
def _hide_control_tokens(tokenizer: Any, size: int) -> Any:
    """Copy a fast tokenizer, with names for its control tokens that no text spells.

    Args:
        size: number of its tokens, so that one with new tokens is copied anew.
    """
    names = {name: HIDDEN.format(i) for name, i in control_tokens(tokenizer).items()}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], list):  # of Unigram
        model["vocab"] = [[names.get(piece, piece), log] for piece, log in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    if "merges" in model:
        pairs = model["merges"]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    hidden = copy.copy(tokenizer)
    hidden._tokenizer = Tokenizer.from_str(json.dumps(state))
    hidden._tokenizer.encode_special_tokens = True  # as AS_TEXT says: no call will change it
    return hidden
