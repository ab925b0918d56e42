"""Pictures of a training run: samples of every evaluation, and their progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from genkit.hub import gallery
from genkit.vision import image_grid, latent, pipelines

SIDE = 8  # of the grid of samples
COUNT = SIDE * SIDE  # samples of an evaluation
MAPPED = 2000  # most images on the map of the latents


def sample_generators() -> list[torch.Generator]:
    """Return a random generator for each sample of an evaluation: the same at every evaluation."""
    return [torch.Generator().manual_seed(seed) for seed in range(COUNT)]


def save_samples(
    run: Path,
    step: int,
    images: torch.Tensor,
    *,
    columns: int = SIDE,
    caption: Callable[[int], str] = "step {}".format,
    film: bool = True,
) -> None:
    """Write the samples of a step, then draw the progress of all samples in the run's folder.

    Args:
        run: the run's folder; it gets samples/step-00000900.png, progress.png and progress.gif.
        step: the number of the step.
        images: in [-1, 1], (n, channels, height, width); as many at every evaluation.
        columns: images in a row of the grid.
        caption: returns the caption of a step's samples.
        film: write progress.gif, too.
    """
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    image_grid.grid(images, folder / f"step-{step:08d}.png", columns)
    grids = gallery.list_samples(run, ".png")
    captions = [caption(gallery.step_of(grid)) for grid in grids]
    rows = math.ceil(len(images) / columns)
    image_grid.progress(grids, captions, run / "progress.png", rows)
    if film:
        image_grid.film(grids, captions, run / "progress.gif")


def save_map(
    run: Path,
    pipeline: Any,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    classes: torch.Tensor | None,
    names: Sequence[str],
) -> torch.Tensor:
    """Write latents.png, a map of the latents of images; return the latents.

    Args:
        run: the run's folder.
        pipeline: of an autoencoder.
        images: in [-1, 1], (n, channels, height, width).
        labels: classes that the encoder is conditioned on, (n,).
        classes: colours of the map, (n,).
        names: of the classes.
    """
    latents = pipelines.encode(pipeline, images, labels)
    if not (latents == latents[0]).all():
        latent.scatter(latents, classes, names).save(run / "latents.png")
    return latents


def save_plane(run: Path, pipeline: Any, label: int | None = None) -> None:
    """Write plane.png: images decoded from a plane of the latents, of one class if it is given."""
    latent.plane(pipeline, label=label).save(run / "plane.png")
