"""Small readers to test with: tokenizers of every kind, and models with a span head."""

import numpy as np
import torch
from hypothesis import strategies as st
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
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

from genkit.qa.reader import Reader

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Where is the café? In Zürich, naïve Zoë!",
    "日本 の 首都 は 東京 です。 What is due on Monday at noon, 2024? The résumé: 40% of it.",
]
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
KINDS = ("uncased", "cased", "bytes", "unigram")

# ---------------------------------------------------------------------------------------------
# Tokenizers


def wrap(backend, names=BERT, **options):
    pad, unk, cls, sep = names
    tokens = {"pad_token": pad, "unk_token": unk, "cls_token": cls, "sep_token": sep}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens, **options)


def bert_pair(backend):
    """[CLS] question [SEP] context [SEP], the context and what follows of the second type."""
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return backend


def wordpiece(lower):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options = {"special_tokens": list(BERT), "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=180, **options))
    return wrap(bert_pair(backend))


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options = {"special_tokens": list(ROBERTA), "show_progress": False}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, **options)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return wrap(backend, ("<pad>", "<unk>", "<s>", "</s>"))


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    options = {"special_tokens": list(ROBERTA), "unk_token": "<unk>", "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=90, **options))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return wrap(backend, ("<pad>", "<unk>", "<s>", "</s>"))


def tokenizer_of(kind):
    if kind in ("uncased", "cased"):
        return wordpiece(lower=kind == "uncased")
    return byte_level() if kind == "bytes" else unigram()


# ---------------------------------------------------------------------------------------------
# Models


def network(kind, vocabulary, positions=64):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "vocab_size": vocabulary}
    if kind == "uncased":
        return BertForQuestionAnswering(BertConfig(max_position_embeddings=positions, **shape))
    if kind == "cased":
        small = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
        config = DistilBertConfig(vocab_size=vocabulary, max_position_embeddings=positions, **small)
        return DistilBertForQuestionAnswering(config)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
    config = RobertaConfig(max_position_embeddings=positions + 2, **shape, **ids)
    return RobertaForQuestionAnswering(config)


def random_reader(kind):
    """A random model with rather peaked predictions, as trained ones have."""
    tokenizer = tokenizer_of(kind)
    model = network(kind, len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        model.qa_outputs.weight.mul_(30)
    return Reader(model.eval(), tokenizer, kind)


# What a token adds to the logits of start and of end, in the model that `pointer` makes
POINTS = {"alpha": (9.0, 0.0), "omega": (0.0, 9.0), "alef": (6.0, 0.0), "tav": (0.0, 6.0)}
POINTS |= {"[CLS]": (3.0, 3.0)}
FILLERS = ("the", "fox", "dog", "is", "lazy", "where", ".", "?", "##s")


def pointer(positions=64):
    """A DistilBERT made by hand: an answer runs from "alpha" to "omega", or "alef" to "tav".

    Each token that points has an axis of its own; attention and the feed-forward layer add nothing.
    """
    names = [*dict.fromkeys([*BERT, *POINTS, *FILLERS])]
    backend = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    shape = {"dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8}
    config = DistilBertConfig(vocab_size=len(names), max_position_embeddings=positions, **shape)
    model = DistilBertForQuestionAnswering(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm" not in name and "layer_norm" not in name:
                weight.zero_()
        axes = [1 + list(POINTS).index(name) if name in POINTS else 0 for name in names]
        model.get_input_embeddings().weight.copy_(torch.eye(8)[axes])
        gap = 1 / torch.eye(8)[0].std(correction=0)  # of an axis to the others, normalised
        model.qa_outputs.weight[:, 1 : 1 + len(POINTS)] = torch.tensor([*POINTS.values()]).T / gap
    return Reader(model, wrap(bert_pair(backend)), "pointer")


def pointer_logits(words):
    """The logits that it gives to [CLS] and these words, (2, 1 + words), up to a constant."""
    return np.array([POINTS.get(word, (0.0, 0.0)) for word in ["[CLS]", *words]]).T


# ---------------------------------------------------------------------------------------------
# Texts

PIECES = (
    *(
        "fox",
        "The",
        "Zürich",
        "naïve",
        "CAFÉ",
        "cafe\u0301",
        "e\u0323\u0301s",
        "dogs",
        "東京",
        "です。",
    ),
    *("👩\u200d🚀", "👨\u200d👩\u200d👧", "🇨🇭", "x", "40%", "2024", "don't", "ﬁn", "½", "ß", "İ"),
    *(
        " ",
        " ",
        " ",
        "  ",
        "\t",
        "\r\n",
        "\n\n",
        "\u00a0",
        "\u3000",
        ". ",
        ", ",
        "«",
        "”",
        "\u200b",
        "\0",
    ),
)
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map("".join)
