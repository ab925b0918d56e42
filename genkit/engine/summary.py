"""A loaded model on one line, and whether it has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from genkit.engine.quantized import count_quantized


def summarize(kind: str, name: str, networks: Iterable[torch.nn.Module], precision: str) -> str:
    """Write a loaded model's kind, name, number of parameters, precision and device on one line."""
    networks = list(networks)
    parameters = [p for network in networks for p in network.parameters()]
    count = sum(p.numel() for p in parameters) + sum(map(count_quantized, networks))
    return f"{f'{kind} {name}'.rstrip()}: {count:,} parameters, {precision}, {parameters[0].device}"


def summarize_pipeline(pipeline: Any) -> str:
    """Write a pipeline on one line: the `__repr__` of those whose files travel without genkit."""
    networks = [part for part in vars(pipeline).values() if isinstance(part, torch.nn.Module)]
    precision = str(next(networks[0].parameters()).dtype).removeprefix("torch.")
    return summarize(type(pipeline).__name__, getattr(pipeline, "name", ""), networks, precision)


def weights_version(model: torch.nn.Module) -> tuple[Any, ...]:
    """Return a value that changes when weights are changed, replaced or moved."""
    return tuple((id(p), p._version, p.device) for p in model.parameters())
