"""Train a diffusion model, or one of flow matching, on images: a network that removes noise.

    accelerate launch recipes/train_diffusion.py
    accelerate launch recipes/train_diffusion.py --images train.parquet --conditional
    accelerate launch recipes/train_diffusion.py --objective flow --extractor runs/classifier
    accelerate launch recipes/train_diffusion.py --output_dir runs/diffusion --resume

The model in the output folder is at any time the best so far, in diffusers' layout: a stock
DDPMPipeline, or with --conditional the pipeline that genkit/models/diffusion.py has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, UNet2DModel

from genkit import machine
from genkit.data import images, pixels, tables
from genkit.data.images import Images, proportional_labels
from genkit.data.order import Order
from genkit.engine import unet
from genkit.errors import clean_errors
from genkit.hub import card, gallery, vendoring
from genkit.metrics.monitor import Monitor
from genkit.metrics.neighbours import K
from genkit.models import diffusion, diffusion_losses
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting
from genkit.vision import denoising, image_grid, sampling

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/diffusion", "folder of the run and of the model")
    images: str = setting("digits", "digits, a folder, a parquet file or a Hub id")
    val_images: str | None = setting(None, "other images to compare with")
    val_fraction: float = setting(0.1, "part of the images to compare with, if there are no others")
    resolution: int | None = setting(None, "scale and crop images to squares of this side")
    channels: int | None = setting(None, "1 for grey, 3 for colour; as the first image has")
    skip_corrupt: bool = setting(False, "leave out files that are no images")
    allow_outside: bool = setting(False, "read images that a table or a link names elsewhere")
    max_pixels: int = setting(pixels.MAX_PIXELS, "largest image, in pixels")
    max_bytes: int = setting(pixels.MAX_BYTES, "largest file of an image")
    table_memory: int = setting(tables.MEMORY, "MiB of the process that reads a table")
    objective: str = setting("v", "what the network tells: epsilon, v, x0 or flow")
    schedule: str | None = setting(
        None, "how noise grows: linear, as epsilon has it unless told, or cosine, as v and x0"
    )
    min_snr: float = setting(0.0, "cap of the signal-to-noise ratio in the loss; 0 for no weights")
    conditional: bool = setting(False, "make a class on demand")
    cond_dropout: float | None = setting(
        None, "part of the classes that are not told, for guidance; 0.1 unless told"
    )
    widths: list[int] | None = setting(None, "of the features, the largest map first")
    layers: int = setting(1, "residual blocks at a size")
    attention: bool = setting(False, "between the places of the smallest map")
    extractor: str | None = setting(None, "classifier to compare images by; their pixels if none")
    eval_samples: int = setting(1024, "images drawn for an evaluation")
    eval_steps: int = setting(10, "steps of dpm++, or of heun in a flow, that draw them")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        for name, allowed in {
            "objective": diffusion.OBJECTIVES,
            "schedule": (None, *diffusion.SCHEDULES),
        }.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(choice for choice in allowed if choice)
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.objective == "flow" and (self.min_snr or self.schedule):
            name = "min_snr" if self.min_snr else "schedule"
            raise ValueError(f"{name}: {getattr(self, name)} has no meaning in objective flow")
        if self.min_snr < 0:
            raise ValueError(f"min_snr must be 0 or more, got {self.min_snr}")
        if self.cond_dropout is not None:
            if not self.conditional:
                raise ValueError(
                    f"cond_dropout: {self.cond_dropout} is for a model that is told classes; give "
                    "--conditional, too, or leave it out"
                )
            if not 0 < self.cond_dropout < 1:
                raise ValueError(
                    f"cond_dropout must be above 0, as guidance needs it, and below 1, got "
                    f"{self.cond_dropout}"
                )
        if self.eval_samples <= K:
            raise ValueError(f"eval_samples must be {K + 1} or more, got {self.eval_samples}")
        for name in ("layers", "eval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        try:
            diffusion.resolve_sampler(
                diffusion.make_scheduler(self.objective), None, self.eval_steps
            )
        except ValueError as error:
            raise ValueError(f"eval_steps: {error}") from error
        for width in self.widths or []:
            if width < 1:
                raise ValueError(f"widths must be 1 or more, got {width}")


# the network's noise says little of the image where all is noise, as where the cosine ends
SCHEDULES = {"epsilon": "linear", "v": "cosine", "x0": "cosine"}
SIDE = 8  # of the grid of samples
SMALLEST = 8  # side of the smallest map, at most
GROWTH = (1, 2, 6, 8)  # of the features, where the map gets smaller
VAL_ROWS = 1024  # images whose loss is measured


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "cuda":
        run: dict[str, Any] = {"max_steps": 20_000, "batch_size": 256}
    else:
        run = {"max_minutes": 5.0, "batch_size": 64}
    run |= {} if settings.objective == "flow" else {"schedule": SCHEDULES[settings.objective]}
    run |= {"cond_dropout": 0.1} if settings.conditional else {}
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.008, "weight_decay": 0.0}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    compiles = device == "cuda" and machine.can_compile()
    if settings.compile and device != "cuda":
        raise ValueError(
            "compile: on a CPU torch's compiler gets the gradient of upsampled features wrong, and "
            "would not be faster; leave it out"
        )
    step = {"optimizer": "muon", "ema": 0.999, "compile": compiles}
    return run | rates | precision | step


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

        # ---- model
        scheduler = diffusion.make_scheduler(settings.objective, settings.schedule or "linear")
        network = make(settings, train, run.device.type)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(
            partial(diffusion_losses.loss, objective=settings.objective, min_snr=settings.min_snr)
        )
        look_up = partial(batch, run, settings, scheduler, train, order)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} to train on, {len(val):,} to compare with"
        )

        made: list[Monitor] = []  # on the main process
        run.on_main_process(
            lambda: made.append(Monitor(val, settings.extractor, settings.eval_samples))
        )
        monitor = made[0] if made else None
        pipeline = diffusion.DenoisingPipeline(run.weights(), scheduler)
        dtype = "bfloat16" if settings.mixed_precision == "bf16" else "float32"
        ask = unet.UNetRunner(run.weights(), dtype, False)

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.restore()
        run.warm_up(lambda rows: loss(model, *look_up(rows)))
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *look_up(rows)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, pipeline, ask, monitor, train, val)
                    if run.report("distance", metrics):
                        run.publish(partial(save, run, settings, pipeline, train, val, metrics))
        run.log(f"the best model is in {run.folder.path}")


def make(settings: Settings, train: Images, device: str) -> UNet2DModel:
    """Build a new model, of a size that fits the images and the machine."""
    halvings = max(1, math.ceil(math.log2(max(train.size[1:]) / SMALLEST)))
    fewest = 16 if device == "cpu" else 64  # features where the map is largest
    grown = [fewest * GROWTH[min(i, len(GROWTH) - 1)] for i in range(halvings + 1)]
    return diffusion.make_unet(
        train.size,
        settings.widths or grown,
        settings.layers,
        settings.attention,
        train.count_classes() if settings.conditional else 0,
    )


Parts = tuple[torch.Tensor, ...]


def batch(
    run: Run,
    settings: Settings,
    scheduler: diffusion.Scheduler,
    train: Images,
    order: Order,
    rows: np.ndarray,
) -> Parts:
    """Look up images and draw all else; a row's draws are the same at any number of processes."""
    _, which = order(rows)
    turn, places = rows[0] // run.batch_size, torch.from_numpy(rows % run.batch_size)
    words = np.random.SeedSequence((settings.seed, int(turn))).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(words[0]))
    noise = torch.randn(run.batch_size, *train.size, generator=generator)[places]
    shuffled = torch.randperm(run.batch_size, generator=generator)
    ranks = diffusion_losses.stratified_quantiles(shuffled, torch.rand(1, generator=generator))[
        places
    ]
    labels = None
    if settings.cond_dropout:
        dropped = torch.rand(run.batch_size, generator=generator)[places] < settings.cond_dropout
        labels = train.classes(which).masked_fill(dropped, train.count_classes()).to(run.device)
    way = diffusion_losses.noising_at_quantiles(scheduler, ranks)
    images = train.batch(which, run.device)
    told = (part.to(run.device) for part in (way.timesteps, way.alpha, way.sigma))
    return images, noise.to(run.device), labels, *told


# ---- evaluate


def evaluate(
    run: Run,
    settings: Settings,
    pipeline: diffusion.DenoisingPipeline,
    ask: diffusion.Network,
    monitor: Monitor | None,
    train: Images,
    val: Images,
) -> dict[str, float]:
    """Judge images of fixed seeds on the main process, tell all, and draw some."""
    network = run.weights().eval()
    figures: dict[str, float] = {}
    if monitor is not None:
        labels = (
            proportional_labels(train, settings.eval_samples).tolist()
            if settings.conditional
            else None
        )
        options = {"num_inference_steps": settings.eval_steps, "network": ask}
        drawn = sampling.draw_samples(pipeline, range(settings.eval_samples), labels, options)
        by_time = denoising.loss_by_time(pipeline, spread(val), ask)
        by_time.save(run.folder.path / "loss_by_time.png")
        figures = {"val_loss": by_time.mean} | monitor.measure(drawn, labels)
        draw(run, settings, pipeline, ask, train)
    network.train()
    return run.broadcast(figures)


def spread(val: Images) -> Images:
    """Take images whose loss is measured from everywhere, as they may lie class by class."""
    return val.take(np.unique(np.linspace(0, len(val) - 1, VAL_ROWS, dtype=int)))


def draw(
    run: Run,
    settings: Settings,
    pipeline: diffusion.DenoisingPipeline,
    ask: diffusion.Network,
    train: Images,
) -> None:
    """Draw samples of the same seeds at every evaluation, and how they came to be in training."""
    told = [i % len(train.names) for i in range(SIDE * SIDE)] if settings.conditional else None
    options = {"num_inference_steps": settings.eval_steps, "network": ask}
    folder = run.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    made = sampling.draw_samples(pipeline, range(SIDE * SIDE), told, options)
    image_grid.grid(made, folder / f"step-{run.progress.step:08d}.png", SIDE)
    grids = gallery.list_samples(run.folder.path, ".png")
    steps_done = (gallery.step_of(grid) for grid in grids)
    names = [f"{step * run.batch_size / 1000:,.0f}k" for step in steps_done]
    image_grid.progress(grids, names, run.folder.path / "progress.png", SIDE)
    image_grid.film(
        grids, [f"{name} images shown" for name in names], run.folder.path / "progress.gif"
    )


# ---- save


USAGE = """
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

pipeline = DDPMPipeline.from_pretrained(model)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
pipeline(4, num_inference_steps=20).images[0].save("sample.png")

import genkit

genkit.sample(model, 64, seed=0).save_grid("samples.png")  # a seed an image
"""
FLOW_USAGE = """
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained(model)
pipeline(4, num_inference_steps=50).images[0].save("sample.png")

import genkit

genkit.sample(model, 64, seed=0).save_grid("samples.png")  # a seed an image
"""
TOLD_USAGE = """
import torch
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
pipeline(4, seeds, labels={labels}, guidance=1.5).images[0].save("sample.png")

import genkit

# without that code
genkit.sample(model, 4, label={labels}, seed=0).save_grid("samples.png")
"""


def save(
    run: Run,
    settings: Settings,
    pipeline: diffusion.DenoisingPipeline,
    train: Images,
    val: Images,
    metrics: dict[str, float],
    folder: Path,
) -> None:
    """Write the model as diffusers does, with its card."""
    network = pipeline.unet
    if settings.conditional:
        vendoring.save_pipeline(pipeline, folder)
        usage = TOLD_USAGE
    else:
        DDPMPipeline(network, pipeline.scheduler).save_pretrained(folder)
        usage = FLOW_USAGE if settings.objective == "flow" else USAGE
    shown = run.progress.step * run.batch_size
    weights = "averaged" if settings.ema else "raw"
    precision = "bfloat16" if settings.mixed_precision == "bf16" else "float32"
    how = sampling.resolve_sampler(pipeline, settings.eval_steps)
    told = ", of classes in the training images' proportions," if settings.conditional else ""
    text = card.card(
        run.folder.path,
        title="A diffusion model of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, objective {settings.objective}, trained "
        f"on {len(train):,} images of {settings.images}, of which it was shown {shown:,}.",
        usage=usage.format(labels=[i % max(1, len(train.names)) for i in range(4)]),
        figures=metrics,
        protocol=f"{settings.eval_samples:,} images of the seeds 0 and up{told} by {how.words}, "
        f"without guidance, {how.evaluations} evaluations each, {weights} weights, {precision}, "
        f"seen by {settings.extractor or 'their pixels'}; val_loss of {len(spread(val)):,} images from "
        f"everywhere in those to compare with, at times spread as in training; images "
        f"{train.sha256}, compared with {val.sha256}; seed {settings.seed}.",
        data=settings.images,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
