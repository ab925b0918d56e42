"""Train a generative adversarial network on images: a generator against a discriminator.

    accelerate launch recipes/train_gan.py
    accelerate launch recipes/train_gan.py --images train.parquet --extractor runs/classifier
    accelerate launch recipes/train_gan.py --preset wgan_gp --conditional --output_dir runs/wgan
    accelerate launch recipes/train_gan.py --output_dir runs/gan --resume

Presets: modern (the default), dcgan, wgan_gp and ac_wgan; any setting that is given replaces the
preset's. The model in the output folder is at any time the best so far, in diffusers' layout;
loss.png shows losses and variety, and the log reports mode collapse when there is any.
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
from genkit.data.images import Images, proportional_labels
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card, download, vendoring
from genkit.metrics.collapse import find_troubles
from genkit.metrics.monitor import FEWEST, Monitor, coverage_k
from genkit.metrics.neighbours import K
from genkit.models import gan, gan_losses
from genkit.models.gan_losses import Batch, Game
from genkit.models.gan_presets import PRESETS, choose_values
from genkit.training import curves
from genkit.training.image_data import ImageSettings, load_for_run
from genkit.training.optim import player_optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.vision import gallery
from genkit.vision.sampling import draw_samples

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/gan", "folder of the run and of the model")
    preset: str = setting("modern", "networks, loss and rates", choices=tuple(PRESETS))
    network: str = setting(CHOSEN, "networks: those of another preset", choices=tuple(PRESETS))
    widths: list[int] | None = setting(
        None, "features of the generator, the smallest map first", least=1
    )
    discriminator_widths: list[int] | None = setting(None, "features of the discriminator", least=1)
    blocks: int = setting(1, "residual blocks at each size, in the networks of modern", least=1)
    latent_dim: int = setting(CHOSEN, "length of the noise vector", least=1)
    normalize: bool = setting(False, "batch normalisation, in networks other than modern's")
    spectral: bool = setting(False, "spectral normalisation of the discriminator")
    conditional: bool = setting(False, "class-conditional model; always so in ac_wgan")
    generator_conditioning: str | None = setting(
        None,
        "class-conditioning of the generator, with --conditional",
        choices=gan.GENERATOR_CONDITIONING,
    )
    discriminator_conditioning: str | None = setting(
        None, "class-conditioning of the discriminator, too", choices=gan.DISCRIMINATOR_CONDITIONING
    )
    loss: str = setting(CHOSEN, "loss of both networks", choices=gan_losses.LOSSES)
    critic_steps: int = setting(CHOSEN, "discriminator steps for each generator step", least=1)
    r1: float = setting(CHOSEN, "weight of the squared gradient at real images", least=0)
    r2: float = setting(CHOSEN, "weight of the squared gradient at generated images", least=0)
    gradient_penalty: float = setting(CHOSEN, "weight of (gradient norm - 1)² in between", least=0)
    penalty_every: int = setting(
        CHOSEN, "steps between two penalties, whose weight is multiplied by it", least=1
    )
    weight_clip: float = setting(CHOSEN, "limit of the discriminator's weights", least=0)
    smoothing: float = setting(0.0, "subtracted from the target of real images", least=0, below=1)
    label_noise: float = setting(CHOSEN, "most that is added to targets", least=0, below=1)
    instance_noise: float = setting(
        0.0, "standard deviation of noise on images, falling to 0", least=0
    )
    augmentations: list[str] = setting(
        (), "augmentations of real and generated images", choices=gan_losses.POLICIES
    )
    packing: int = setting(1, "images that the discriminator scores together", least=1)
    optimizer: str = setting(
        CHOSEN, "optimizer of both networks", choices=("adamw", "muon", "rmsprop")
    )
    discriminator_learning_rate: float = setting(
        CHOSEN, "peak learning rate; default: learning_rate", above=0
    )
    betas: list[float] = setting(CHOSEN, "two decay rates of AdamW's averages", least=0, below=1)
    momentum: float = setting(0.5, "of Muon; more makes both networks oscillate", least=0, below=1)
    warmup: float = setting(
        CHOSEN, "part of the run over which the rate rises from 0", least=0, most=1
    )
    decay: float = setting(
        CHOSEN, "part of the run, at its end, over which the rate falls to 0", least=0, most=1
    )
    clip: float = setting(0.0, "largest norm of the gradient; 0 for no limit", least=0)
    extractor: str | None = setting(
        None, "classifier whose features compare images; default: their pixels"
    )
    eval_samples: int = setting(2000, "generated images of an evaluation", least=K + 1)
    stop_on_collapse: bool = setting(False, "stop at mode collapse")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        self.conditional = self.conditional or self.preset == "ac_wgan"
        super().__post_init__()
        download.check_exists(self.extractor, "--extractor")
        if self.compile:
            raise ValueError("--compile is impossible: a penalty needs the gradient of a gradient")
        for name in ("generator_conditioning", "discriminator_conditioning"):
            if getattr(self, name) and not self.conditional:
                raise ValueError(f"--{name} {getattr(self, name)} requires --conditional")
        if self.betas is not None and len(self.betas) != 2:
            raise ValueError(f"--betas must be two numbers, got {self.betas}")
        if self.normalize and (self.network or self.preset) == "modern":
            raise ValueError("--normalize requires networks other than modern's: --network dcgan")


LIMIT = 8  # the largest side of the smallest feature map of modern networks


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    values = choose_values(
        settings.preset,
        loss=settings.loss,
        weight_clip=settings.weight_clip,
        learning_rate=settings.learning_rate,
        conditional=settings.conditional,
    )
    steps = values.pop("max_steps") or (50_000 if device == "accelerator" else None)
    run = {"max_steps": steps} if steps else {"max_minutes": 5.0}
    rates = {"muon_learning_rate": 0.02, "weight_decay": 0.0}
    half = settings.preset == "modern" and machine.fast_bf16()
    step = {"mixed_precision": "bf16" if half else "no", "network": settings.preset}
    return values | run | rates | step | {"compile": False}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    game = make_game(settings)

    with Run(settings) as run:
        # ---- data
        train, val, order = load_for_run(run, settings, FEWEST)
        check_packing(settings, run)

        # ---- model
        generator, discriminator = make_networks(settings, train)
        d_rate = settings.discriminator_learning_rate
        d_settings = dataclasses.replace(settings, learning_rate=d_rate)
        rates = partial(player_optimizers, betas=settings.betas, momentum=settings.momentum)
        wrapped_generator = run.network("generator", generator, rates(generator, settings))
        wrapped_discriminator = run.network(
            "discriminator", discriminator, rates(discriminator, d_settings), averaged=False
        )
        # each loss calls the other network unwrapped: only its own gradients are exchanged
        d_loss = run.autocast(partial(game.discriminator_loss, wrapped_discriminator, generator))
        g_loss = run.autocast(partial(game.generator_loss, discriminator, wrapped_generator))
        get_batch = partial(make_batch, run, settings, train, order)
        run.log(
            f"{generator.num_parameters():,} + {discriminator.num_parameters():,} parameters · "
            f"{len(train):,} images of {' x '.join(map(str, train.size))} to train on, "
            f"{len(val):,} to compare with"
        )
        monitor = run.on_main_process(
            lambda: Monitor(val, settings.extractor, settings.eval_samples)
        )

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.restore()
        if monitor and not settings.dry_run:  # figures of the log are relative to the baseline
            run.folder.write("baseline.json", json.dumps(monitor.baseline))
        for step in run.steps():
            penalty = settings.penalty_every if step % settings.penalty_every == 0 else 0
            for turn in range(settings.critic_steps):
                for rows in run.rows(turn, settings.critic_steps):
                    run.backward(d_loss(get_batch(rows, 0), penalty), "discriminator")
                run.update("discriminator")
                if settings.weight_clip:
                    gan_losses.clip_weights(discriminator, settings.weight_clip)
            discriminator.requires_grad_(False)
            for rows in run.rows(settings.critic_steps - 1, settings.critic_steps):
                run.backward(g_loss(get_batch(rows, 1)), "generator")
            run.update("generator")
            discriminator.requires_grad_(True)
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, monitor, train)
                    plot = partial(plot_curves, settings, monitor)
                    if run.report("distance", metrics, curve=plot):
                        run.publish(partial(save_model, run, settings, train, val, metrics))
                    if report_collapse(run, settings, monitor) and settings.stop_on_collapse:
                        run.result(f"the best model until now is in {run.folder.path}")
                        run.stop()


def make_game(settings: Settings) -> Game:
    """Return the loss with its regularizers; refuse those that exclude each other."""
    if settings.packing > 1 and settings.conditional:
        raise ValueError(f"--packing {settings.packing} excludes --conditional")
    penalized = [n for n in ("r1", "r2", "gradient_penalty") if getattr(settings, n)]
    if settings.normalize and penalized:
        raise ValueError(
            f"--normalize mixes the images of a batch and excludes --{penalized[0]}, a penalty on "
            "each image"
        )
    limited = settings.gradient_penalty or settings.weight_clip or settings.spectral or settings.r1
    if settings.loss == "wasserstein" and not limited:
        raise ValueError(
            "--loss wasserstein requires --gradient_penalty, --weight_clip, --r1 or --spectral"
        )
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Game)}
    return Game(**given | {"augmentations": tuple(settings.augmentations)})


def check_packing(settings: Settings, run: Run) -> None:
    """Refuse rows of a process that cannot be packed for the discriminator."""
    parts = run.processes * settings.gradient_accumulation
    if run.batch_size // parts % settings.packing:
        raise ValueError(
            f"--packing {settings.packing} does not divide the {run.batch_size // parts} rows "
            f"of a process; give a --batch_size of {parts * settings.packing} times a number"
        )


def make_networks(settings: Settings, train: Images) -> tuple[gan.Generator, gan.Discriminator]:
    """Build both networks."""
    chosen = PRESETS[settings.network]
    g_options, d_options = dict(chosen.generator), dict(chosen.discriminator)
    channels, height, width = train.size
    shared: dict[str, Any] = {"normalize": settings.normalize}
    if settings.network == "modern":
        patch = 4 if min(height, width) > 16 else 2
        halvings = max(0, math.ceil(math.log2(max(height, width) / patch / LIMIT)))
        shared = {"widths": [64] * (halvings + 1), "patch": patch, "blocks": settings.blocks}
    shared |= {"labels": train.count_classes()} if settings.conditional else {}
    g_options |= shared
    d_options |= shared
    g_options |= {"widths": settings.widths} if settings.widths else {}
    d_options |= {"widths": settings.discriminator_widths} if settings.discriminator_widths else {}
    if settings.conditional:
        g_options["conditioning"] = settings.generator_conditioning
        d_options["conditioning"] = settings.discriminator_conditioning
    generator = gan.Generator(image_size=train.size, latent_dim=settings.latent_dim, **g_options)
    packed = (channels * settings.packing, height, width)
    discriminator = gan.Discriminator(image_size=packed, spectral=settings.spectral, **d_options)
    if settings.network != "modern":
        gan_losses.initialize_weights(generator, chosen.std)
        if not settings.spectral:  # spectral normalisation cancels the scale of weights
            gan_losses.initialize_weights(discriminator, chosen.std)
    return generator, discriminator


def make_batch(
    run: Run, settings: Settings, train: Images, order: Order, rows: np.ndarray, network: int
) -> Batch:
    """Look up images and draw random numbers: the same for a row at any number of processes."""
    _, which = order(rows)
    slots = torch.from_numpy(rows - run.first_row)
    words = np.random.SeedSequence((settings.seed, run.turn, network))
    seed = int(words.generate_state(1, np.uint64)[0])
    generator, count = torch.Generator().manual_seed(seed), run.batch_size
    noise = torch.randn(count, settings.latent_dim, generator=generator)[slots]
    u = torch.rand(count, gan_losses.UNIFORMS, generator=generator)[slots]
    instance_noise = None
    strength = settings.instance_noise * max(0.0, 1 - run.fraction)
    if strength:
        normal = torch.randn(2, count, *train.size, generator=generator)
        instance_noise = (strength * normal[:, slots]).to(run.device)
    labels = train.classes(which, run.device) if settings.conditional else None
    real = train.batch(which, run.device)
    return Batch(real, noise.to(run.device), u.to(run.device), labels, instance_noise)


# ---- evaluate


def evaluate(
    run: Run, settings: Settings, monitor: Monitor | None, train: Images
) -> dict[str, float]:
    """Evaluate generated images of fixed seeds on the main process, and save some."""
    network = run.weights("generator").eval()
    metrics: dict[str, float] = {}
    if monitor is not None:
        pipeline = gan.GANPipeline(network)
        labels = proportional_labels(train, settings.eval_samples) if settings.conditional else None
        metrics = monitor.measure(
            draw_samples(pipeline, range(settings.eval_samples), labels), labels
        )
        save_pictures(run, settings, pipeline, train)
    network.train()
    return run.broadcast(metrics)


def plot_curves(
    settings: Settings, monitor: Monitor | None, log: list[dict[str, Any]], path: Path
) -> None:
    """Plot losses and metrics, with the troubles that they show; on the main process."""
    assert monitor is not None, "only the main process draws"
    curves.plot_game(
        log, monitor.baseline, find_troubles(log, settings.loss, monitor.baseline), path
    )


def report_collapse(run: Run, settings: Settings, monitor: Monitor | None) -> bool:
    """Log the troubles of the last evaluation; return, on all processes, whether one is fatal."""
    fatal = 0.0
    if monitor is not None:
        for trouble in find_troubles(run.folder.log(), settings.loss, monitor.baseline):
            if trouble.step == run.progress.step:
                run.log(f"! {trouble}")
                fatal += trouble.fatal
    return run.broadcast({"fatal": fatal})["fatal"] > 0


def save_pictures(run: Run, settings: Settings, pipeline: gan.GANPipeline, train: Images) -> None:
    """Save samples of the same seeds at every evaluation."""
    labels = torch.arange(gallery.COUNT) % len(train.names) if settings.conditional else None
    generators = gallery.sample_generators()
    samples = pipeline(gallery.COUNT, generators, labels, output_type="pt").images
    gallery.save_samples(
        run.folder.path,
        run.progress.step,
        2 * samples - 1,
    )


# ---- save


def save_model(
    run: Run, settings: Settings, train: Images, val: Images, metrics: dict[str, float], path: Path
) -> None:
    """Write the model as diffusers does, with its card, and beside it the raw weights."""
    network, raw = run.weights("generator"), run.networks["generator"].module
    vendoring.save_pipeline(gan.GANPipeline(network), path)
    gan.Generator.save_pretrained(raw, path / "generator", variant=gan.RAW)
    shown = run.progress.rows * settings.critic_steps  # real images
    labels = f", labels={[i % len(train.names) for i in range(4)]}" if settings.conditional else ""
    card.write_card(
        path,
        run.folder.path,
        title="A generative adversarial network of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, preset {settings.preset}, trained on "
        f"{len(train):,} images of {settings.images}, of which it was shown {shown:,}.",
        usage=card.PIPELINE_USAGE.format(labels=labels),
        figures=metrics,
        protocol=f"{settings.eval_samples:,} images of the seeds 0 and up, compared with "
        f"{len(val):,} validation images by {settings.extractor or 'their pixels'}; coverage "
        f"has k = {coverage_k(settings.eval_samples, len(val))}.",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
