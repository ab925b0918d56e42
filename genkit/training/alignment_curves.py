"""Curves of an alignment: reward, divergence, entropy and lengths; and pairs of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

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
    """Draw reward, divergence, entropy and length by step.

    Args:
        log: entries with "step" and some of the metrics of the panels.
        path: the PNG to write.
    """
    _draw(log, path, DRAWN)


def preference_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss, both log-probabilities and the accuracy of pairs by step."""
    _draw(log, path, PAIRED)


def reward_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss, the accuracy and the rewards of a reward model by step."""
    _draw(log, path, REWARDED)


def _draw(log: list[dict[str, Any]], path: Path, panels: dict[str, dict[str, str]]) -> None:
    figure = matplotlib.figure.Figure(
        figsize=(4.2 * len(panels), 3.8), dpi=110, layout="constrained"
    )
    for axes, (title, metrics) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
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
    save_figure(figure, path)
