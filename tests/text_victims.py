"""Small victims of attacks on texts: classifiers of texts and a masked language model."""

import torch
from readers import TEXTS, bert_pair, wrap
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from genkit.text.classifiers import TextClassifier

GOOD = ("good", "nice", "lovely", "bright", "warm", "kind")
BAD = ("bad", "poor", "awful", "dull", "cold", "rude")
PLAIN = ("the", "film", "was", "a", "and", "house", "story", "day", "very", "had", "an", "ending")
HEBREW = ("שלום", "עולם", "טוב", "רע", "יום")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPE = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "pad_token_id": 0}


def word_tokenizer(lower=True):
    """Words, and the letters of others, in the manner of BERT."""
    letters = sorted({c for text in (*TEXTS, *HEBREW) for c in text.lower() if c.isalpha()})
    pieces = [*letters, *(f"##{letter}" for letter in letters), *".,!?'()"]
    names = dict.fromkeys([*SPECIAL, *GOOD, *BAD, *PLAIN, *HEBREW, *pieces])
    backend = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrap(bert_pair(backend), mask_token="[MASK]")


class BagConfig(PreTrainedConfig):
    model_type = "bag"


class BagOfWords(PreTrainedModel):
    """Logits are linear in the sum of the embeddings."""

    config_class = BagConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, 8)
        self.head = torch.nn.Linear(8, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask):
        summed = (self.words(input_ids) * attention_mask[..., None]).sum(1)
        return SequenceClassifierOutput(logits=self.head(summed))


def bag_of_words(seed=0):
    tokenizer = word_tokenizer()
    torch.manual_seed(seed)
    model = BagOfWords(BagConfig(vocab_size=len(tokenizer), num_labels=2, pad_token_id=0)).eval()
    with torch.no_grad():
        model.words.weight.normal_()
        model.head.weight.normal_(0, 0.1)
        model.head.bias.zero_()
    return TextClassifier(model, tokenizer, "bag")


def train_classifier(positions=48):
    """A DistilBERT that has learned to tell texts with words of GOOD from those of BAD."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=positions,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
        **SHAPE,
    )
    model = DistilBertForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    draws = torch.Generator().manual_seed(0)
    for _ in range(80):
        labels = torch.randint(2, (32,), generator=draws)
        texts = [sentence(int(label), draws) for label in labels]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return TextClassifier(model.eval(), tokenizer, "trained")


def sentence(label, draws):
    """Plain words, two or three of the class among them, and signs."""

    def pick(words):
        return words[int(torch.randint(len(words), (1,), generator=draws))]

    own = GOOD if label else BAD
    words = [pick(own) if i % 4 == 1 else pick(PLAIN) for i in range(pick(range(6, 15)))]
    return "".join(word + pick((" ", " ", " ", ", ", " (", ") ", "! ", " 42 ")) for word in words)


def masked_network():
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    model = DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **SHAPE)
    )
    return model, tokenizer
