"""Train a generative adversarial network on images: two players, one who makes and one who judges.

    accelerate launch recipes/train_gan.py
    accelerate launch recipes/train_gan.py --images train.parquet --extractor runs/classifier
    accelerate launch recipes/train_gan.py --preset wgan_gp --conditional --output_dir runs/wgan
    accelerate launch recipes/train_gan.py --output_dir runs/gan --resume

Presets: modern (the default), dcgan, wgan_gp and ac_wgan; --help names what each can be changed in.
The model in the output folder is at any time the best so far, in diffusers' layout; loss.png shows
how the game goes, and the log names a collapse when there is one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import machine
from genkit.data import images, pixels, tables
from genkit.data.images import Images, proportional_labels
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card, gallery, vendoring
from genkit.metrics.collapse import find_troubles
from genkit.metrics.monitor import Monitor
from genkit.metrics.neighbours import K
from genkit.models import gan, gan_losses
from genkit.models.gan_losses import Batch, Game
from genkit.training import curves
from genkit.training.optim import player_optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, RunSettings, parse, setting
from genkit.vision import image_grid
from genkit.vision.evaluation import sample

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/gan", "folder of the run and of the model")
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
    preset: str = setting("modern", "modern, dcgan, wgan_gp or ac_wgan: what is left open below")
    network: str | None = setting(None, "whose networks: those of another preset")
    widths: list[int] | None = setting(None, "of the generator's features, the smallest map first")
    discriminator_widths: list[int] | None = setting(None, "of the discriminator's")
    blocks: int = setting(1, "residual blocks at a size, in the networks of modern")
    latent_dim: int | None = setting(None, "numbers of noise an image")
    normalize: bool = setting(False, "batch normalisation, in networks other than modern's")
    spectral: bool = setting(False, "spectral normalisation of the discriminator")
    conditional: bool = setting(False, "make a class on demand; ac_wgan always does")
    generator_conditioning: str | None = setting(None, "the class: product or concatenation")
    discriminator_conditioning: str | None = setting(None, "concatenation, auxiliary or projection")
    loss: str | None = setting(None, ", ".join(gan_losses.LOSSES))
    critic_steps: int | None = setting(None, "of the discriminator for one of the generator")
    r1: float | None = setting(None, "weight of the squared gradient at real images")
    r2: float | None = setting(None, "weight of the squared gradient at generated images")
    gradient_penalty: float | None = setting(None, "weight of (gradient norm - 1)² in between")
    penalty_every: int | None = setting(None, "steps between penalties, which then weigh as much")
    weight_clip: float | None = setting(None, "largest size of the discriminator's weights")
    smoothing: float = setting(0.0, "how far below 1 the target of real images is")
    label_noise: float | None = setting(None, "how far targets are moved at most")
    instance_noise: float = setting(0.0, "standard deviation of noise on images, falling to 0")
    augmentations: list[str] = setting((), "of what is scored: colour, translation, cutout")
    packing: int = setting(1, "images that are scored together")
    discriminator_learning_rate: float | None = setting(
        None, "peak rate; learning_rate unless told"
    )
    betas: list[float] | None = setting(None, "of AdamW's averages")
    momentum: float = setting(0.5, "of Muon; with more of it the players chase each other")
    warmup: float | None = setting(None, "part of the run over which the rate rises from 0")
    decay: float | None = setting(
        None, "part of the run over which the rate falls to 0, at its end"
    )
    optimizer: str = setting(
        CHOSEN, "optimizer of both networks", choices=("adamw", "muon", "rmsprop")
    )
    clip: float = setting(0.0, "largest norm of the gradient; 0 for no limit")
    extractor: str | None = setting(None, "classifier to compare images by; their pixels if none")
    eval_samples: int = setting(2000, "images drawn for an evaluation")
    stop_on_collapse: bool = setting(False, "end the run when it has collapsed")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        self.conditional = self.conditional or self.preset == "ac_wgan"
        super().__post_init__()
        for name, allowed in {
            "preset": tuple(PRESETS),
            "network": (None, *LAYOUTS),
            "generator_conditioning": (None, *gan.GENERATOR_CONDITIONING),
            "discriminator_conditioning": (None, *gan.DISCRIMINATOR_CONDITIONING),
        }.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice)
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("critic_steps", "penalty_every", "latent_dim", "packing", "blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.compile:
            raise ValueError(
                "compile: penalties need the gradient of a gradient, which compiled code does not "
                "have, and the networks are too small to gain; leave it out"
            )
        for name in ("generator_conditioning", "discriminator_conditioning"):
            if getattr(self, name) and not self.conditional:
                raise ValueError(f"{name}: no class is told; add --conditional")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be 0 or more and below 1, got {self.momentum}")
        if self.eval_samples <= K:
            raise ValueError(f"eval_samples must be {K + 1} or more, got {self.eval_samples}")
        for width in (*(self.widths or []), *(self.discriminator_widths or [])):
            if width < 1:
                raise ValueError(f"widths must be 1 or more, got {width}")
        if self.betas is not None and not (
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        ):
            raise ValueError(f"betas must be two numbers, 0 or more and below 1, got {self.betas}")
        if self.normalize and (self.network or self.preset) == "modern":
            raise ValueError(
                "normalize: the networks of modern have no batch normalisation; add --network dcgan"
            )


# How the networks of each preset are built; what the papers and the course do not say is ours
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "modern": ({"network": "residual"}, {"network": "residual"}),
    "dcgan": (
        {"network": "dcgan", "widths": [128, 128, 128], "kernels": [4, 7], "unit": True},
        {"network": "dcgan", "widths": [64, 128], "strides": [2, 2], "kernel": 3, "pool": "max"}
        | {"unit": True},
    ),
    "wgan_gp": (
        {"network": "dcgan", "widths": [256, 128, 64], "kernels": [5, 5], "slope": 0.0},
        {"network": "dcgan", "widths": [64, 128, 256], "strides": [2, 2, 2], "kernel": 5},
    ),
    "ac_wgan": (
        {"network": "dcgan", "widths": [256, 128, 64], "tail": [32], "kernels": [5, 5]}
        | {"growth": "nearest", "slope": 0.3},
        {"network": "dcgan", "widths": [64, 128, 256, 512], "strides": [2, 2, 2, 1], "kernel": 5}
        | {"dropout": 0.4, "slope": 0.3},
    ),
}
PLAIN = {"r1": 0.0, "r2": 0.0, "gradient_penalty": 0.0, "weight_clip": 0.0, "label_noise": 0.0}
PLAIN |= {"critic_steps": 1, "penalty_every": 1, "warmup": 0.0, "decay": 0.0, "ema": 0.0}
TOLD = {"generator_conditioning": "concat", "discriminator_conditioning": "projection"}
PRESETS: dict[str, dict[str, Any]] = {
    # Huang et al. 2024, https://arxiv.org/abs/2501.05441; Muon, sizes and rates are ours
    "modern": {"loss": "relativistic", "r1": 1.0, "r2": 1.0, "penalty_every": 4, "latent_dim": 64}
    | {"optimizer": "muon", "learning_rate": 1e-3, "betas": [0.0, 0.99], "batch_size": 32}
    | {"ema": 0.999, "decay": 0.5},
    # the network and the numbers of Keras' introduction to adversarial training
    "dcgan": {"loss": "non_saturating", "label_noise": 0.05, "latent_dim": 128, "batch_size": 64}
    | {"optimizer": "adamw", "learning_rate": 4e-4, "discriminator_learning_rate": 3e-4}
    | {"betas": [0.9, 0.999]},
    # Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, algorithm 1
    "wgan_gp": {"loss": "wasserstein", "gradient_penalty": 10.0, "critic_steps": 5}
    | {"optimizer": "adamw", "learning_rate": 1e-4, "betas": [0.0, 0.9], "batch_size": 64}
    | {"latent_dim": 128},
    # Arjovsky et al. 2017, https://arxiv.org/abs/1701.07875, with Odena's classifier
    "ac_wgan": {"loss": "wasserstein", "weight_clip": 0.01, "critic_steps": 100}
    | {"optimizer": "rmsprop", "learning_rate": 5e-5, "betas": [0.0, 0.9], "batch_size": 64}
    | {"latent_dim": 100, "max_steps": 25_000}
    | {"generator_conditioning": "embedding_product", "discriminator_conditioning": "auxiliary"},
}
STD = {"ac_wgan": 0.02}  # of initial weights of layers; those of the others are Glorot's
SIDE = 8  # of the grid of samples
LIMIT = 8  # the largest side of a map of features that modern networks start from


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    values = PLAIN | (TOLD if settings.conditional else {}) | {"network": settings.preset}
    values |= {"muon_learning_rate": 0.02, "weight_decay": 0.0}
    chosen = PRESETS[settings.preset]
    values |= {"max_steps": 50_000} if device == "cuda" else {"max_minutes": 5.0}
    values |= chosen | ({"max_minutes": None} if "max_steps" in chosen else {})
    # a preset's own regularizers make way for a loss or a limit that was asked for
    loss = settings.loss or values["loss"]
    values |= {} if loss in gan_losses.TARGETED else {"label_noise": 0.0}
    values |= {} if loss == "wasserstein" else {"gradient_penalty": 0.0, "weight_clip": 0.0}
    values |= {"r1": 0.0, "r2": 0.0, "gradient_penalty": 0.0} if settings.weight_clip else {}
    rate = settings.learning_rate or values["learning_rate"]
    if settings.learning_rate or "discriminator_learning_rate" not in values:
        values["discriminator_learning_rate"] = rate
    modern = settings.preset == "modern"
    return values | {"mixed_precision": "bf16" if modern and machine.fast_bf16() else "no"}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    game = rules(settings)

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

        parts = run.processes * settings.gradient_accumulation
        if run.batch_size // parts % settings.packing:
            raise ValueError(
                f"packing: {run.batch_size // parts} rows of a process do not divide by "
                f"{settings.packing}; {parts * settings.packing} rows in batch_size would"
            )

        # ---- model
        generator, discriminator = players(settings, train)
        slower = dataclasses.replace(settings, learning_rate=settings.discriminator_learning_rate)
        rates = partial(player_optimizers, betas=settings.betas, momentum=settings.momentum)
        wrapped_generator = run.network("generator", generator, rates(generator, settings))
        wrapped_discriminator = run.network(
            "discriminator", discriminator, rates(discriminator, slower), False
        )
        # each player sees the other as it is: only its own gradients are exchanged
        d_loss = run.autocast(partial(game.discriminator_loss, wrapped_discriminator, generator))
        g_loss = run.autocast(partial(game.generator_loss, discriminator, wrapped_generator))
        look_up = partial(batch, run, settings, train, order)
        run.log(
            f"{generator.num_parameters():,} + {discriminator.num_parameters():,} parameters · "
            f"{len(train):,} images of {' x '.join(map(str, train.size))} to train on, "
            f"{len(val):,} to compare with"
        )

        made: list[Monitor] = []  # on the main process
        run.on_main_process(
            lambda: made.append(Monitor(val, settings.extractor, settings.eval_samples))
        )
        monitor = made[0] if made else None

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.restore()
        if monitor is not None and not settings.dry_run:
            run.folder.write("baseline.json", json.dumps(monitor.baseline))  # to judge the log by
        for step in run.steps():
            penalty = settings.penalty_every if step % settings.penalty_every == 0 else 0
            for turn in range(settings.critic_steps):
                for rows in run.rows(turn, settings.critic_steps):
                    run.backward(d_loss(look_up(rows, 0), penalty), "discriminator")
                run.update("discriminator")
                if settings.weight_clip:
                    gan_losses.clip_weights(discriminator, settings.weight_clip)
            discriminator.requires_grad_(False)
            for rows in run.rows(settings.critic_steps - 1, settings.critic_steps):
                run.backward(g_loss(look_up(rows, 1)), "generator")
            run.update("generator")
            discriminator.requires_grad_(True)
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, monitor, train)
                    if run.report("distance", metrics, curve=partial(show, settings, monitor)):
                        run.publish(partial(save, run, settings, train, val, metrics))
                    if warn(run, settings, monitor) and settings.stop_on_collapse:
                        run.log(f"the best model until now is in {run.folder.path}")
                        run.stop()
        run.log(f"the best model is in {run.folder.path}")


def rules(settings: Settings) -> Game:
    """Say what is played for; refuse what does not go together."""
    if settings.packing > 1 and settings.conditional:
        raise ValueError("packing: images of several classes cannot be scored as one; conditional")
    if settings.normalize and (settings.r1 or settings.r2 or settings.gradient_penalty):
        raise ValueError(
            "normalize: batch normalisation mixes images, and the penalties r1, r2 and "
            "gradient_penalty are of each alone; leave one out"
        )
    limited = settings.gradient_penalty or settings.weight_clip or settings.spectral or settings.r1
    if settings.loss == "wasserstein" and not limited:
        raise ValueError(
            "loss: the wasserstein loss has no bound of its own; add gradient_penalty, "
            "weight_clip, r1 or spectral"
        )
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Game)}
    return Game(**given | {"augmentations": tuple(settings.augmentations)})


def players(settings: Settings, train: Images) -> tuple[gan.Generator, gan.Discriminator]:
    """Build both networks."""
    g_options, d_options = (dict(layout) for layout in LAYOUTS[settings.network])
    channels, height, width = train.size
    if settings.network == "modern":
        patch = 4 if min(height, width) > 16 else 2
        halvings = max(0, math.ceil(math.log2(max(height, width) / patch / LIMIT)))
        sizes = {"widths": [64] * (halvings + 1), "patch": patch, "blocks": settings.blocks}
        g_options, d_options = (
            g_options | sizes,
            d_options | sizes,
        )
    else:
        g_options |= {"normalize": settings.normalize}
        d_options |= {"normalize": settings.normalize}
    g_options |= {"widths": settings.widths} if settings.widths else {}
    d_options |= {"widths": settings.discriminator_widths} if settings.discriminator_widths else {}
    if settings.conditional:
        labels = train.count_classes()
        g_options |= {"labels": labels, "conditioning": settings.generator_conditioning}
        d_options |= {
            "labels": labels,
            "conditioning": settings.discriminator_conditioning,
        }
    generator = gan.Generator(image_size=train.size, latent_dim=settings.latent_dim, **g_options)
    discriminator = gan.Discriminator(
        image_size=(channels * settings.packing, height, width),
        spectral=settings.spectral,
        **d_options,
    )
    if settings.network != "modern":
        gan_losses.initialize_weights(generator, STD.get(settings.network))
        if not settings.spectral:  # which makes the size of weights its own
            gan_losses.initialize_weights(discriminator, STD.get(settings.network))
    return generator, discriminator


def batch(
    run: Run, settings: Settings, train: Images, order: Order, rows: np.ndarray, role: int
) -> Batch:
    """Look up images and draw all else; a row's draws are the same at any number of processes."""
    _, which = order(rows)
    turn, places = rows[0] // run.batch_size, torch.from_numpy(rows % run.batch_size)
    words = np.random.SeedSequence((settings.seed, int(turn), role)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(words[0]))
    count = run.batch_size
    noise = torch.randn(count, settings.latent_dim, generator=generator)[places]
    u = torch.rand(count, gan_losses.UNIFORMS, generator=generator)[places]
    instance_noise = None
    strength = settings.instance_noise * max(0.0, 1 - run.fraction)
    if strength:
        drawn = torch.randn(2, count, *train.size, generator=generator)
        instance_noise = (strength * drawn[:, places]).to(run.device)
    labels = train.classes(which, run.device) if settings.conditional else None
    real = train.batch(which, run.device)
    return Batch(real, noise.to(run.device), u.to(run.device), labels, instance_noise)


# ---- evaluate


def evaluate(
    run: Run, settings: Settings, monitor: Monitor | None, train: Images
) -> dict[str, float]:
    """Judge images of fixed seeds on the main process, tell all, and draw some."""
    network = run.weights("generator").eval()
    figures: dict[str, float] = {}
    if monitor is not None:
        pipeline = gan.GANPipeline(network)
        labels = proportional_labels(train, settings.eval_samples) if settings.conditional else None
        figures = monitor.measure(sample(pipeline, settings.eval_samples, labels), labels)
        draw(run, settings, pipeline, train)
    network.train()
    return run.broadcast(figures)


def show(
    settings: Settings, monitor: Monitor | None, log: list[dict[str, Any]], path: Path
) -> None:
    """Draw how the game goes, on the main process."""
    assert monitor is not None, "only the main process draws"
    curves.game(log, monitor.baseline, find_troubles(log, settings.loss, monitor.baseline), path)


def warn(run: Run, settings: Settings, monitor: Monitor | None) -> bool:
    """Say what the last evaluation shows to be wrong; return on all whether the run is lost."""
    fatal = 0.0
    if monitor is not None:
        for trouble in find_troubles(run.folder.log(), settings.loss, monitor.baseline):
            if trouble.step == run.progress.step:
                run.log(f"! {trouble}")
                fatal += trouble.fatal
    return run.broadcast({"fatal": fatal})["fatal"] > 0


def draw(run: Run, settings: Settings, pipeline: gan.GANPipeline, train: Images) -> None:
    """Draw samples of the same seeds at every evaluation, and how they came to be."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(SIDE * SIDE)]
    told = torch.arange(SIDE * SIDE) % len(train.names) if settings.conditional else None
    made = pipeline(SIDE * SIDE, generators, told, output_type="pt").images
    folder = run.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    image_grid.grid(2 * made - 1, folder / f"step-{run.progress.step:08d}.png", SIDE)
    grids = gallery.list_samples(run.folder.path, ".png")
    shown = (gallery.step_of(grid) * seen(settings) for grid in grids)
    names = [f"{images / 1000:,.0f}k" if images >= 10_000 else f"{images:,}" for images in shown]
    image_grid.progress(grids, names, run.folder.path / "progress.png", SIDE)
    image_grid.film(
        grids, [f"{name} images shown" for name in names], run.folder.path / "progress.gif"
    )


def seen(settings: Settings) -> int:
    """Return how many real images the discriminator is shown in a step."""
    return settings.critic_steps * settings.batch_size


# ---- save


USAGE = """
import torch
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
pipeline(4, seeds{labels}).images[0].save("sample.png")

import genkit

pipeline = genkit.load(model)  # the same, without running that code
"""


def save(
    run: Run,
    settings: Settings,
    train: Images,
    val: Images,
    metrics: dict[str, float],
    folder: Path,
) -> None:
    """Write the model as diffusers does, with its card; weights that are not averaged beside it."""
    network, raw = run.weights("generator"), run.networks["generator"].module
    vendoring.save_pipeline(gan.GANPipeline(network), folder)
    gan.Generator.save_pretrained(raw, folder / "generator", variant=gan.RAW)
    shown = run.progress.step * seen(settings)
    told = f", labels={[i % len(train.names) for i in range(4)]}" if settings.conditional else ""
    weights = "averaged" if settings.ema else "raw"
    text = card.card(
        run.folder.path,
        title="A generative adversarial network of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, preset {settings.preset}, trained on "
        f"{len(train):,} images of {settings.images}, of which it was shown {shown:,}.",
        usage=USAGE.format(labels=told),
        figures=metrics,
        protocol=f"{settings.eval_samples:,} images of the seeds 0 and up, {weights} weights, "
        f"float32, seen by {settings.extractor or 'their pixels'}; images {train.sha256}, compared "
        f"with {val.sha256}; seed {settings.seed}.",
        data=settings.images,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
