"""genkit.sample: images from a saved model of any family, each by its own seed."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genkit import diffusion, mosaic, pipelines, quick
from genkit.diffusion import DenoisingPipeline
from genkit.images import blocks
from genkit.pipelines import Encoder
from genkit.pixel_lm import PixelPipeline

ROWS = {"cpu": quick.ROWS, "cuda": 1024}  # images drawn at a time
LIMIT = 1 << 63  # of seeds

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
        seeds = f"{self.seeds[0]}" if count == 1 else f"{self.seeds[0]} to {self.seeds[-1]}"
        way = f", {self.steps} steps of {self.scheduler}" if self.scheduler else ""
        way += f" at guidance {self.guidance:g}" if self.guidance not in (None, 1.0) else ""
        return (
            f"{count} of {channels} x {height} x {width}, seeds {seeds}{way}, "
            f"{self.evaluations} evaluations each, {self.seconds:.1f} s"
        )

    def save_grid(self, path: str | Path, columns: int | None = None) -> None:
        """Write all images into one PNG, row by row; a square of them unless told."""
        mosaic.grid(self.images, Path(path), columns)


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
    compile: bool | None = None,
    revision: str | None = None,
) -> Samples:
    """Draw images from a saved model: autoencoder, adversarial, diffusion, flow or pixels.

    An image depends on its own seed and label alone, not on the batch that it is in. Global random
    state is neither read nor changed. What kind of model it is its folder says.

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
        compile: True compiles that network first; None when it has been asked as long as that
            takes; False never. On a CPU only.
        revision: a branch, tag or commit on the Hub.

    Returns:
        A record of images.

    Raises:
        ValueError: an argument cannot work; it is named, with the value it got.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be a whole number, 1 or more, got {n!r}")
    seeds = row_seeds(seed, int(n))
    pipeline = load(str(model), revision)
    labels = _labels(label, int(n))
    how = find(pipeline, steps, scheduler, guidance, dtype, compile)
    started = time.perf_counter()
    images = draw(pipeline, seeds, labels, how.arguments)
    seconds = time.perf_counter() - started
    return Samples(
        images, seeds, labels, how.scheduler, how.steps, how.guidance, how.evaluations, seconds,
        str(model),
    )  # fmt: skip


def draw(
    pipeline: Any, seeds: Sequence[int], labels: Sequence[int] | None, arguments: dict[str, Any]
) -> torch.Tensor:
    """Draw an image a seed, some at a time.

    Args:
        pipeline: of any family.
        labels: the class of each, for a model that is told.
        arguments: of the pipeline's call.

    Returns:
        In [-1, 1], (n, channels, height, width), on the CPU.
    """
    told = None if labels is None else torch.tensor(labels)
    rows, drawn = ROWS[torch.device(pipeline.device).type], []
    with tqdm(total=len(seeds), desc="drawing", unit=" images", delay=2, leave=False) as bar:
        for which in blocks(len(seeds), rows):
            own = [torch.Generator().manual_seed(seeds[i]) for i in which]
            some = None if told is None else told[which]
            made = pipeline(len(which), own, some, output_type="pt", **arguments).images
            drawn.append(2 * made.float().cpu() - 1)
            bar.update(len(which))
    return torch.cat(drawn)


def load(model: str, revision: str | None = None) -> Any:
    """Load a model of any family, where it runs best; the last ones are kept, and reused.

    Raises:
        ValueError: there is none, or its files are not such as can be trusted.
    """
    folder = pipelines.fetch(model, revision)
    stamp = max((f.stat().st_mtime_ns for f in folder.rglob("*.*") if f.is_file()), default=0)
    return _load(folder, stamp)


@functools.lru_cache(maxsize=4)
def _load(folder: Path, stamp: int) -> Any:
    return pipelines.load(folder).to("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class How:
    """How images are drawn, and what a record says of it; see `Samples`."""

    arguments: dict[str, Any]  # of the pipeline's call
    evaluations: int
    words: str
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None


def find(
    pipeline: Any,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance: float | None = None,
    dtype: str = "float32",
    compile: bool | None = None,
) -> How:
    """Say how a model draws images; see `sample`.

    Raises:
        ValueError: an argument cannot work; it is named.
    """
    if dtype not in quick.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(quick.DTYPES)}, got {dtype!r}")
    if isinstance(pipeline, DenoisingPipeline):
        how = _denoising(pipeline, steps, scheduler, guidance)
        how.arguments["network"] = quick.network(pipeline.unet, dtype, compile)
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
        return How({}, pipeline.pixels.length, "one pixel after the other")
    prior = isinstance(pipeline, Encoder)
    return How({}, 1, "one draw from the prior" if prior else "one draw of noise")


def _denoising(
    pipeline: DenoisingPipeline, steps: int | None, scheduler: str | None, guidance: float | None
) -> How:
    guided = 1.0 if guidance is None else float(guidance)
    pipeline.check_guidance(guided)
    name, count = diffusion.resolve(pipeline.scheduler, scheduler, steps)
    times = diffusion.sampler(pipeline.scheduler, name, count).timesteps
    asked = {"num_inference_steps": count, "sampler_name": name, "guidance": guided}
    words = f"{count} steps of {name}" + ("" if guided == 1 else f" at guidance {guided:g}")
    return How(asked, len(times) * (1 if guided == 1 else 2), words, name, count, guided)


def row_seeds(seed: Any, rows: int) -> list[int]:
    """Return one seed a row: the number and those that follow it, or those that were given."""
    given: Any = secrets.randbits(31) if seed is None else seed
    if _whole(given):
        given = [int(given) + i for i in range(rows)]
    if isinstance(given, str) or np.ndim(given) != 1 or not all(map(_whole, given)):
        raise ValueError(f"seed must be a whole number, or one an image, got {seed!r:.80}")
    if len(given) != rows:
        raise ValueError(f"seed: {len(given)} seeds for {rows} images; give one each, or a number")
    if min(given) < 0 or max(given) >= LIMIT:
        raise ValueError(f"seed must be 0 or more and less than 2^63, got {seed!r:.80}")
    return [int(own) for own in given]


def _labels(label: Any, rows: int) -> list[int] | None:
    if label is None:
        return None
    given = [label] * rows if _whole(label) else list(np.asarray(label).reshape(-1))
    if not all(map(_whole, given)) or len(given) != rows:
        raise ValueError(f"label must be a whole number, or {rows} of them, got {label!r:.80}")
    return [int(own) for own in given]


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
