"""Encoders for extractive question answering, new or to be fine-tuned, with their tokenizers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from genkit.data.squad import Example
from genkit.hub import download, safe_weights, safety
from genkit.qa.reader import Reader, check_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000  # the most characters in a new tokenizer's vocabulary
HINT = "Give the folder or Hub id of an encoder in safetensors, such as BERT, RoBERTa or DistilBERT"

# ---------------------------------------------------------------------------------------------
# The model to start from


def load_extractor(name: str, revision: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load an encoder to train, in float32, and its tokenizer; its head is new if it has none.

    Args:
        name: folder or Hub id.
        revision: a branch, tag or commit on the Hub.

    Raises:
        ValueError: there is no such model, or it cannot be trained to answer questions.
    """
    folder = download.fetch(name, revision, argument="init_from", hint=HINT)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the new head
    try:
        with safety.opened(folder, argument="init_from") as private:
            tokenizer = AutoTokenizer.from_pretrained(private, trust_remote_code=False)
            model, report = AutoModelForQuestionAnswering.from_pretrained(
                private,
                use_safetensors=True,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
            safe_weights.check_loaded(model)
            check_tokenizer(tokenizer, name)
            safe_weights.check_tokens(model, tokenizer)
    finally:
        logging.set_verbosity(verbosity)
    lacking = [name for name in report["missing_keys"] if name.startswith(model.base_model_prefix)]
    if lacking:
        raise ValueError(f"init_from: the weights in {name!r} lack {sorted(lacking)}")
    reader = Reader(model, tokenizer, name)
    if not reader.has_null:
        raise ValueError(
            f"init_from: the tokenizer in {name!r} puts no [CLS] before a question, which "
            "stands for no answer; choose another model"
        )
    taken = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    tokenizer.model_max_length = reader.limit
    return model, tokenizer


def make_model(
    vocab_size: int, positions: int, depth: int, width: int, heads: int
) -> PreTrainedModel:
    """Build a DistilBERT with a span head and random weights.

    Args:
        positions: the most tokens of a window.
        depth: number of layers.
        width: size of a layer's vectors; the feed-forward layers have four times as many units.
        heads: number of attention heads.

    Raises:
        ValueError: the width does not divide among the heads.
    """
    if width % heads:
        raise ValueError(f"width: {width} does not divide into {heads} heads")
    return DistilBertForQuestionAnswering(
        DistilBertConfig(
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            n_layers=depth,
            n_heads=heads,
            dim=width,
            hidden_dim=4 * width,
            initializer_range=width**-0.5,  # BERT's 0.02 would leave small models on a plateau
            dropout=0.0,
            attention_dropout=0.0,
            qa_dropout=0.0,
            pad_token_id=SPECIAL.index("[PAD]"),
        )
    )


def make_tokenizer(
    examples: Sequence[Example], vocab_size: int, positions: int
) -> PreTrainedTokenizerFast:
    """Learn a cased WordPiece tokenizer like BERT's, the same on every machine.

    Args:
        examples: whose questions and contexts to learn from.
        vocab_size: the most tokens there may be, unless characters alone are more.
        positions: the most tokens of a window of the model.
    """
    texts = list(dict.fromkeys(t for e in examples for t in (e.context, e.question)))
    learner = _make_backend({name: i for i, name in enumerate(SPECIAL)})
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(learner.normalizer.normalize_str(text).replace(" ", ""))
    alphabet = sorted(character for character, _ in counts.most_common(ALPHABET))
    # the trainer numbers other tokens in no fixed order, and breaks ties by number
    first = [*SPECIAL, *alphabet, *(f"##{character}" for character in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    backend = _make_backend(learner.get_vocab(with_added_tokens=False))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"],  # DistilBERT has no token types
        **names,
    )


def _make_backend(vocabulary: dict[str, int]) -> Tokenizer:
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend
