"""Answers equal to those that the pipeline of transformers 4.57 gave, on the same weights.

They were recorded by

    python tests/test_pipeline.py path/to/python/with/transformers/4.57

which runs that pipeline on the model that is made here, of numbers that never change.
"""

import json
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from readers import BERT, bert_pair, wrap
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import DistilBertConfig, DistilBertForQuestionAnswering

import genkit
from genkit.qa.reader import Reader

RECORD = Path(__file__).with_name("pipeline.json")
TEXTS = (
    "Marie Curie won the prize in 1903 and in 1911; the Prize was shared the first time.",
    "Das Café in Zürich\r\nopens at 7:30 (not 8).\r\n\r\nZoë likes the café.",
    "Rockets 🚀🚀 cost 40%, or 👩‍🚀 says so: 40% of 1.5 million. \t And e\u0301te\u0301 is summer.",
    "日本の首都は東京です。 Tokyo is big.",
    "word",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4,
)
QUESTIONS = ("who won?", "When does the Café open, and why?", "40%?", "東京")
OPTIONS = (
    {},
    {"align_to_words": False},
    {"handle_impossible": True},
    {"max_seq_len": 48, "doc_stride": 12},
    {"max_answer_len": 3},
)
PEER = """
import json, sys, warnings
warnings.simplefilter("ignore")
from transformers import pipeline
answer = pipeline("question-answering", model=sys.argv[1], device="cpu")
rows = []
for question, context, options in json.load(sys.stdin):
    if "handle_impossible" in options:
        options["handle_impossible_answer"] = options.pop("handle_impossible")
    rows.append(answer(question=question, context=context, **options))
print(json.dumps(rows))
"""


def fixed_reader():
    letters = [*string.ascii_letters, *string.digits, *"éüë日本の首都は東京です。🚀👩"]
    words = ["the", "in", "prize", "##ize", "##ie", "opens", "café", "summer", "Tokyo", "Cu", "19"]
    names = [*BERT, *letters, *(f"##{c}" for c in letters), *words, *string.punctuation]
    backend = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    shape = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    config = DistilBertConfig(vocab_size=len(names), max_position_embeddings=400, **shape)
    model = DistilBertForQuestionAnswering(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim == 2:
                numbers = rng.normal(0, 2 if name.startswith("qa") else 0.3, weight.shape)
                weight.copy_(torch.from_numpy(numbers))
    names = ["input_ids", "attention_mask"]
    return Reader(model, wrap(bert_pair(backend), model_input_names=names), "fixed")


def cases():
    return [
        (question, context, options)
        for context in TEXTS
        for question in QUESTIONS
        for options in OPTIONS
    ]


@pytest.fixture(scope="module")
def reader():
    return fixed_reader()


def test_answers_are_those_of_the_pipeline(reader):
    """All of them, but that a score is not added up over windows, which could make it 1.4."""
    recorded = json.loads(RECORD.read_text())
    for (question, context, options), theirs in zip(cases(), recorded, strict=True):
        ours = genkit.answer(question, context, model=reader, **options)
        what = (question, context, options, ours, theirs)
        if ours.answer and ours.window != (0, len(context)):
            assert ours.score < theirs["score"] + 1e-5, what
            assert ours.answer == theirs["answer"] or theirs["score"] > 1, what
            continue
        place = tuple(theirs[name] for name in ("answer", "start", "end"))
        assert (ours.answer, ours.start, ours.end) == place, what
        assert ours.score == pytest.approx(theirs["score"], abs=1e-5), what


def record(python):
    with tempfile.TemporaryDirectory() as folder:
        reader = fixed_reader()
        reader.model.save_pretrained(folder)
        reader.tokenizer.save_pretrained(folder)
        config = Path(folder) / "tokenizer_config.json"
        known = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(known | {"model_max_length": 400}))
        command, given = [python, "-c", PEER, folder], json.dumps(cases())
        told = subprocess.run(command, input=given, check=True, stdout=subprocess.PIPE, text=True)
    rows = [json.dumps(row) for row in json.loads(told.stdout)]
    RECORD.write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    record(sys.argv[1])
