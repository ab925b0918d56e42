"""Tokenizer of word language models: the most frequent words of a text.

A token is a word, a number or a punctuation mark together with the space before it, as in GPT-2;
or the end of a line; or a run of spaces. The concatenated tokens are the text again, byte for byte,
if all of them are in the vocabulary; others become <unk>.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from genkit import files
from genkit.data import tables
from genkit.data.corpus import Corpus, Part, read_blocks, read_corpus, split_corpus

EOS, UNKNOWN = "<eos>", "<unk>"  # neither can be a word: < and > are tokens of their own
EOS_ID, UNKNOWN_ID = 0, 1
TOKEN = "|".join(
    (
        " ?[\\p{L}\\p{M}]+(?:['\u2019][\\p{L}\\p{M}]+)*",  # don't is one word
        r" ?\p{N}+",
        r" ?[^\s\p{L}\p{M}\p{N}]",
        r"\r?\n",
        r" +(?= \S)",  # the last space of a run goes with the word
        r" +",
        r"\s",
    )
)


def make_tokenizer(part: Part, vocab_size: int, lower: bool) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a text: <eos>, <unk>, then its most frequent words.

    <unk> is no special token, so that decoded text shows where a word is missing.

    Args:
        part: the text whose words are counted.
        vocab_size: the most tokens, <eos> and <unk> included.
        lower: convert texts to lower case.
    """
    tokens = [EOS, UNKNOWN, *frequent_words(part, vocab_size - 2, lower)]
    backend = _make_backend({token: i for i, token in enumerate(tokens)}, lower)
    # a word starts with its space, and so should <unk>, which stands for one
    spaced = decoders.Replace(UNKNOWN, f" {UNKNOWN}")
    backend.decoder = decoders.Sequence([spaced, decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=EOS,
        split_special_tokens=True,  # "<eos>" in a text is three words
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def frequent_words(part: Part, count: int, lower: bool) -> list[str]:
    """List the `count` most frequent words of a text, the most frequent first."""
    what = f"{part.sha256} {part.start} {part.stop} {count} {lower} {TOKEN}"
    path = files.cache_folder() / f"{hashlib.sha256(what.encode()).hexdigest()}.words.json"
    if not path.exists():
        backend = _make_backend({}, lower)
        text = (block for block in read_blocks(part, "counting words") if block)
        trainer = trainers.WordLevelTrainer(vocab_size=count, show_progress=False)
        backend.train_from_iterator(text, trainer)
        with files.written_whole(path, shared=True) as scratch:
            ranks = backend.get_vocab()
            scratch.write_text(json.dumps(sorted(ranks, key=ranks.__getitem__)))
    return json.loads(path.read_text())


def _make_backend(vocabulary: dict[str, int], lower: bool) -> Tokenizer:
    backend = Tokenizer(models.WordLevel(vocabulary, UNKNOWN))
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "isolated")
    return backend


def read_words(
    source: str,
    column: str,
    val_source: str | None,
    val_fraction: float,
    context: int,
    vocab_size: int,
    lower: bool,
    table_memory: int = tables.MEMORY,
) -> Corpus:
    """Read a text, split it by position, make the tokenizer of its first part, and encode both.

    Args:
        source: see `text.read_documents`.
        val_source: another text to validate on; default: the end of `source`.
        val_fraction: part of `source` to validate on.
        context: tokens of a window; each part must have at least one window.
        vocab_size, lower: see `make_tokenizer`.
        table_memory: see `text.read_documents`.

    Raises:
        ValueError: a text is missing, empty, not text, or too short.
    """
    train, val = split_corpus(source, column, val_source, val_fraction, table_memory)
    return read_corpus(train, val, make_tokenizer(train, vocab_size, lower), context)


def unknown_words(corpus: Corpus) -> tuple[float, float]:
    """Measure the words of the validation text that are not in the vocabulary.

    Returns:
        Their fraction of the words, and the bits that it takes to spell them out, if at each step
        all characters of the vocabulary and the end of the word are equally likely. Without these
        bits, a small vocabulary would seem to encode a text in few bits.
    """
    vocabulary = corpus.tokenizer.get_vocab()
    lengths = np.zeros(len(vocabulary), dtype=np.int64)
    for word, i in vocabulary.items():
        lengths[i] = len(word)
    lengths[[EOS_ID, UNKNOWN_ID]] = 1, 0
    counts = np.bincount(corpus.val, minlength=len(vocabulary))
    count = int(counts[UNKNOWN_ID])
    characters = corpus.val_characters - int(counts @ lengths)
    alphabet = set().union(*(vocabulary.keys() - {EOS, UNKNOWN}))
    return count / len(corpus.val), (characters + count) * math.log2(len(alphabet) + 1)
