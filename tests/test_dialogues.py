"""Demonstrations, pairs and prompts: files as people have them, and as tokens of a model."""

import json
from pathlib import Path

import pytest
import torch
from builders import byte_model
from chat_models import TEMPLATES, chat_model

from genkit.data import characters, dialogues
from genkit.data.dialogues import Demonstration, Pair
from genkit.models import lm
from genkit.models.completions import LOGITS, log_probabilities, pad_rows, split_blocks
from genkit.text.dialogue_tokens import add_template, encode_dialogue, encode_prompt_of
from genkit.text.language_model import LanguageModel

HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi there."}
AND = {"role": "user", "content": "And now?"}
BYE = {"role": "assistant", "content": "Bye \U0001f44b"}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- reading


def test_demonstrations_of_every_form(tmp_path):
    rows = [
        {"messages": [HELLO, HI, AND, BYE]},
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": [HELLO], "completion": [HI]},
        {"prompt": [HELLO], "completion": "Hi."},
    ]
    found = dialogues.read_demonstrations(write(tmp_path / "demos.jsonl", rows))
    assert found == [
        Demonstration([HELLO, HI, AND], BYE["content"]),
        Demonstration("2+2=", "4"),
        Demonstration([HELLO], "Hi there."),
        Demonstration([HELLO], "Hi."),
    ]


def test_pairs_with_a_prompt_and_as_two_chats(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2},
        {"prompt": [HELLO], "chosen": [HI], "rejected": [BYE]},
        {"chosen": [HELLO, HI], "rejected": [HELLO, BYE]},
    ]
    found = dialogues.read_pairs(write(tmp_path / "pairs.jsonl", rows))
    assert found[0] == Pair("a", "b", "c", 2.0)
    assert found[1] == found[2] == Pair([HELLO], HI["content"], BYE["content"])


def test_prompts_of_lines_and_of_tables_once_each(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\none\n  three \n")
    assert dialogues.read_prompts(str(tmp_path / "prompts.txt")) == ["one", "two", "  three "]
    table = write(tmp_path / "prompts.jsonl", [{"prompt": [HELLO]}, {"messages": [HELLO]}])
    assert dialogues.read_prompts(table) == [[HELLO]]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"}, "row 1: .*equal"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": " "}, "row 1: rejected.*empty"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "row 1 has no 'rejected'"),
        ("pairs", {"chosen": [HELLO, HI], "rejected": [AND, BYE]}, "row 1: without a prompt"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "row 1: margin"),
        ("demonstrations", {"messages": [HELLO]}, "row 1: the last of messages"),
        ("demonstrations", {"messages": [HELLO, AND]}, "row 1: .*out of order"),
        ("demonstrations", {"prompt": "a", "completion": 3}, "row 1: completion must be a text"),
        ("demonstrations", {"prompt": [HI], "completion": "b"}, "row 1: prompt"),
        ("demonstrations", {"text": "a"}, "row 1 has no 'prompt'"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, reader, row, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}
    source = write(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(ValueError, match=f"data: {message}"):
        getattr(dialogues, f"read_{reader}")(source)


def test_a_split_has_every_item_once():
    items = list(range(23))
    for fraction in (0.001, 0.1, 0.5, 0.999):
        train, val = dialogues.split(items, fraction, "data")
        assert sorted(train + val) == items and train and val
    with pytest.raises(ValueError, match="data: 1 rows are too few"):
        dialogues.split([1], 0.1, "data")


# ---- as tokens


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "llama2"])
def test_the_answers_of_a_chat_are_marked_token_by_token(name):
    language = chat_model(TEMPLATES[name])
    row = encode_dialogue([HELLO, HI, AND], BYE["content"], language, "row")
    tokenizer = language.tokenizer
    spans, current = [], []
    for token, answers in zip(row.ids, row.answers, strict=True):
        if answers:
            current.append(token)
        elif current:
            spans, current = [*spans, current], []
    texts = [tokenizer.decode(span, skip_special_tokens=True) for span in [*spans, current]]
    assert [text.strip() for text in texts] == [HI["content"], BYE["content"]]
    assert current[-1] in tokenizer.added_tokens_decoder  # it learns to end
    whole = tokenizer.apply_chat_template([HELLO, HI, AND, BYE], return_dict=False)
    assert whole[: len(row.ids)] == row.ids
    assert row.ids[: len(row.ids) - len(current)] == encode_prompt_of(
        [HELLO, HI, AND], language, "prompt"
    )


def test_a_text_ends_with_the_end_token():
    language = byte_model()
    row = encode_dialogue("ab", "c<|endoftext|>", language, "row")
    assert row.ids == [*language.tokenizer("abc").input_ids, *[*b"<|endoftext|>"], 256] or (
        language.tokenizer.decode(row.ids[:-1]) == "abc<|endoftext|>" and row.ids[-1] == 256
    )
    assert row.answers == [i >= 2 for i in range(len(row.ids))]
    assert row.count == len(row.ids) - 2


def test_the_simple_template_works_with_characters():
    tokenizer = characters.make_tokenizer("abcdefghijklmnopqrstuvwxyz .:\nAHU")
    add_template(tokenizer)
    model = lm.make_model("llama", len(tokenizer), 128, 1, 16, 1, 0.0)
    language = LanguageModel(model.eval(), tokenizer, "letters")
    row = encode_dialogue([HELLO, HI, AND], "Fine", language, "row")
    assert tokenizer.decode(row.ids) == (
        "User:\nHello\n\nAssistant:\nHi there.<eos>\n\nUser:\nAnd now?\n\nAssistant:\nFine<eos>"
    )
    assert row.count == len("Hi there.Fine") + 2


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match=r"data: row 3: prompt and answer are \d+ tokens"):
        encode_dialogue("a", "b" * 100, byte_model(), "data: row 3")


# ---- under a model


def test_log_probabilities_are_those_of_each_row_alone():
    language = byte_model()
    rows = [([1, 2, 3, 4, 256], 3), ([5, 6, 7], 1), ([8, 9], 1)]
    batch = pad_rows(
        [ids for ids, _ in rows], [[i >= n for i in range(len(ids))] for ids, n in rows]
    )
    logs, entropies = log_probabilities(language.model, batch)
    for row, (ids, start) in enumerate(rows):
        logits = language.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(batch.mask.shape[1]):
            if start <= t + 1 < len(ids):
                torch.testing.assert_close(logs[row, t], logits[t, ids[t + 1]])
                torch.testing.assert_close(entropies[row, t], -(logits[t].exp() * logits[t]).sum())
            else:
                assert logs[row, t] == entropies[row, t] == batch.mask[row, t] == 0
    some = batch.take(slice(1, 3))
    assert some.ids.tolist() == [[5, 6, 7], [8, 9, 0]]


def test_blocks_have_every_row_and_no_more_logits_than_fit():
    rows = pad_rows([[1] * 101] * 50, [[False] + [True] * 100] * 50)
    vocabulary = LOGITS // 100 // 7
    found = split_blocks(rows, vocabulary)
    assert [i for block in found for i in range(50)[block]] == list(range(50))
    assert max(len(range(50)[block]) for block in found) == 7
