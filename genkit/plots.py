"""Every picture the library draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np


def loss_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw training and validation loss by step.

    Args:
        log: entries with "step" and any of "loss" and "val_loss".
        path: the PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    trained = [(e["step"], e["loss"]) for e in log if e.get("loss") is not None]
    judged = [(e["step"], e["val_loss"]) for e in log if "val_loss" in e]
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
    axes.set(xlabel="step", ylabel="loss (nats)", yscale="log")
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    _save(figure, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a trailing window of a fiftieth of the curve."""
    window = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _save(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write the picture whole or not at all."""
    scratch = path.with_name(f".{path.name}.writing")
    figure.savefig(scratch, format="png")
    scratch.replace(path)
