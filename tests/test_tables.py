"""Tables, and files that are no regular ones: what is unsafe to read is refused in one line."""

import csv
import dataclasses
import http.server
import inspect
import io
import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from genkit.commands import common
from genkit.data import image_files, images, squad, table_formats, tables
from genkit.data import text as data

ROOT = Path(__file__).parent.parent
ODD = ["a[1]", "b*", "c?", "{d,e}", "**", "http:x", "a::b"]  # in names
SQUAD = {"id": "q", "title": "t", "question": "Who?", "context": "Ada"}
SQUAD |= {"answers": {"text": ["Ada"], "answer_start": [0]}}


def refusal(call, *arguments, **options) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


def texts(source, **options) -> list[str]:
    return ["".join(document) for document in data.read_documents(str(source), **options)]


def picture(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9, 9), level, np.uint8)).save(path)
    return path


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write rows as the suffix says; without one, as a saved dataset."""
    table = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        with path.open("wb") as file:  # the file of that very name
            pq.write_table(table.data.table, file)
    elif path.suffix == ".csv":
        names = list(rows[0])
        lines = [names, *([row[name] for name in names] for row in rows)]
        path.write_text("\n".join(",".join(map(str, line)) for line in lines) + "\n")
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        table.save_to_disk(path.absolute().with_name("saved"))  # which takes some names for URLs
        path.with_name("saved").rename(path)
    return path


# each kind that is read in its own way; .json is read as .jsonl is, and has tests of its own
KINDS = [".csv", ".jsonl", ".parquet", ""]

# ---- names


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, ".txt"])
def test_names_are_never_patterns(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # so that the name is all that is given
    for decoy in ("a1", "bb", "cc", "d", "e"):
        if kind == ".txt":
            Path(f"{decoy}.txt").write_text("of another")
        else:
            write_table(Path(decoy + kind), [{"text": "of another"}])
    for name in ODD if kind in (".txt", ".csv") else ("a[1]", "http:x"):
        path = Path(name + kind)
        if kind == ".txt":
            assert "no file, folder or dataset" in refusal(texts, path)
            path.write_text("of this")
        else:
            write_table(path, [{"text": "of this"}])
        assert texts(path) == ["of this"]


def test_folders_with_odd_names_are_read_as_named(tmp_path):
    for i, name in enumerate(("a[1]", "http:x")):
        picture(tmp_path / name / "set" / "x.png", i)
        (tmp_path / name / "x.txt").write_text(name)
        (tmp_path / name / "table.csv").write_text("image\nset/x.png\n")
        assert images.load_images(tmp_path / name / "set").pixels.max() == i
        assert images.load_images(tmp_path / name / "table.csv").pixels.max() == i
        assert texts(tmp_path / name) == [name]


def test_what_is_hashed_is_what_is_read(tmp_path):
    path = tmp_path / "a[1].json"
    write_table(tmp_path / "a1.json", [{"image": "white.png"}])
    write_table(path, [{"image": "black.png"}])
    picture(tmp_path / "white.png", 255), picture(tmp_path / "black.png", 0)
    assert images.load_images(path).pixels.max() == 0
    write_table(tmp_path / "a1.json", [{"image": "black.png"}])
    write_table(path, [{"image": "white.png"}])
    assert images.load_images(path).pixels.max() == 255


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_a_table_that_grows_while_it_is_read_is_an_error(tmp_path, kind):
    path = write_table(tmp_path / f"t{kind}", [{"text": "a"}] * 5)
    rows = data.read_documents(str(path))
    next(rows)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="changed while it was read; try again"):
        list(rows)


# ---- what a cell names


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((".csv", how) for how in ("absolute", "dots", "dots inside", "link", "linked folder")),
        *(pytest.param(kind, "absolute", marks=pytest.mark.slow) for kind in KINDS[1:3]),
        ("", "absolute"),
        ("", "dots inside"),
        ("", "link"),  # of a saved dataset, whose folder is its own
    ],
)
def test_a_table_names_pictures_below_its_own_folder(tmp_path, kind, how):
    private = picture(tmp_path / "private" / "x.png", 77)
    home = tmp_path / "home"
    picture(home / "in" / "a.png")
    table = home / f"table{kind}"
    folder = table if kind == "" else home  # a saved dataset is a folder
    names = {"absolute": str(private), "dots": os.path.relpath(private, folder)}
    names |= {"dots inside": "in/../in/a.png", "link": "l.png", "linked folder": "l/x.png"}
    write_table(table, [{"image": names[how]}])
    if how.startswith("link"):
        (folder / Path(names[how]).parts[0]).symlink_to(
            private.parent if "/" in names[how] else private
        )
    if (how, kind) == ("dots inside", ""):
        picture(folder / "in" / "a.png")
    said = refusal(images.load_images, table)
    assert all(part in said for part in (str(table), "row 0", names[how], "--allow_outside"))
    assert len(images.load_images(table, allow_outside=True)) == 1


def test_links_that_stay_inside_are_followed(tmp_path):
    picture(tmp_path / "deep" / "a.png", 5)
    (tmp_path / "l.png").symlink_to("deep/a.png")
    table = write_table(tmp_path / "t.csv", [{"image": "l.png"}])
    assert images.load_images(table).pixels.max() == 5


def test_all_rows_are_looked_at_before_any_picture_is_decoded(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    table = write_table(tmp_path / "t.csv", [{"image": "bad.png"}, {"image": "/etc/passwd"}])
    assert "row 1 of" in refusal(images.load_images, table)


@pytest.mark.parametrize("name", ["", ".", "x\0y", "a" * 5000, "none.png"])
@pytest.mark.parametrize("allowed", [False, True])
def test_a_name_of_no_file_is_one_line(tmp_path, name, allowed):
    source = image_files.ImageSource("t", "image", "label", "train", allowed, 1000, 64)
    with pytest.raises(ValueError, match="images: "):
        path = image_files._resolve_cell(tmp_path, name, "row 0", source)
        image_files._read_file(path, source)


def test_a_text_folder_holds_no_link_out_of_it(tmp_path):
    (tmp_path / "private.txt").write_text("secret")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").symlink_to(tmp_path / "private.txt")
    assert "a.txt leads out of the folder" in refusal(texts, tmp_path / "books")
    assert texts(tmp_path / "books" / "a.txt") == ["secret"]  # which the user has named


@pytest.fixture
def requests():
    """A server's address, and the paths that were requested."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/x.png", paths
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        (".parquet", "{}"),
        (".parquet", "zip://x.png::{}"),
        ("", "{}"),
        ("", "hf://datasets/a/b/x.png"),
        ("", "/private"),
    ],
)
def test_no_cell_is_fetched_or_opened_whatever_its_column_is(tmp_path, kind, scheme, requests):
    address, paths = requests
    private = picture(tmp_path / "private.png")
    name = str(private) if scheme == "/private" else scheme.format(address)
    columns = ("text", "label", "answers", "image", "title", "extra")
    rows = {column: [{"bytes": None, "path": name}] for column in columns}
    features = Features(dict.fromkeys(columns, ImageFeature()))
    schema = features.arrow_schema
    plain = pa.table({k: pa.array(v, schema.field(k).type) for k, v in rows.items()}, schema)
    path = tmp_path / "sub" / f"t{kind}"
    path.parent.mkdir()
    if kind:
        pq.write_table(plain, path)
    else:
        Dataset.from_dict({"a": [1]}).save_to_disk(path)
        (path / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
        with pa.OSFile(str(path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as out:
            out.write_table(plain)
    assert "row 0" in refusal(texts, path)
    assert "row 0" in refusal(images.load_images, path, label_column="none")
    refusal(images.load_images, path, label_column="extra")
    assert "row 0" in refusal(squad.read_examples, str(path))
    assert not paths


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "a/b", "", 3, None, "link.arrow"])
def test_a_saved_dataset_has_its_rows_beside_it(tmp_path, name):
    write_table(tmp_path / "set", [{"text": "a", "image": "x"}])
    (tmp_path / "x.arrow").write_bytes(next((tmp_path / "set").glob("*.arrow")).read_bytes())
    (tmp_path / "set" / "link.arrow").symlink_to(tmp_path / "x.arrow")
    (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    for call in (texts, images.load_images, squad.read_examples):
        assert f"state.json names {name!r}" in refusal(call, str(tmp_path / "set"))


def test_a_saved_dataset_has_its_splits_in_it(tmp_path):
    write_table(tmp_path / "train", [SQUAD | {"text": "of another"}])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../train"]}')
    for call in (texts, images.load_images, squad.read_examples):
        assert "names '../train'" in refusal(call, str(tmp_path / "set"))


# ---- pipes, sockets, folders and devices


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["pipe", "socket", "folder", "device", "link to a pipe"])
def test_files_that_are_not_regular_are_never_waited_for(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)  # a socket's path has a limit
    picture(Path("set/a.png"))
    Path("set/a.txt").write_text("text")
    for suffix in (".png", ".txt", ".json", ".csv", ".parquet"):
        path = Path(f"set/x{suffix}")
        if what == "folder":
            path.mkdir()
        elif what == "device":
            path.symlink_to("/dev/zero")
        elif what == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        else:
            os.mkfifo(path if what == "pipe" else f"pipe{suffix}")
            what == "pipe" or path.symlink_to(f"../pipe{suffix}")
        if what != "folder":
            refusal(images.load_images, path)
            refusal(texts, path)
            refusal(squad.read_examples, str(path))
            refusal(common.read_text, "context", str(path))
    if what != "folder":
        assert (
            len(images.load_images("set")) == 1
        )  # passed over, as another folder would be a class
        assert texts("set") == ["text"]
    table = write_table(Path("table.csv"), [{"image": "set/x.png"}])
    assert "x.png" in refusal(images.load_images, table)
    refusal(images.load_images, table, allow_outside=True)


def test_a_state_that_is_a_pipe_is_not_waited_for(tmp_path):
    write_table(tmp_path / "set", [{"text": "a"}])
    (tmp_path / "set" / "state.json").unlink()
    os.mkfifo(tmp_path / "set" / "state.json")
    assert "regular file" in refusal(texts, tmp_path / "set")


# ---- sizes that cannot be


def bomb(path: Path, what: str) -> Path:
    if what == "one field":
        path.write_bytes(b'text\n"' + b"x" * (80 << 20) + b'"\n')
    elif what == "one line":
        path.write_bytes(b'{"text": "' + b"x" * (80 << 20))
    elif what == "lists":
        path.write_text("[" + "[]," * 6_000_000 + "[]]")
    elif what == "nested":
        path.write_text("[" * 100_000)
    elif what == "number":
        path.write_text("[" + "9" * 100_000 + "]")
    elif what == "nulls":
        pq.write_table(pa.table({"text": pa.nulls(1_000_000, pa.string())}), path)
    elif what == "same text":
        same = pa.array(["x" * (1 << 20)] * 300)
        pq.write_table(pa.table({"text": same, "image": same}), path, compression="zstd")
    elif what == "one page":
        column = pa.array([b"\0" * (100 << 20)])
        table = pa.table({"text": column, "image": column})
        pq.write_table(table, path, compression="zstd", use_dictionary=False)
    elif what == "cut":
        pq.write_table(pa.table({"text": ["a"] * 1000}), path)
        path.write_bytes(path.read_bytes()[:-20])
    return path


BOMBS = {
    ("one field", ".csv"): "needs more than 64 MiB; raise table_memory",
    ("one line", ".jsonl"): "needs more than 64 MiB|cannot be read: JSONDecodeError",
    ("lists", ".json"): "needs more than 64 MiB",
    ("nested", ".json"): "is nested too deeply",
    ("number", ".json"): "cannot be read: ValueError",
    ("same text", ".parquet"): "needs more than 64 MiB|holds far more than the size of its files",
    ("one page", ".parquet"): "needs more than 64 MiB",
    ("cut", ".parquet"): "cannot be read: ArrowInvalid",
}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "kind"), BOMBS, ids=str)
def test_what_does_not_fit_is_one_line(tmp_path, what, kind):
    path = bomb(tmp_path / f"bomb{kind}", what)
    with pytest.raises(ValueError, match=BOMBS[what, kind]):
        texts(path, table_memory=64)
    if what in ("nested", "cut", "same text"):  # whose rows are images, or questions, to the reader
        refusal(images.load_images, path, table_memory=64)
        with pytest.raises(ValueError, match=r"data: "):
            squad.read_examples(str(path), table_memory=64)


def test_rows_that_the_file_has_no_room_for_are_refused(tmp_path):
    path = bomb(tmp_path / "t.parquet", "nulls")
    assert path.stat().st_size < 10_000
    table = tables.hash_files("t", "parquet", [path], 64)
    with (
        tables.open_table(table, ["text"]) as (_, rows),
        pytest.raises(ValueError, match="holds far more than the size of its files"),
    ):
        list(rows)
    with pytest.raises(ValueError, match="table_memory must be 64 MiB or more, got 63"):
        tables.hash_files("t", "parquet", [path], 63)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"text\n\0\n", "line 2 holds a zero byte"),
        (b"text,b\na\n", r"has 1 fields, not 2, in line 2"),
        (b"text\na,b\n", r"has 2 fields, not 1, in line 2"),
        (b"text,text\na,b\n", "two columns of one name"),
        (b"", "is empty; its first line must name the columns"),
        (b'text\n"a"b\n', "expected after"),
        (b'text\n"a\n', "unexpected end of data"),
        (b"text\n\xff\n", "can't decode byte"),
    ],
)
def test_a_broken_csv_file_is_an_error(monkeypatch, text, message):
    monkeypatch.setattr(table_formats, "open_regular", lambda path: io.BytesIO(text))
    request = tables.Request("csv", ["t.csv"], 64, ["text"], None, None, 0)
    errors = (table_formats._TableError, csv.Error, UnicodeDecodeError)
    with pytest.raises(errors, match=message):
        list(table_formats._read_csv(request)[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"text,b\na\n", "has 1 fields"), (b'text\n"a\n', "cannot be read: Error")],
)
def test_an_error_of_the_process_is_one_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text)
    assert f"t.csv {message}" in refusal(texts, tmp_path / "t.csv")


def test_integers_are_labels_if_all_of_a_csv_file_are():
    assert image_files._as_int_labels(["10", "9", "-1"]) == [10, 9, -1]
    assert image_files._as_int_labels(["010", "9", "NA", ""]) == ["010", "9", "NA", None]


def test_no_cell_of_a_csv_file_is_made_up(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        '\ufefftext,b\r\n"a ""q"",\r\nx",1\r\nNA,2\n\n007,3\n'.encode()
    )
    assert texts(tmp_path / "t.csv") == ['a "q",\r\nx', "NA", "007"]
    for name in ("x", "y", "z"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "i.csv").write_text("image,label\nx.png,10\ny.png,9\nz.png,-1\n")
    assert images.load_images(tmp_path / "i.csv").names == ["-1", "9", "10"]
    (tmp_path / "i.csv").write_text("image,label\nx.png,1\ny.png,\n")
    assert "row 1 has no label" in refusal(images.load_images, tmp_path / "i.csv")


CELLS = ["null", "NA", "", "12345", "007", "N/A", "nan", "1e5", "true", " a ", "-", "None"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_texts_are_what_the_file_says(tmp_path, kind):
    file = write_table(tmp_path / f"t.{kind}", [{"text": cell, "n": "x"} for cell in CELLS])
    assert texts(file) == CELLS


@pytest.mark.parametrize("labels", [["NA", "ZA", "NZ"], ["007", "008", "9"], ["null", "nan", "1"]])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_are_what_the_file_says(tmp_path, kind, labels):
    names = [picture(tmp_path / f"{i}.png").name for i in range(len(labels))]
    rows = [{"image": name, "label": x} for name, x in zip(names, labels, strict=True)]
    assert images.load_images(write_table(tmp_path / f"t.{kind}", rows)).names == sorted(labels)


def test_json_of_every_layout_gives_the_same_rows(tmp_path):
    rows = [{"text": "a"}, {"text": "b\r\n🦉"}]
    (tmp_path / "lines.json").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": rows}))
    for name in ("lines", "list", "data"):
        assert texts(tmp_path / f"{name}.json") == ["a", "b\r\n🦉"]
    (tmp_path / "mixed.json").write_text('[{"text": "a"}, {"other": "b"}, 3]')
    assert "row 1 of 'text' is no text: None" in refusal(texts, tmp_path / "mixed.json")


def test_a_reader_ends_with_who_reads(tmp_path):
    path = write_table(tmp_path / "t.jsonl", [{"text": "a" * 1000}] * 20_000)
    documents = data.read_documents(str(path))
    next(documents)
    before = _children()
    documents.close()
    assert len(_children()) == len(before) - 1


def _children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


# ---- settings


def test_every_recipe_of_images_has_the_caps_as_flags():
    from genkit.training import image_data  # with accelerate, which takes seconds to import

    recipes = [
        p for p in sorted((ROOT / "recipes").glob("*.py")) if "load_for_run(" in p.read_text()
    ]
    assert len(recipes) == 8
    assert all("class Settings(ImageSettings)" in recipe.read_text() for recipe in recipes)
    names = {field.name for field in dataclasses.fields(image_data.ImageSettings)}
    for name in ("allow_outside", "max_pixels", "max_bytes", "table_memory"):
        assert name in names
        assert f"{name}=settings.{name}," in inspect.getsource(image_data.load_for_run)


def test_caps_are_settings(tmp_path):
    path = picture(tmp_path / "set" / "a.png")
    size = path.stat().st_size
    assert len(images.load_images(tmp_path / "set", max_pixels=81, max_bytes=size)) == 1
    with pytest.raises(ValueError, match=r"has 9 x 9 pixels.*max_pixels=80"):
        images.load_images(tmp_path / "set", max_pixels=80)
    with pytest.raises(ValueError, match=f"has {size} bytes.*max_bytes={size - 1}"):
        images.load_images(tmp_path / "set", max_bytes=size - 1)
    cell = {"bytes": path.read_bytes(), "path": None}
    table = write_table(tmp_path / "t.parquet", [{"image": cell}])
    with pytest.raises(ValueError, match=f"row 0 has {size} bytes.*max_bytes={size - 1}"):
        images.load_images(table, max_bytes=size - 1)
    for name in ("max_pixels", "max_bytes"):
        with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
            images.load_images(tmp_path / "set", **{name: 0})
