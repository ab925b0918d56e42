"""Train a language model of pixels: it writes an image from the top left, one pixel at a time.

    accelerate launch recipes/train_pixels.py
    accelerate launch recipes/train_pixels.py --images train.parquet --max_minutes 20 --compile yes
    accelerate launch recipes/train_pixels.py --conditional --output_dir runs/told
    accelerate launch recipes/train_pixels.py --images photos --resolution 16 --levels 16
    accelerate launch recipes/train_pixels.py --output_dir runs/pixels --resume

The output folder is an ordinary transformers model, at any time the best one so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import machine
from genkit.data import images, pixels, tables
from genkit.data.images import Images
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card, gallery
from genkit.models import lm
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting
from genkit.vision import image_grid, pixel_lm
from genkit.vision.pixel_lm import PixelFormat

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/pixels", "folder of the run and of the model")
    images: str = setting("digits", "digits, a folder, a parquet file or a Hub id")
    val_images: str | None = setting(None, "other images to validate on")
    val_fraction: float = setting(0.1, "part of the images to validate on, if there are no others")
    resolution: int | None = setting(None, "scale and crop images to squares of this side")
    channels: int | None = setting(None, "1 for grey, 3 for colour; as the first image has")
    skip_corrupt: bool = setting(False, "leave out files that are no images")
    allow_outside: bool = setting(False, "read images that a table or a link names elsewhere")
    max_pixels: int = setting(pixels.MAX_PIXELS, "largest image, in pixels")
    max_bytes: int = setting(pixels.MAX_BYTES, "largest file of an image")
    table_memory: int = setting(tables.MEMORY, "MiB of the process that reads a table")
    conditional: bool = setting(False, "tell the model the class")
    levels: int = setting(256, "that each channel of a pixel is rounded to")
    depth: int | None = setting(None, "layers: the one dial of the model's size")
    width: int | None = setting(None, "size of a layer's vectors")
    heads: int | None = setting(None, "attention heads")
    dropout: float = setting(0.0, "of attention weights")
    eval_samples: int | None = setting(None, "validation images of an evaluation, evenly from all")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        if not 2 <= self.levels <= pixel_lm.MOST_LEVELS:
            raise ValueError(f"levels must be 2 to {pixel_lm.MOST_LEVELS}, got {self.levels}")
        for name in ("depth", "width", "heads", "eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.width and self.heads and self.width % (2 * self.heads):
            raise ValueError(f"width: {self.width} is not {self.heads} heads of an even size")


SIDE = 8  # of the grid of samples
HALVES, TRIES = 12, 3  # images that are completed, and how often


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "cuda":
        depth = settings.depth or 6
        shape: dict[str, Any] = {"depth": depth, "width": settings.width or 64 * depth}
        run: dict[str, Any] = {"batch_size": 64, "max_steps": 10_000, "eval_samples": 10_000}
    else:
        depth = settings.depth or 4
        shape = {"depth": depth, "width": settings.width or 32 * depth}
        run = {"batch_size": 16, "max_minutes": 1.0, "eval_samples": 200}
    shape |= {"heads": lm.count_heads(shape["width"])}
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.3}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # on a CPU, compiling takes as long as the digits do
    step = {"optimizer": "muon", "ema": 0.0, "compile": device == "cuda" and machine.can_compile()}
    return shape | run | rates | precision | step


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        with run.accelerator.local_main_process_first():
            train, val = images.load_train_val(
                settings.images,
                settings.val_images,
                settings.val_fraction,
                settings.resolution,
                settings.channels,
                settings.skip_corrupt,
                allow_outside=settings.allow_outside,
                max_pixels=settings.max_pixels,
                max_bytes=settings.max_bytes,
                table_memory=settings.table_memory,
            )
        for problem in train.skipped:
            run.log(f"skipped: {problem}")
        order = Order(len(train), settings.seed)
        val = val.take(np.unique(np.linspace(0, len(val) - 1, settings.eval_samples, dtype=int)))

        # ---- model
        labels = train.count_classes() if settings.conditional else 0
        pixels = PixelFormat(train.size, settings.levels, labels, train.names[:labels])
        network = make(settings, pixels)
        network.set_attn_implementation(
            machine.attention(run.device.type, settings.mixed_precision)
        )
        model = run.network("model", network, optimizers(network, settings))
        loss, look_up = run.autocast(pixel_lm.loss), partial(batch, pixels, train, run.device)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} to train on, {len(val):,} to validate · "
            f"{pixels.length:,} levels an image"
        )

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.restore()
        run.warm_up(lambda rows: loss(model, *look_up(order(rows)[1])))
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *look_up(order(rows)[1])))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, val)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save, run, settings, train, val, metrics))
        run.log(f"the best model is in {run.folder.path}")


def make(settings: Settings, pixels: PixelFormat) -> pixel_lm.PreTrainedModel:
    """Build a new model."""
    return pixel_lm.make_model(
        pixels,
        depth=settings.depth,
        width=settings.width,
        heads=settings.heads,
        dropout=settings.dropout,
    )


def batch(
    pixels: PixelFormat, part: Images, device: torch.device, which: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up images as lines: what is read, and what comes next; (n, length) each."""
    lines = encoded(pixels, part, which, device)
    return lines[:, :-1], lines[:, 1:]


def encoded(
    pixels: PixelFormat, part: Images, which: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Look up images as lines, (n, 1 + length)."""
    labels = part.classes(which, device) if pixels.labels else None
    return pixels.encode(part.batch(which, device), labels)


# ---- evaluate


def evaluate(run: Run, val: Images) -> dict[str, float]:
    """Judge the model on the validation images, and let it draw."""
    network = run.weights().eval()
    pipeline = pixel_lm.PixelPipeline(network)
    lines = encoded(pipeline.pixels, val, np.array(run.shard(len(val)), int), run.device)
    bits = pixel_lm.bits_per_dimension(network, lines)
    total, count = run.sum(torch.stack([bits.sum(), bits.new_tensor(len(bits))])).tolist()
    if run.is_main:
        draw(run, pipeline, val)
    network.train()
    return {"val_loss": total / count * math.log(2), "bits_per_dimension": total / count}


def draw(run: Run, pipeline: pixel_lm.PixelPipeline, val: Images) -> None:
    """Draw samples of the same seeds at every evaluation, their progress, and lower halves."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(SIDE * SIDE)]
    told = torch.arange(SIDE * SIDE) % pipeline.labels if pipeline.labels else None
    samples = pipeline(SIDE * SIDE, generators, told, output_type="pt").images
    folder = run.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    image_grid.grid(2 * samples - 1, folder / f"step-{run.progress.step:08d}.png", SIDE)
    grids = gallery.list_samples(run.folder.path, ".png")
    names = [f"step {gallery.step_of(grid)}" for grid in grids]
    image_grid.progress(grids, names, run.folder.path / "progress.png", SIDE)
    some = np.unique(np.linspace(0, len(val) - 1, HALVES, dtype=int))  # of all classes
    seen, kept = val.batch(some), val.size[1] // 2
    classes = val.classes(some) if pipeline.labels else None
    given = seen.clone()
    given[:, :, kept:] = 0
    named = {"original": seen, "given": given}
    for i in range(TRIES):
        own = [torch.Generator().manual_seed(i * len(some) + j) for j in range(len(some))]
        named[f"completion {i + 1}"] = pipeline.complete(seen, classes, kept, own)
    image_grid.rows(named, run.folder.path / "completions.png")


# ---- save


USAGE = """
import torch
import genkit

pipeline = genkit.load(model)
seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
pipeline(4, seeds{labels}).images[0].save("sample.png")

from transformers import AutoModelForCausalLM

network = AutoModelForCausalLM.from_pretrained(model)  # without genkit: levels as tokens
network.generate(torch.tensor([[{start}]]))[0, 1:]
"""


def save(
    run: Run,
    settings: Settings,
    train: Images,
    val: Images,
    metrics: dict[str, float],
    folder: Path,
) -> None:
    """Write the model as transformers does, with its card."""
    network, weights = run.weights(), "averaged" if settings.ema else "raw"
    network.save_pretrained(folder)
    told = f", labels={[i % len(train.names) for i in range(4)]}" if settings.conditional else ""
    text = card.card(
        run.folder.path,
        title="A language model of pixels",
        task="unconditional-image-generation",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} for {run.progress.step:,} steps.",
        usage=USAGE.format(labels=told, start=settings.levels),
        figures=metrics,
        protocol=f"Exact likelihood of {len(val):,} validation images, evenly from all, each "
        f"channel of a pixel rounded to {settings.levels} levels: nats and bits for each of "
        f"{' x '.join(map(str, train.size))} dimensions"
        f"{', given the class' if settings.conditional else ''}; {weights} weights, float32; "
        f"images {train.sha256}, validation {val.sha256}; seed {settings.seed}.",
        data=settings.images,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
