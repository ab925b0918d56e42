"""Curves of an alignment: reward, divergence, entropy and lengths; and pairs of answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from genkit.plots import save_figure, smooth

# panels: metrics of steps and of evaluations, with their colours
DRAWN = {
    "reward": {"reward": "tab:blue", "val_reward": "tab:orange", "val_gold": "tab:red"},
    "divergence (nats a completion)": {"kl": "tab:blue", "val_kl": "tab:orange"},
    "entropy (nats a token)": {"entropy": "tab:purple"},
    "tokens a completion": {"tokens": "tab:green"},
}
PAIRED = {
    "loss (nats)": {"loss": "tab:blue", "val_loss": "tab:orange"},
    "change of log-probability (nats)": {"chosen": "tab:green", "rejected": "tab:red"},
    "pairs in the right order": {"accuracy": "tab:orange"},
}
REWARDED = {
    "loss (nats)": {"loss": "tab:blue", "val_loss": "tab:orange"},
    "pairs in the right order": {"accuracy": "tab:orange"},
    "rewards": {"reward_mean": "tab:blue", "reward_std": "tab:purple"},
}


def alignment_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw reward, divergence, entropy and length by step, and reward against divergence.

    Args:
        log: entries with "step" and some of the metrics of the panels.
        path: the PNG to write.
    """
    figure = Figure(figsize=(12.6, 7.2), dpi=110, layout="constrained")
    reward, divergence, frontier, *others = figure.subplot_mosaic("AABBCC;DDDEEE").values()
    _draw_by_step([reward, divergence, *others], log, DRAWN)
    _draw_frontier(frontier, log)
    save_figure(figure, path)


def preference_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss, both log-probabilities and the accuracy of pairs by step."""
    _save_by_step(log, path, PAIRED)


def reward_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss, the accuracy and the rewards of a reward model by step."""
    _save_by_step(log, path, REWARDED)


def _save_by_step(log: list[dict[str, Any]], path: Path, panels: dict[str, dict[str, str]]) -> None:
    figure = Figure(figsize=(4.2 * len(panels), 3.8), dpi=110, layout="constrained")
    _draw_by_step(figure.subplots(1, len(panels)), log, panels)
    save_figure(figure, path)


def _draw_by_step(
    row: Sequence[Axes], log: list[dict[str, Any]], panels: dict[str, dict[str, str]]
) -> None:
    for axes, (title, metrics) in zip(row, panels.items(), strict=True):
        for name, colour in metrics.items():
            points = [(e["step"], e[name]) for e in log if e.get(name) is not None]
            if not points:
                continue
            steps, values = np.array(points, dtype=float).T
            if len(points) > 30:
                axes.plot(steps, values, color=colour, alpha=0.2, linewidth=1)
                axes.plot(steps, smooth(values), color=colour, label=name.replace("_", " "))
            else:
                axes.plot(steps, values, "o-", color=colour, label=name.replace("_", " "))
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(frameon=False)


def _draw_frontier(axes: Axes, log: list[dict[str, Any]]) -> None:
    """Draw the evaluations as points in their order, the first and the last with their step."""
    rows = [e for e in log if e.get("val_kl") is not None and e.get("val_reward") is not None]
    divergences, rewards = ([row[name] for row in rows] for name in ("val_kl", "val_reward"))
    axes.plot(divergences, rewards, "o-", color="tab:orange", alpha=0.7)
    for row in {row["step"]: row for row in (*rows[:1], *rows[-1:])}.values():
        place = row["val_kl"], row["val_reward"]
        axes.annotate(f"step {row['step']}", place, (6, 5), textcoords="offset points")
    axes.set(xlabel="val kl (nats a completion)", title="val reward against val kl")
    axes.grid(alpha=0.3)
