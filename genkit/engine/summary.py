"""A loaded model on one line."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def summarize(kind: str, name: str, networks: Iterable[torch.nn.Module], precision: str) -> str:
    """Write a loaded model's kind, name, number of parameters, precision and device on one line."""
    parameters = [p for network in networks for p in network.parameters()]
    count = sum(p.numel() for p in parameters)
    return f"{f'{kind} {name}'.rstrip()}: {count:,} parameters, {precision}, {parameters[0].device}"
