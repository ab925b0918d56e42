import io
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genkit.data import image_files, images, pixels, tables, workers
from genkit.data.pixels import ImageError

ROOT = Path(__file__).parent.parent
CLASSES = ["an owl 🦉", "dog", "zèbre"]


def picture(i: int, channels: int = 1, height: int = 9, width: int = 11) -> np.ndarray:
    """Pixels that no other number gives, (height, width) or (height, width, 3)."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.random.default_rng(i).integers(0, 256, shape, np.uint8)


def write(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


@pytest.fixture
def flat(tmp_path) -> Path:
    """Five images in a folder; numbers in their pixels as in their names."""
    for i in range(5):
        write(tmp_path / "flat" / f"image {i} 🎲.png", picture(i))
    return tmp_path / "flat"


@pytest.fixture
def classes(tmp_path) -> Path:
    """Twelve images in three classes, some a folder deeper."""
    for i in range(12):
        deeper = "more" if i > 8 else "."
        write(tmp_path / "classes" / CLASSES[i % 3] / deeper / f"{i:02d}.png", picture(i, 3))
    return tmp_path / "classes"


@pytest.fixture(scope="module")
def digits() -> images.Images:
    return images.load_images("digits")


def all_of(found: images.Images) -> np.ndarray:
    """Pixels as they were decoded."""
    return np.asarray(found.pixels[found.rows])


def same(a: images.Images, b: images.Images) -> bool:
    labels = a.labels is b.labels or np.array_equal(a.labels[a.rows], b.labels[b.rows])
    return labels and np.array_equal(all_of(a), all_of(b)) and a.sha256 == b.sha256


# ---- pixels and labels


def test_pixels_are_those_of_the_files_in_the_order_of_their_names(flat):
    found = images.load_images(flat)
    assert len(found) == 5 and found.size == (1, 9, 11)
    assert found.labels is None and found.names == [] and found.skipped == []
    assert np.array_equal(all_of(found), np.stack([picture(i)[None] for i in range(5)]))


def test_folders_are_classes(classes):
    found = images.load_images(classes)
    assert found.names == CLASSES and found.size == (3, 9, 11)
    order = sorted(range(12), key=lambda i: (i % 3, i))  # "09.png" lies in "more", after digits
    assert found.classes(np.arange(12)).tolist() == [i % 3 for i in order]
    assert np.array_equal(all_of(found), [np.moveaxis(picture(i, 3), 2, 0) for i in order])


@given(st.lists(st.integers(0, 1796), min_size=1, max_size=20))
def test_a_batch_is_looked_up(digits, which):
    batch = digits.batch(np.array(which))
    assert batch.dtype == torch.float32 and batch.shape == (len(which), 1, 8, 8)
    exact = torch.from_numpy(digits.pixels[which].astype(np.float32)) / 127.5 - 1
    assert torch.equal(batch, exact)
    assert digits.classes(np.array(which)).tolist() == digits.labels[which].tolist()
    part = digits.take(np.array(which))
    again = np.arange(len(which))[::-1].copy()
    assert torch.equal(part.batch(again), batch.flip(0))
    assert torch.equal(part.classes(again), digits.classes(np.array(which)).flip(0))


def test_every_level_has_its_place_between_minus_one_and_one(tmp_path):
    write(tmp_path / "a.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    values = images.load_images(tmp_path).batch(np.array([0])).flatten()
    assert values.min() == -1 and values.max() == 1
    assert torch.equal(((values + 1) * 127.5).round().byte(), torch.arange(256).byte())


def test_the_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    expected = load_digits()
    assert np.abs(all_of(digits)[:, 0] / 255 - expected.images / 16).max() < 1 / 255
    assert np.array_equal(digits.labels, expected.target) and digits.names == list("0123456789")


def test_resolution_and_channels_make_images_alike(tmp_path):
    write(tmp_path / "a.png", picture(0, 1, 20, 10))
    write(tmp_path / "b.png", picture(1, 3, 8, 30))
    for channels in (1, 3):
        found = images.load_images(tmp_path, resolution=8, channels=channels)
        assert found.size == (channels, 8, 8)
        for i, values in enumerate((picture(0, 1, 20, 10), picture(1, 3, 8, 30))):
            expected = pixels.image_to_array(Image.fromarray(values), 8, channels)
            assert np.array_equal(found.pixels[i], expected)


def test_many_images_are_decoded_by_other_processes_to_the_same(tmp_path, monkeypatch):
    for i in range(40):
        write(tmp_path / f"{i:02d}.png", picture(i))
    (tmp_path / "17.png").write_bytes(b"nothing")
    (tmp_path / "18 🦉.png").write_bytes(b"")
    here = images.load_images(tmp_path, skip_corrupt=True)
    monkeypatch.setattr(workers, "FILES", 3)
    monkeypatch.setattr(images, "VERSION", -1)  # no cache
    assert workers.FILES * os.cpu_count() < 40  # some processes are asked more than once
    there = images.load_images(tmp_path, skip_corrupt=True)
    assert same(here, there) and here.skipped == there.skipped and len(there.skipped) == 2
    with pytest.raises(ImageError, match=r"17\.png is no image"):
        images.load_images(tmp_path)


def test_large_files_are_handed_over_one_by_one(flat, monkeypatch):
    here = images.load_images(flat)
    monkeypatch.setattr(workers, "FILES", 4)
    monkeypatch.setattr(workers, "BYTES", 1)
    monkeypatch.setattr(images, "VERSION", -1)
    assert same(here, images.load_images(flat))


@pytest.mark.slow
def test_a_script_needs_no_guard(flat, tmp_path):
    """The processes that decode do not import the script that asked, and find what it found."""
    (tmp_path / "genkit").mkdir()
    (tmp_path / "genkit" / "__init__.py").write_text("raise ImportError('of another genkit')")
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "import os, sys\n"
        f"os.environ['PYTHONPATH'] = {str(tmp_path)!r}\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from genkit.data import images, workers\n"
        "workers.FILES = 2\n"
        f"print(len(images.load_images({str(flat)!r})))\n"
    )
    done = run([str(script)], tmp_path / "cache")
    assert done.stdout.split() == ["once", "5"], done.stderr


def test_a_process_that_dies_is_an_error(flat, monkeypatch):
    monkeypatch.setattr(workers, "FILES", 2)
    monkeypatch.setattr(workers, "START", "import sys; sys.stdin.buffer.readline()")
    monkeypatch.setattr(images, "VERSION", -2)
    with pytest.raises(ChildProcessError, match=r"image 0 .*was killed.*memory"):
        images.load_images(flat)
    monkeypatch.undo()
    assert len(images.load_images(flat)) == 5


def segments(count: int) -> bytes:
    """A JPEG that begins with so many empty segments, each an entry in a list of the decoder's."""
    file = io.BytesIO()
    Image.fromarray(picture(0)).save(file, "jpeg")
    return file.getvalue()[:2] + b"\xff\xe1\x00\x02" * count + file.getvalue()[2:]


def tags(count: int, size: int) -> bytes:
    """A TIFF of which each of so many tags has the same bytes as its value."""
    one = struct.pack("<HHII", 9, 4, 1, 9)
    head = struct.pack("<2sHIH", b"II", 42, 8, count + 1)
    offset = len(head) + 12 * (count + 1) + 4
    each = b"".join(struct.pack("<HHII", 1000 + i, 7, size, offset) for i in range(count))
    return head + one + each + bytes(4) + bytes(size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "data", "what"),
    [
        ("SECONDS = 0.2", segments(500_000), "it crashes the decoder, or takes longer than"),
        ("MIB, workers.BYTES_A_PIXEL = 200, 0", tags(500, 1 << 20), "it needs too much memory"),
    ],
    ids=["time", "memory"],
)
def test_a_file_that_exhausts_its_decoder_is_an_image_error(flat, monkeypatch, limit, data, what):
    limited = workers.START.replace("workers.serve_", f"workers.{limit}; workers.serve_")
    monkeypatch.setattr(workers, "START", limited)
    (flat / "image 2 🎲.png").write_bytes(data)
    with pytest.raises(ImageError, match=rf"image 2 🎲\.png cannot be decoded: {what}"):
        images.load_images(flat)
    found = images.load_images(flat, skip_corrupt=True)
    assert np.array_equal(all_of(found), [picture(i)[None] for i in (0, 1, 3, 4)])
    assert len(found.skipped) == 1


def test_large_results_are_handed_back_one_by_one(flat, monkeypatch):
    here = images.load_images(flat)
    monkeypatch.setattr(images, "VERSION", -3)
    small = workers.START.replace("workers.serve_", "workers.PIXELS = 100; workers.serve_")
    monkeypatch.setattr(workers, "START", small)
    assert same(here, images.load_images(flat))


# ---- missing labels, unreadable files


def test_labels_that_are_missing_are_asked_for(flat):
    with pytest.raises(ValueError, match=r"labels: .*no labels"):
        images.load_images(flat).classes(np.array([0]))


def test_unreadable_files_are_refused_or_skipped(classes):
    owl, dog = (classes / name for name in CLASSES[:2])
    (owl / "03.png").write_bytes(b"no image")
    (dog / "04.png").write_bytes((dog / "04.png").read_bytes()[:-40])
    with pytest.raises(ImageError, match=r"owl.*03\.png is no image.*pass --skip_corrupt"):
        images.load_images(classes)
    found = images.load_images(classes, skip_corrupt=True)
    assert [message.split(" ", 1)[0] for message in found.skipped] == [
        str(owl).split(" ")[0]
    ] * 1 + [str(dog / "04.png")]
    order = [i for i in sorted(range(12), key=lambda i: (i % 3, i)) if i not in (3, 4)]
    assert found.classes(np.arange(10)).tolist() == [i % 3 for i in order]
    assert np.array_equal(all_of(found), [np.moveaxis(picture(i, 3), 2, 0) for i in order])
    assert (
        images.load_images(classes, skip_corrupt=True).skipped == found.skipped
    )  # from the cache, too


def test_other_sizes_and_colours_are_refused_though_corrupt_ones_are_skipped(flat):
    write(flat / "x.png", picture(0, 1, 11, 9))
    with pytest.raises(ImageError, match=r"x\.png is 9 x 11, but .*0.*is 11 x 9; pass --resol"):
        images.load_images(flat, skip_corrupt=True)
    write(flat / "x.png", picture(0, 3))
    with pytest.raises(ImageError, match=r"x\.png is colour, but .* is grey; pass --channels"):
        images.load_images(flat, skip_corrupt=True)
    assert len(images.load_images(flat, channels=3)) == 6


def test_a_folder_without_one_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"all 1 files .*a\.png is empty"):
        images.load_images(tmp_path, skip_corrupt=True)


def test_a_huge_file_is_not_read_whole(flat):
    with (flat / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing, sparse
    with pytest.raises(ImageError, match=r"huge\.png has 67,108,865 bytes"):
        images.load_images(flat)
    assert len(images.load_images(flat, skip_corrupt=True)) == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_never_skipped(flat):
    (flat / "image 2 🎲.png").chmod(0)
    with pytest.raises(ValueError, match=r"cannot read .*image 2 🎲\.png: Permission denied"):
        images.load_images(flat, skip_corrupt=True)


# ---- folders


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ({"resolution": 7}, "resolution must be 8 or more, got 7"),
        ({"resolution": 0}, "resolution must be 8 or more, got 0"),
        ({"channels": 2}, "channels must be 1 for grey or 3 for colour, got 2"),
        ({"source": "no such thing 🦉"}, "'no such thing 🦉' is no folder, table or dataset"),
        ({"source": ""}, "no folder, table or dataset|holds"),
        ({"source": "/no/such/folder"}, "is no folder, table or dataset; give a folder"),
        ({"source": __file__}, "is no folder, table or dataset"),
        ({"source": "nobody/nothing"}, "'nobody/nothing' is no file or folder, and it cannot be"),
    ],
)
def test_arguments_are_checked(argument, what):
    with pytest.raises(ValueError, match=what):
        images.load_images(**{"source": "digits"} | argument)


def test_folders_that_make_no_sense_are_refused(tmp_path, classes):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no image; put images \(\.png, .*into it, or"):
        images.load_images(tmp_path / "empty")
    (classes / "none").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*none holds no image"):
        images.load_images(classes)
    (classes / "none" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"the folder .*none holds no image"):
        images.load_images(classes)
    shutil.rmtree(classes / "none")
    write(classes / "loose.png", picture(0, 3))
    with pytest.raises(
        ValueError, match=r"holds loose\.png beside the folders \['an owl 🦉', 'dog"
    ):
        images.load_images(classes)


def test_folders_that_look_like_splits_are_not_taken_for_classes(tmp_path):
    for name in ("val", "train", "test"):
        write(tmp_path / name / "a.png", picture(0))
    with pytest.raises(ValueError, match=r"like splits; give .* --images.*train.*--val_images"):
        images.load_images(tmp_path)
    write(tmp_path / "probe" / "a.png", picture(0))
    assert images.load_images(tmp_path).names == ["probe", "test", "train", "val"]


def test_hidden_files_are_left_alone(classes, flat):
    """What file managers and notebooks leave behind is no class and no image."""
    before = images.load_images(classes)
    for folder in (classes, classes / CLASSES[0]):
        (folder / ".thumbnails").mkdir()
        write(folder / ".thumbnails" / "a.png", picture(99, 3))
        (folder / "._01.png").write_bytes(b"a resource fork")
        (folder / ".DS_Store").write_bytes(b"\0")
    assert same(before, images.load_images(classes))


def test_links_out_of_a_folder_need_allow_outside(flat, classes, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in flat.iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"image 0 .*leads out of the folder .*--allow_outside"):
        images.load_images(linked)
    assert same(images.load_images(flat), images.load_images(linked, allow_outside=True))
    folders = tmp_path / "folders"
    folders.mkdir()
    for folder in classes.iterdir():
        (folders / folder.name).symlink_to(folder, target_is_directory=True)
    with pytest.raises(ValueError, match=r"leads out of the folder"):
        images.load_images(folders)
    assert same(images.load_images(classes), images.load_images(folders, allow_outside=True))
    assert same(
        images.load_images(flat), images.load_images(tmp_path / "linked", allow_outside=True)
    )


def test_a_broken_link_is_an_error(flat):
    (flat / "lost.png").symlink_to(flat / "nowhere")
    with pytest.raises(ValueError, match=r"cannot read .*lost\.png: No such file"):
        images.load_images(flat, skip_corrupt=True)
    (flat / "lost.png").unlink()
    (flat / "round.png").symlink_to(flat / "round.png")
    with pytest.raises(ValueError, match=r"cannot read .*round\.png: Too many levels"):
        images.load_images(flat, skip_corrupt=True)


@pytest.mark.timeout(20)
def test_links_that_go_round_end(classes):
    before = images.load_images(classes)
    (classes / CLASSES[0] / "round").symlink_to(classes, target_is_directory=True)
    (classes / CLASSES[0] / "more" / "up").symlink_to("..", target_is_directory=True)
    assert same(before, images.load_images(classes))


# ---- tables and datasets


def table(folder: Path, kind: str = "parquet", **columns) -> Path:
    path = folder / f"table.{kind}"
    rows = Dataset.from_dict(columns)
    {"parquet": rows.to_parquet, "json": rows.to_json, "csv": rows.to_csv}[kind](path)
    return path


def cells(count: int, channels: int = 1) -> list[dict]:
    return [{"bytes": png(picture(i, channels)), "path": None} for i in range(count)]


def test_a_parquet_file_has_images_and_labels(tmp_path):
    found = images.load_images(table(tmp_path, image=cells(4), label=["b", "a 🦉", "b", "c"]))
    assert found.names == ["a 🦉", "b", "c"] and found.classes(np.arange(4)).tolist() == [
        1,
        0,
        1,
        2,
    ]
    assert np.array_equal(all_of(found), [picture(i)[None] for i in range(4)])


def test_columns_may_have_other_names(tmp_path):
    path = table(tmp_path, picture=cells(3), kind_of=[7, -1, 7], image=["x", "y", "z"])
    found = images.load_images(path, column="picture", label_column="kind_of")
    assert found.names == ["-1", "7"] and found.classes(np.arange(3)).tolist() == [1, 0, 1]
    assert images.load_images(path, column="picture").labels is None
    with pytest.raises(ValueError, match=r"no column 'label'; there are .*'picture', 'kind_of'"):
        images.load_images(path, column="label")
    with pytest.raises(ValueError, match="row 0 of column 'kind_of' holds no image, but 7"):
        images.load_images(path, column="kind_of")


def test_bytes_alone_are_images(tmp_path):
    found = images.load_images(table(tmp_path, image=[cell["bytes"] for cell in cells(3)]))
    assert np.array_equal(all_of(found), [picture(i)[None] for i in range(3)])


@pytest.mark.parametrize("label", [None, [1], {"a": 1}])
def test_a_label_that_is_none_is_refused(tmp_path, label):
    path = table(tmp_path, image=cells(3), label=[label and label.__class__(label), label, label])
    with pytest.raises(ValueError, match=r"row 0 (has no label in|of) column 'label'"):
        images.load_images(path)
    with pytest.raises(ValueError, match="row 2 has no label in column 'label'"):
        images.load_images(table(tmp_path, image=cells(3), label=["a", "b", None]))


def test_a_label_that_is_none_of_the_classes_is_named(tmp_path):
    numbers = table(tmp_path, image=cells(3), label=[0.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match=r"row 0 of column 'label' is no label: 0\.0"):
        images.load_images(numbers)
    with pytest.raises(ValueError, match="row 1 of column 'label' is no label: 2"):
        head = tables.Head(["image", "label"], tables.COLUMNS, ["x", "y"])
        image_files._number_classes([0, 2, 1], head, "label")


def test_class_labels_keep_their_names_also_those_not_seen(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["x", "y", "z"])})
    rows = Dataset.from_dict({"image": cells(3), "label": [2, 0, 2]}, features)
    rows.to_parquet(tmp_path / "table.parquet")
    rows.save_to_disk(tmp_path / "saved")
    first, second = (
        images.load_images(tmp_path / "table.parquet"),
        images.load_images(tmp_path / "saved"),
    )
    assert same(first, second) and first.names == ["x", "y", "z"]
    assert first.classes(np.arange(3)).tolist() == [2, 0, 2]
    rows = Dataset.from_dict({"image": cells(2), "label": [1, -1]}, features)
    rows.to_parquet(tmp_path / "hidden.parquet")
    with pytest.raises(ValueError, match="row 1 has no label"):  # as in the tests of contests
        images.load_images(tmp_path / "hidden.parquet")


def test_an_image_that_is_null_is_none(tmp_path):
    path = table(tmp_path, image=[*cells(2), None, *cells(1)], label=[0, 1, 2, 1])
    with pytest.raises(ImageError, match="row 2 is empty"):
        images.load_images(path)
    found = images.load_images(path, skip_corrupt=True)
    assert found.skipped == ["row 2 is empty"] and found.names == ["0", "1", "2"]
    assert found.classes(np.arange(3)).tolist() == [0, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_tables_may_name_files(flat, tmp_path, kind, monkeypatch):
    """From their own folder, wherever the program runs; and a changed file is seen."""
    names = [f"flat/image {i} 🎲.png" for i in (3, 1, 2)]
    path = table(tmp_path, kind, image=names, label=["a", "b", "a"])
    found = images.load_images(path)
    assert np.array_equal(all_of(found), [picture(i)[None] for i in (3, 1, 2)])
    assert found.classes(np.arange(3)).tolist() == [0, 1, 0]
    monkeypatch.chdir(tmp_path)
    assert same(found, images.load_images(path.name))
    write(tmp_path / names[1], picture(7))
    assert np.array_equal(all_of(images.load_images(path)), [picture(i)[None] for i in (3, 7, 2)])
    (tmp_path / names[2]).unlink()
    with pytest.raises(ValueError, match=r"cannot read .*image 2 🎲\.png: No such file"):
        images.load_images(path, skip_corrupt=True)


def test_a_broken_table_is_named(tmp_path):
    for kind in ("parquet", "json"):
        (tmp_path / f"broken.{kind}").write_bytes(b"no table")
        with pytest.raises(ValueError, match=rf"images: .*broken\.{kind} cannot be read"):
            images.load_images(tmp_path / f"broken.{kind}")


def test_a_table_without_rows_is_refused(tmp_path):
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": [], "label": []}, features)
    rows.to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"table\.parquet has no rows"):
        images.load_images(tmp_path / "table.parquet")


def test_several_splits_are_not_guessed_at(tmp_path):
    rows = Dataset.from_dict({"image": cells(2)}).cast_column("image", ImageFeature())
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"holds the splits \['train', 'test'\]; give the folder"):
        images.load_images(tmp_path / "saved")
    assert len(images.load_images(tmp_path / "saved" / "train")) == 2
    (tmp_path / "saved" / "train" / "state.json").unlink()
    with pytest.raises(ValueError, match="images: cannot load"):
        images.load_images(tmp_path / "saved" / "train")


# ---- the cache


def touch_like(path: Path, data: bytes) -> None:
    """Put other bytes of the same number into a file, and keep its times."""
    before = path.stat()
    assert len(data) == before.st_size
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_second_load_decodes_nothing(flat):
    first = images.load_images(flat)
    for file in flat.iterdir():
        touch_like(file, bytes(file.stat().st_size))
    assert same(first, images.load_images(flat))
    for argument in ({"resolution": 8}, {"channels": 3}, {"skip_corrupt": True}):
        with pytest.raises(ImageError):  # another argument is another entry
            images.load_images(flat, **argument)


def test_a_changed_file_is_seen(flat):
    first = images.load_images(flat)
    path = flat / "image 3 🎲.png"
    data = path.read_bytes()
    path.write_bytes(png(picture(8)))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    second = images.load_images(flat)
    assert np.array_equal(all_of(second)[3, 0], picture(8)) and second.sha256 != first.sha256
    path.write_bytes(data)
    assert same(first, images.load_images(flat))
    path.rename(flat / "zoo.png")
    assert [*all_of(images.load_images(flat))[:, 0, 0, 0]] == [
        picture(i)[0, 0] for i in (0, 1, 2, 4, 3)
    ]
    path.with_name("zoo.png").unlink()
    assert len(images.load_images(flat)) == 4


def test_the_digest_is_of_pixels_and_labels_wherever_they_lie(classes, tmp_path):
    first = images.load_images(classes)
    copy = shutil.copytree(classes, tmp_path / "elsewhere")
    assert same(first, images.load_images(copy))
    for file in copy.rglob("*.png"):  # another format, other names in the same order, no loss
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    assert same(first, images.load_images(copy))
    (copy / "dog").rename(copy / "cat")
    assert images.load_images(copy).sha256 != first.sha256


def test_two_folders_alike_in_names_sizes_and_times_are_two(tmp_path):
    """Archives often give every file the same time, and every BMP of a shape has one size."""
    for i in range(2):
        path = write(tmp_path / str(i) / "a.bmp", picture(i))
        os.utime(path, (0, 0))
    for i in range(2):
        assert np.array_equal(all_of(images.load_images(tmp_path / str(i)))[0, 0], picture(i))


def run(arguments: list[str], cache: Path, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GENKIT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


LOAD = """
import sys
from genkit.data import images
found = images.load_images(sys.argv[1])
print(found.sha256, found.labels.tolist())
"""


@pytest.mark.slow
def test_processes_at_once_get_the_same(classes, tmp_path):
    environment = os.environ | {"GENKIT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD, str(classes)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=60)[0] for process in running}
    expected = images.load_images(classes)
    assert outputs == {f"{expected.sha256} {expected.labels.tolist()}\n"}
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the pixels and their facts


KILLED = """
import os, signal, sys
from genkit.data import images
from genkit.data import workers
workers.FILES = 4
count = 0
check = images._check_shape
def counted(*arguments):
    global count
    count += 1
    if count == 9:
        tasks = "/proc/self/task"
        print(*[open(f"{tasks}/{task}/children").read() for task in os.listdir(tasks)], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    check(*arguments)
images._check_shape = counted
images.load_images(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_a_kill_leaves_nothing_that_is_used_and_no_process(classes, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    done = run(["-c", KILLED, str(classes)], cache)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [file.name[:9] for file in cache.iterdir()] == [".writing-"]
    children = [int(number) for number in done.stdout.split()]
    assert len(children) == min(os.cpu_count(), 3)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    expected = images.load_images(classes)
    monkeypatch.setenv("GENKIT_CACHE", str(cache))
    assert same(images.load_images(classes), expected)


@pytest.mark.parametrize("limit", [1, 300, 3000])
def test_a_full_disk_leaves_no_cache(classes, tmp_path, monkeypatch, limit):
    """The pixels have 3,564 bytes, the facts about them some hundreds."""
    expected = images.load_images(classes)
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores the signal
    try:
        with pytest.raises(OSError, match="File too large"):
            images.load_images(classes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").glob("*.json"))
    assert not list((tmp_path / "cache").glob(".writing*"))
    assert same(images.load_images(classes), expected)


def test_a_disk_that_is_full_at_the_last_file_leaves_no_cache(tmp_path, monkeypatch):
    """What is known, with names and labels, may be longer than the pixels."""
    for i in range(20):
        write(tmp_path / "classes" / f"{'long name ' * 20}{i}" / "a.png", picture(i, 1, 8, 8))
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            images.load_images(tmp_path / "classes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".pixels"]
    assert len(images.load_images(tmp_path / "classes")) == 20


# ---- parts


@given(st.integers(2, 300), st.floats(0.01, 0.99))
def test_parts_share_nothing_and_miss_nothing(digits, count, fraction):
    some = digits.take(np.random.default_rng(count).permutation(1797)[:count])
    if round(fraction * count) >= count:
        with pytest.raises(ValueError, match=f"{count} are too few to train and validate on"):
            images.split_images(some, None, fraction)
        return
    train, val = images.split_images(some, None, fraction)
    assert sorted([*train.rows, *val.rows]) == sorted(some.rows)
    assert len(val) == max(1, round(fraction * count)) and len(train) >= 1
    again = images.split_images(some, None, fraction)
    for a, b in zip((train, val), again, strict=True):
        assert same(a, b)
        which = np.arange(len(a))
        assert np.array_equal(a.classes(which), digits.labels[a.rows])
        assert np.array_equal(all_of(a), digits.pixels[a.rows])


def test_of_each_class_some_are_validated_on(digits):
    """In a folder classes follow each other; a part is drawn from all of it."""
    sorted_ = digits.take(np.argsort(digits.labels, kind="stable"))
    _, val = images.split_images(sorted_, None, 0.1)
    counts = np.bincount(val.classes(np.arange(len(val))), minlength=10)
    assert counts.sum() == 180 and counts.min() >= 6  # 18 are expected


@pytest.mark.parametrize("fraction", [-0.1, 0, 1, 1.5, float("nan")])
def test_a_part_is_a_part(digits, fraction):
    with pytest.raises(ValueError, match=f"val_fraction must be between 0 and 1, got {fraction}"):
        images.split_images(digits, None, fraction)


def test_one_image_cannot_be_split(digits):
    with pytest.raises(ValueError, match="1 are too few"):
        images.split_images(digits.take(np.array([3])), None, 0.5)


def test_images_to_validate_on_must_be_like_the_others(digits, flat, classes):
    other = digits.take(np.arange(5))
    assert images.split_images(digits, other, 0.1) == (digits, other)
    with pytest.raises(ValueError, match=r"they are \(1, 9, 11\).*on \(1, 8, 8\); give"):
        images.split_images(digits, images.load_images(flat), 0.1)
    coloured = images.load_images(classes, resolution=8)
    with pytest.raises(ValueError, match=r"they are \(3, 8, 8\).*--channels"):
        images.split_images(digits, coloured, 0.1)
    animals = images.load_images(classes, resolution=8, channels=1)
    with pytest.raises(ValueError, match=r"their classes are \['an owl 🦉', .*\['0', '1'"):
        images.split_images(digits, animals, 0.1)


def test_selections_have_digests_of_their_own(digits):
    chosen = [[0], [1], [0, 1], [1, 0], [0, 0], list(range(1797))]
    digests = {digits.take(np.array(which)).sha256 for which in chosen}
    assert len(digests | {digits.sha256}) == len(chosen) + 1
    mask = np.zeros(1797, bool)
    mask[[0, 1]] = True
    assert digits.take(mask).sha256 == digits.take(np.array([0, 1])).sha256


# ---- MNIST


def test_mnist_is_as_published():
    folder = Path(os.environ.get("GENKIT_DATA", ""), "mnist")
    if not folder.is_dir():
        pytest.skip("needs GENKIT_DATA, a folder with mnist/test-00000-of-00001.parquet")
    found = images.load_images(folder / "test-00000-of-00001.parquet")
    assert len(found) == 10_000 and found.size == (1, 28, 28)
    assert np.bincount(found.labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    assert found.classes(np.arange(5)).tolist() == [7, 2, 1, 0, 4]
    assert found.pixels.mean() / 255 == pytest.approx(0.1325, abs=1e-4)
