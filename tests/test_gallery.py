"""Samples of a run, and their progress."""

import pytest
import torch
from PIL import Image

from genkit.vision import gallery, image_grid


def test_save_samples_draws_progress_and_film_with_captions(tmp_path, monkeypatch):
    captions = []
    real = image_grid.progress

    def progress(grids, names, path, side):
        captions.append(list(names))
        real(grids, names, path, side)

    monkeypatch.setattr(image_grid, "progress", progress)
    for step in (9, 12_000):
        images = torch.rand(gallery.COUNT, 1, 8, 8) * 2 - 1
        gallery.save_samples(
            tmp_path, step, images, caption=lambda step: f"{step * 3:,} images shown"
        )
    assert captions[-1] == ["27 images shown", "36,000 images shown"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-00000009.png",
        "step-00012000.png",
    ]
    with Image.open(tmp_path / "progress.gif") as film:
        assert film.n_frames == 2
    with (
        Image.open(tmp_path / "progress.png") as picture,
        Image.open(tmp_path / "samples" / "step-00000009.png") as grid,
    ):
        assert picture.height == 2 * ((grid.height - 1) // gallery.SIDE)


def test_save_samples_makes_no_film_of_one_row(tmp_path):
    gallery.save_samples(tmp_path, 1, torch.zeros(4, 3, 8, 8), columns=4, film=False)
    assert not (tmp_path / "progress.gif").exists()
    assert (tmp_path / "progress.png").exists()


@pytest.mark.parametrize("index", [0, 5])
def test_sample_generators_are_the_same_every_time(index):
    first, again = gallery.sample_generators()[index], gallery.sample_generators()[index]
    assert torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=again))
