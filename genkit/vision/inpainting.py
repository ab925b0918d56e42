"""Fill holes of images by a diffusion model or a flow that was not trained to.

Images are in [-1, 1], (n, channels, height, width).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.models.diffusion import DenoisingPipeline
from genkit.models.diffusion_losses import Noising
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

JUMPS = 25  # on the way, as in the paper, where a jump goes over 10 of 250 steps


@dataclass(frozen=True, eq=False)
class Inpainting:
    """Images whose holes were filled."""

    given: torch.Tensor = field(repr=False)  # (n, channels, height, width), holes 0
    images: torch.Tensor = field(repr=False)  # filled
    mask: torch.Tensor = field(repr=False)  # (n, height, width), True where kept

    def __str__(self) -> str:
        count, made = len(self.images), 1 - self.mask.float().mean().item()
        return f"{count} {'image' if count == 1 else 'images'}, {100 * made:.0f} % made"

    def save(self, path: str | Path) -> None:
        """Write what was given over what was made of it into a PNG."""
        image_grid.rows({"given": self.given, "filled": self.images}, Path(path), COLUMNS)


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
    """Fill holes of images so that they fit what is kept, which comes out as it was given.

    After each step towards the image, what is kept is put in anew, with as much noise as is left.
    Jumps back to more noise let both parts grow together.

    Args:
        mask: True where an image is kept, (height, width) for all or (n, height, width).
        labels: the class of each image, for a model that is told.
        seed: image i is filled by the chance of seed + i.
        steps: from noise to images.
        resample: how often each part of the way is gone; 1 for no jumps. What it costs is about
            steps · resample evaluations.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.

    Source: Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, algorithm 1 and appendix B
    """
    if resample < 1:
        raise ValueError(f"resample must be 1 or more, got {resample}")
    real = images_as_tensor(pipeline, images)
    known, way = checked_labels(pipeline, labels, len(real)), noise_levels(pipeline, steps)
    kept, own = _checked_mask(mask, real), row_generators(seed, len(real))
    walk, turns, parts = resampling_schedule(steps, resample), list(blocks(len(real), ROWS)), []
    shown = {"desc": "filling", "unit": " steps", "delay": 2, "leave": False}
    with tqdm(total=len(turns) * (len(walk) - 1), **shown) as bar:
        for which in turns:
            told = None if known is None else known[which]
            some = (real[which].to(pipeline.device), kept[which, None].to(pipeline.device), told)
            parts.append(_fill(pipeline, *some, [own[i] for i in which], way, walk, bar).cpu())
    return Inpainting(real.where(kept[:, None], 0), torch.cat(parts), kept)


def _fill(
    pipeline: DenoisingPipeline,
    real: torch.Tensor,
    kept: torch.Tensor,
    labels: torch.Tensor | None,
    own: list[torch.Generator],
    way: Noising,
    walk: list[int],
    bar: Any,
) -> torch.Tensor:
    """Walk over levels of noise; kept is (n, 1, height, width), all else of the images' shape."""
    x = draw_noise(pipeline, own)
    for here, there in pairwise(walk):
        if there > here:
            x = add_noise(x, draw_noise(pipeline, own), way, here, there)
        else:
            image = predict_image_and_noise(pipeline, x, labels, way, here)[0].clamp(-1, 1)
            made = remove_noise(x, image, draw_noise(pipeline, own), way, here, there)
            given = way.alpha[there] * real + way.sigma[there] * draw_noise(pipeline, own)
            x = torch.where(kept, given, made)
        bar.update()
    return x


def resampling_schedule(steps: int, resample: int) -> list[int]:
    """Return the levels to walk over, from the noisiest, steps, to 0; jumps up lead to more noise.

    Args:
        steps, resample: see `inpaint`.
    """
    length = max(1, steps // JUMPS)
    left = dict.fromkeys(range(1, steps - length + 1, length), resample - 1)
    level, found = steps, [steps]
    while level:
        level -= 1
        found.append(level)
        if left.get(level):
            left[level] -= 1
            level += length
            found.append(level)
    return found


# For any mixture x_t = signal · image + grain · noise, be it a diffusion's or a flow's, here is the
# Markov chain that adds noise and has it at each time, and that chain backwards (Kingma et al.
# 2021, https://arxiv.org/abs/2107.00630, section 3.1 and appendix A).


def add_noise(
    x: torch.Tensor, noise: torch.Tensor, way: Noising, here: int, there: int
) -> torch.Tensor:
    """Add noise to x at the level `here` until it is at the level `there`."""
    ratio, variance = _between(way, there, here)
    return ratio * x + variance.sqrt() * noise


def remove_noise(
    x: torch.Tensor, image: torch.Tensor, noise: torch.Tensor, way: Noising, here: int, there: int
) -> torch.Tensor:
    """Draw from what x at the level `here` was at the level `there`, if it comes from the image."""
    ratio, variance = _between(way, here, there)
    total, left = way.sigma[here].square(), way.sigma[there].square()
    mean = (ratio * left * x + way.alpha[there] * variance * image) / total
    return mean + (variance * left / total).sqrt() * noise


def _between(way: Noising, noisy: int, clean: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is left of x from a level to a noisier one, and the noise's variance."""
    ratio = way.alpha[noisy] / way.alpha[clean]
    return ratio, way.sigma[noisy].square() - (ratio * way.sigma[clean]).square()


def _checked_mask(mask: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return a mask an image, (n, height, width)."""
    shape = (len(images), *images.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"mask must be of {shape[1:]} or {shape}, True where an image is kept, got "
            f"{tuple(mask.shape)} of {str(mask.dtype).removeprefix('torch.')}"
        )
    return mask.cpu().expand(shape)
