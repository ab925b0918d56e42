import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import benchmark
from PIL import Image

from genkit.data import images

lab, stacked = benchmark("gan_losses"), benchmark("stacked_mnist")


# ---- the laboratory


@pytest.mark.parametrize(("part", "modes"), [("ring", 8), ("grid", 25)])
def test_real_points_are_as_good_as_two_normal_numbers_can_be(part: str, modes: int) -> None:
    mixture = getattr(lab, part)()
    points = mixture.draw(100_000, torch.Generator().manual_seed(0))
    found, good, even = lab.found(points, mixture)
    assert found == modes
    assert good == pytest.approx(1 - np.exp(-(lab.DEVIATIONS**2) / 2), abs=2e-3)
    assert 0.9 < even < 1


def test_points_between_modes_are_not_good_and_find_none() -> None:
    mixture = lab.grid()
    assert lab.found(mixture.centres + 1.0, mixture) == (0, 0.0, 0.0)
    assert lab.found(mixture.centres, mixture) == (25, 1.0, 1.0)


def test_a_collapse_finds_one_mode() -> None:
    mixture = lab.ring()
    assert lab.found(mixture.centres[3:4].expand(50, 2), mixture) == (1, 1.0, 0.0)


def test_a_shift_is_as_far_as_its_mean_shadow() -> None:
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert lab.sliced_distance(points, points.flip(0)) == 0
    shift = torch.tensor([3.0, 4.0])  # a vector's shadow is 2 / π of it in the mean
    assert lab.sliced_distance(points, points + shift) == pytest.approx(10 / np.pi, rel=1e-3)


def launch(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    """Run the laboratory in this process: the seconds that a launch takes are saved."""
    monkeypatch.setattr(sys, "argv", ["gan_losses.py", *map(str, words)])
    lab.main()


@pytest.mark.slow
def test_the_laboratory_writes_a_row_and_a_panel_for_each_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--parts ring grid --losses minimax wgan_clip modern --seconds 0.2"
    launch(monkeypatch, *words.split(), "--output", tmp_path)
    head, rule, *rows = (tmp_path / "losses.md").read_text().splitlines()
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    named = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    names = ["real", "minimax", "wgan_clip", "modern"]
    assert named == [[part, name] for part in ("ring", "grid") for name in names]
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.width > picture.height > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.md", "losses.png"]


@pytest.mark.parametrize("name", lab.CONTENDERS)
def test_every_loss_moves_both_players(name: str) -> None:
    torch.manual_seed(0)
    players = lab.Maker(lab.POINTS.latent_dim), lab.Scorer()
    before = [parameter.clone() for player in players for parameter in player.parameters()]
    mixture = lab.ring()

    def real(chance: torch.Generator) -> torch.Tensor:
        return mixture.draw(lab.POINTS.batch_size, chance)

    played = lab.play(lab.CONTENDERS[name], lab.POINTS, *players, real, 0.05, seed=0)
    assert played.steps >= 1 and played.seconds >= 0.05 and min(played.gradients) > 0
    after = [parameter for player in players for parameter in player.parameters()]
    assert all((a != b).any() for a, b in zip(before[:-1], after[:-1], strict=True))


def test_mnist_asks_for_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        launch(monkeypatch, "--parts", "mnist")
    assert "--parts mnist needs --train" in capsys.readouterr().err


# ---- stacked MNIST


def test_stacks_are_three_images_of_the_file() -> None:
    digits = images.load_images("digits")
    some = stacked.stacked(digits.take(np.arange(5)), 40, seed=0)
    assert some.shape == (40, 3, 8, 8) and some.dtype == np.uint8
    known = {digits.pixels[i, 0].tobytes() for i in range(5)}
    assert {channel.tobytes() for stack in some for channel in stack} == known
    assert (some == stacked.stacked(digits.take(np.arange(5)), 40, seed=0)).all()
    assert (some != stacked.stacked(digits.take(np.arange(5)), 40, seed=1)).any()


def test_a_table_of_stacks_is_read_as_it_was(tmp_path: Path) -> None:
    values = stacked.stacked(images.load_images("digits"), 6, seed=0)
    stacked.write(values, tmp_path / "stacked.parquet")
    assert (images.load_images(tmp_path / "stacked.parquet").pixels == values).all()


def test_every_triple_once_is_no_divergence() -> None:
    every = np.stack(np.unravel_index(np.arange(1000), (10, 10, 10)), 1)
    figures = stacked.measure(every, np.full(1000, 1e-3))
    assert figures.modes == 1000 and figures.divergence == pytest.approx(0, abs=1e-12)


def test_a_single_triple_diverges_by_its_surprise() -> None:
    expected = np.full(1000, 0.5 / 999)
    expected[123] = 0.5
    figures = stacked.measure(np.tile([1, 2, 3], (50, 1)), expected)
    assert figures == stacked.Figures(1, pytest.approx(np.log(2)))


def test_triples_come_as_often_as_their_digits() -> None:
    digits = images.load_images("digits")
    parts = stacked.shares(digits)
    counts = np.bincount(digits.labels, minlength=10)
    assert parts.sum() == pytest.approx(1)
    assert parts[907] == pytest.approx(counts[9] * counts[0] * counts[7] / counts.sum() ** 3)
