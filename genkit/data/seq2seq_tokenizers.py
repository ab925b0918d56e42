"""Tokenizers of sequence-to-sequence models: characters, or byte-pair encoding.

They end every text with <eos>, so that an encoder sees where it ends, and have a token for padding
that means nothing else: an embedding of padding is not trained.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from genkit.data import characters
from genkit.data.characters import EOS

PAD = "<pad>"
LEAST = 300  # tokens of a byte-pair encoding: the 256 bytes, and some merges


def make_tokenizer(texts: Iterable[str], vocab_size: int = 0) -> PreTrainedTokenizerFast:
    """Make the tokenizer of some texts.

    Args:
        texts: that it is made from.
        vocab_size: tokens of a byte-pair encoding; 0 for a token a character.
    """
    if vocab_size:
        tokenizer = _make_byte_pairs(texts, vocab_size)
    else:
        tokenizer = characters.make_tokenizer("".join(sorted(set().union(*texts))))
    tokenizer.add_special_tokens({"pad_token": PAD})
    end = (EOS, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[end]
    )
    tokenizer.padding_side = "right"  # positions count from a source's first token
    return tokenizer


def _make_byte_pairs(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level byte-pair encoding (Radford et al. 2019), which has every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # and padding
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[EOS],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        split_special_tokens=True,  # "<eos>" in a text is text
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
