"""What networks that translate images are trained with: conditions, losses, a discriminator.

Images are in [-1, 1], (n, channels, height, width). Functions are pure: random numbers come as an
argument, u, uniform in [0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from genkit.models import diffusion_losses
from genkit.models.diffusion import Scheduler
from genkit.models.translation import FACTOR, hide, luminance

UNIFORMS = 4  # random numbers that `make_condition` takes for an image
HOLE = (0.25, 0.6)  # parts of a side that a mask hides: the least, and the most
L1_WEIGHT = 100.0  # of pix2pix, over its adversarial loss
PATCH = 32  # pixels of an image for a patch of 16; each doubling of both takes a further layer
WIDTH = 64  # channels of the first layer of the discriminator
SLOPE = 0.2

# ---------------------------------------------------------------------------------------------
# Conditions


def make_condition(images: torch.Tensor, kind: str, u: torch.Tensor) -> torch.Tensor:
    """Make of images what a model is to translate back to them.

    Args:
        images: of sides that `FACTOR` divides, for "low".
        kind: "grey": the luminance; "low": means of squares of `FACTOR` pixels; "mask": all but a
            rectangle; "edges": the luminance's gradient.
        u: of the rectangle, (n, UNIFORMS).

    Returns:
        (n, condition channels, height, width).
    """
    if kind == "grey":
        return luminance(images)
    if kind == "low":
        small = F.avg_pool2d(images, FACTOR)
        return small.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
    if kind == "mask":
        return hide(images, _rectangles(u, images.shape[2], images.shape[3]))
    assert kind == "edges", f"kind must be grey, low, mask or edges, got {kind!r}"
    return edges(images)


def edges(images: torch.Tensor) -> torch.Tensor:
    """Return the norm of the luminance's gradient by Sobel's kernels, (n, 1, height, width).

    It is 1, white, where the luminance goes from black to white in two pixels.
    """
    kernel = torch.tensor([[1.0, 2.0, 1.0]]).mT @ torch.tensor([[-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([kernel, kernel.mT])[:, None].to(images)
    gradient = F.conv2d(F.pad(luminance(images), (1, 1, 1, 1), mode="replicate"), kernels)
    return (2 * gradient.square().sum(1, keepdim=True).sqrt() - 1).clamp(-1, 1)


def _rectangles(u: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return a rectangle for each row, True inside, (n, 1, height, width)."""
    inside = []
    for side, own in ((height, u[:, :2]), (width, u[:, 2:])):
        size, start = own.unbind(1)
        length = ((HOLE[0] + (HOLE[1] - HOLE[0]) * size) * side).round()
        first = (start * (side - length + 1)).floor()
        places = torch.arange(side, device=u.device)
        inside.append((places >= first[:, None]) & (places < (first + length)[:, None]))
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]


# ---------------------------------------------------------------------------------------------
# Batches


def draw_numbers(
    scheduler: Scheduler | None, size: tuple[int, ...], count: int, seed: int
) -> list[torch.Tensor]:
    """Draw random numbers for a batch: of conditions, then noise, timesteps, alpha and sigma."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(count, UNIFORMS, generator=generator)]
    if scheduler is not None:
        noise = torch.randn(count, *size, generator=generator)
        shuffled = torch.randperm(count, generator=generator)
        offset = torch.rand(1, generator=generator)
        quantiles = diffusion_losses.stratified_quantiles(shuffled, offset)
        noising = diffusion_losses.noising_at_quantiles(scheduler, quantiles)
        drawn += [noise, noising.timesteps, noising.alpha, noising.sigma]
    return drawn


# ---------------------------------------------------------------------------------------------
# Networks


def beside(model: torch.nn.Module, condition: torch.Tensor) -> Callable[..., Any]:
    """Return a UNet2DModel with the condition beside its input, for the losses of diffusion."""

    def call(mixed: torch.Tensor, timesteps: torch.Tensor, class_labels: None = None) -> Any:
        return model(torch.cat([mixed, condition], 1), timesteps, class_labels=class_labels)

    return call


def predict_once(model: torch.nn.Module, condition: torch.Tensor) -> torch.Tensor:
    """Return the images that a UNet2DModel without noise predicts."""
    predicted: torch.Tensor = model(
        condition, torch.zeros(len(condition), device=condition.device)
    ).sample
    return predicted.float()


class PatchDiscriminator(torch.nn.Module):
    """Scores patches of an image, beside its condition if it has one: higher means more real.

    Patches are of 70 x 70 pixels for images of 256 x 256, and smaller ones for smaller images: 34
    or 16. Instance normalisation is what batch normalisation is in the paper, whose batches are of
    one image.

    Args:
        channels: of the image, and of its condition if it has one, together.
        side: of the images.

    Source: Isola et al. 2017, https://arxiv.org/abs/1611.07004, section 6.1.2
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        halvings = min(3, max(1, round(math.log2(side / PATCH))))
        widths = [WIDTH * 2**i for i in range(halvings + 1)]
        layers: list[torch.nn.Module] = []
        for i, (before, after) in enumerate(zip([channels, *widths], widths, strict=False)):
            layers.append(torch.nn.Conv2d(before, after, 4, 2 if i < halvings else 1, 1))
            layers += [torch.nn.InstanceNorm2d(after, affine=True)] if i else []
            layers.append(torch.nn.LeakyReLU(SLOPE))
        self.layers = torch.nn.Sequential(*layers, torch.nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, images: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return the scores of the patches, (n, 1, rows, columns)."""
        given = images if condition is None else torch.cat([images, condition], 1)
        scores: torch.Tensor = self.layers(given)
        return scores


# ---------------------------------------------------------------------------------------------
# Losses


def regression_loss(
    model: torch.nn.Module, images: torch.Tensor, condition: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared error of predicted images, a scalar."""
    return F.mse_loss(predict_once(model, condition), images)


def absolute_loss(
    model: torch.nn.Module, images: torch.Tensor, condition: torch.Tensor
) -> torch.Tensor:
    """Return the generator's loss before there is a discriminator, a scalar."""
    return L1_WEIGHT * F.l1_loss(predict_once(model, condition), images)


def generator_loss(
    discriminator: torch.nn.Module,
    model: torch.nn.Module,
    images: torch.Tensor,
    condition: torch.Tensor,
) -> torch.Tensor:
    """Return the generator's loss in the game, a scalar (Isola et al. 2017, equation 4)."""
    made = predict_once(model, condition)
    scores = discriminator(made, condition)
    return F.softplus(-scores).mean() + L1_WEIGHT * F.l1_loss(made, images)


def discriminator_loss(
    discriminator: torch.nn.Module,
    model: torch.nn.Module,
    images: torch.Tensor,
    condition: torch.Tensor,
) -> torch.Tensor:
    """Return the discriminator's loss, a scalar: half the cross-entropy, as in the paper."""
    with torch.no_grad():
        made = predict_once(model, condition)
    scores = discriminator(torch.cat([images, made]), condition.repeat(2, 1, 1, 1))
    real, fake = scores.chunk(2)
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
