"""Optimizers, learning-rate schedule and weight averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genkit.settings import RunSettings


def optimizers(model: torch.nn.Module, settings: RunSettings) -> list[torch.optim.Optimizer]:
    """Build AdamW, or Muon for the matrices inside a transformer and AdamW for the rest.

    Muon (Jordan et al. 2024) orthogonalises a matrix's momentum; embeddings, the output head and
    vectors are not matrices in that sense. Vectors are not decayed.
    """
    assert settings.learning_rate and settings.muon_learning_rate, "the preset fills in the rates"
    assert settings.weight_decay is not None, "the preset fills in the decay"
    decay, embeddings = settings.weight_decay, _embeddings(model)
    groups: dict[str, list[torch.nn.Parameter]] = {"hidden": [], "embedding": [], "vector": []}
    for parameter in model.parameters():
        kind = "vector" if parameter.ndim < 2 else "hidden"
        groups["embedding" if id(parameter) in embeddings else kind].append(parameter)
    adamw: list[dict[str, Any]] = [
        {"params": groups["embedding"]},
        {"params": groups["vector"], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        adamw.append({"params": groups["hidden"]})
    rest = torch.optim.AdamW(
        adamw, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=decay, fused=True
    )
    if settings.optimizer == "adamw":
        return [rest]
    muon = torch.optim.Muon(groups["hidden"], lr=settings.muon_learning_rate, weight_decay=decay)
    return [muon, rest]


def _embeddings(model: torch.nn.Module) -> set[int]:
    """Find the weights of embedding tables and of the output head that mirrors them."""
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    sizes = {table.num_embeddings for table in tables}
    heads = [
        m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features in sizes
    ]
    return {id(module.weight) for module in [*tables, *heads]}


def averaging(decay: float) -> Callable[..., None]:
    """Average weights with a decay that rises to `decay`, so that the first weights fade."""

    @torch.no_grad()
    def update(averages: list[torch.Tensor], weights: list[torch.Tensor], count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def rate_factor(fraction: float, warmup: float, decay: float) -> float:
    """Learning rate over its peak: linear up over `warmup`, linear down to 0 over the last `decay`.

    Args:
        fraction: of the run that is done.
        warmup: part of the run at the start.
        decay: part of the run at the end.
    """
    up = fraction / warmup if warmup else 1.0
    down = (1 - fraction) / decay if decay else 1.0
    return max(0.0, min(1.0, up, down))
