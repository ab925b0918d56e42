"""One network in training, with its optimizers, its average and how its loss is computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import accelerate
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from genkit.training import checkpoints
from genkit.training.optim import averaging

T = TypeVar("T")


class Stateful(Protocol):
    """What a checkpoint holds a state of."""

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint must hold."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""


@dataclass
class Network:
    """One network in training: as it is, as prepared for this machine, with what changes it."""

    module: torch.nn.Module
    prepared: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: AveragedModel | None
    losses: list[torch.Tensor] = field(default_factory=list)  # of the step under way

    @property
    def evaluated(self) -> torch.nn.Module:
        """The module to evaluate and to save: the average if there is one."""
        return self.average.module if self.average is not None else self.module

    def clip_gradients(self, largest: float) -> float:
        """Scale the gradients down to a norm, or by nothing if it is 0; return the norm before."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if largest:
            torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), largest, norm)
        return norm.item()

    def mean_loss(self) -> float:
        """Return the mean of the step's losses."""
        return torch.stack(self.losses).mean().item()

    def optimize(self, rate_factor: float) -> None:
        """Step the optimizers at a part of their peak rates, and update the average."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor
            optimizer.step()
        if self.average is not None:
            update_average(self.average, self.module)

    def clear(self) -> None:
        """Forget the losses and the gradients of the step."""
        self.losses.clear()
        self.module.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint must hold."""
        return {
            "module": checkpoints.trained_state(self.module),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": checkpoints.trained_state(self.average) if self.average else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`, but keep rates and decays: they are settings, checked elsewhere."""
        checkpoints.load_trained_state(self.module, state["module"])
        if self.average is not None:
            checkpoints.load_trained_state(self.average, state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)


@torch.no_grad()
def update_average(average: AveragedModel, module: torch.nn.Module) -> None:
    """Average a network's weights and, alike, its running statistics of batch normalisation.

    The statistics of the raw network are not those of the averaged weights. All other buffers are
    copied.
    """
    statistics = running_statistics(average.module)
    before = [each.clone() for each in statistics]
    count = average.n_averaged.clone()
    average.update_parameters(module)  # it copies all buffers
    if count and before:
        assert average.multi_avg_fn is not None, "prepare_network gives one"
        average.multi_avg_fn(before, running_statistics(module), count)
        torch._foreach_copy_(statistics, before)


def running_statistics(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return the running means and variances of batch normalisation."""
    layers = (m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    each = [(m.running_mean, m.running_var) for m in layers]
    return [value for pair in each for value in pair if value is not None]


def prepare_network(
    module: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: float | None,
    accelerator: accelerate.Accelerator,
) -> Network:
    """Put a module on this process's device and wrap it for its processes.

    Args:
        ema: decay of the average of its weights; 0 or None for none.
    """
    module.to(accelerator.device).train()
    average = AveragedModel(module, multi_avg_fn=averaging(ema)) if ema else None
    prepared = accelerator.prepare_model(module)
    if isinstance(prepared, DistributedDataParallel):
        # a network with batch normalisation may be called twice before its gradient is taken
        prepared.forward_sync_buffers = False
        # what it warns of in a matrix of one row is a stride that is never used
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return Network(module, prepared, optimizers, average)


def prepare_loss(
    loss: Callable[..., T], device: torch.device, precision: str | None, compiles: bool | None
) -> Callable[..., T]:
    """Return a loss that computes in a precision, "bf16" or the network's own, maybe compiled."""

    def lowered(*arguments: Any) -> T:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return loss(*arguments)

    if not compiles:
        return lowered
    # diffusers' layers ask for torch's version, whose answer is kept
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache")
    return torch.compile(lowered)
