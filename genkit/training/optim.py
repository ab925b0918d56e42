"""Optimizers, learning-rate schedule and weight averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from genkit import machine
from genkit.training.settings import RunSettings


def optimizers(
    model: torch.nn.Module, settings: RunSettings, momentum: float = 0.95
) -> list[torch.optim.Optimizer]:
    """Build AdamW, or Muon for the matrices inside a network and AdamW for the rest.

    Muon (Jordan et al. 2024) orthogonalises a matrix's momentum; embeddings, a language model's
    output head and vectors are not matrices in that sense, a convolution's kernel is, flattened.
    Vectors are not decayed, frozen parameters not changed.

    Args:
        model: a network.
        settings: for the kind of optimizer and its rates.
        momentum: of Muon.
    """
    assert settings.learning_rate and settings.muon_learning_rate, "the preset chooses the rates"
    assert settings.weight_decay is not None, "the preset chooses the decay"
    decay, groups = settings.weight_decay, _group_parameters(model)
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
    return [BatchedMuon(groups["hidden"], settings.muon_learning_rate, decay, momentum), rest]


def _group_parameters(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    """Return the trainable parameters by kind: matrices inside the model, embeddings, vectors."""
    embeddings = _embeddings(model)
    groups: dict[str, list[torch.nn.Parameter]] = {"hidden": [], "embedding": [], "vector": []}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        kind = "vector" if parameter.ndim < 2 else "hidden"
        groups["embedding" if id(parameter) in embeddings else kind].append(parameter)
    return groups


def player_optimizers(
    player: torch.nn.Module,
    settings: RunSettings,
    betas: Sequence[float],
    momentum: float = 0.5,
) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a player of an adversarial game.

    Muon, if asked for, is of the kernels of convolutions alone. Gradients of a game turn with the
    other player: averages that reach far back make the two chase each other.

    Args:
        player: a network.
        settings: for the kind of optimizer and its rates.
        betas: of AdamW's averages.
        momentum: of Muon.
    """
    assert settings.learning_rate and settings.muon_learning_rate, "the preset chooses the rates"
    assert settings.weight_decay is not None, "the preset chooses the decay"
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "rmsprop":
        return [torch.optim.RMSprop(player.parameters(), rate, weight_decay=decay)]
    transposed = [m for m in player.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    turned = {id(p) for module in transposed for p in module.parameters()}
    kernels: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for parameter in player.parameters():  # a transposed kernel is no matrix when it is flattened
        kernel = parameter.ndim == 4 and id(parameter) not in turned
        (kernels if kernel and settings.optimizer == "muon" else others).append(parameter)
    first, second = betas
    adam = torch.optim.AdamW(others, rate, (first, second), weight_decay=decay, fused=True)
    muon = [BatchedMuon(kernels, settings.muon_learning_rate, decay, momentum)] if kernels else []
    return [*muon, adam]


class BatchedMuon(torch.optim.Optimizer):
    """torch's Muon, for kernels of convolutions too, with all of one shape orthogonalised at once.

    A transformer has dozens of small matrices of few shapes: one batched product keeps every core
    busy where torch's loop over matrices pays for each call.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        newton_schulz = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5}
        rest = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, rest | newton_schulz)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Do one step; gradients must be there for every matrix."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for weight in group["params"]:
                shapes.setdefault(weight.shape, []).append(weight)
            for weights in shapes.values():
                self._step(weights, group)

    def _step(self, weights: list[torch.Tensor], group: dict[str, Any]) -> None:
        gradients: list[Any] = [weight.grad for weight in weights]
        buffers = [self._momentum(weight) for weight in weights]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])).flatten(2)
        updates = orthogonalized(updates, group["ns_coefficients"], group["ns_steps"])
        rows, columns = updates.shape[1:]
        rate = group["lr"] * max(1, rows / columns) ** 0.5
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        steps = updates.to(weights[0].dtype).view(-1, *weights[0].shape)
        torch._foreach_add_(weights, list(steps.unbind()), alpha=-rate)

    def _momentum(self, weight: torch.Tensor) -> torch.Tensor:
        if "momentum_buffer" not in self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return self.state[weight]["momentum_buffer"]


def orthogonalized(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int
) -> torch.Tensor:
    """Bring all singular values near 1 by Newton-Schulz iterations, in bfloat16 if that is fast.

    Args:
        matrices: (count, rows, columns).
        coefficients: of the quintic a x + b x³ + c x⁵.
        steps: iterations.
    """
    a, b, c = coefficients
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    # bfloat16 is a hundred times slower on some CPUs
    x = x.bfloat16() if machine.fast_bf16(x.device) else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _embeddings(model: torch.nn.Module) -> set[int]:
    """Find the weights of embedding tables and of a language model's output head."""
    found = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {id(module.weight) for module in ([*found, head] if head is not None else found)}


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
