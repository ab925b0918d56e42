"""A step of training under differential privacy: a secret draw, clipped gradients, noise.

The mechanism is that of Abadi et al. 2016, https://arxiv.org/abs/1607.00133: each row is drawn by
itself with a probability (Poisson sampling), its gradient is clipped to a norm, and the sum gets
Gaussian noise. Functions are pure: random numbers follow from a secret key, a purpose and the
number of the step, and are the same on every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch.func import grad_and_value, vmap

KEY_BYTES = 32
ROWS = 128  # whose gradients are held at once: they fit into a cache of a CPU
BITS = 52  # of a uniform random number

Parameters = dict[str, torch.Tensor]
RowLoss = Callable[..., torch.Tensor]  # of parameters and one row of each input; a scalar

# ---------------------------------------------------------------------------------------------
# Secret random numbers


def uniforms(key: bytes, purpose: str, step: int, count: int) -> np.ndarray:
    """Return uniform random numbers in (0, 1), (count,), float64, a secret without the key.

    They are the output of SHAKE-256, a cryptographic function, of the key and the two others.

    Args:
        key: KEY_BYTES secret bytes.
        purpose: a word; numbers for different purposes are independent.
        step: the number of the step.
        count: how many numbers.
    """
    assert len(key) == KEY_BYTES, f"a key has {KEY_BYTES} bytes, got {len(key)}"
    stream = hashlib.shake_256(key + f"{purpose}/{step}".encode()).digest(8 * count)
    words = np.frombuffer(stream, "<u8") >> np.uint64(64 - BITS)
    return (words.astype(np.float64) + 0.5) / 2**BITS


def normals(key: bytes, purpose: str, step: int, count: int) -> np.ndarray:
    """Return standard normal random numbers, (count,), float64; see `uniforms`.

    Source: Box and Muller 1958, https://doi.org/10.1214/aoms/1177706645
    """
    half = -(-count // 2)
    first, second = uniforms(key, purpose, step, 2 * half).reshape(2, half)
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def poisson_draw(key: bytes, step: int, count: int, rate: float) -> np.ndarray:
    """Draw each of `count` rows by itself with probability `rate`; return their numbers, sorted.

    There may be none of them.
    """
    return np.flatnonzero(uniforms(key, "draw", step, count) < rate)


# ---------------------------------------------------------------------------------------------
# Gradients


def clipped_sum(
    loss: RowLoss, parameters: Parameters, rows: tuple[torch.Tensor, ...], limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the gradients of single rows, each scaled down to a norm of at most `limit`.

    A row whose gradient is not finite adds nothing, so that no row moves the sum further than
    `limit`.

    Args:
        loss: of the parameters and of one row of each input, which has lost its first dimension.
        parameters: by name.
        rows: inputs, (n, …) each.
        limit: the largest norm, over all parameters together.

    Returns:
        the sum, (parameters,), in their order, and the losses of the rows, (n,).
    """
    size = sum(parameter.numel() for parameter in parameters.values())
    first = next(iter(parameters.values()))
    total, losses = first.new_zeros(size), [first.new_zeros(0)]
    each_row = vmap(grad_and_value(loss), in_dims=(None, *[0] * len(rows)))
    for start in range(0, len(rows[0]), ROWS):
        gradients, values = each_row(parameters, *[row[start : start + ROWS] for row in rows])
        flat = [gradient.flatten(1) for gradient in gradients.values()]
        norms = torch.stack([part.norm(dim=1) for part in flat]).norm(dim=0)
        finite = norms.isfinite()
        if not finite.all():
            flat = [part.where(finite[:, None], torch.zeros_like(part)) for part in flat]
        factors = (limit / norms.clamp(min=limit)).where(finite, torch.zeros_like(norms))
        total += torch.cat([factors @ part for part in flat])
        losses.append(values)
    return total, torch.cat(losses)


def noisy_mean(
    total: torch.Tensor, normal: np.ndarray, noise: float, limit: float, expected: float
) -> torch.Tensor:
    """Return the sum with noise, over the number of rows that a draw has on average, (parameters,).

    The number of rows that were drawn is private, and not divided by.

    Args:
        total: see `clipped_sum`, over all processes.
        normal: standard normal random numbers, (parameters,).
        noise: standard deviation of the noise, in units of `limit`.
        limit: to which each row was clipped.
        expected: rows of a draw on average: the rate times the number of rows.
    """
    added = torch.from_numpy(noise * limit * normal).to(total)
    return (total + added) / expected


def assign_gradient(module: torch.nn.Module, gradient: torch.Tensor) -> None:
    """Give each parameter of a module its part of a gradient, (parameters,)."""
    parameters = list(module.parameters())
    parts = gradient.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter)


@torch.no_grad()
def limit_spectrum(module: torch.nn.Module, limit: float) -> None:
    """Scale down each matrix of a module whose largest singular value is above `limit`.

    Source: Gouk et al. 2021, https://arxiv.org/abs/1804.04368, equation 12
    """
    for weight in module.parameters():
        if weight.ndim == 2:
            weight.div_((torch.linalg.matrix_norm(weight, 2) / limit).clamp(min=1))
