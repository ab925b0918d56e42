"""Train a VAE-GAN on images: a variational autoencoder whose images a discriminator compares.

    accelerate launch recipes/train_vaegan.py
    accelerate launch recipes/train_vaegan.py --images photos --resolution 32
    accelerate launch recipes/train_vaegan.py --output_dir runs/vaegan --resume

Errors are not of pixels but of the features that a discriminator sees by, and what is drawn must
pass for real (Larsen et al. 2016, https://arxiv.org/abs/1512.09300). What is saved is the
autoencoder alone, as recipes/train_vae.py saves its own: at any time the best so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genkit import machine
from genkit.data import images, pixels, tables
from genkit.data.images import Images
from genkit.data.order import Order, blocks
from genkit.errors import clean_errors
from genkit.hub import card, gallery, vendoring
from genkit.models import autoencoder, autoencoder_losses, gan, gan_losses
from genkit.models.gan_losses import Batch, Game
from genkit.training.optim import optimizers, player_optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting
from genkit.vision import image_grid

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/vaegan", "folder of the run and of the model")
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
    widths: list[int] = setting((16, 32, 64), "of the encoder's layers; the decoder mirrors them")
    discriminator_widths: list[int] | None = setting(None, "of its features, the full size first")
    latent_dim: int = setting(32, "length of the latent vector")
    beta: float = setting(1.0, "weight of the divergence from the prior")
    gamma: float = setting(0.01, "weight of rebuilding against passing for real, in the decoder")
    loss: str = setting("relativistic", ", ".join(gan_losses.LOSSES))
    r1: float = setting(1.0, "weight of the squared gradient at real images")
    r2: float = setting(1.0, "weight of the squared gradient at generated images")
    penalty_every: int = setting(4, "steps between penalties, which then weigh as much")
    clip: float = setting(0.0, "largest norm of the gradient; 0 for no limit")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        for name in ("latent_dim", "gamma", "penalty_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.compile:
            raise ValueError(
                "compile: penalties need the gradient of a gradient, which compiled code does not "
                "have; leave it out"
            )
        if self.loss == "wasserstein" and not self.r1:
            raise ValueError("loss: the wasserstein loss has no bound of its own; add r1")
        if not self.beta >= 0:
            raise ValueError(f"beta must be 0 or more, got {self.beta}")
        for width in (*self.widths, *(self.discriminator_widths or [])):
            if width < 1:
                raise ValueError(f"widths must be 1 or more, got {width}")


SIDE = 8  # of the grid of samples
BLOCK = 100  # images judged together
LIMIT = 8  # the largest side of a map of features that are compared
BETAS = (0.0, 0.99)  # of AdamW's averages: an adversary's gradients turn


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    values: dict[str, Any] = {"batch_size": 64, "ema": 0.999, "optimizer": "muon"}
    values |= {"max_steps": 20_000} if device == "cuda" else {"max_minutes": 5.0}
    values |= {"learning_rate": 1e-3, "muon_learning_rate": 0.02, "weight_decay": 0.0}
    return values | {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    game = Game(settings.loss, settings.r1, settings.r2)

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
        network, discriminator = make(settings, train)
        model = run.network("model", network, optimizers(network, settings))
        rates = player_optimizers(discriminator, settings, BETAS)
        scoring = run.network("discriminator", discriminator, rates, averaged=False)
        # each sees the other as it is: only its own gradients are exchanged
        losing = run.autocast(partial(discriminator_loss, game, scoring, network))
        winning = run.autocast(partial(model_loss, settings, game, discriminator, model, network))
        look_up = partial(batch, settings, train, run.device)
        run.log(
            f"{network.num_parameters():,} + {discriminator.num_parameters():,} parameters · "
            f"{len(train):,} images of {' x '.join(map(str, train.size))} to train on, "
            f"{len(val):,} to validate"
        )

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.restore()
        for step in run.steps():
            penalty = settings.penalty_every if step % settings.penalty_every == 0 else 0
            for rows in run.rows():
                run.backward(losing(*look_up(order(rows)[1]), penalty), "discriminator")
            run.update("discriminator")
            discriminator.requires_grad_(False)
            for rows in run.rows():
                run.backward(winning(*look_up(order(rows)[1])))
            run.update()
            discriminator.requires_grad_(True)
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, val)
                    if run.report("mse", metrics):
                        run.publish(partial(save, run, settings, train, val, metrics))
        run.log(f"the best model is in {run.folder.path}")


def make(settings: Settings, train: Images) -> tuple[autoencoder.Autoencoder, gan.Discriminator]:
    """Build new networks."""
    network = autoencoder.Autoencoder(
        image_size=train.size,
        latent_dim=settings.latent_dim,
        network="conv",
        widths=settings.widths,
        variational=True,
        likelihood="gaussian",
    )
    _, height, width = train.size
    patch = 4 if min(height, width) > 16 else 2
    halvings = max(0, math.ceil(math.log2(max(height, width) / patch / LIMIT)))
    widths = settings.discriminator_widths or [64] * (halvings + 1)
    discriminator = gan.Discriminator(image_size=train.size, widths=widths, patch=patch)
    return network, discriminator


# ---- loss


def batch(
    settings: Settings, train: Images, device: torch.device, which: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up images, and draw noise for their latents and for as many new ones."""
    noise = torch.randn(2, len(which), settings.latent_dim)
    return train.batch(which, device), noise.to(device)


def discriminator_loss(
    game: Game,
    scoring: torch.nn.Module,
    network: autoencoder.Autoencoder,
    real: torch.Tensor,
    noise: torch.Tensor,
    penalty: float,
) -> torch.Tensor:
    """Tell real images from what is rebuilt, and from what is drawn."""
    with torch.no_grad():
        latents = autoencoder.reparameterize(network.encode(real).latent_dist, noise[0])
    return game.discriminator_loss(scoring, network.predict, pairs(real, latents, noise), penalty)


def model_loss(
    settings: Settings,
    game: Game,
    discriminator: gan.Discriminator,
    model: torch.nn.Module,
    network: autoencoder.Autoencoder,
    real: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Rebuild what the discriminator sees, and pass for real.

    The encoder is not told what passes. The paper gives the decoder gamma times the first and once
    the second; here all of that is divided by gamma, which changes its rate alone.
    """
    seen = model(real, noise[:1])
    kl = autoencoder_losses.gaussian_kl(seen["mean"], seen["logvar"]).sum(1).mean()
    with torch.no_grad():
        wanted = discriminator.features(real).float()
    features = discriminator.features(seen["prediction"][0]).float()
    error = (features - wanted).square().sum(1).mean() / 2  # nats of a Gaussian of variance 1
    batch = pairs(real, seen["latents"][0].detach(), noise)
    passing = game.generator_loss(discriminator, network.predict, batch)
    return settings.beta * kl + error + passing / settings.gamma


def pairs(real: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> Batch:
    """Put half of the real images beside their reconstructions, the others beside new images."""
    half = len(real) // 2
    u = torch.zeros(len(real), gan_losses.UNIFORMS, device=real.device)  # none is taken
    return Batch(real, torch.cat([latents[:half], noise[1, half:]]), u)


# ---- evaluate


@torch.inference_mode()
def evaluate(run: Run, val: Images) -> dict[str, float]:
    """Judge the model on the validation images, and draw what it makes of some."""
    network = run.weights().eval()
    chunks = list(blocks(len(val), BLOCK))
    sums = torch.zeros(2, dtype=torch.float64)
    for i in range(run.accelerator.process_index, len(chunks), run.processes):
        real = val.batch(chunks[i], run.device)
        seen = network(real)
        error = F.mse_loss(seen["prediction"][0], real).item() / 4  # of values in [0, 1]
        kl = autoencoder_losses.gaussian_kl(seen["mean"], seen["logvar"]).sum(1).mean().item()
        sums += len(real) * torch.tensor([error, kl], dtype=torch.float64)
    error, kl = (run.sum(sums) / len(val)).tolist()
    if run.is_main:
        draw(run, autoencoder.AutoencoderPipeline(network), val)
    network.train()
    return {"mse": error, "kl": kl}


def draw(run: Run, pipeline: autoencoder.AutoencoderPipeline, val: Images) -> None:
    """Draw samples of the same seeds at every evaluation, their progress, and reconstructions."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(SIDE * SIDE)]
    made = pipeline(SIDE * SIDE, generators, output_type="pt").images
    folder = run.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    image_grid.grid(2 * made - 1, folder / f"step-{run.progress.step:08d}.png", SIDE)
    grids = gallery.list_samples(run.folder.path, ".png")
    names = [f"step {gallery.step_of(grid)}" for grid in grids]
    image_grid.progress(grids, names, run.folder.path / "progress.png", SIDE)
    image_grid.film(grids, names, run.folder.path / "progress.gif")
    some = val.batch(np.unique(np.linspace(0, len(val) - 1, 12, dtype=int)))
    named = {"original": some, "reconstruction": pipeline.reconstruct(some)}
    image_grid.rows(named, run.folder.path / "reconstructions.png")


# ---- save


USAGE = """
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
pipeline(4).images[0].save("sample.png")

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
    """Write the model as diffusers does, with its card."""
    network, weights = run.weights(), "averaged" if settings.ema else "raw"
    vendoring.save_pipeline(autoencoder.AutoencoderPipeline(network), folder)
    text = card.card(
        run.folder.path,
        title="A VAE-GAN of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} for {run.progress.step:,} steps beside a discriminator.",
        usage=USAGE,
        figures=metrics,
        protocol=f"Over all {len(val):,} validation images: mse is a pixel's squared error in "
        f"[0, 1], rebuilt from mean latents; kl is in nats an image; {weights} weights, float32; "
        f"images {train.sha256}, validation {val.sha256}; seed {settings.seed}.",
        data=settings.images,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
