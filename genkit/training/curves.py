"""Curves of a run: its losses, and how the game of two networks goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.axes
import matplotlib.figure
import matplotlib.patheffects
import numpy as np

if TYPE_CHECKING:
    from genkit.metrics.collapse import Trouble
from genkit.plots import log_scale, save_figure, smooth


def loss_curve(log: list[dict[str, Any]], path: Path, unit: str = "nats") -> None:
    """Draw training and validation loss by step.

    Args:
        log: entries with "step" and any of "loss" and "val_loss".
        path: the PNG to write.
        unit: of the loss; "" for none.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    trained = [(e["step"], e["loss"]) for e in log if e.get("loss") is not None]
    validated = [(e["step"], e["val_loss"]) for e in log if e.get("val_loss") is not None]
    if trained:
        steps, losses = np.array(trained, dtype=float).T
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(losses), color="tab:blue", label="training")
    if validated:
        steps, losses = np.array(validated, dtype=float).T
        axes.plot(steps, losses, "o-", color="tab:orange", label="validation")
        best = int(losses.argmin())
        axes.annotate(
            f"{losses[best]:.3f}",
            (steps[best], losses[best]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    positive = all(loss > 0 for _, loss in (*trained, *validated))  # log-densities need not be
    named = f"loss ({unit})" if unit else "loss"
    axes.set(xlabel="step", ylabel=f"{named}, lower is better")
    if positive:
        log_scale(axes)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    save_figure(figure, path)


def robustness_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss of adversarial training, and accuracies with and without an attack, by step.

    Args:
        log: entries with "step" and any of "loss", "accuracy" and "robust_accuracy".
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [(e["step"], e["loss"]) for e in log if e.get("loss") is not None]
    if trained:
        steps, losses = np.array(trained, dtype=float).T
        left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        left.plot(steps, smooth(losses), color="tab:blue")
    left.set(xlabel="step", ylabel="training loss under attack (nats), lower is better")
    log_scale(left)
    for name, colour in (("accuracy", "tab:orange"), ("robust_accuracy", "tab:red")):
        found = [(e["step"], 100 * e[name]) for e in log if e.get(name) is not None]
        steps, shares = np.array(found, dtype=float).T
        right.plot(steps, shares, "o-", color=colour, label=name.replace("_", " "))
        highest = int(shares.argmax())
        place: dict[str, Any] = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        right.annotate(f"{shares[highest]:.1f}", (steps[highest], shares[highest]), **place)
    right.set(xlabel="step", ylabel="validation images that are right (%)", ylim=(0, 102))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    save_figure(figure, path)


PANELS = {  # of a game: metrics of each player and of the monitor, and their colours
    "losses": {"discriminator_loss": "tab:purple", "generator_loss": "tab:green"},
    "gradient norms": {"discriminator_grad_norm": "tab:purple", "generator_grad_norm": "tab:green"},
    "Frechet distance (lower is better)": {"distance": "tab:blue"},
    "coverage (higher is better)": {"coverage": "tab:blue"},
    "variety of images (best near real ones)": {"spread": "tab:blue", "duplicates": "tab:orange"},
    "classes (higher is better)": {"entropy": "tab:blue", "label_accuracy": "tab:orange"},
}
LOGARITHMIC = ("gradient norms", "Frechet distance (lower is better)")
SHOWN_BY = {"saturated": "losses", "at chance": "losses", "vanished": "gradient norms"}
SHOWN_BY |= {"collapse": "variety of images (best near real ones)"}


def plot_game(
    log: list[dict[str, Any]], baseline: dict[str, float], troubles: Sequence[Trouble], path: Path
) -> None:
    """Draw how an adversarial game goes: both players' losses and gradients, figures, troubles.

    Args:
        log: an entry a step; see `collapse.find_troubles`.
        baseline: figures of held-out real images, drawn dashed.
        troubles: of this log, drawn as red lines.
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(13, 7), dpi=110, layout="constrained")
    logged = {name for entry in log for name, value in entry.items() if value is not None}
    titles = [title for title, names in PANELS.items() if logged & set(names)]
    upper = -(-len(titles) // 2)  # panels in the upper row; those in the lower one may be wider
    rows = [row for row in (titles[:upper], titles[upper:]) if row]
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        for axes, title in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
            _draw_panel(axes, title, log, baseline)
            for trouble in troubles:
                axes.axvline(trouble.step, color="tab:red", linewidth=0.8)
                if SHOWN_BY[trouble.kind] == title:
                    _label_trouble(axes, trouble)
    save_figure(figure, path)


def _draw_panel(
    axes: matplotlib.axes.Axes, title: str, log: list[dict[str, Any]], baseline: dict[str, float]
) -> None:
    """Draw the metrics of one panel by step."""
    for name, colour in PANELS[title].items():
        logged = [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None]
        if not logged:
            continue
        steps, values = np.array(logged, dtype=float).T
        label = name.removesuffix("_loss").removesuffix("_grad_norm").replace("_", " ")
        if name in baseline:
            axes.plot(steps, values, "o-", color=colour, markersize=4, label=label)
            style: dict[str, Any] = {"color": colour, "linestyle": "--", "linewidth": 1}
            axes.axhline(baseline[name], label="real images", **style)
        else:
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            axes.plot(steps, smooth(values), color=colour, label=label)
    if title in LOGARITHMIC:
        log_scale(axes)
    axes.legend(frameon=False, fontsize=10)
    axes.set_title(title, fontsize=12)
    axes.set(xlabel="step", xlim=(0, 1.02 * log[-1]["step"]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _label_trouble(axes: matplotlib.axes.Axes, trouble: Trouble) -> None:
    """Write the kind of a trouble along its line."""
    outline = [matplotlib.patheffects.withStroke(linewidth=3, foreground="white")]
    style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "top", "color": "tab:red"}
    style |= {"fontsize": 10, "path_effects": outline, "transform": axes.get_xaxis_transform()}
    axes.text(trouble.step, 0.98, trouble.kind, **style)
