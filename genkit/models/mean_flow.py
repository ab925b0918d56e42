"""Mean flow: a network of mean velocities, which takes noise to an image in one step.

The velocity of a flow, u(z_t, t, t), changes on the way from noise to an image; its mean from time
r to t, u(z_t, r, t), leads there in one step: z_r = z_t - (t - r) u(z_t, r, t). Times are from 0,
the image, to 1, noise. Images are in [-1, 1], (n, channels, height, width).

Sources: Geng et al. 2025, https://arxiv.org/abs/2505.13447 and https://arxiv.org/abs/2512.02012
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.models.diffusion import MAX_GUIDANCE, MEAN_TIMES, with_planes

LEAST_ERROR = 1e-3  # that a row's weight tells from none


@dataclass(frozen=True)
class Spans:
    """What each row of a batch is asked for; all are (n,).

    Args:
        times: t, in (0, 1].
        intervals: t - r; 0 for the velocity at t.
        guidance: scale of classifier-free guidance, 1 or more.
        count: timesteps of the whole way, a number.
    """

    times: torch.Tensor
    intervals: torch.Tensor
    guidance: torch.Tensor
    count: int = MEAN_TIMES

    def rows(self, which: torch.Tensor) -> Spans:
        """Return some of the rows."""
        parts = self.times[which], self.intervals[which], self.guidance[which]
        return Spans(*parts, self.count)

    def to(self, device: torch.device) -> Spans:
        """Move all to a device."""
        times, intervals = self.times.to(device), self.intervals.to(device)
        return Spans(times, intervals, self.guidance.to(device), self.count)

    def inputs(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the network's input for z_t, and its timesteps."""
        return with_planes(mixed, self.intervals, self.guidance), self.count * self.times


def spans_at_quantiles(
    quantiles: torch.Tensor,
    slots: torch.Tensor,
    u: torch.Tensor,
    guided: torch.Tensor,
    count: int = MEAN_TIMES,
) -> Spans:
    """Choose what the rows of a batch are asked for.

    Half of them are asked for the velocity at t. The others are asked for a mean velocity: half of
    these for that of the whole way to the image.

    Args:
        quantiles: of the times, in [0, 1), (n,).
        slots: places of the rows in the batch, (n,).
        u: uniform random numbers in [0, 1), (n, 2).
        guided: which rows have a class, (n,); all others are without guidance.
        count: timesteps of the whole way.
    """
    normal = torch.special.ndtri(quantiles.clamp(1e-6, 1 - 1e-6)).sigmoid()
    mean, whole = slots % 2 == 1, slots % 4 == 1
    times = torch.where(mean, 1 - quantiles.square(), normal)
    intervals = mean * times * torch.where(whole, 1.0, u[:, 0])
    guidance = 1 / (1 - (1 - 1 / MAX_GUIDANCE) * u[:, 1] * guided)
    return Spans(times, intervals, guidance, count)


@torch.no_grad()
def target(
    network: torch.nn.Module,
    images: torch.Tensor,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    spans: Spans,
    null_label: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the target of the network's prediction: v - (t - r) du/dt, (n, ...).

    v is the velocity of the image and the noise, under guidance away from the prediction without a
    class. The derivative is along the velocity that the network itself predicts (improved MeanFlow,
    section 4). That prediction would be a target with less noise, but one that 0 meets, too.

    Args:
        network: a UNet2DModel, not wrapped for several processes.
        images, noise: (n, channels, height, width).
        labels: classes, (n,), if the model is class-conditional.
        spans: by `spans_at_quantiles`.
        null_label: the label that stands for no class.
        dtype: to compute in.
    """
    weights = {name: each.to(dtype) for name, each in network.named_parameters()}

    def predict(mixed: torch.Tensor, spans: Spans, labels: torch.Tensor | None) -> torch.Tensor:
        seen, timesteps = spans.inputs(mixed)
        options = {"class_labels": labels}
        found = torch.func.functional_call(network, weights, (seen.to(dtype), timesteps), options)
        return found.sample.float()

    mean, still = spans.intervals > 0, replace(spans, intervals=torch.zeros_like(spans.times))
    mixed = torch.lerp(images, noise, _wide(spans.times))
    own = predict(mixed, still, labels)
    velocity, guided = noise - images, spans.guidance > 1
    if labels is not None and guided.any():
        free = replace(still, guidance=torch.ones_like(spans.times)).rows(guided)
        null = torch.full_like(labels[guided], null_label)
        away = own[guided] - predict(mixed[guided], free, null)
        velocity[guided] += _wide(1 - 1 / spans.guidance[guided]) * away
    if mean.any():
        asked = None if labels is None else labels[mean]
        with_labels, some = partial(predict, labels=asked), spans.rows(mean)
        slope = _derivative(network, with_labels, mixed[mean], some, own[mean])
        velocity[mean] -= _wide(some.intervals) * slope
    return velocity


def with_target(
    compute: Callable[..., torch.Tensor],
    network: torch.nn.Module,
    null_label: int,
    dtype: torch.dtype,
) -> Callable[..., torch.Tensor]:
    """Return `loss`, or what computes it, with the target that a network gives itself.

    Args:
        compute: `loss`, in a precision.
        network, null_label, dtype: see `target`.
    """

    def loss_on_target(
        model: torch.nn.Module,
        images: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor | None,
        spans: Spans,
    ) -> torch.Tensor:
        wanted = target(network, images, noise, labels, spans, null_label, dtype)
        return compute(model, images, noise, labels, spans, wanted)

    return loss_on_target


def _derivative(
    network: torch.nn.Module,
    predict: Callable[[torch.Tensor, Spans], torch.Tensor],
    mixed: torch.Tensor,
    spans: Spans,
    velocity: torch.Tensor,
) -> torch.Tensor:
    """Return du/dt along a velocity; r stays."""

    def mean_velocity(mixed: torch.Tensor, passed: torch.Tensor) -> torch.Tensor:
        times, intervals = spans.times + passed, spans.intervals + passed
        return predict(mixed, replace(spans, times=times, intervals=intervals))

    still = torch.zeros_like(spans.times)
    tangents = velocity, torch.ones_like(still)
    with _differentiable(network), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return torch.func.jvp(mean_velocity, (mixed, still), tangents)[1]


@contextlib.contextmanager
def _differentiable(network: torch.nn.Module) -> Iterator[None]:
    """Run a network by operations that have a forward-mode derivative.

    No kernel of attention has one but the plain one, and that of group normalisation is for
    contiguous features, which attention does not pass on.
    """

    def contiguous(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        return tuple(each.contiguous() for each in inputs)

    norms = [each for each in network.modules() if isinstance(each, torch.nn.GroupNorm)]
    hooks = [each.register_forward_pre_hook(contiguous) for each in norms]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def loss(
    model: torch.nn.Module,
    images: torch.Tensor,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    spans: Spans,
    target: torch.Tensor,
) -> torch.Tensor:
    """Return the mean squared error of the prediction, a scalar; its gradient is weighted.

    Its gradient is that of the errors' logarithm, so that rows with much noise in their target do
    not outweigh the others (MeanFlow, section 4.3, with p = 1). Its value is their mean.

    Args:
        model: a UNet2DModel.
        images, noise, labels, spans: see `target`.
        target: by `target`, (n, channels, height, width).
    """
    seen, timesteps = spans.inputs(torch.lerp(images, noise, _wide(spans.times)))
    prediction = model(seen, timesteps, class_labels=labels).sample.float()
    errors = (prediction - target).square().mean((1, 2, 3))
    weighted = errors / (errors.detach() + LEAST_ERROR)
    return (weighted + (errors - weighted).detach()).mean()


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
