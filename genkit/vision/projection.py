"""Projection: the latents from which a model decodes the image nearest to a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import console
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.notebook import DrawnRecord
from genkit.vision import image_grid
from genkit.vision.pipelines import (
    ROWS,
    Decoder,
    Encoder,
    IntLabels,
    as_int_labels,
    check_images,
    encode,
    image_batch,
    latent_to_noise,
)

RATE = 0.1  # initial learning rate, in standard deviations of the prior
COLUMNS = 12  # images side by side in a picture


@dataclass(frozen=True, eq=False)
class Projection(DrawnRecord):
    """The nearest images that a model can decode to given ones."""

    target: torch.Tensor = field(repr=False)  # (n, channels, height, width)
    images: torch.Tensor = field(repr=False)  # decoded from the latents
    latents: torch.Tensor = field(repr=False)  # (n, *latent_shape)
    errors: torch.Tensor = field(
        repr=False
    )  # (n, starts): least mean squared error of each descent
    started: torch.Tensor = field(repr=False)  # (n, starts): before the first step
    encoded: bool  # the last start is the encoder's latents
    steps: int

    @property
    def error(self) -> torch.Tensor:
        """Mean squared error of each image, (n,); values are in [-1, 1]."""
        return self.errors.min(1).values

    def __str__(self) -> str:
        count, starts = self.errors.shape
        head = f"{count} {'image' if count == 1 else 'images'}, {starts} starts, {self.steps} steps"
        lines = [f"{head}{', the last start from the encoder' if self.encoded else ''}"]
        for i, (each, best) in enumerate(zip(self.errors, self.error, strict=True)):
            all_of_them = " ".join(f"{error:.5f}" for error in each.tolist())
            lines.append(f"{i}: mean squared error {best:.5f} (of each start: {all_of_them})")
        return "\n".join(lines[:11] + (["…"] if count > 10 else []))

    def save(self, path: str | Path) -> None:
        """Write targets, projections and their differences, with the errors, into a PNG."""
        rows: dict[str, torch.Tensor | list[str]] = {
            "target": self.target,
            "projection": self.images,
            "difference": (self.images - self.target).abs() - 1,  # black: no difference
            "squared error": [f"{error:.3f}" for error in self.error.tolist()],
        }
        image_grid.rows(rows, Path(path), COLUMNS)


def project(
    pipeline: Decoder,
    images: Images | torch.Tensor,
    restarts: int = 4,
    steps: int = 200,
    pull: float = 1e-4,
    seed: int | Sequence[int] = 0,
    labels: IntLabels | None = None,
) -> Projection:
    """Find the latents that decode to the nearest image to each target, by gradient descent.

    Adam with a cosine schedule minimises the mean squared error from several samples of the prior
    and, where there is an encoder, from its latents. It optimises the standard normal noise before
    `noise_to_latent`. The point of least error of any descent is returned, so the result is never
    worse than the best start. An image's result depends on its own seed and not, but for rounding,
    on the others; more restarts add starts to those of fewer.

    Args:
        images: the targets.
        restarts: samples of the prior for each image.
        steps: of each descent.
        pull: weight of the prior: of the mean squared noise, added to the error.
        seed: one number, then image i has seed + i; or one for each image.
        labels: the class of each image, if the model is class-conditional; default: the images'
            own.

    Raises:
        ValueError: an argument is invalid.

    Source: Creswell and Bharath 2018, https://arxiv.org/abs/1802.05701, with restarts
    """
    for name, value, least in (("restarts", restarts, 1), ("steps", steps, 1), ("pull", pull, 0)):
        if not value >= least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    classes = check_images(pipeline, images, labels)
    if isinstance(seed, int | np.integer):
        seed = range(seed, seed + len(images))
    seeds = as_int_labels("seed", seed, len(images))
    if seeds.min() < 0:
        raise ValueError(f"seed must be 0 or more, got {seeds.min()}")
    encoded = isinstance(pipeline, Encoder)
    noise = torch.stack([_draw_noise(s, restarts, pipeline.latent_shape) for s in seeds.tolist()])
    if encoded:
        inferred = latent_to_noise(pipeline, encode(pipeline, images, classes))
        noise = torch.cat([noise, inferred[:, None]], 1)
    starts = noise.shape[1]
    turns = list(blocks(len(images), max(1, ROWS // starts)))
    parts = []
    with console.bar(None, "projecting", len(turns) * steps, " steps") as bar:
        for which in turns:
            target = image_batch(images, which)
            some = None if classes is None else classes[which].repeat_interleave(starts)
            parts.append(
                (target, *_descend(pipeline, noise[which], target, some, steps, pull, bar))
            )
    joined = [torch.cat(part).cpu() for part in zip(*parts, strict=True)]
    target, images, latents, errors, started = joined
    return Projection(target, images, latents, errors, started, encoded, steps)


def _draw_noise(seed: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw one after the other, so that more restarts add to those of fewer; (count, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


@torch.enable_grad()
def _descend(
    pipeline: Decoder,
    starts: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor | None,
    steps: int,
    pull: float,
    bar: Any,
) -> tuple[torch.Tensor, ...]:
    """Descend from standard normal noise, (n, starts, …), towards target images, (n, …).

    Returns:
        The best images and latents, (n, …); errors at the end and at the start, (n, starts).
    """
    shape = starts.shape[:2]
    noise = starts.flatten(0, 1).to(pipeline.device).requires_grad_()
    wanted = target.to(pipeline.device).repeat_interleave(shape[1], 0)
    optimizer = torch.optim.Adam([noise], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, images = noise.detach().clone(), torch.zeros_like(wanted)
    least = torch.full((len(noise),), torch.inf, device=noise.device)
    for step in range(steps + 1):
        decoded = pipeline.decode(pipeline.noise_to_latent(noise), labels)
        error = (decoded - wanted).square().flatten(1).mean(1)
        if not step:
            started = error.detach()
        better = error.detach() < least
        least[better], best[better] = error.detach()[better], noise.detach()[better]
        images[better] = decoded.detach()[better]
        if step < steps:
            cost = error + pull * noise.square().flatten(1).mean(1)
            (noise.grad,) = torch.autograd.grad(cost.sum(), noise)  # none for the weights
            optimizer.step()
            schedule.step()
            bar.update()
    ends = least.unflatten(0, shape)
    winners = torch.arange(shape[0], device=ends.device) * shape[1] + ends.argmin(1)
    latents = pipeline.noise_to_latent(best[winners]).detach()
    return images[winners], latents, ends, started.unflatten(0, shape)
