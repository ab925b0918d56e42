"""Plots of latents, losses and classes, and the helpers that all plots share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import matplotlib.font_manager
import matplotlib.ticker
import numpy as np

from genkit import files

BANDS = 20  # of timesteps, over which losses are averaged
NAMED, ROWS = 60, 20  # classes in a legend, and in a column of it
CAPTION: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8.5, "linespacing": 1.0}


def loss_by_time(times: np.ndarray, losses: np.ndarray, objective: str, path: Path) -> None:
    """Plot the loss of a diffusion model by timestep.

    Args:
        times: timesteps in ascending order, (n,).
        losses: the loss of an image at each of them, (n,).
        objective: what the network predicts.
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(times, losses, ".", color="tab:blue", alpha=0.2, markersize=4)
    parts = [part for part in np.array_split(np.arange(len(times)), BANDS) if len(part)]
    middles, means = ([values[part].mean() for part in parts] for values in (times, losses))
    axes.plot(middles, means, "o-", color="tab:blue")
    axes.set(
        xlabel="timestep (noise grows)",
        ylabel=f"mean squared error of {objective}, lower is better",
    )
    log_scale(axes)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def latent_scatter(
    points: np.ndarray,
    labels: np.ndarray | None,
    names: Sequence[str],
    path: Path,
    axes_names: Sequence[str] = ("latent 0", "latent 1"),
    caption: str = "",
) -> None:
    """Plot latents of images as points, a colour a class, with the classes' names beside them.

    Args:
        points: (n, 2).
        labels: the class of each; None for one colour.
        names: of the classes.
        path: the PNG to write.
        axes_names: of the two dimensions.
        caption: what the plot shows.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 7), dpi=120, layout="constrained")
    axes = figure.subplots()
    order = np.random.default_rng(0).permutation(len(points))  # no class hides the others
    x, y = points[order].T
    dots: dict[str, Any] = {"s": np.clip(20_000 / len(points), 3, 25), "linewidths": 0}
    if labels is None:
        axes.scatter(x, y, color="tab:blue", alpha=0.6, **dots)
    else:
        colours = distinct_colours(len(names))
        axes.scatter(x, y, color=colours[labels[order]], alpha=0.75, **dots)
        name_classes(figure, labels, names, colours)
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(caption, fontsize=11, pad=12)
    save_figure(figure, path)


def confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix, shaded so that rare mistakes can be seen.

    Args:
        matrix: counts, (true classes, predicted classes); a row may be empty.
        names: of the classes.
        path: the PNG to write.
    """
    count, total, right = len(names), matrix.sum(), np.trace(matrix)
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(14.0, max(5.0, 3 + 0.42 * count))
    figure = matplotlib.figure.Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    shade = axes.imshow(shares, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.35, 0, 100))
    bar = figure.colorbar(shade, ax=axes, pad=0.02, label="share of the true class (%)")
    bar.set_ticks([0, 0.1, 1, 10, 50, 100], labels=["0", "0.1", "1", "10", "50", "100"])
    ticks = range(0, count, -(-count // 50))  # more than 50 names cannot be read
    labels = [drawable(shortened(names[i], 14)) for i in ticks]
    style: dict[str, Any] = {"fontsize": 10 if count <= 30 else 7, "parse_math": False}
    long = max(map(len, labels)) > 2
    axes.set_xticks(ticks, labels, rotation=90 if long else 0, **style)
    axes.set_yticks(ticks, labels, **style)
    for i, j in np.argwhere(matrix) if count <= 20 else ():
        ink = "white" if shares[i, j] > 20 else "black"
        axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=ink, fontsize=9)
    axes.set(xlabel="predicted", ylabel="true")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(f"{100 * right / total:.2f} % right · {total - right:,} of {total:,} wrong")
    save_figure(figure, path)


def captioned(images: np.ndarray, captions: Sequence[str], path: Path, columns: int = 6) -> None:
    """Draw images in rows, with up to two lines of text over each.

    Args:
        images: (n, height, width, 3), in [0, 1].
        captions: one an image.
        path: the PNG to write.
        columns: images in a row, at most.
    """
    _, height, width, _ = images.shape
    columns = min(columns, len(images))
    rows, tall, head = -(-len(images) // columns), height / width, 0.28  # in widths of an image
    size = 1.5 * columns, 1.5 * rows * (tall + head)
    figure = matplotlib.figure.Figure(figsize=size, dpi=120)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, left = divmod(i, columns)
        bottom = (rows - 1 - row) * (tall + head) + 0.04
        top = bottom + tall - 0.08
        axes.imshow(image, extent=(left + 0.04, left + 0.96, bottom, top))
        lines = "\n".join(drawable(shortened(line, 24)) for line in caption.splitlines())
        axes.text(left + 0.5, top + 0.02, lines, parse_math=False, **CAPTION)
    axes.set(xlim=(0, columns), ylim=(0, rows * (tall + head)), aspect="auto")
    axes.axis("off")
    save_figure(figure, path)


def name_classes(
    figure: matplotlib.figure.Figure,
    labels: np.ndarray,
    names: Sequence[str],
    colours: np.ndarray,
) -> None:
    """Name the classes in a legend beside the points; more than NAMED would look alike."""
    kinds, (axes,) = np.unique(labels), figure.axes
    if len(kinds) > NAMED:
        return
    written = [drawable(shortened(names[kind], 16)) for kind in kinds]
    key = [axes.plot([], [], "o", color=colours[kind])[0] for kind in kinds]
    layout: dict[str, Any] = {"loc": "outside right center", "frameon": False}
    layout |= {"handletextpad": 0.2, "ncols": -(-len(kinds) // ROWS)}
    for text in figure.legend(key, written, **layout).get_texts():
        text.set_parse_math(False)


def distinct_colours(count: int) -> np.ndarray:
    """Return colours that differ as much as possible, (count, 3)."""
    if count <= 10:
        return matplotlib.colormaps["tab10"](np.arange(count))[:, :3]
    return matplotlib.colormaps["hsv"](np.arange(count) / count)[:, :3] * 0.9


def shortened(text: str, length: int) -> str:
    """Cut a text to `length` characters, the last of them an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def drawable(text: str) -> str:
    """Write the characters that the font lacks as their code points."""
    available = _characters_of_the_font()
    return "".join(c if c == "\n" or ord(c) in available else f"U+{ord(c):04X}" for c in text)


@functools.cache
def _characters_of_the_font() -> set[int]:
    fonts = matplotlib.font_manager
    return set(fonts.get_font(fonts.findfont(fonts.FontProperties())).get_charmap())


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of a fiftieth of the curve, which is narrower at both ends."""
    count = len(values)
    half = np.minimum(np.arange(count), np.arange(count)[::-1])
    half = np.minimum(half, count // 100)
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    starts, ends = np.arange(count) - half, np.arange(count) + half + 1
    return (sums[ends] - sums[starts]) / (ends - starts)


class PlainLogFormatter(matplotlib.ticker.LogFormatter):
    """Writes the ticks of a logarithmic axis as plain numbers: 0.6, not 6 x 10^-1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick; "" where matplotlib leaves it out, to avoid crowds."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def log_scale(axes: matplotlib.axes.Axes) -> None:
    """Give an axes a logarithmic y-axis, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PlainLogFormatter())
    axes.yaxis.set_minor_formatter(PlainLogFormatter())


def save_figure(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with files.written_whole(path) as scratch:
        figure.savefig(scratch, format="png")
