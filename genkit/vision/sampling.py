"""genkit.sample: images from a saved model of any family, each by its own seed."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genkit import machine
from genkit.data.order import blocks
from genkit.engine import unet
from genkit.hub import download, model_files
from genkit.models import diffusion
from genkit.models.diffusion import DenoisingPipeline
from genkit.seeds import is_whole, row_seeds
from genkit.vision import image_grid, pipelines
from genkit.vision.pipelines import Encoder
from genkit.vision.pixel_lm import PixelPipeline

ROWS = {"cpu": unet.ROWS, "cuda": 1024}  # images drawn at a time

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Samples:
    """Images and what there is to know about them.

    Args:
        images: in [-1, 1], (n, channels, height, width).
        seeds: image i is drawn again by sample(model, 1, seed=seeds[i], …).
        labels: the class of each, from a model that is told.
        scheduler, steps, guidance: of a diffusion model.
        evaluations: of the network for an image, by one row each: guidance takes two a step.
        seconds: for all.
    """

    images: torch.Tensor = field(repr=False)
    seeds: list[int]
    labels: list[int] | None
    scheduler: str | None
    steps: int | None
    guidance: float | None
    evaluations: int
    seconds: float
    model: str

    def __str__(self) -> str:
        count, channels, height, width = self.images.shape
        first, last = self.seeds[0], self.seeds[-1]
        follow = count > 1 and self.seeds == list(range(first, first + count))
        seeds = f"{first} to {last}" if follow else ", ".join(map(str, self.seeds[:8]))
        seeds += ", …" if not follow and count > 8 else ""
        way = f", {self.steps} steps of {self.scheduler}" if self.scheduler else ""
        way += f" at guidance {self.guidance:g}" if self.guidance not in (None, 1.0) else ""
        return (
            f"{count} of {channels} x {height} x {width}, seeds {seeds}{way}, "
            f"{self.evaluations} evaluations each, {self.seconds:.1f} s"
        )

    def save_grid(self, path: str | Path, columns: int | None = None) -> None:
        """Write all images into one PNG, row by row; a square of them unless told."""
        image_grid.grid(self.images, Path(path), columns)


# ---------------------------------------------------------------------------------------------
# The verb


def sample(
    model: str | Path,
    n: int = 1,
    *,
    label: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance: float | None = None,
    dtype: str = "float32",
    compile: bool = False,
    revision: str | None = None,
) -> Samples:
    """Draw images from a saved model: autoencoder, adversarial, diffusion, flow or pixels.

    An image depends on its own seed and label alone, not on the batch that it is in, but for the
    last digits once a network is compiled. Global random state is neither read nor changed. What
    kind of model it is its folder says.

    Args:
        model: folder, or Hub id.
        n: how many images.
        label: the class of all, or one an image, for a model that is told.
        seed: a number, then image i has seed + i; or one number an image. None draws one.
        steps, scheduler: of a diffusion model: ddpm, ddim, dpm++, unipc, heun or euler; of a flow:
            euler or heun. Unless told 20 steps of dpm++, of a flow 15 of heun.
        guidance: of a class-conditional diffusion model: above 1 for images that show the class
            more clearly, and are more alike; 1 unless told.
        dtype: "float32", or "bfloat16" for the network of a diffusion model.
        compile: compile that network first, which takes a minute, on a CPU.
        revision: a branch, tag or commit on the Hub.

    Returns:
        A record of images.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be a whole number, 1 or more, got {n!r}")
    seeds = row_seeds(seed, int(n), "an image")
    pipeline = load_image_model(str(model), revision)
    labels = _labels(label, int(n), pipelines.count_classes(pipeline))
    how = resolve_sampler(pipeline, steps, scheduler, guidance, dtype, compile)
    started = time.perf_counter()
    images = draw_samples(pipeline, seeds, labels, how.arguments)
    seconds = time.perf_counter() - started
    return Samples(
        images, seeds, labels, how.scheduler, how.steps, how.guidance, how.evaluations, seconds,
        str(model),
    )  # fmt: skip


def draw_samples(
    pipeline: Any, seeds: Sequence[int], labels: Any, arguments: dict[str, Any]
) -> torch.Tensor:
    """Draw an image a seed, some at a time.

    Args:
        pipeline: of any family.
        labels: the class of each, for a model that is told.
        arguments: of the pipeline's call.

    Returns:
        In [-1, 1], (n, channels, height, width), on the CPU.
    """
    told = None if labels is None else torch.as_tensor(labels)
    rows, drawn = ROWS.get(torch.device(pipeline.device).type, unet.ROWS), []
    with tqdm(total=len(seeds), desc="drawing", unit=" images", delay=2, leave=False) as bar:
        for which in blocks(len(seeds), rows):
            own = [torch.Generator().manual_seed(int(seeds[i])) for i in which]
            some = None if told is None else told[which]
            made = pipeline(len(which), own, some, output_type="pt", **arguments).images
            drawn.append(2 * made.float().cpu() - 1)
            bar.update(len(which))
    return torch.cat(drawn)


def load_image_model(model: str, revision: str | None = None) -> Any:
    """Load a model of any family, where it runs best; the last ones are kept, and reused.

    Raises:
        ValueError: there is none, or its files are not such as can be trusted.
    """
    folder = download.fetch(model, revision).resolve()
    return _load(folder, model_files.last_written(folder))


@functools.lru_cache(maxsize=4)
def _load(folder: Path, written: int) -> Any:
    return pipelines.load_pipeline(folder).to("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class SamplerOptions:
    """How images are drawn, and what a record says of it; see `Samples`."""

    arguments: dict[str, Any]  # of the pipeline's call
    evaluations: int
    words: str
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None


def resolve_sampler(
    pipeline: Any,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance: float | None = None,
    dtype: str = "float32",
    compile: bool = False,
) -> SamplerOptions:
    """Say how a model draws images; see `sample`.

    Raises:
        ValueError: an argument cannot work; it is named.
    """
    if dtype not in unet.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(unet.DTYPES)}, got {dtype!r}")
    if compile and not (pipeline.device.type == "cpu" and machine.can_compile()):
        raise ValueError(
            "compile: True is for a CPU, a C++ compiler and Python's headers; leave it out"
        )
    if isinstance(pipeline, DenoisingPipeline):
        how = _denoising(pipeline, steps, scheduler, guidance)
        how.arguments["network"] = unet.network(pipeline.unet, dtype, compile)
        return how
    asked = {"steps": steps, "scheduler": scheduler, "guidance": guidance}
    asked |= {"dtype": None if dtype == "float32" else dtype, "compile": compile or None}
    for name, value in asked.items():
        if value is not None:
            raise ValueError(
                f"{name}: {value!r} is for a diffusion model, and this is a "
                f"{type(pipeline).__name__}; leave it out"
            )
    if isinstance(pipeline, PixelPipeline):
        return SamplerOptions({}, pipeline.pixels.length, "one pixel after the other")
    prior = isinstance(pipeline, Encoder)
    return SamplerOptions({}, 1, "one draw from the prior" if prior else "one draw of noise")


def _denoising(
    pipeline: DenoisingPipeline, steps: int | None, scheduler: str | None, guidance: float | None
) -> SamplerOptions:
    guided = 1.0 if guidance is None else guidance
    pipeline.check_guidance(guided)
    name, count = diffusion.resolve_sampler(pipeline.scheduler, scheduler, steps)
    times = diffusion.make_sampler(pipeline.scheduler, name, count).timesteps
    asked = {"num_inference_steps": count, "sampler_name": name, "guidance": guided}
    words = f"{count} steps of {name}" + ("" if guided == 1 else f" at guidance {guided:g}")
    return SamplerOptions(asked, len(times) * (1 if guided == 1 else 2), words, name, count, guided)


def _labels(label: Any, rows: int, classes: int) -> list[int] | None:
    """Check labels, and return one a row."""
    if label is None or not classes:
        if (label is None) == bool(classes):
            need = (
                f"this model is told one of {classes} classes"
                if classes
                else "this model is told none"
            )
            raise ValueError(f"label: {need}, got {label!r:.80}")
        return None
    given = label.tolist() if isinstance(label, torch.Tensor) else label
    given = [given] * rows if is_whole(given) else given
    if isinstance(given, str) or np.shape(given) != (rows,) or not all(map(is_whole, given)):
        raise ValueError(f"label must be a whole number, or {rows} of them, got {label!r:.80}")
    if not all(0 <= own < classes for own in given):
        raise ValueError(f"label must be 0 to {classes - 1}, got {label!r:.80}")
    return [int(own) for own in given]
