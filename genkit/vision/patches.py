"""Adversarial patches: a disc that makes a classifier wrong wherever it lies in an image.

Functions of a classifier as a callable from pixels in [0, 1] to logits. One patch is made for one
image or for many, by its expected effect over places, sizes and rotations.

Source: Brown et al. 2017, https://arxiv.org/abs/1712.09665
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from genkit import console
from genkit.vision.perturbations import Logits

DRAWS = 8  # placements in a step
RATE = 0.05  # of Adam, in pixels of [0, 1]
SIZES = (0.8, 1.2)  # of the diameter: the least and the largest, as parts of that asked for
TURN = 45.0  # degrees that a patch is rotated by, at most


def make_patch(
    logits: Logits,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    share: float,
    steps: int,
    seed: int,
    targeted: bool = False,
) -> torch.Tensor:
    """Make one patch for all of some images.

    Args:
        pixels: images in [0, 1], (n, channels, height, width).
        labels: classes to leave, or with `targeted` to reach, (n,).
        share: diameter over the shorter side of the images.
        steps: of Adam, each over 8 placements.
        seed: of the placements.

    Returns:
        Pixels in [0, 1], (channels, side, side), of which the disc within counts.
    """
    channels, height, width = pixels.shape[1:]
    side = max(2, math.ceil(share * SIZES[1] * min(height, width)))
    generator = torch.Generator().manual_seed(seed)
    patch = torch.full((channels, side, side), 0.5, device=pixels.device, requires_grad=True)
    optimizer = torch.optim.Adam([patch], RATE)
    for _ in console.bar(range(steps), "patch"):
        which = torch.randint(len(pixels), (DRAWS,), generator=generator).to(pixels.device)
        places = torch.rand(DRAWS, 4, generator=generator)
        scores = logits(paste(pixels[which], patch, places, share)).float()
        loss = F.cross_entropy(scores, labels[which]) * (1 if targeted else -1)
        (patch.grad,) = torch.autograd.grad(loss, patch)
        optimizer.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
    return patch.detach()


def paste(
    pixels: torch.Tensor, patch: torch.Tensor, places: torch.Tensor, share: float
) -> torch.Tensor:
    """Paste a patch into each image, wholly inside it.

    Args:
        pixels: images in [0, 1], (n, channels, height, width).
        patch: (channels, side, side).
        places: in [0, 1], (n, 4): from top to bottom, from left to right, size, rotation.
        share: diameter over the shorter side, at a size of 0.5.
    """
    height, width = pixels.shape[2:]
    down, right, size, turn = places.to(pixels.device)[:, :, None, None].unbind(1)  # (n, 1, 1)
    radius = share * min(height, width) / 2 * (SIZES[0] + (SIZES[1] - SIZES[0]) * size)
    y = torch.arange(height, device=pixels.device)[:, None] + 0.5
    x = torch.arange(width, device=pixels.device) + 0.5
    y = (y - radius - down * (height - 2 * radius)) / radius  # (n, height, 1), -1 to 1 in the disc
    x = (x - radius - right * (width - 2 * radius)) / radius
    angle = (2 * turn - 1) * math.radians(TURN)
    grid = torch.stack([x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()], -1)
    drawn = F.grid_sample(
        patch.expand(len(pixels), -1, -1, -1), grid, padding_mode="border", align_corners=False
    )
    inside = (x.square() + y.square() <= 1)[:, None]
    return torch.where(inside, drawn, pixels)
