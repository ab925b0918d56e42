"""Projection: the latents of the image that a model can make nearest to a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genkit.data.images import Images
from genkit.data.order import blocks
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

RATE = 0.1  # a step's length at first, in standard deviations of the prior
COLUMNS = 12  # images side by side in a picture


@dataclass(frozen=True, eq=False)
class Projection:
    """Images as near to given ones as a model comes."""

    target: torch.Tensor = field(repr=False)  # (n, channels, height, width)
    images: torch.Tensor = field(repr=False)  # what the latents decode to
    latents: torch.Tensor = field(repr=False)  # (n, *latent_shape)
    errors: torch.Tensor = field(repr=False)  # (n, starts): mean squared, the least on each way
    started: torch.Tensor = field(repr=False)  # (n, starts): before the first step
    encoded: bool  # the last start is the encoder's answer
    steps: int

    @property
    def error(self) -> torch.Tensor:
        """Mean squared difference of each image from its target, (n,); values are in [-1, 1]."""
        return self.errors.min(1).values

    def __str__(self) -> str:
        count, starts = self.errors.shape
        head = f"{count} {'image' if count == 1 else 'images'}, {starts} starts, {self.steps} steps"
        lines = [f"{head}{', the last start from the encoder' if self.encoded else ''}"]
        for i, (each, best) in enumerate(zip(self.errors, self.error, strict=True)):
            all_of_them = " ".join(f"{error:.5f}" for error in each.tolist())
            lines.append(f"{i}: mean squared error {best:.5f} (starts led to {all_of_them})")
        return "\n".join(lines[:11] + (["…"] if count > 10 else []))

    def save(self, path: str | Path) -> None:
        """Write targets over what was found, and what is not found, with the errors, into a PNG."""
        rows: dict[str, torch.Tensor | list[str]] = {
            "target": self.target,
            "found": self.images,
            "difference": (self.images - self.target).abs() - 1,  # black is none
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
    """Find the latents that decode to what is nearest to each image, by gradient descent.

    Adam, its rate falling to 0 by a cosine, goes down the mean squared error from several draws of
    the prior and, where there is an encoder, from its answer; it walks where latents are standard
    normal, before `place`. The place of least error on any of the ways is taken, so the result is
    never worse than the best start. An image's result depends on its own seed and not, but for
    rounding, on the others; with more restarts it starts from the same places, and from others.

    Args:
        images: the targets.
        restarts: draws of the prior for each image.
        steps: of each descent.
        pull: of the prior on the way: what is added to the error for each squared standard
            deviation from the middle, mean over the latents.
        seed: a number, then image i has seed + i; or one number an image.
        labels: the class of each image, for a model that is told.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.

    Source: Creswell and Bharath 2018, https://arxiv.org/abs/1802.05701, with restarts
    """
    for name, value, least in (("restarts", restarts, 1), ("steps", steps, 1), ("pull", pull, 0)):
        if not value >= least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    told = check_images(pipeline, images, labels)
    if isinstance(seed, int | np.integer):
        seed = range(seed, seed + len(images))
    seeds = as_int_labels("seed", seed, len(images))
    if seeds.min() < 0:
        raise ValueError(f"seed must be 0 or more, got {seeds.min()}")
    encoded = isinstance(pipeline, Encoder)
    noise = torch.stack([_draws(s, restarts, pipeline.latent_shape) for s in seeds.tolist()])
    if encoded:
        answer = latent_to_noise(pipeline, encode(pipeline, images, told))
        noise = torch.cat([noise, answer[:, None]], 1)
    starts = noise.shape[1]
    turns = list(blocks(len(images), max(1, ROWS // starts)))
    parts = []
    shown = {"desc": "projecting", "unit": " steps", "delay": 2, "leave": False}
    with tqdm(total=len(turns) * steps, **shown) as bar:
        for which in turns:
            target = image_batch(images, which)
            classes = None if told is None else told[which].repeat_interleave(starts)
            parts.append(
                (target, *_descend(pipeline, noise[which], target, classes, steps, pull, bar))
            )
    found = [torch.cat(part).cpu() for part in zip(*parts, strict=True)]
    target, images, latents, errors, started = found
    return Projection(target, images, latents, errors, started, encoded, steps)


def _draws(seed: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw one after the other, so that the first are the same however many follow."""
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
    """Go down from (n, starts, …) standard normal numbers towards (n, …) images.

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
