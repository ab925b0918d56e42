"""Pictures of tables: a column each, real and synthetic."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import matplotlib.axes
import matplotlib.figure
import numpy as np
from numpy.typing import NDArray

from genkit.data.columns import CATEGORY, DATE, EPOCH, Column
from genkit.plots import drawable, save_figure, shortened

Array = NDArray[np.float64]
ACROSS, MOST, BARS, HISTOGRAM = 4, 24, 12, 24  # panels in a row, panels, categories, bins


def columns(found: Sequence[Column], real: Array, synthetic: Array, path: Path) -> None:
    """Draw the distribution of each column in real and in synthetic rows.

    Args:
        found: the columns; at most 24 are drawn.
        real, synthetic: (n, columns) each.
        path: the PNG to write.
    """
    shown = found[:MOST]
    across = min(ACROSS, len(shown))
    down = -(-len(shown) // across)
    figure = matplotlib.figure.Figure(
        figsize=(2.9 * across, 2.1 * down + 0.4), dpi=110, layout="constrained"
    )
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.axis("off")
    for j, (axes, column) in enumerate(zip(panels, shown, strict=False)):
        draw_panel = _categories if column.kind == CATEGORY else _numbers
        draw_panel(axes, column, real[:, j], synthetic[:, j])
        axes.set_title(drawable(shortened(column.name, 28)), fontsize=9, parse_math=False)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def _numbers(axes: matplotlib.axes.Axes, column: Column, real: Array, synthetic: Array) -> None:
    real, synthetic = (part[~np.isnan(part)] for part in (real, synthetic))
    if not len(real):
        return
    edges = np.linspace(real.min(), max(real.max(), real.min() + 1e-9), HISTOGRAM + 1)
    shares = [np.histogram(part, edges)[0] / max(1, len(part)) for part in (real, synthetic)]
    axes.stairs(shares[0], edges, fill=True, color="tab:blue", alpha=0.4, label="real")
    axes.stairs(shares[1], edges, linewidth=1.4, color="tab:orange", label="synthetic")
    axes.locator_params(axis="x", nbins=4)  # labels do not touch
    if column.kind == DATE:
        ticks = np.linspace(edges[0], edges[-1], 3)
        dates = [(EPOCH + datetime.timedelta(days=tick)).date().isoformat() for tick in ticks]
        axes.set_xticks(ticks, dates)


def _categories(axes: matplotlib.axes.Axes, column: Column, real: Array, synthetic: Array) -> None:
    size = len(column.categories) + 1  # the last one is a gap
    shares = []
    for part in (real, synthetic):
        index = np.where(np.isnan(part), size - 1, part).astype(int)
        shares.append(np.bincount(index, minlength=size) / max(1, len(part)))
    order = np.argsort(-(shares[0] + shares[1]), kind="stable")[:BARS]
    order = order[(shares[0] + shares[1])[order] > 0]
    places = np.arange(len(order))
    axes.bar(places - 0.2, shares[0][order], 0.4, color="tab:blue", alpha=0.5, label="real")
    axes.bar(places + 0.2, shares[1][order], 0.4, color="tab:orange", label="synthetic")
    names = [*column.categories, "(gap)"]
    labels = [drawable(shortened(names[i], 10)) for i in order]
    long = max(map(len, labels), default=0) * len(labels) > 24
    axes.set_xticks(places, labels, rotation=90 if long else 0, parse_math=False)
