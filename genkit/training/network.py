"""One network in training, with its optimizers and its average."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from genkit.training import checkpoints


@dataclass
class Network:
    """One network in training: as it is, as prepared for this machine, with what changes it."""

    module: torch.nn.Module
    prepared: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: AveragedModel | None
    losses: list[torch.Tensor] = field(default_factory=list)  # of the step under way

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint must hold."""
        return {
            "module": checkpoints.trained(self.module),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": checkpoints.trained(self.average) if self.average else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Undo `state`, but keep rates and decays: they are settings, checked elsewhere."""
        checkpoints.put_back(self.module, state["module"])
        if self.average is not None:
            checkpoints.put_back(self.average, state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)
