"""Question-answering data: reading, splitting, targets, loss, a new tokenizer, the evaluation."""

import dataclasses
import json
import math
import random

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genkit
from genkit.data import squad
from genkit.data.squad import Example
from genkit.qa import training
from genkit.qa.model import make_model, make_tokenizer
from genkit.qa.reader import Reader

CONTEXT = "Ada wrote it in 1843, naïve 🙂 or not. Ada Lovelace was born in London, in 1815."
WORDS = ["Ada", "wrote", "naïve", "1843", "🙂", "Lovelace", "London", "in", "it"]


def example(name="q", title="Ada", question="Who?", context=CONTEXT, answers=(("Ada", 0),)):
    return Example(name, title, question, context, list(answers))


def nested(examples, version="1.1"):
    """SQuAD's own format, an article and a paragraph an example."""
    articles = []
    for e in examples:
        golds = [{"text": text, "answer_start": start} for text, start in e.answers]
        asked = {"id": e.id, "question": e.question, "answers": golds}
        if version == "v2.0":
            asked["is_impossible"] = not golds
        articles.append({"title": e.title, "paragraphs": [{"context": e.context, "qas": [asked]}]})
    return {"version": version, "data": articles}


def flat(examples):
    """The layout of the Hub."""
    rows = []
    for e in examples:
        texts, starts = [text for text, _ in e.answers], [start for _, start in e.answers]
        row = {name: getattr(e, name) for name in ("id", "title", "question", "context")}
        rows.append(row | {"answers": {"text": texts, "answer_start": starts}})
    return rows


SEVERAL = [
    example("a", "one"),
    example("b", "two", "When was it 🙂?", answers=[("1843", 16), ("in 1843", 13)]),
    example("c", "two", "Why?", answers=[]),
    example("d", "three", "Where?", "In Łódź.", [("Łódź", 3)]),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(SEVERAL, 200, 64)


# ---- reading


@pytest.mark.parametrize("kind", ["nested", "v2.0", "flat", "jsonl", "parquet", "saved"])
def test_every_layout_gives_the_same_examples(tmp_path, kind):
    path = tmp_path / {"saved": "set", "jsonl": "q.jsonl", "parquet": "q.parquet"}.get(
        kind, "q.json"
    )
    if kind in ("nested", "v2.0"):
        path.write_text(json.dumps(nested(SEVERAL, kind)))
    elif kind == "flat":
        path.write_text(json.dumps(flat(SEVERAL)))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, flat(SEVERAL))))
    else:
        table = datasets.Dataset.from_list(flat(SEVERAL))
        table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    train, val = squad.read_examples(str(path))
    assert (train, val) == (SEVERAL, [])
    assert squad.content_hash(train) == squad.content_hash(SEVERAL)


def test_a_dataset_with_a_validation_split_keeps_it(tmp_path):
    parts = {"train": SEVERAL[:2], "validation": SEVERAL[2:]}
    tables = {name: datasets.Dataset.from_list(flat(rows)) for name, rows in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "set")
    assert squad.split_examples(str(tmp_path / "set"), None, 0.5) == (SEVERAL[:2], SEVERAL[2:])
    (tmp_path / "q.json").write_text(json.dumps(nested(SEVERAL[:1])))
    assert (
        squad.split_examples(str(tmp_path / "q.json"), str(tmp_path / "set"), 0.5)[1] == SEVERAL[2:]
    )


def test_the_hash_is_of_all_fields():
    hashes = {squad.content_hash(SEVERAL)}
    for name, value in {
        "id": "e",
        "title": "x",
        "question": "x",
        "context": "x",
        "answers": [],
    }.items():
        changed = dataclasses.replace(SEVERAL[0], **{name: value})
        hashes.add(squad.content_hash([changed, *SEVERAL[1:]]))
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: JSONDecodeError: Expecting"),
        ("3", "must hold a list of rows, or a row a line, got 3"),
        ('{"rows": []}', r"must be SQuAD's .*; a file of one JSON object a line is a .jsonl"),
        ("[]", "has no questions"),
        ('{"data": []}', "has no questions"),
        ('{"data": [{"title": "t"}]}', r"data\[0\].paragraphs must be a list, got None"),
        ('[{"id": 3}]', r"row 0.id must be a str, got 3"),
        ('["a"]', r"row 0.id must be a str, got None"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        squad.read_examples(str(tmp_path / "q.json"))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([example(), example()], "two questions with the id 'q'"),
        ([example(answers=[("Eve", 0)])], "'q' at character 0 should be 'Eve', .*'Ada'"),
        ([example(answers=[("5.", len(CONTEXT))])], "should be '5.', .*''"),
        ([example(answers=[(".", -1)])], "must be a text and the character .* got '.' and -1"),
        ([example(answers=[("", 0)])], "must be a text and the character .* got '' and 0"),
        ([example(answers=[(" ", 3)])], "must be a text and the character"),
        ([example(answers=[("Ada", "0")])], "must be a text and the character .* and '0'"),
        ([example(question=" ")], "question 'q' has an empty question"),
        ([example(context="", answers=[])], "question 'q' has an empty context"),
        ([example(question="\ud83d?")], "question 'q' has half a surrogate pair"),
    ],
)
def test_wrong_rows_are_named(tmp_path, examples, message):
    (tmp_path / "q.json").write_text(json.dumps(flat(examples)))
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        squad.read_examples(str(tmp_path / "q.json"))


def test_contradictions_are_refused(tmp_path):
    for wrong in (SEVERAL[0], SEVERAL[2]):
        content = nested([wrong], "v2.0")
        asked = content["data"][0]["paragraphs"][0]["qas"][0]
        asked["is_impossible"] = not asked["is_impossible"]
        (tmp_path / "q.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"answers, and is_impossible is .*one must be wrong"):
            squad.read_examples(str(tmp_path / "q.json"))
    rows = flat(SEVERAL)
    rows[1]["answers"]["answer_start"].pop()
    (tmp_path / "q.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="'b' has 2 answers and 1 values of answer_start"):
        squad.read_examples(str(tmp_path / "q.json"))


@pytest.mark.parametrize("source", ["nothing.json", "{tmp}", "nobody/nothing"])
def test_missing_sources_are_named(tmp_path, monkeypatch, source):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data: .*(is no file of rows|cannot be loaded)"):
        squad.read_examples(source.format(tmp=tmp_path))


# ---- splitting


@given(st.lists(st.sampled_from("abcdef"), min_size=2), st.floats(0.01, 0.99))
def test_an_article_is_on_one_side(titles, fraction):
    examples = [
        example(str(i), title, context=title * 5, answers=[]) for i, title in enumerate(titles)
    ]
    distinct = list(dict.fromkeys(titles))
    if len(distinct) == 1:
        with pytest.raises(ValueError, match="is one article"):
            squad.split_by_article(examples, fraction, "q.json")
        return
    train, val = squad.split_by_article(examples, fraction, "q.json")
    held = list(dict.fromkeys(e.title for e in val))
    assert held and held == distinct[-len(held) :]
    assert abs(len(held) - fraction * len(distinct)) <= 1
    assert not {e.title for e in train} & set(held)
    assert sorted([*train, *val], key=lambda e: int(e.id)) == examples


def test_a_file_without_a_validation_split_is_split_by_article(tmp_path):
    last = example("e", "four", context="Of another article.", answers=[])
    (tmp_path / "q.json").write_text(json.dumps(flat([*SEVERAL, last])))
    assert squad.split_examples(str(tmp_path / "q.json"), None, 0.01) == (SEVERAL, [last])


def test_articles_that_share_a_context_cannot_be_split():
    with pytest.raises(ValueError, match=r"'one' and 'two' of .* share a context"):
        squad.split_by_article(SEVERAL[:3], 0.5, "q.json")


# ---- targets and loss


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_targets_are_the_tokens_of_the_answer(tokenizer, draw):
    """By the tokenizer's own pairs: what overlaps the answer, if its window holds all of it."""
    context = " ".join(draw.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40)))
    start = draw.draw(st.integers(0, len(context) - 1))
    text = context[start : start + draw.draw(st.integers(1, 12))]
    one = example(question="Who in it?", context=context, answers=[(text, start)])
    if text.isspace():
        return
    part = training.Questions([one, dataclasses.replace(one, answers=[])], tokenizer, 24, 4)
    windows = tokenizer(
        [one.question] * 2,
        [context] * 2,
        truncation="only_second",
        max_length=24,
        stride=4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    stop = start + len(text)
    wanted = sum(a < stop and b > start for a, b in whole.offset_mapping)
    assert len(part.windows) == len(windows.input_ids)
    for i, (first, last) in enumerate(part.targets):
        spans = enumerate(zip(windows.offset_mapping[i], windows.sequence_ids(i), strict=True))
        touched = [k for k, ((a, b), s) in spans if s == 1 and a < stop and b > start]
        held = len(touched) == wanted and windows.overflow_to_sample_mapping[i] == 0
        assert (first, last) == ((touched[0], touched[-1]) if held else (0, 0))


def test_padding_changes_no_loss(tokenizer):
    torch.manual_seed(0)
    model = make_model(len(tokenizer), 64, 2, 32, 2).eval()
    part = training.Questions(SEVERAL, tokenizer, 64, 8)
    everything = training.loss(model, *part.batch(np.arange(4), model))
    alone = [training.loss(model, *part.batch(np.array([i]), model)) for i in range(4)]
    torch.testing.assert_close(everything, torch.stack(alone).mean())
    inputs, targets = part.batch(np.array([3]), model)
    output = model(**inputs)
    by_hand = [
        -torch.log_softmax(logits[0], 0)[place]
        for logits, place in zip((output.start_logits, output.end_logits), targets[0], strict=True)
    ]
    torch.testing.assert_close(alone[3], sum(by_hand) / 2)
    nine = torch.zeros(1, 9, dtype=torch.long)
    ids = inputs["input_ids"]
    wide = {"input_ids": torch.cat([ids, nine], 1)}
    wide["attention_mask"] = torch.cat([torch.ones_like(ids), nine], 1)
    torch.testing.assert_close(training.loss(model, wide, targets), alone[3])


# ---- a new tokenizer


def test_a_new_tokenizer_is_always_the_same_and_reads_pairs():
    rng = random.Random(0)
    texts = [
        " ".join("".join(rng.choices("abcdefghäß", k=5)) for _ in range(60)) for _ in range(40)
    ]
    examples = [example(str(i), context=text, answers=[]) for i, text in enumerate(texts)]
    states = {make_tokenizer(examples, 400, 32).backend_tokenizer.to_str() for _ in range(4)}
    assert len(states) == 1
    tokenizer = make_tokenizer(examples, 400, 32)
    assert len(tokenizer) == 400 and tokenizer.cls_token_id == 2
    ids = tokenizer("abc", "Äß ß").input_ids
    assert tokenizer.decode(ids).startswith("[CLS] abc [SEP]")
    assert tokenizer.unk_token_id in ids  # cased, and there is no Ä
    assert tokenizer.decode(tokenizer("ßä", add_special_tokens=False).input_ids) == "ßä"


# ---- the evaluation


def test_predictions_are_those_of_answer(tokenizer):
    """Texts, scores and confidences, over several windows, for both temperatures."""
    torch.manual_seed(1)
    model = make_model(len(tokenizer), 64, 2, 32, 2).eval()
    model.config.calibration = {"temperature": 2.5, "threshold": 0.0, "impossible": False}
    part = training.Questions(SEVERAL, tokenizer, 24, 4)
    assert len(part.windows) > 6
    logits, nats = training.predict_logits(model, part)
    every = training.loss(model, *part.batch(np.arange(len(part.windows)), model)).item()
    assert nats / len(part.windows) == pytest.approx(every, rel=1e-5)
    read = training.predict_answers(logits, part, 7, np.array([2.5, 1.0, 2.5, 2.5]))
    reader = Reader(model, tokenizer, "small")
    said = genkit.answer(
        [e.question for e in SEVERAL],
        part.contexts,
        model=reader,
        max_seq_len=24,
        doc_stride=4,
        max_answer_len=7,
    )
    for one, (ours, theirs) in enumerate(zip(read, said, strict=True)):
        assert ours.answer == theirs.answer
        assert ours.score == pytest.approx(theirs.score, rel=1e-4)
        assert ours.null_score == pytest.approx(theirs.null_score, rel=1e-4)
        sure = ours.score if one == 1 else theirs.confidence
        assert ours.confidence == pytest.approx(sure, rel=1e-4)
    classes = training.gold_classes(part)
    assert np.isfinite(np.take_along_axis(logits, classes[..., None], 2)).all()


def prediction(answer, score, null):
    return training.Prediction(answer, score, score / 2, null, null / 2)


def test_evaluation_without_impossible_questions():
    examples = [example(str(i)) for i in range(4)]
    read = [prediction(a, 0.8, 0.9) for a in ("Ada", "ada.", "Ada wrote", "London")]
    evaluation = training.evaluate_predictions(read, examples)
    assert evaluation.right == [True, True, False, False] and evaluation.threshold == 0
    assert evaluation.figures["exact_match"] == 50
    assert evaluation.figures["f1"] == pytest.approx(100 * (2 + 2 / 3) / 4)
    assert evaluation.figures["ece_before"] == pytest.approx(0.3)
    assert evaluation.figures["ece_after"] == pytest.approx(0.1)


def test_each_half_is_evaluated_with_the_threshold_of_the_other():
    """Even questions part at odds of 1/4, odd ones at 4: each half's own would make no mistake."""
    examples, read = [], []
    for i in range(40):
        border = (0.25, 4.0)[i % 2]
        possible = i % 4 < 2
        examples.append(example(str(i), answers=[("Ada", 0)] if possible else []))
        read.append(prediction("Ada", 0.1, 0.1 * border * (0.5 if possible else 2)))
    evaluation = training.evaluate_predictions(read, examples)
    # even ones are answered up to 2: all of them; odd ones up to 1/8: none
    assert evaluation.answers == ["Ada", ""] * 20
    assert evaluation.figures["exact"] == 50
    assert evaluation.figures["HasAns_exact"] == evaluation.figures["NoAns_exact"] == 50
    assert evaluation.threshold == pytest.approx(math.log(1 / 8), abs=1e-6)


def test_an_answer_without_tokens_is_named():
    """It is not trained on as a question without an answer."""
    unseen = example("7", context="one \u200b two", answers=[("\u200b", 4)])
    tokenizer = make_tokenizer([unseen], 100, 48)
    with pytest.raises(ValueError, match=r"knows no token of the answer '\\u200b' \(7\)"):
        training.Questions([unseen], tokenizer, 48, 8)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n \n"])
def test_read_examples_takes_files_of_other_editors(tmp_path, encoding, end):
    """A byte-order mark and blank lines at the end change nothing."""
    for content in (nested(SEVERAL, "v2.0"), flat(SEVERAL)):
        (tmp_path / "q.json").write_text(json.dumps(content) + end, encoding=encoding)
        train, _ = squad.read_examples(str(tmp_path / "q.json"))
        assert sorted(train, key=lambda e: e.id) == sorted(SEVERAL, key=lambda e: e.id)


def test_read_examples_names_utf_16(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(flat(SEVERAL)), encoding="utf-16")
    with pytest.raises(ValueError, match=r"data: .*q.json is UTF-16, not UTF-8"):
        squad.read_examples(str(tmp_path / "q.json"))


@pytest.mark.parametrize(
    ("start", "hint"),
    [(7, "counted in UTF-16 code units"), (12, "counted in bytes of UTF-8"), (5, "'Ada'$|'$")],
)
def test_read_examples_says_what_an_answer_was_counted_in(tmp_path, start, hint):
    context = "\N{PILE OF POO}\N{PILE OF POO} é Ada"
    (tmp_path / "q.json").write_text(
        json.dumps(flat([example(context=context, answers=[("Ada", start)])]))
    )
    if start == 5:
        assert squad.read_examples(str(tmp_path / "q.json"))[0]
        return
    with pytest.raises(ValueError, match=hint):
        squad.read_examples(str(tmp_path / "q.json"))


def test_questions_names_the_question_that_is_too_long():
    long = example("long", question="who wrote it " * 40)
    tokenizer = make_tokenizer([long], 100, 48)
    several = [example("short"), long]
    with pytest.raises(ValueError, match=r"data: the question of 'long': .*, or raise max_seq_len"):
        training.Questions(several, tokenizer, 48, 8)
    with pytest.raises(ValueError, match=r"data: the question of 'long': .* Shorten it$"):
        training.Questions(several, tokenizer, 48, 8, 48)
