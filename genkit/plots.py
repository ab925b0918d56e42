"""Every picture the library draws."""

from __future__ import annotations

import functools
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

from genkit import disk, tokens

if TYPE_CHECKING:
    from genkit.decoding import Candidate
    from genkit.monitor import Trouble


BANDS = 20  # of time, over which losses are averaged


def loss_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw training and validation loss by step.

    Args:
        log: entries with "step" and any of "loss" and "val_loss".
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    trained = [(e["step"], e["loss"]) for e in log if e.get("loss") is not None]
    judged = [(e["step"], e["val_loss"]) for e in log if e.get("val_loss") is not None]
    if trained:
        steps, losses = np.array(trained, dtype=float).T
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color="tab:blue", label="training")
    if judged:
        steps, losses = np.array(judged, dtype=float).T
        axes.plot(steps, losses, "o-", color="tab:orange", label="validation")
        best = int(losses.argmin())
        axes.annotate(
            f"{losses[best]:.3f}",
            (steps[best], losses[best]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    positive = all(loss > 0 for _, loss in (*trained, *judged))  # log-densities need not be
    axes.set(xlabel="step", ylabel="loss (nats)", yscale="log" if positive else "linear")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    _save(figure, path)


PANELS = {  # of a game: what is logged for each player, what a monitor says, and its colour
    "losses": {"discriminator_loss": "tab:purple", "generator_loss": "tab:green"},
    "gradient norms": {"discriminator_grad_norm": "tab:purple", "generator_grad_norm": "tab:green"},
    "Frechet distance": {"distance": "tab:blue"},
    "coverage": {"coverage": "tab:blue"},
    "variety of images": {"spread": "tab:blue", "duplicates": "tab:orange"},
    "classes": {"entropy": "tab:blue", "label_accuracy": "tab:orange"},
}
SHOWN_BY = {"saturated": "losses", "pinned": "losses", "vanished": "gradient norms"}
SHOWN_BY |= {"collapse": "variety of images"}


def game(
    log: list[dict[str, Any]], floor: dict[str, float], troubles: Sequence[Trouble], path: Path
) -> None:
    """Draw how an adversarial game goes: both players' losses and gradients, figures, troubles.

    Args:
        log: an entry a step; see `monitor.troubles`.
        floor: what real images get in place of the generated ones, drawn dashed.
        troubles: of this log, drawn as red lines.
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(13, 7), dpi=110, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for name, colour in names.items():
            logged = [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None]
            if not logged:
                continue
            steps, values = np.array(logged, dtype=float).T
            label = name.removesuffix("_loss").removesuffix("_grad_norm").replace("_", " ")
            if name in floor:
                axes.plot(steps, values, "o-", color=colour, markersize=4, label=label)
                style = {"color": colour, "linestyle": "--", "linewidth": 1}
                axes.axhline(floor[name], label="real images", **style)
            else:
                axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
                axes.plot(steps, _smooth(values), color=colour, label=label)
        if not axes.lines:  # no classifier tells classes
            axes.remove()
            continue
        if title in ("gradient norms", "Frechet distance"):
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=10)
        for trouble in troubles:
            axes.axvline(trouble.step, color="tab:red", linewidth=0.8)
            if SHOWN_BY[trouble.kind] == title:
                _word(axes, trouble)
        axes.set_title(title, fontsize=12)
        axes.set(xlabel="step", xlim=(0, 1.02 * log[-1]["step"]))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _word(axes: matplotlib.axes.Axes, trouble: Trouble) -> None:
    """Write what happened along its line."""
    outline = [matplotlib.patheffects.withStroke(linewidth=3, foreground="white")]
    style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "top", "color": "tab:red"}
    style |= {"fontsize": 10, "path_effects": outline, "transform": axes.get_xaxis_transform()}
    axes.text(trouble.step, 0.98, trouble.kind, **style)


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
    columns, labels = len(temperatures), [_drawable(_shortened(name, 16)) for name in names]
    size = (1.6 + 2.3 * columns, 1.3 + 0.32 * len(names))
    figure = matplotlib.figure.Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, columns, sharex=True, sharey=True, squeeze=False)[0]
    for axes, temperature, shares, bits, colour in zip(
        panels, temperatures, probabilities, entropies, _from_cold_to_hot(columns), strict=True
    ):
        bars = axes.barh(np.arange(len(names)), 100 * np.array(shares), color=colour)
        axes.bar_label(bars, [tokens.percent(share) for share in shares], padding=3, fontsize=9)
        axes.set_title(f"temperature {temperature:g}\n{bits:.2f} bits", fontsize=11)
        axes.set_yticks(np.arange(len(names)), labels, fontsize=11, parse_math=False)
        axes.tick_params(left=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(xlim=(0, 1.3 * 100 * np.max(probabilities)))
    panels[0].invert_yaxis()
    figure.suptitle(_drawable(_shortened(prompt, 60)) + " …", parse_math=False)
    figure.supxlabel("probability of the next token (%)", fontsize=11)
    _save(figure, path)


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
    figure.suptitle(_drawable(_shortened(prompt, 60)) + " …", parse_math=False)
    _save(figure, path)


def reliability(confidences: Sequence[float], right: Sequence[bool], path: Path) -> None:
    """Draw accuracy by confidence against the diagonal, and how often each confidence occurs.

    Args:
        confidences: the probability that each prediction was given.
        right: whether each was right.
        path: the PNG to write.

    Source: Guo et al. 2017, figure 1, https://arxiv.org/abs/1706.04599
    """
    from genkit.metrics import calibration  # with evaluate, which takes seconds to import

    counts, trust, correct = calibration.by_confidence(confidences, right)
    error = calibration.expected_calibration_error(confidences, right)
    filled, width = counts > 0, 1 / len(counts)
    lefts = np.flatnonzero(filled) * width
    accuracy, gap = (each[filled] / counts[filled] for each in (correct, trust - correct))
    figure = matplotlib.figure.Figure(figsize=(6, 6.5), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bars: dict[str, Any] = {"width": width, "align": "edge"}
    upper.bar(lefts, accuracy, color="tab:blue", edgecolor="white", label="accuracy", **bars)
    hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": "tab:red", "hatch": "///"}
    hatched |= {"linewidth": 0, "label": "gap to confidence"}
    upper.bar(lefts, gap, bottom=accuracy, **hatched, **bars)
    upper.plot([0, 1], [0, 1], "--", color="0.3", label="right as often as it says")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.01))
    upper.legend(edgecolor="none", loc="upper left")
    lower.bar(lefts, 100 * counts[filled] / counts.sum(), color="0.6", edgecolor="white", **bars)
    lower.set(xlabel="confidence", ylabel="predictions (%)")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"expected calibration error {error:.3f} · {len(confidences):,} predictions")
    _save(figure, path)


def loss_by_time(times: np.ndarray, losses: np.ndarray, objective: str, path: Path) -> None:
    """Draw how much a diffusion model errs at which time.

    Args:
        times: in ascending order, (n,).
        losses: of an image at that time each, (n,).
        objective: what the network tells.
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(times, losses, ".", color="tab:blue", alpha=0.2, markersize=4)
    parts = [part for part in np.array_split(np.arange(len(times)), BANDS) if len(part)]
    middles, means = ([values[part].mean() for part in parts] for values in (times, losses))
    axes.plot(middles, means, "o-", color="tab:blue")
    axes.set(xlabel="time (noise grows)", ylabel=f"mean squared error of {objective}", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


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
    places = _planar(steps)
    rows = max(map(len, steps))
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
    for x, (step, heights) in enumerate(zip(steps, places, strict=True), 1):
        for i, (candidate, y) in enumerate(zip(step, heights, strict=True)):
            mark = "■ " if candidate.fate == "finished" else ""
            label = f"{mark}{_shortened(names[x - 1][i], 11)}\n{candidate.total:.2f}"
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
    figure.suptitle(_drawable(_shortened(title, 100)), parse_math=False)
    _save(figure, path)


def latent_scatter(
    points: np.ndarray,
    labels: np.ndarray | None,
    names: Sequence[str],
    path: Path,
    axes_names: Sequence[str] = ("latent 0", "latent 1"),
    caption: str = "",
) -> None:
    """Draw latents of images as points, a colour a class, its name at the middle of its points.

    Args:
        points: (n, 2).
        labels: the class of each; None for one colour.
        names: of the classes.
        path: the PNG to write.
        axes_names: of the two dimensions.
        caption: what is seen.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 7), dpi=120, layout="constrained")
    axes = figure.subplots()
    order = np.random.default_rng(0).permutation(len(points))  # no class lies over the others
    x, y = points[order].T
    dots: dict[str, Any] = {"s": np.clip(20_000 / len(points), 3, 25), "linewidths": 0}
    if labels is None:
        axes.scatter(x, y, color="tab:blue", alpha=0.6, **dots)
    else:
        colours = _distinct_colours(len(names))
        axes.scatter(x, y, color=colours[labels[order]], alpha=0.75, **dots)
        _name_classes(figure, points, labels, names, colours)
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(caption, fontsize=11, pad=12)
    _save(figure, path)


def confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw how often each class is taken for which, shaded so that rare mistakes are seen.

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
    places = range(0, count, -(-count // 50))  # more names than 50 cannot be read
    labels = [_drawable(_shortened(names[i], 14)) for i in places]
    style: dict[str, Any] = {"fontsize": 10 if count <= 30 else 7, "parse_math": False}
    long = max(map(len, labels)) > 2
    axes.set_xticks(places, labels, rotation=90 if long else 0, **style)
    axes.set_yticks(places, labels, **style)
    for i, j in np.argwhere(matrix) if count <= 20 else ():
        ink = "white" if shares[i, j] > 20 else "black"
        axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=ink, fontsize=9)
    axes.set(xlabel="predicted", ylabel="true")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(f"{100 * right / total:.2f} % right · {total - right:,} of {total:,} wrong")
    _save(figure, path)


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
        lines = "\n".join(_drawable(_shortened(line, 24)) for line in caption.splitlines())
        place: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8.5}
        axes.text(left + 0.5, top + 0.02, lines, parse_math=False, linespacing=1.0, **place)
    axes.set(xlim=(0, columns), ylim=(0, rows * (tall + head)), aspect="auto")
    axes.axis("off")
    _save(figure, path)


def _node(
    axes: matplotlib.axes.Axes, x: float, y: float, label: str, ink: str = "black", **style: Any
) -> None:
    """Draw a labelled box around a place."""
    corner, size = (x - HALF_NODE, y - HALF_NODE), 2 * HALF_NODE
    shape = "round,pad=0,rounding_size=0.08"
    box = matplotlib.patches.FancyBboxPatch(corner, size, size, boxstyle=shape, zorder=2, **style)
    axes.add_patch(box)
    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 10, "color": ink}
    axes.text(x, y, _drawable(label), parse_math=False, **place)


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
    places, parents = [], np.zeros(1)
    for step in steps:
        order = sorted(range(len(step)), key=lambda i: (-parents[step[i].parent], i))
        heights = np.empty(len(step))
        heights[order] = (len(step) - 1) / 2 - np.arange(len(step))
        places.append(heights)
        parents = heights[[c.fate == "kept" for c in step]]
    return places


def _name_classes(
    figure: matplotlib.figure.Figure,
    points: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    colours: np.ndarray,
) -> None:
    """Write each class over its points and, as names may meet there, beside them."""
    kinds, (axes,) = np.unique(labels), figure.axes
    written = [_drawable(_shortened(names[kind], 16)) for kind in kinds]
    large = len(kinds) <= 20 and max(map(len, written)) <= 3
    outline = [matplotlib.patheffects.withStroke(linewidth=3.5, foreground="white")]
    style: dict[str, Any] = {"weight": "bold", "fontsize": 15 if large else 9}
    style |= {"ha": "center", "va": "center", "path_effects": outline, "parse_math": False}
    for kind, name in zip(kinds, written, strict=True):
        x, y = np.median(points[labels == kind], 0)
        axes.text(x, y, name, color=0.75 * colours[kind], **style)
    if len(kinds) <= 20:
        key = [axes.plot([], [], "o", color=colours[kind])[0] for kind in kinds]
        place = {"loc": "outside right center", "frameon": False, "handletextpad": 0.2}
        for text in figure.legend(key, written, **place).get_texts():
            text.set_parse_math(False)


def _distinct_colours(count: int) -> np.ndarray:
    """Return colours as unlike as can be, (count, 3)."""
    if count <= 10:
        return matplotlib.colormaps["tab10"](np.arange(count))[:, :3]
    return matplotlib.colormaps["hsv"](np.arange(count) / count)[:, :3] * 0.9


def _from_cold_to_hot(count: int) -> np.ndarray:
    return matplotlib.colormaps["coolwarm"](np.linspace(0.05, 0.95, count))


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _drawable(text: str) -> str:
    """Write the characters that the font lacks as their code points."""
    known = _characters_of_the_font()
    return "".join(c if c == "\n" or ord(c) in known else f"U+{ord(c):04X}" for c in text)


@functools.cache
def _characters_of_the_font() -> set[int]:
    fonts = matplotlib.font_manager
    return set(fonts.get_font(fonts.findfont(fonts.FontProperties())).get_charmap())


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a trailing window of a fiftieth of the curve."""
    window = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _save(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write the picture whole or not at all."""
    with disk.written_whole(path) as scratch:
        figure.savefig(scratch, format="png")
