from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import mosaic


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def some(count: int, channels: int = 1, height: int = 56, width: int = 56) -> torch.Tensor:
    """Images of pixels with 256 levels, as `Images.batch` gives them."""
    shape = (count, channels, height, width)
    levels = torch.randint(256, shape, generator=torch.Generator().manual_seed(count))
    return levels.float() / 127.5 - 1


def levels(images: torch.Tensor) -> np.ndarray:
    """(n, height, width, 3), 0 to 255."""
    values = ((images.double() + 1) * 127.5).round().expand(-1, 3, -1, -1)
    return values.permute(0, 2, 3, 1).numpy().astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 3), (6, 3), (7, 10)])
@pytest.mark.parametrize("gap", [0, 2, 5])
def test_every_pixel_is_where_it_belongs(tmp_path, count, columns, channels, gap):
    images = some(count, channels, 56, 60)
    mosaic.grid(images, tmp_path / "a.png", columns, gap)
    found = read(tmp_path / "a.png")
    rows = -(-count // columns)
    assert found.shape == (rows * (56 + gap) + gap, columns * (60 + gap) + gap, 3)
    expected = np.full_like(found, 255)
    for i, value in enumerate(levels(images)):
        top, left = gap + i // columns * (56 + gap), gap + i % columns * (60 + gap)
        expected[top : top + 56, left : left + 60] = value
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (4, (2, 2)), (5, (2, 3)), (64, (8, 8))])
def test_images_make_a_square(tmp_path, count, shape):
    mosaic.grid(some(count), tmp_path / "a.png", gap=0)
    assert read(tmp_path / "a.png").shape == (shape[0] * 56, shape[1] * 56, 3)


@pytest.mark.parametrize(("side", "times"), [(8, 7), (28, 2), (27, 3), (56, 1), (64, 1), (1, 56)])
def test_small_images_are_enlarged_by_whole_pixels(tmp_path, side, times):
    images = some(1, 3, side, side)
    mosaic.grid(images, tmp_path / "a.png", gap=0)
    found = read(tmp_path / "a.png")
    assert np.array_equal(found, levels(images)[0].repeat(times, 0).repeat(times, 1))


def test_what_is_out_of_range_is_cut_and_gradients_are_no_hindrance(tmp_path):
    images = torch.tensor([-7.0, -1.0, 1.0, 9.0]).reshape(4, 1, 1, 1).expand(4, 1, 56, 56)
    mosaic.grid(images.clone().requires_grad_(), tmp_path / "a.png", 4, 0)
    assert read(tmp_path / "a.png")[0, ::56, 0].tolist() == [0, 0, 255, 255]
    mosaic.grid(images.bfloat16(), tmp_path / "b.png", 4, 0)
    assert np.array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


def test_rows_are_named_and_stand_below_each_other(tmp_path):
    named = {"original": some(4), "a long name of what was done": some(4) * 0.5}
    mosaic.rows(named, tmp_path / "a.png")
    found = read(tmp_path / "a.png")
    mosaic.grid(named["original"], tmp_path / "b.png", 4)
    strip = read(tmp_path / "b.png")
    height, width, _ = strip.shape
    assert found.shape[0] == 2 * height
    assert np.array_equal(found[:height, -width:], strip)
    margins = [found[:height, :-width], found[height:, :-width]]
    inked = [np.flatnonzero((margin < 128).any((0, 2))) for margin in margins]
    for columns in inked:  # the names are written, and whole: paper is left at both sides
        assert columns.min() > 0 and columns.max() < found.shape[1] - width - 1
    assert inked[1].min() < inked[0].min()  # the longer begins further left


@pytest.mark.parametrize("side", [2, 3, 8])
def test_progress_shows_first_rows(tmp_path, side):
    grids = [tmp_path / f"samples-{step:08d}.png" for step in (10, 200)]
    for i, path in enumerate(grids):
        mosaic.grid(some(side * side + i, 3)[: side * side], path)
    mosaic.progress(grids, tmp_path / "a.png", side)
    found = read(tmp_path / "a.png")
    height = 56 + mosaic.GAP
    assert len(found) == 2 * height
    for i, path in enumerate(grids):
        whole = read(path)
        strip = found[i * height : (i + 1) * height, -whole.shape[1] :]
        assert np.array_equal(strip, whole[:height])


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    mosaic.grid(some(1), path)
    before = path.read_bytes()

    def fail(self, file, kind):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        mosaic.grid(some(2), path)
    assert path.read_bytes() == before
