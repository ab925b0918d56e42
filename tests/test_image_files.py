"""Which files of a folder are images, and what is said of the others."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from genkit.data import images
from genkit.data.pixels import UnsuitableError, suffixes


def picture(i: int, channels: int = 1) -> np.ndarray:
    shape = (32, 40, 3) if channels == 3 else (32, 40)
    return np.random.default_rng(i).integers(0, 256, shape, np.uint8)


def write(path: Path, values: np.ndarray, kind: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, kind, **options)
    return path


# ---- splits


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (("Training", "Testing"), "Training", "Testing"),
        (("Train", "Test"), "Train", "Test"),
        (("dev", "train"), "train", "dev"),
        (("train_set", "test_set"), "train_set", "test_set"),
        (("TRAIN", "VAL"), "TRAIN", "VAL"),
        (("TrainSet", "valid-images"), "TrainSet", "valid-images"),
        (("train2017", "val2017"), "train2017", "val2017"),
        (("trainA", "testB"), "trainA", "testB"),
        (("trainA", "trainB"), "trainA", None),
        (("test",), "test", None),
    ],
)
def test_folders_named_like_splits_are_refused(tmp_path, names, first, second):
    for name in names:
        for kind in ("cat", "dog"):
            write(tmp_path / name / kind / "a.png", picture(0))
    with pytest.raises(ValueError, match="look like splits") as caught:
        images.load_images(tmp_path)
    said = str(caught.value)
    assert f"--images, such as {tmp_path / first}" in said
    assert ("--val_images" in said) == (second is not None)
    assert second is None or f"such as {tmp_path / second}, as --val_images" in said


@pytest.mark.parametrize("names", [("bus", "train"), ("A", "B"), ("contest", "dataset")])
def test_other_names_are_classes(tmp_path, names):
    for name in names:
        write(tmp_path / name / "a.png", picture(0))
    assert images.load_images(tmp_path).names == sorted(names)


def test_classes_that_hold_folders_are_named(tmp_path):
    write(tmp_path / "one" / "a.png", picture(0))
    write(tmp_path / "two" / "deeper" / "b.png", picture(1))
    found = images.load_images(tmp_path)
    assert found.names == ["one", "two"]
    (note,) = found.notes
    assert "2 folders" in note and note.endswith("one, two")


# ---- suffixes

ODD = {".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".ppm": "PPM", ".tga": "TGA"}
ODD |= {".ico": "ICO", ".pcx": "PCX", ".sgi": "SGI", ".dib": "DIB", ".apng": "PNG", ".JPG": "JPEG"}
ODD |= {".avif": "AVIF"} if features.check("avif") else {}


@pytest.mark.parametrize("suffix", ODD)
def test_every_suffix_is_read(tmp_path, suffix):
    write(tmp_path / "a" / "0.png", picture(0, 3))
    write(tmp_path / "b" / f"1{suffix}", picture(1, 3), ODD[suffix])
    found = images.load_images(tmp_path, resolution=8, channels=3)
    assert len(found) == 2 and found.names == ["a", "b"] and not found.notes


def test_formats_that_pillow_writes_are_read():
    Image.init()
    unread = {"EPS", "PDF", "BUFR", "GRIB", "HDF5", "WMF", "PALM", "MSP", "IM", "SPIDER"}
    kinds = {s: k for s, k in Image.registered_extensions().items() if k in Image.SAVE}
    assert {suffix for suffix, kind in kinds.items() if kind not in unread} <= suffixes()


def test_an_image_without_a_suffix_is_read(tmp_path):
    write(tmp_path / "one.png", picture(0))
    write(tmp_path / "two", picture(1), "png")
    (tmp_path / "README").write_text("Python reads pictures")
    found = images.load_images(tmp_path)
    assert len(found) == 2
    assert "1 without suffix; README" in found.notes[0]


def test_other_files_are_counted_and_named(tmp_path):
    for i in range(3):
        write(tmp_path / "a" / f"{i}.png", picture(i))
        (tmp_path / "a" / f"{i}.heic").write_bytes(b"?")
    write(tmp_path / "b" / "x.PNG", picture(5))
    (tmp_path / "b" / "notes.txt").write_text("notes")
    (tmp_path / "list.csv").write_text("a,b")
    found = images.load_images(tmp_path)
    assert len(found) == 4
    (note,) = found.notes
    assert all(part in note for part in ("3 .heic", "1 .txt", "1 .csv", "0.heic", "list.csv"))
    assert images.load_images(tmp_path).notes == found.notes  # from the cache, too


def test_a_class_without_an_image_names_its_files(tmp_path):
    write(tmp_path / "a" / "0.png", picture(0))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.heic").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"b holds no image .*1 \.heic; 0\.heic"):
        images.load_images(tmp_path)


def test_an_archive_is_named(tmp_path):
    (tmp_path / "all.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"all\.zip is an archive; unpack it"):
        images.load_images(tmp_path / "all.zip")


def test_a_table_may_have_a_suffix_in_upper_case(tmp_path):
    write(tmp_path / "a.png", picture(0))
    (tmp_path / "TR.CSV").write_text("image\na.png\n")
    (tmp_path / "TR.JSONL").write_text('{"image": "a.png"}\n')
    for name in ("TR.CSV", "TR.JSONL"):
        assert len(images.load_images(tmp_path / name)) == 1


# ---- grey in palettes


@pytest.mark.parametrize("kind", ["gif", "webp", "palette"])
@pytest.mark.parametrize("first", [True, False])
def test_grey_of_formats_without_grey_is_grey(tmp_path, kind, first):
    names = ("a", "b") if first else ("b", "a")
    indices, greys = picture(0) % 4, np.array([240, 10, 99, 180], np.uint8)
    values = greys[indices]
    if kind == "webp":
        write(tmp_path / f"{names[0]}.webp", np.stack([values] * 3, 2), lossless=True)
    else:
        made = Image.fromarray(indices).convert("P")
        made.putpalette(greys.repeat(3).tobytes())
        made.save(tmp_path / f"{names[0]}.{'gif' if kind == 'gif' else 'png'}")
    write(tmp_path / f"{names[1]}.png", picture(1))
    found = images.load_images(tmp_path)
    assert np.array_equal(found.pixels[0 if first else 1, 0], values)
    assert np.array_equal(found.pixels[1 if first else 0, 0], picture(1))
    assert found.size == (1, *values.shape)


def test_grey_of_formats_without_grey_is_colour_among_colours(tmp_path):
    for i in range(3):
        values = np.stack([picture(0)] * 3, 2) if i < 2 else picture(i, 3)
        write(tmp_path / f"{i}.webp", values, lossless=True)
    assert images.load_images(tmp_path).size == (3, 32, 40)


def test_colour_after_grey_is_refused(tmp_path):
    write(tmp_path / "a.webp", np.stack([picture(0)] * 3, 2), lossless=True)
    write(tmp_path / "b.png", picture(1))
    write(tmp_path / "c.png", picture(2, 3))
    with pytest.raises(
        ValueError, match=r"c\.png is colour, but .*a\.webp is grey; pass --channels"
    ):
        images.load_images(tmp_path)


# ---- skip_corrupt

INTACT = {
    "16-bit": Image.fromarray(picture(1).astype(np.uint16) * 257),
    "transparent": Image.fromarray(picture(1, 3)).convert("RGBA"),
    "CMYK": Image.fromarray(picture(1, 3)).convert("CMYK"),
}
INTACT["transparent"].putalpha(100)


SGI_HEADER = struct.pack(">hBBHHHHll492x", 474, 0, 2, 3, 8, 8, 3, 0, 65535)
DEEP = {  # of 8 x 8 in colour, which Pillow would give 8 bits without a word
    "a.ppm": b"P6 8 8 65535\n" + bytes(8 * 8 * 3 * 2),
    "plain.ppm": b"P3 8 8 1023\n" + b"700 " * (8 * 8 * 3),
    "a.sgi": SGI_HEADER + bytes(8 * 8 * 3 * 2),
}


@pytest.mark.parametrize("name", DEEP)
def test_colours_of_16_bits_are_refused_in_every_format(tmp_path, name):
    (tmp_path / name).write_bytes(DEEP[name])
    with pytest.raises(UnsuitableError, match=r"is RGB: .*16-bit"):
        images.load_images(tmp_path)


def test_plain_bitmaps_are_read(tmp_path):
    (tmp_path / "a.pbm").write_bytes(b"P1 8 8\n" + b"1 0 " * 32)
    assert images.load_images(tmp_path).size == (1, 8, 8)


@pytest.mark.parametrize("kind", INTACT)
def test_skip_corrupt_leaves_out_no_intact_image(tmp_path, kind):
    write(tmp_path / "a.png", picture(0, 3))
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert len(images.load_images(tmp_path, skip_corrupt=True)) == 1
    INTACT[kind].save(tmp_path / ("x.jpg" if kind == "CMYK" else "x.png"))
    with pytest.raises(UnsuitableError, match=rf"x\.(png|jpg) is .*{kind}") as caught:
        images.load_images(tmp_path, skip_corrupt=True)
    assert "--skip_corrupt" not in str(caught.value)
