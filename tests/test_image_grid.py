from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.vision import image_grid


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
    image_grid.grid(images, tmp_path / "a.png", columns, gap)
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
    image_grid.grid(some(count), tmp_path / "a.png", gap=0)
    assert read(tmp_path / "a.png").shape == (shape[0] * 56, shape[1] * 56, 3)


@pytest.mark.parametrize(("side", "times"), [(8, 7), (28, 2), (27, 3), (56, 1), (64, 1), (1, 56)])
def test_small_images_are_enlarged_by_whole_pixels(tmp_path, side, times):
    images = some(1, 3, side, side)
    image_grid.grid(images, tmp_path / "a.png", gap=0)
    found = read(tmp_path / "a.png")
    assert np.array_equal(found, levels(images)[0].repeat(times, 0).repeat(times, 1))


def test_what_is_out_of_range_is_cut_and_gradients_are_no_hindrance(tmp_path):
    images = torch.tensor([-7.0, -1.0, 1.0, 9.0]).reshape(4, 1, 1, 1).expand(4, 1, 56, 56)
    image_grid.grid(images.clone().requires_grad_(), tmp_path / "a.png", 4, 0)
    assert read(tmp_path / "a.png")[0, ::56, 0].tolist() == [0, 0, 255, 255]
    image_grid.grid(images.bfloat16(), tmp_path / "b.png", 4, 0)
    assert np.array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


def test_rows_are_named_and_stand_below_each_other(tmp_path):
    named = {"original": some(4), "a long name of what was done": some(4) * 0.5}
    image_grid.rows(named, tmp_path / "a.png")
    found = read(tmp_path / "a.png")
    image_grid.grid(named["original"], tmp_path / "b.png", 4)
    strip = read(tmp_path / "b.png")
    height, width, _ = strip.shape
    assert found.shape[0] == 2 * height
    assert np.array_equal(found[:height, -width:], strip)
    margins = [found[:height, :-width], found[height:, :-width]]
    inked = [np.flatnonzero((margin < 128).any((0, 2))) for margin in margins]
    for columns in inked:  # the names are written, and whole: paper is left at both sides
        assert columns.min() > 0 and columns.max() < found.shape[1] - width - 1
    assert inked[1].min() < inked[0].min()  # the longer begins further left


def test_words_stand_under_their_images_and_rows_begin_again(tmp_path):
    images, words = some(7), ["0.12", "0.3", "", "1.5", "0.7", "8", "9.25"]
    image_grid.rows({"made": images, "error": words}, tmp_path / "a.png", columns=3)
    found = read(tmp_path / "a.png")
    height, pitch = 56 + 2 * image_grid.GAP, 56 + image_grid.GAP
    under = 2 * image_grid.SMALL
    assert found.shape[0] == 3 * (height + under)
    left = found.shape[1] - 3 * pitch - image_grid.GAP
    for i in range(7):
        top, start = i // 3 * (height + under), left + i % 3 * pitch
        tile = found[top + image_grid.GAP : top + image_grid.GAP + 56, start + image_grid.GAP :][
            :, :56
        ]
        assert np.array_equal(tile, levels(images)[i])
        word = found[top + height : top + height + under, start : start + pitch + image_grid.GAP]
        inked = np.flatnonzero((word < 128).any((0, 2)))
        assert bool(len(inked)) == bool(words[i])
        if words[i]:
            assert (
                abs(inked.min() + inked.max() - (pitch + image_grid.GAP - 1)) <= 3
            )  # in the middle
    for block in range(3):  # the names are written again
        margin = found[block * (height + under) :][: height + under, :left]
        assert (margin[:height] < 128).any() and (margin[height:] < 128).any()
    assert (found[2 * (height + under) :, left + pitch + image_grid.GAP :] == 255).all()


def grids_of(folder: Path, count: int, side: int, channels: int = 3) -> list[Path]:
    grids = [folder / f"samples-{step:08d}.png" for step in range(count)]
    for i, path in enumerate(grids):
        image_grid.grid(some(side * side + i, channels)[: side * side], path)
    return grids


@pytest.mark.parametrize("side", [2, 3, 8])
def test_progress_shows_first_rows(tmp_path, side):
    grids = grids_of(tmp_path, 2, side)
    image_grid.progress(grids, ["12k", "1,024k images"], tmp_path / "a.png", side)
    found = read(tmp_path / "a.png")
    height = 56 + image_grid.GAP
    assert len(found) == 2 * height
    for i, path in enumerate(grids):
        whole = read(path)
        strip = found[i * height : (i + 1) * height, -whole.shape[1] :]
        assert np.array_equal(strip, whole[:height])
    margin = found.shape[1] - read(grids[0]).shape[1]
    inked = [np.flatnonzero((m[:, :margin] < 128).any((0, 2))) for m in np.split(found, 2)]
    assert 0 < inked[1].min() < inked[0].min() and inked[0].max() < margin


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_a_film_shows_every_grid_under_its_name(tmp_path, count, channels):
    levels = torch.arange(16).float().reshape(1, 1, 4, 4) / 7.5 - 1  # few, so that all are kept
    hues = torch.linspace(-1, 1, 3).view(3, 1, 1) if channels == 3 else torch.ones(1, 1, 1)
    grids = [tmp_path / f"{i}.png" for i in range(count)]
    for i, path in enumerate(grids):
        image_grid.grid((levels * hues).roll(i, 3).repeat(4, 1, 1, 1), path)
    image_grid.film(grids, [f"{i}28k images" for i in range(count)], tmp_path / "a.gif")
    titles = []
    with Image.open(tmp_path / "a.gif") as film:
        assert film.format == "GIF" and film.n_frames == count
        times = []
        for i, path in enumerate(grids):
            film.seek(i)
            times.append(film.info["duration"])
            frame, sheet = np.asarray(film.convert("RGB")), read(path)
            assert frame.shape[1] == sheet.shape[1]
            shown = frame[-len(sheet) :].astype(int)
            assert np.abs(shown - sheet).max() <= 8
            titles.append(frame[: -len(sheet)])
            assert (titles[-1] < 128).any() and (titles[-1][[0, -1]] > 240).all()
        assert times == [image_grid.FRAME] * (count - 1) + [image_grid.LAST]
        assert film.info["loop"] == 0  # for ever
    assert all((titles[0] != title).any() for title in titles[1:])
    assert not list(tmp_path.glob(".*"))


def test_a_film_is_small(tmp_path):
    """Not half of what the pictures are, of many colours as they are."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(64, 3, 4, 4, generator=generator) * 2 - 1, size=(28, 28), mode="bicubic"
    ).clamp(-1, 1)
    grids = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(grids):
        image_grid.grid(smooth * (i + 1) / 5, path, 8)
    image_grid.film(grids, ["name"] * 5, tmp_path / "a.gif")
    assert 2 * (tmp_path / "a.gif").stat().st_size < sum(path.stat().st_size for path in grids)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    image_grid.grid(some(1), path)
    before = path.read_bytes()

    def fail(self, file, kind, **options):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        image_grid.grid(some(2), path)
    with pytest.raises(OSError, match="no space"):
        image_grid.film([path], ["1k"], path)
    assert path.read_bytes() == before
