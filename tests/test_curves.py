"""Pictures of curves and latents: plain ticks, no lag, no empty cell, names beside points."""

from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genkit import plots
from genkit.training import alignment_curves, curves


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@given(st.integers(1, 700), st.floats(-3, 3), st.floats(-3, 3))
def test_smooth_keeps_straight_lines(count, slope, start):
    line = start + slope * np.arange(count)
    assert np.allclose(plots.smooth(line), line, atol=1e-6)


def test_smooth_does_not_lag():
    step = (np.arange(1000) >= 500).astype(float)
    smoothed = plots.smooth(step)
    assert smoothed[499] + smoothed[500] == pytest.approx(1)
    assert np.allclose(smoothed, 1 - plots.smooth(1 - step[::-1])[::-1])
    rough = np.random.default_rng(0).normal(size=1000)
    assert plots.smooth(rough)[100:-100].std() < 0.3


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(0.3, 0.9, "0.6"), (0.01, 20, "0.1"), (200, 900, "600")]
)
def test_log_scale_writes_plain_numbers(low, high, shown):
    figure = matplotlib.figure.Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [low, high])
    plots.log_scale(axes)
    figure.draw_without_rendering()
    ticks = [*axes.yaxis.get_ticklabels(), *axes.yaxis.get_ticklabels(minor=True)]
    texts = {tick.get_text() for tick in ticks}
    assert shown in texts and not any("$" in text or "10^" in text for text in texts)


def keep_figures(monkeypatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved from now on."""
    saved, save = [], matplotlib.figure.Figure.savefig

    def savefig(figure, *arguments, **options):
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


@pytest.mark.parametrize("marked", [[], ["step 0"], ["step 0", "step 2"]])
def test_an_alignment_is_drawn_as_reward_against_divergence(monkeypatch, tmp_path, marked):
    saved, points = keep_figures(monkeypatch), [[0.0, 0.5], [3.0, 0.6], [2.0, 0.9]]
    log = [{"step": i, "reward": 0.1, "kl": 1.0} for i in range(4)]
    points = points[: int(marked[-1].split()[1]) + 1] if marked else []
    for line, (divergence, reward) in zip(log, points, strict=False):
        line |= {"val_kl": divergence, "val_reward": reward}
    alignment_curves.alignment_curve(log, tmp_path / "loss.png")
    axes = saved[0].axes[2]
    assert axes.lines[0].get_xydata().tolist() == points
    assert [text.get_text() for text in axes.texts] == marked


def ylabel_of(monkeypatch, path: Path, log: list[dict], unit: str) -> str:
    """The name of the y-axis of the figure that `loss_curve` saves."""
    saved = keep_figures(monkeypatch)
    curves.loss_curve(log, path, unit)
    return saved[0].axes[0].get_ylabel()


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("nats", "loss (nats), lower is better"),
        ("", "loss, lower is better"),
        ("squared error", "loss (squared error), lower is better"),
    ],
)
def test_loss_curve_names_the_unit_and_the_good_way(monkeypatch, tmp_path, unit, expected):
    log = [{"step": i, "loss": 1 / i, "val_loss": 2 / i} for i in range(1, 9)]
    assert ylabel_of(monkeypatch, tmp_path / "a.png", log, unit) == expected


def test_plot_game_has_no_empty_cell(tmp_path):
    entry = {"discriminator_loss": 0.6, "generator_loss": 0.9, "discriminator_grad_norm": 1.0}
    entry |= {"generator_grad_norm": 2.0, "distance": 3.0, "coverage": 0.5}
    log = [{"step": i, **entry, "spread": 1.0, "duplicates": 0.1} for i in range(1, 30)]
    curves.plot_game(log, {"coverage": 0.9, "distance": 1.0}, [], tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    height, width, _ = picture.shape
    for top in (0, height // 2):  # ink up to the right edge, above and below
        right = picture[top : top + height // 2, int(0.85 * width) :]
        assert (right < 200).any(2).sum() > 500


def test_latent_scatter_writes_names_beside_the_points(tmp_path):
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(200, 2)), rng.integers(2, size=200)
    pictures = []
    for names in (["0", "1"], ["6", "9"]):
        plots.latent_scatter(points, labels, names, tmp_path / "a.png")
        pictures.append(read(tmp_path / "a.png"))
    changed = np.flatnonzero((pictures[0] != pictures[1]).any((0, 2)))
    coloured = np.ptp(pictures[0], axis=2) > 60
    of_points = np.flatnonzero(coloured.sum(0) > 30).max()
    assert len(changed) and changed.min() > of_points
