import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genkit.data import text, utf8
from genkit.data.order import Order, Windows


def read(source, **options) -> list[str]:
    return ["".join(document) for document in text.read_documents(str(source), **options)]


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"two\r\nlines\r")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("une \N{SNOWMAN}")
    (tmp_path / "c.md").write_text("# no")
    assert read(tmp_path / "b.txt") == ["two\r\nlines\r"]
    assert read(tmp_path) == ["une \N{SNOWMAN}", "two\r\nlines\r"]


def test_a_character_cut_by_a_piece_border_survives(tmp_path, monkeypatch):
    monkeypatch.setattr(utf8, "PIECE", 3)
    (tmp_path / "a.txt").write_text("aa\N{SNOWMAN}b\N{PILE OF POO}")
    assert read(tmp_path / "a.txt") == ["aa\N{SNOWMAN}b\N{PILE OF POO}"]


def test_tables_and_saved_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["one\r\n", "two"], "other": ["3", "4"]})
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_json(tmp_path / "a.jsonl")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows).save_to_disk(tmp_path / "split")
    for name in ("a.parquet", "a.jsonl", "saved", "split"):
        assert read(tmp_path / name) == ["one\r\n", "two"]
    assert read(tmp_path / "saved", column="other") == ["3", "4"]
    with pytest.raises(ValueError, match="no column 'words'"):
        read(tmp_path / "saved", column="words")


def test_bad_tables_are_named(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_dict({"text": ["one", None]}).to_parquet(tmp_path / "null.parquet")
    Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    DatasetDict(test=Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "split")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    for name, message in {
        "null.parquet": "row 1 of 'text' is no text: None",
        "numbers.parquet": "row 0 of 'text' is no text: 1",
        "split": "no split 'train'",
        "broken.jsonl": "broken.jsonl cannot be read: JSONDecodeError",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


def test_the_embedded_corpus_is_prose():
    assert sum(map(len, read(text.EMBEDDED))) > 300_000


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    (tmp_path / "empty").mkdir()
    for source, message in {
        tmp_path / "missing.txt": "no file, folder or dataset",
        tmp_path / "*.nothing": "no file, folder or dataset",
        tmp_path / "empty": "holds no",
        tmp_path / "latin.txt": "not UTF-8 at byte 1",
        tmp_path / "cut.txt": "not UTF-8",
        tmp_path / "binary.txt": "byte 3 is zero",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(source)
    with pytest.raises(ValueError, match="'nobody/nothing' is no file or folder, and"):
        read("nobody/nothing")


@given(st.integers(1, 50), st.integers(0, 10), st.integers(1, 20))
def test_every_epoch_visits_everything_once(count, seed, size):
    order = Order(count, seed)
    positions = np.arange(3 * count)
    epochs, things = order(positions)
    assert (epochs == positions // count).all()
    for epoch in range(3):
        assert sorted(things[epochs == epoch]) == list(range(count))
    other = Order(count, seed)  # looked up in another order, by other parts
    for first in reversed(range(0, 3 * count, size)):
        part = positions[first : first + size]
        assert (other(part)[1] == things[first : first + size]).all()


@given(st.integers(2, 200), st.integers(1, 40), st.integers(0, 3))
def test_windows_are_pieces_of_the_text(length, context, seed):
    ids = np.arange(length, dtype=np.uint16)
    if length < context + 1:
        with pytest.raises(ValueError, match="less than one window"):
            Windows(ids, context, seed)
        return
    windows = Windows(ids, context, seed)
    inputs, targets = windows.batch(np.arange(3 * len(windows)))
    assert inputs.shape == (3 * len(windows), context)
    assert (targets == inputs + 1).all()
    assert (inputs.diff() == 1).all()
    first = inputs[: len(windows), 0].numpy()
    assert len(set(first)) == len(windows)  # one epoch: no window twice


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\r\nb\nc\rd\n", ["a", "b", "c", "d"]),
        ("a\n\n", ["a", ""]),
        ("a\u2028b\x0cc\x85d\x1ce\n", ["a\u2028b\x0cc\x85d\x1ce"]),
    ],
)
def test_split_lines_ends_a_line_at_three_ends_only(text, lines):
    assert utf8.split_lines(text) == lines


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json", "list.json"])
def test_read_documents_leaves_a_byte_order_mark_out(tmp_path, name):
    forms = {"a.txt": "\ufeffé\ufeff", "a.csv": "text\né\ufeff\n", "a.jsonl": '{"text": "é\ufeff"}'}
    forms |= {"a.json": '{"text": "é\ufeff"}\n{"text": "b"}', "list.json": '[{"text": "é\ufeff"}]'}
    (tmp_path / name).write_text(forms[name].removeprefix("\ufeff"), encoding="utf-8-sig")
    assert read(tmp_path / name)[0] == "é\ufeff"  # one within the text is a character of it


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
def test_read_documents_names_utf_16(tmp_path, encoding, name):
    (tmp_path / name).write_text('{"text": "one"}\n', encoding=encoding)
    with pytest.raises(ValueError, match=f"{name} is UTF-16, not UTF-8; .*iconv -f utf-16"):
        read(tmp_path / name)


def test_the_byte_that_is_no_utf_8_is_counted_from_the_start_of_the_file(tmp_path):
    for start in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(start + b"abc\xff")
        with pytest.raises(ValueError, match=f"not UTF-8 at byte {len(start) + 3} "):
            read(tmp_path / "a.txt")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_read_documents_splits_json_lines_at_three_ends_only(tmp_path, end):
    rows = ["a\u2028b", "\x0c", "c\x85"]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_bytes(end.join([*lines, ""]).encode())
    assert read(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("name", ["A.CSV", "A.Jsonl", "A.JSON"])
def test_a_table_is_one_whatever_the_case_of_its_ending(tmp_path, name):
    content = "text\none\n" if name.lower().endswith("csv") else '{"text": "one"}\n'
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name) == ["one"]
