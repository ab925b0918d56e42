"""Inpainting by a diffusion model or a flow that was not trained for it.

Images are in [-1, 1], (n, channels, height, width).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from genkit import console
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.models.diffusion import DenoisingPipeline
from genkit.models.diffusion_losses import Noising
from genkit.notebook import DrawnRecord
from genkit.vision import image_grid
from genkit.vision.denoising import (
    COLUMNS,
    checked_labels,
    draw_noise,
    images_as_tensor,
    noise_levels,
    predict_image_and_noise,
    row_generators,
)
from genkit.vision.pipelines import ROWS, IntLabels

JUMPS = 25  # in all steps, as in the paper, where a jump goes back 10 of 250 steps


@dataclass(frozen=True, eq=False)
class Inpainting(DrawnRecord):
    """Inpainted images."""

    given: torch.Tensor = field(repr=False)  # (n, channels, height, width), 0 where masked out
    images: torch.Tensor = field(repr=False)  # inpainted, (n, channels, height, width)
    mask: torch.Tensor = field(repr=False)  # (n, height, width), True where kept

    def __str__(self) -> str:
        count, part = len(self.images), 1 - self.mask.float().mean().item()
        return f"{count} {'image' if count == 1 else 'images'}, {100 * part:.0f} % inpainted"

    def save(self, path: str | Path) -> None:
        """Write given images over inpainted ones into a PNG."""
        image_grid.rows({"given": self.given, "inpainted": self.images}, Path(path), COLUMNS)


@torch.no_grad()
def inpaint(
    pipeline: DenoisingPipeline,
    images: Images | torch.Tensor,
    mask: torch.Tensor,
    labels: IntLabels | None = None,
    seed: int = 0,
    steps: int = 50,
    resample: int = 10,
) -> Inpainting:
    """Inpaint images: the kept pixels stay as given, and the others are sampled to fit them.

    After each denoising step, the kept pixels are replaced by the given ones at the same noise
    level. Jumps back to more noise harmonise the two parts.

    Args:
        images: to inpaint.
        mask: True where a pixel is kept, (height, width) for all images or (n, height, width).
        labels: the class of each image, if the model is class-conditional; default: the images'
            own.
        seed: image i is sampled with seed + i.
        steps: from noise to images.
        resample: how often each jump's steps are repeated; 1 for no jumps. The cost is about
            steps · resample evaluations.

    Raises:
        ValueError: an argument is invalid.

    Source: Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, algorithm 1 and appendix B
    """
    if resample < 1:
        raise ValueError(f"resample must be 1 or more, got {resample}")
    real = images_as_tensor(pipeline, images)
    classes, levels = checked_labels(pipeline, labels, images), noise_levels(pipeline, steps)
    kept, own = _checked_mask(mask, real), row_generators(seed, len(real))
    schedule, turns, parts = resampling_schedule(steps, resample), list(blocks(len(real), ROWS)), []
    with console.bar(None, "inpainting", len(turns) * (len(schedule) - 1), " steps") as bar:
        for which in turns:
            some = None if classes is None else classes[which]
            given, mask = real[which].to(pipeline.device), kept[which, None].to(pipeline.device)
            rows = [own[i] for i in which]
            sample = _sample(pipeline, given, mask, some, rows, levels, schedule, bar)
            parts.append(sample.cpu())
    return Inpainting(real.where(kept[:, None], 0), torch.cat(parts), kept)


def _sample(
    pipeline: DenoisingPipeline,
    real: torch.Tensor,
    kept: torch.Tensor,
    labels: torch.Tensor | None,
    own: list[torch.Generator],
    levels: Noising,
    schedule: list[int],
    bar: Any,
) -> torch.Tensor:
    """Follow the schedule from noise to images; kept is (n, 1, height, width)."""
    x = draw_noise(pipeline, own)
    for start, end in pairwise(schedule):
        if end > start:
            x = add_noise(x, draw_noise(pipeline, own), levels, start, end)
        else:
            image = predict_image_and_noise(pipeline, x, labels, levels, start)[0].clamp(-1, 1)
            sample = remove_noise(x, image, draw_noise(pipeline, own), levels, start, end)
            given = levels.alpha[end] * real + levels.sigma[end] * draw_noise(pipeline, own)
            x = torch.where(kept, given, sample)
        bar.update()
    return x


def resampling_schedule(steps: int, resample: int) -> list[int]:
    """Return the noise levels in turn, from `steps` to 0, with jumps back to more noise.

    Args:
        steps, resample: see `inpaint`.
    """
    length = max(1, steps // JUMPS)
    left = dict.fromkeys(range(1, steps - length + 1, length), resample - 1)
    level, schedule = steps, [steps]
    while level:
        level -= 1
        schedule.append(level)
        if left.get(level):
            left[level] -= 1
            level += length
            schedule.append(level)
    return schedule


# The Markov chain with x_t = alpha_t · image + sigma_t · noise at each timestep, and its reverse
# (Kingma et al. 2021, https://arxiv.org/abs/2107.00630, section 3.1 and appendix A).


def add_noise(
    x: torch.Tensor, noise: torch.Tensor, levels: Noising, start: int, end: int
) -> torch.Tensor:
    """Sample x at the noise level `end`, given x at the lower level `start`."""
    ratio, variance = _between(levels, end, start)
    return ratio * x + variance.sqrt() * noise


def remove_noise(
    x: torch.Tensor, image: torch.Tensor, noise: torch.Tensor, levels: Noising, start: int, end: int
) -> torch.Tensor:
    """Sample x at the noise level `end`, given x at the higher level `start` and the image."""
    ratio, variance = _between(levels, start, end)
    total, rest = levels.sigma[start].square(), levels.sigma[end].square()
    mean = (ratio * rest * x + levels.alpha[end] * variance * image) / total
    return mean + (variance * rest / total).sqrt() * noise


def _between(levels: Noising, noisy: int, clean: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor of x, and the variance of the noise, from a level to a noisier one."""
    ratio = levels.alpha[noisy] / levels.alpha[clean]
    return ratio, levels.sigma[noisy].square() - (ratio * levels.sigma[clean]).square()


def _checked_mask(mask: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return a mask for each image, (n, height, width), on the CPU."""
    shape = (len(images), *images.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"mask must be {shape[1:]} or {shape}, True where a pixel is kept, got "
            f"{tuple(mask.shape)} of {str(mask.dtype).removeprefix('torch.')}"
        )
    return mask.cpu().expand(shape)
