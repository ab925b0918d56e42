"""Plots of what a language model predicts: next tokens, temperatures, beams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.axes
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import matplotlib.font_manager
import matplotlib.patches
import matplotlib.patheffects
import numpy as np
from matplotlib.path import Path as Curve

from genkit.text import token_names

if TYPE_CHECKING:
    from genkit.text.logits import Candidate
from genkit.plots import drawable, save_figure, shortened


def next_tokens(
    prompt: str,
    names: Sequence[str],
    temperatures: Sequence[float],
    probabilities: Sequence[Sequence[float]],
    entropies: Sequence[float],
    path: Path,
) -> None:
    """Draw the likeliest next tokens as bars, a panel a temperature.

    Args:
        names: the tokens, the likeliest first.
        probabilities: (temperatures, tokens).
        entropies: of each whole distribution, in bits.
        path: the PNG to write.
    """
    columns, labels = len(temperatures), [drawable(shortened(name, 16)) for name in names]
    size = (1.6 + 2.3 * columns, 1.3 + 0.32 * len(names))
    figure = matplotlib.figure.Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, columns, sharex=True, sharey=True, squeeze=False)[0]
    for axes, temperature, shares, bits, colour in zip(
        panels, temperatures, probabilities, entropies, _from_cold_to_hot(columns), strict=True
    ):
        bars = axes.barh(np.arange(len(names)), 100 * np.array(shares), color=colour)
        axes.bar_label(
            bars, [token_names.percent(share) for share in shares], padding=3, fontsize=9
        )
        axes.set_title(f"temperature {temperature:g}\n{bits:.2f} bits", fontsize=11)
        axes.set_yticks(np.arange(len(names)), labels, fontsize=11, parse_math=False)
        axes.tick_params(left=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(xlim=(0, 1.3 * 100 * np.max(probabilities)))
    panels[0].invert_yaxis()
    figure.suptitle(drawable(shortened(prompt, 60)) + " …", parse_math=False)
    figure.supxlabel("probability of the next token (%)", fontsize=11)
    save_figure(figure, path)


def temperature_series(
    prompt: str,
    temperatures: Sequence[float],
    entropies: Sequence[float],
    shares: dict[str, Sequence[float]],
    path: Path,
) -> None:
    """Draw how varied texts are by temperature.

    Args:
        entropies: of the distributions that the texts were drawn from, in bits.
        shares: measures between 0 and 1, by name.
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(temperatures, entropies, "o-", color="tab:red")
    left.set(ylabel="mean entropy (bits a token)")
    for (name, values), marker in zip(shares.items(), "os^", strict=True):
        right.plot(temperatures, values, marker + "-", label=name)
    right.set(ylabel="share", ylim=(-0.03, 1.03))
    right.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    for axes in (left, right):
        axes.set(xlabel="temperature")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(drawable(shortened(prompt, 60)) + " …", parse_math=False)
    save_figure(figure, path)


HALF_NODE = 0.36  # of the distance between two columns, and between two rows


def beam_tree(
    prompt: str,
    title: str,
    steps: Sequence[Sequence[Candidate]],
    names: Sequence[Sequence[str]],
    winners: Sequence[int],
    path: Path,
) -> None:
    """Draw beam search from left to right, a column a step, so that no two branches cross.

    Args:
        steps: candidates of each step, the best first.
        names: texts of their tokens.
        winners: the candidate of each step that the winning text goes through.
        path: the PNG to write.
    """
    columns = _planar(steps)
    rows = max(map(len, steps), default=1)
    size = (2.6 + 1.3 * len(steps), 1.4 + 0.55 * rows)
    figure = matplotlib.figure.Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    shade = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(0, 100),
        matplotlib.colors.ListedColormap(matplotlib.colormaps["YlGn"](np.linspace(0, 0.65, 256))),
    )
    winner: dict[str, Any] = {"edgecolor": "black", "linewidth": 2.5}
    _node(axes, 0, 0, prompt[-10:], facecolor="white", **winner)
    parents = np.zeros(1)  # heights of the candidates that the column before kept
    for x, (step, heights) in enumerate(zip(steps, columns, strict=True), 1):
        for i, (candidate, y) in enumerate(zip(step, heights, strict=True)):
            mark = "■ " if candidate.fate == "finished" else ""
            label = f"{mark}{shortened(names[x - 1][i], 11)}\n{candidate.total:.2f}"
            face: Any = shade.to_rgba(100 * np.exp(candidate.log_probability))
            line: dict[str, Any] = {"edgecolor": "0.4", "linewidth": 1}
            if x <= len(winners) and winners[x - 1] == i:
                line = winner
            elif candidate.fate == "dropped":
                face, line = "white", {"edgecolor": "0.75", "linewidth": 1}
            _branch(axes, x, parents[candidate.parent], y, **line)
            ink = "0.6" if candidate.fate == "dropped" else "black"
            _node(axes, x, y, label, ink, facecolor=face, **line)
        parents = heights[[c.fate == "kept" for c in step]]
    axes.set(xlim=(-0.45, len(steps) + 0.45), ylim=(-rows / 2, rows / 2), xlabel="step")
    axes.set_xticks(range(1, len(steps) + 1))
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.colorbar(shade, ax=axes, pad=0.01, aspect=30, label="probability of the token (%)")
    figure.suptitle(drawable(shortened(title, 100)), parse_math=False)
    save_figure(figure, path)


def _node(
    axes: matplotlib.axes.Axes, x: float, y: float, label: str, ink: str = "black", **style: Any
) -> None:
    """Draw a labelled box around a point."""
    corner, size = (x - HALF_NODE, y - HALF_NODE), 2 * HALF_NODE
    shape = "round,pad=0,rounding_size=0.08"
    box = matplotlib.patches.FancyBboxPatch(corner, size, size, boxstyle=shape, zorder=2, **style)
    axes.add_patch(box)
    centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 10, "color": ink}
    axes.text(x, y, drawable(label), parse_math=False, **centred)


def _branch(axes: matplotlib.axes.Axes, x: int, start: float, end: float, **style: Any) -> None:
    """Draw a curve from a box of the column before to one of this column, bold ones on top."""
    left, right = x - 1 + HALF_NODE, x - HALF_NODE
    middle = (left + right) / 2
    corners = [(left, start), (middle, start), (middle, end), (right, end)]
    curve = Curve(corners, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    order = 1 + style["linewidth"] / 10
    axes.add_patch(matplotlib.patches.PathPatch(curve, facecolor="none", zorder=order, **style))


def _planar(steps: Sequence[Sequence[Candidate]]) -> list[np.ndarray]:
    """Give each candidate a height in its column such that branches do not cross."""
    columns, parents = [], np.zeros(1)
    for step in steps:
        order = sorted(range(len(step)), key=lambda i: (-parents[step[i].parent], i))
        heights = np.empty(len(step))
        heights[order] = (len(step) - 1) / 2 - np.arange(len(step))
        columns.append(heights)
        parents = heights[[c.fate == "kept" for c in step]]
    return columns


def _from_cold_to_hot(count: int) -> np.ndarray:
    return matplotlib.colormaps["coolwarm"](np.linspace(0.05, 0.95, count))


def search_errors(
    beams: Sequence[int],
    errors: dict[str, float],
    wrong: dict[str, float],
    empty: dict[str, float],
    length: dict[str, float],
    path: Path,
) -> None:
    """Draw search errors, wrong texts and lengths by the width of the beam.

    Args:
        errors, wrong, empty: shares of pairs, by the name of the search.
        length: mean tokens, by the name of the search; "exact" and "reference", too.
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [str(width) for width in beams]
    for shares, label, colour in (
        (errors, "not the most likely (search error)", "tab:red"),
        (wrong, "not the target (wrong)", "tab:blue"),
    ):
        left.plot(beams, [100 * shares[name] for name in names], "o-", color=colour, label=label)
    for shares, label, colour in (
        (wrong, "wrong by exact search (model error)", "tab:blue"),
        (empty, "no text by exact search", "0.4"),
    ):
        left.axhline(100 * shares["exact"], color=colour, linestyle="--", label=label)
    left.set(ylabel="pairs (%)", ylim=(-2, 102))
    left.legend(frameon=False, fontsize=9)
    right.plot(beams, [length[name] for name in names], "o-", color="tab:green", label="beam")
    for name, style, label in (("exact", "--", "exact search"), ("reference", ":", "target")):
        right.axhline(length[name], color="tab:green", linestyle=style, label=label)
    right.set(ylabel="length (tokens)")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(beams, names)
        axes.set(xlabel="beams")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
