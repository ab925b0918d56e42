import io
import itertools
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from genkit.data import pixels
from genkit.data.pixels import ImageError

NAME = "a folder/ein Bild 🦉.png"
SIDES = st.integers(8, 20)
GREY = arrays(np.uint8, st.tuples(SIDES, SIDES))
COLOUR = arrays(np.uint8, st.tuples(SIDES, SIDES, st.just(3)))


def encoded(image: Image.Image | np.ndarray, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(pixels.decode_image(data, NAME))


def refusal(data: bytes) -> str:
    """What the error says, which must name the file."""
    with pytest.raises(ImageError) as caught:
        pixels.decode_image(data, NAME)
    assert str(caught.value).startswith(NAME)
    return str(caught.value)


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """A PNG written by hand: the header may claim anything."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---- pixels


@given(st.one_of(GREY, COLOUR), st.sampled_from(["png", "bmp", "tiff"]))
def test_pixels_come_out_as_they_went_in(values, kind):
    image = pixels.decode_image(encoded(values, kind), NAME)
    assert image.mode == ("L" if values.ndim == 2 else "RGB")
    assert np.array_equal(np.asarray(image), values)
    whole = pixels.image_to_array(image, None, len(image.getbands()))
    expected = values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)
    assert whole.dtype == np.uint8 and np.array_equal(whole, expected)


def test_no_width_is_taken_for_a_depth():
    """Pillow's raw mode of a BMP holds the bytes of a row, which begin with 16 for some widths."""
    for width in range(8, 65):
        for values in (noise(8, width), noise(8, width, 3)):
            assert np.array_equal(decoded(encoded(values, "bmp")), values)


def test_palettes_are_looked_up():
    values = noise(9, 11, 3) // 64 * 64  # 64 colours
    image = Image.fromarray(values).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    for kind in ("png", "gif", "bmp"):
        assert np.array_equal(decoded(encoded(image, kind)), np.asarray(image.convert("RGB")))


def test_black_and_white_become_grey():
    bits = Image.fromarray(noise(9, 11)).convert("1")
    assert np.array_equal(decoded(encoded(bits)), np.asarray(bits, np.uint8) * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_set_upright(orientation):
    """Exif 2.32, 4.6.4: how the rows and columns stored lie in the picture that is seen."""
    seen = np.add.outer(np.arange(16) * 8, np.arange(24) * 4).astype(np.uint8)
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, 1),  # to be turned clockwise
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("png", "tiff", "webp"):
        stored = np.ascontiguousarray(turns[orientation](seen))
        options = {"lossless": True} if kind == "webp" else {}
        found = decoded(encoded(stored, kind, exif=exif, **options))
        found = found[..., 0] if kind == "webp" else found  # which knows no grey
        assert np.array_equal(found, seen), kind


def test_an_opaque_alpha_channel_is_dropped_and_another_is_refused():
    values = noise(9, 11, 3)
    alpha = np.full((9, 11, 1), 255, np.uint8)
    assert np.array_equal(decoded(encoded(np.concatenate([values, alpha], 2))), values)
    grey = np.concatenate([values[..., :1], alpha], 2)
    assert np.array_equal(decoded(encoded(Image.fromarray(grey, "LA"))), values[..., 0])
    alpha[4, 5] = 254
    assert "transparent" in refusal(encoded(np.concatenate([values, alpha], 2)))
    grey = np.concatenate([values[..., :1], alpha], 2)
    assert "transparent" in refusal(encoded(Image.fromarray(grey, "LA")))
    palette = Image.fromarray(values).quantize(8)
    assert "transparent" in refusal(encoded(palette, "png", transparency=palette.getpixel((3, 3))))


def test_a_photograph_with_other_views_is_its_first():
    """Phones append a preview or a depth map, in the Multi-Picture Format."""
    first, second = (Image.fromarray(noise(16, 24, 3, seed=i)) for i in range(2))
    data = encoded(first, "mpo", save_all=True, append_images=[second])
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@given(COLOUR, st.integers(8, 24))
def test_a_square_is_cut_from_the_middle(values, side):
    image = Image.fromarray(values)
    found = pixels.image_to_array(image, side, 3)
    assert found.shape == (3, side, side)
    mirrored = pixels.image_to_array(Image.fromarray(values[::-1, ::-1].copy()), side, 3)
    assert np.abs(found[:, ::-1, ::-1].astype(int) - mirrored).max() <= 1  # rounding


def test_scaling_keeps_what_fits():
    values = noise(16, 16, 3)
    image = Image.fromarray(values)
    assert np.array_equal(pixels.image_to_array(image, 16, 3), np.moveaxis(values, 2, 0))
    wide = np.concatenate(
        [np.zeros((16, 4, 3), np.uint8), values, np.zeros((16, 4, 3), np.uint8)], 1
    )
    assert np.array_equal(
        pixels.image_to_array(Image.fromarray(wide), 16, 3), np.moveaxis(values, 2, 0)
    )
    flat = Image.new("RGB", (37, 61), (10, 20, 30))
    expected = np.array([10, 20, 30])[:, None, None]
    assert (pixels.image_to_array(flat, 8, 3) == expected).all()


def test_grey_and_colour_turn_into_each_other():
    grey = noise(9, 11)
    assert (pixels.image_to_array(Image.fromarray(grey), None, 3) == grey).all()
    colour = Image.fromarray(noise(9, 11, 3))
    found = pixels.image_to_array(colour, None, 1).astype(float)
    expected = np.asarray(colour, float) @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert found.shape == (1, 9, 11) and np.abs(found[0] - expected).max() <= 1


# ---- refused files


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"no image", "is no image"),
        (b"\x89PNG\r\n\x1a\n", "is no image"),
        ("Grüße 🦉".encode(), "is no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
        (png(50_000, 50_000), "decompression bomb"),
        (png(8193, 8192), "has 8193 x 8192 pixels, more than max_pixels=67108864"),
        (png(13_000, 13_000), "has 13000 x 13000 pixels"),  # of which Pillow only warns
        (png(1, 1, rows=bytes(4)), "is 1 x 1; a side must be 8 pixels or more"),
        (png(7, 100, rows=bytes(2200)), "is 7 x 100"),
        (png(9, 9, 16, 0, bytes(9 * 19)), "16-bit: convert it to 8 bits"),
        (png(9, 9, 16, 2, bytes(9 * 55)), "16-bit: convert it to 8 bits"),
        (png(9, 9, 16, 4, bytes(9 * 37)), "16-bit: convert it to 8 bits"),
        (png(9, 9, 16, 6, bytes(9 * 73)), "16-bit: convert it to 8 bits"),
        (encoded(Image.new("CMYK", (9, 9)), "jpeg"), "CMYK: it is for print: convert it to RGB"),
        (encoded(Image.new("F", (9, 9)), "tiff"), "F: floating point: convert it"),
        (encoded(Image.new("I", (9, 9)), "tiff"), "I: 32-bit: convert it"),
        (encoded(Image.new("I;16", (9, 9)), "tiff"), "I;16: 16-bit: convert it"),
        (encoded(Image.new("LAB", (9, 9)), "tiff"), "LAB: convert it to RGB or to grey"),
    ],
    ids=itertools.count(),
)
def test_files_that_are_not_images_to_train_on_are_refused(data, what):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert what in refusal(data)
    assert not warned


def test_too_many_bytes_are_refused_before_they_are_looked_at():
    data = encoded(noise(9, 11))
    pixels.decode_image(data, NAME, max_bytes=len(data))
    with pytest.raises(ImageError, match=f"has {len(data) + 1:,} bytes.*max_bytes={len(data)}"):
        pixels.decode_image(data + b"\0", NAME, max_bytes=len(data))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_animations_are_refused(kind):
    first, *others = [Image.fromarray(noise(9, 11, seed=i)) for i in range(3)]
    data = encoded(first, kind, save_all=True, append_images=others)
    assert "has several frames; save one of them" in refusal(data)


def directories(count: int) -> bytes:
    """A TIFF of so many directories, all of them of the same strip but the last, which is none."""
    tags = [
        (256, 9),
        (257, 9),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 9),
        (279, 81),
    ]
    size = 2 + 12 * len(tags) + 4
    start = 8 + 88
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    heads = [
        struct.pack("<H", len(tags)) + entries + struct.pack("<I", start + (i + 1) * size)
        for i in range(count)
    ]
    return struct.pack("<2sHI", b"II", 42, start) + bytes(88) + b"".join(heads) + b"\xff"


@pytest.mark.parametrize("count", [2, 100_000])
def test_frames_beyond_the_second_are_not_read(count):
    """The last one is damaged, and reading all of them takes a minute."""
    assert "has several frames; save one of them" in refusal(directories(count))


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "gif", "webp", "tiff"])
def test_a_part_of_a_file_is_refused_or_holds_all_pixels(kind):
    data = encoded(noise(9, 11), kind)
    whole = decoded(data)
    refused = 0
    for length in range(len(data)):
        try:
            found = decoded(data[:length])
        except ImageError:
            refused += 1
        else:
            assert np.array_equal(found, whole), length
    assert refused > 0.8 * len(data)


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "gif", "webp", "tiff", "mpo"])
def test_damaged_files_give_an_image_or_an_image_error(kind, capfd):
    rng = random.Random(kind)
    for image in (noise(9, 11), noise(9, 11, 3)):
        data = encoded(image, kind)
        for _ in range(100):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(min(len(data), rng.choice([60, 400, 10**6])))] = (
                    rng.randrange(256)
                )
            try:
                found = pixels.decode_image(bytes(damaged), NAME)
            except ImageError as error:
                assert str(error).startswith(NAME)
            else:
                assert found.mode in ("L", "RGB") and min(found.size) >= pixels.MIN_SIDE
    capfd.readouterr()  # libtiff writes warnings to the terminal
