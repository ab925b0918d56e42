"""Images that genkit.evaluate is given, and options of those that it reads."""

import numpy as np
import pytest
from PIL import Image, ImageOps

import genkit
from genkit.cli import main
from genkit.data import images
from genkit.metrics.features import PixelFeatures

DIGITS = images.load_images("digits")
PIXELS = DIGITS.pixels[:40, 0]
EXTRACTOR = PixelFeatures()


def figures(given, **options):
    return genkit.evaluate(given, "digits", extractor=EXTRACTOR, **options).figures


def test_evaluate_takes_tensors_arrays_and_pictures_alike():
    expected = figures(DIGITS.batch(np.arange(40)))
    assert figures(PIXELS) == figures(PIXELS[..., None]) == expected
    assert figures([Image.fromarray(each) for each in PIXELS]) == expected


def test_evaluate_takes_arrays_as_data_and_train():
    real = DIGITS.pixels[100:200, 0]
    record = genkit.evaluate(PIXELS, real, extractor=EXTRACTOR, train=DIGITS.pixels[200:300, 0])
    assert record.protocol.real + record.protocol.held_out >= 90


def test_colour_arrays_have_channels_last():
    colour = np.random.default_rng(0).integers(0, 256, (60, 8, 9, 3), np.uint8)
    one = genkit.evaluate(colour, colour[::-1], extractor=EXTRACTOR)
    pictures = [Image.fromarray(each) for each in colour]
    assert genkit.evaluate(pictures, colour[::-1], extractor=EXTRACTOR).figures == one.figures


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (PIXELS.astype(np.float32), r"model must be uint8 .*got float32 .*\(40, 8, 8\)"),
        (PIXELS[0], r"model must be uint8 .*got uint8 .*\(8, 8\)"),
        (DIGITS.pixels[:40], r"model must be uint8 .*\(n, height, width, 1 or 3\)"),
        (PIXELS[:0], "model must be uint8"),
        (5, "model must be a path, .*got int 5"),
        ([1, 2], r"model must be a path, .*got list \[1, 2\]"),
        ([], "model must be PIL images"),
        ([Image.new("CMYK", (8, 8))] * 20, "PIL images .* CMYK of 8 x 8"),
        ([Image.new("L", (8, 8)), Image.new("L", (9, 8))], "one size.* L of 8 x 8, L of 9 x 8"),
    ],
)
def test_what_cannot_be_evaluated_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        figures(given)


@pytest.fixture
def mixed(tmp_path):
    """A folder of images of two sizes and modes, one of them broken."""
    for i in range(30):
        picture = Image.fromarray(DIGITS.pixels[i, 0])
        picture = picture.resize((10, 12)) if i % 2 else ImageOps.colorize(picture, "red", "white")
        picture.save(tmp_path / f"{i:02d}.png")
    (tmp_path / "31.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_evaluate_has_the_options_that_its_errors_name(mixed):
    given: dict = {}
    for name, value in (("channels", 1), ("resolution", 8), ("skip_corrupt", True)):
        with pytest.raises(ValueError, match=f"--{name}"):
            figures(mixed, **given)
        given[name] = value
    record = genkit.evaluate(mixed, "digits", extractor=EXTRACTOR, **given)
    assert record.protocol.count == 30
    assert any("notes.txt" in each for each in record.warnings)
    assert any("31.png" in each for each in record.warnings)


def test_the_command_has_these_flags(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = capsys.readouterr().out
    assert all(f"--{flag}" in said for flag in ("resolution", "channels", "skip-corrupt"))


def test_options_of_reading_need_files():
    with pytest.raises(ValueError, match="resolution=8 is for images that are read"):
        genkit.evaluate(PIXELS, DIGITS, extractor=EXTRACTOR, resolution=8)
