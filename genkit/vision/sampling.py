"""genkit.sample: images from a saved model of any family, each with its own seed."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import console, machine
from genkit.arguments import explain_names
from genkit.data.order import blocks
from genkit.engine import unet
from genkit.hub import download, kinds, model_files
from genkit.models import diffusion
from genkit.models.diffusion import DenoisingPipeline
from genkit.notebook import as_png
from genkit.seeds import is_whole, row_seeds
from genkit.vision import image_grid, pipelines
from genkit.vision.pipelines import Encoder
from genkit.vision.pixel_lm import PixelPipeline

ROWS: dict[machine.Kind, int] = {"cpu": unet.ROWS, "accelerator": 1024}  # images in a batch

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Samples:
    """Images, and how they were sampled.

    Args:
        images: in [-1, 1], (n, channels, height, width).
        seeds: sample(model, 1, seed=seeds[i], label=labels[i], …) gives image i again.
        labels: the class of each image; None from an unconditional model.
        scheduler, steps, guidance: of a diffusion model.
        evaluations: of the network, for each image; guidance takes two for each step, but in a
            mean flow.
        seconds: for all images.
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
        consecutive = count > 1 and self.seeds == list(range(first, first + count))
        seeds = f"{first} to {last}" if consecutive else ", ".join(map(str, self.seeds[:8]))
        seeds += ", …" if not consecutive and count > 8 else ""
        classes = f", {pipelines.describe_labels(self.labels)}" if self.labels else ""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        sampler = f", {steps} of {self.scheduler}" if self.scheduler else ""
        sampler += f" at guidance {self.guidance:g}" if self.guidance not in (None, 1.0) else ""
        return (
            f"{count} of {channels} x {height} x {width}, seeds {seeds}{classes}{sampler}, "
            f"{self.evaluations} evaluation{'s' * (self.evaluations > 1)} each, "
            f"{self.seconds:.1f} s"
        )

    def save_grid(self, path: str | Path, columns: int | None = None) -> None:
        """Write all images into one PNG, row by row; columns: as many as rows by default."""
        image_grid.grid(self.images, Path(path), columns)

    def _repr_png_(self) -> bytes:
        return as_png(self.save_grid)


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
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
    device: str | None = None,
) -> Samples:
    """Sample images from a saved autoencoder, GAN, diffusion model, flow or pixel model.

    An image depends on its own seed and label alone, not on the batch that it is in, but for the
    last digits once a network is compiled. Global random state is neither read nor changed.

    Args:
        model: folder, or Hub id.
        n: number of images.
        label: class of all images, or one for each; default for a class-conditional model: all
            classes in turn, which the record names.
        seed: one number, then image i has seed + i; or one for each image; default: random.
        steps: of a diffusion model or a flow; default: 10 of dpm++, 1 of a mean flow.
        scheduler: ddpm, ddim, dpm++, unipc, heun or euler; of a flow dpm++, euler or heun; of a
            mean flow euler; default: dpm++, of a mean flow euler.
        guidance: scale of classifier-free guidance; above 1 images show the class more clearly, and
            are less diverse; of a mean flow 1 to 2; default: 1.
        dtype: float32, or bfloat16 for the network of a diffusion model.
        compile: compile that network first, which takes a minute; on a CPU.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A record with the images.

    Raises:
        ValueError: an argument is invalid.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be a whole number, 1 or more, got {n!r}")
    seeds = row_seeds(seed, int(n), "an image")
    pipeline = load_image_model(kinds.as_name(model), revision, device)
    labels = _labels(label, int(n), pipeline)
    options = resolve_sampler(pipeline, steps, scheduler, guidance, dtype, compile)
    started = time.perf_counter()
    images = draw_samples(pipeline, seeds, labels, options.arguments)
    seconds = time.perf_counter() - started
    return Samples(
        images=images,
        seeds=seeds,
        labels=labels,
        scheduler=options.scheduler,
        steps=options.steps,
        guidance=options.guidance,
        evaluations=options.evaluations,
        seconds=seconds,
        model=str(model),
    )


def draw_samples(
    pipeline: Any, seeds: Sequence[int], labels: Any = None, arguments: dict[str, Any] | None = None
) -> torch.Tensor:
    """Sample an image for each seed, in batches.

    Args:
        pipeline: of any family.
        seeds: of the images, (n,).
        labels: the class of each image, (n,), if the model is class-conditional.
        arguments: further ones of the pipeline's call.

    Returns:
        In [-1, 1], (n, channels, height, width), on the CPU.
    """
    classes = None if labels is None else torch.as_tensor(labels)
    rows, images = ROWS[machine.kind(pipeline.device)], []
    with console.bar(None, "sampling", len(seeds), " images") as bar:
        for which in blocks(len(seeds), rows):
            own = [torch.Generator().manual_seed(int(seeds[i])) for i in which]
            some = None if classes is None else classes[which]
            batch = pipeline(len(which), own, some, output_type="pt", **(arguments or {})).images
            images.append(2 * batch.float().cpu() - 1)
            bar.update(len(which))
    return torch.cat(images)


def load_image_model(model: str, revision: str | None = None, device: str | None = None) -> Any:
    """Load a model of any family onto a device; the last ones are cached.

    Args:
        model: folder, or Hub id.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such model or device, or its files are unsafe.
    """
    where = machine.find_device(device)
    folder = download.fetch(model, revision).resolve()
    pipeline = _load(folder, model_files.last_written(folder), where)
    pipeline.name = model
    return pipeline


@functools.lru_cache(maxsize=4)
def _load(folder: Path, written: int, device: torch.device) -> Any:
    return pipelines.load_pipeline(folder).to(device)


# ---------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class SamplerOptions:
    """How a pipeline samples images; see `Samples`."""

    arguments: dict[str, Any]  # of the pipeline's call
    evaluations: int
    description: str  # for protocols
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
    """Check options of sampling, and fill in defaults.

    Args:
        pipeline: of any family.
        steps, scheduler, guidance, dtype, compile: see `sample`.

    Raises:
        ValueError: an argument is invalid.
    """
    if dtype not in unet.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(unet.DTYPES)}, got {dtype!r}")
    device = pipeline.device
    if dtype == "bfloat16" and not machine.has_bf16(device):
        raise ValueError(f"dtype='bfloat16': {device} does not have it; use 'float32'")
    if compile and not (device.type == "cpu" and machine.can_compile(device)):
        raise ValueError("compile=True needs a CPU device, a C++ compiler and Python headers")
    if isinstance(pipeline, DenoisingPipeline):
        options = _denoising(pipeline, steps, scheduler, guidance)
        options.arguments["network"] = unet.get_runner(pipeline.unet, dtype, compile)
        return options
    given = {"steps": steps, "scheduler": scheduler, "guidance": guidance}
    given |= {"dtype": None if dtype == "float32" else dtype, "compile": compile or None}
    for name, value in given.items():
        if value is not None:
            kind = type(pipeline).__name__
            raise ValueError(f"{name}={value!r} requires a diffusion model, this is a {kind}")
    if isinstance(pipeline, PixelPipeline):
        return SamplerOptions({}, pipeline.pixels.length, "autoregressive sampling")
    prior = isinstance(pipeline, Encoder)
    return SamplerOptions({}, 1, "one sample of the prior" if prior else "one sample of noise")


def _denoising(
    pipeline: DenoisingPipeline, steps: int | None, scheduler: str | None, guidance: float | None
) -> SamplerOptions:
    scale = 1.0 if guidance is None else guidance
    pipeline.check_guidance(scale)
    mean = pipeline.mean
    name, count = diffusion.resolve_sampler(pipeline.scheduler, scheduler, steps, mean)
    timesteps = diffusion.make_sampler(pipeline.scheduler, name, count, mean).timesteps
    arguments = {"num_inference_steps": count, "sampler_name": name, "guidance": scale}
    description = f"{count} step{'s' * (count > 1)} of {name}"
    description += "" if scale == 1 else f" at guidance {scale:g}"
    evaluations = len(timesteps) * (1 if scale == 1 or mean else 2)
    return SamplerOptions(arguments, evaluations, description, name, count, scale)


def _labels(label: Any, rows: int, pipeline: Any) -> list[int] | None:
    """Check labels, and return one for each row: by default the classes in turn."""
    classes = pipelines.count_classes(pipeline)
    if label is None:
        turns = pipelines.labels_to_draw(pipeline, None, rows)
        return None if turns is None else turns.tolist()
    if not classes:
        raise ValueError(f"label: this model is unconditional, got {label!r:.80}; leave it out")
    given = label.tolist() if isinstance(label, torch.Tensor) else label
    given = [given] * rows if is_whole(given) else given
    if isinstance(given, str) or np.shape(given) != (rows,) or not all(map(is_whole, given)):
        raise ValueError(f"label must be a whole number, or {rows} of them, got {label!r:.80}")
    if not all(0 <= own < classes for own in given):
        raise ValueError(f"label must be 0 to {classes - 1}, got {label!r:.80}")
    return [int(own) for own in given]
