"""Train a VAE-GAN on images: a variational autoencoder with the loss of a discriminator.

    accelerate launch recipes/train_vaegan.py
    accelerate launch recipes/train_vaegan.py --images photos --resolution 32
    accelerate launch recipes/train_vaegan.py --output_dir runs/vaegan --resume

The reconstruction error is that of a discriminator's features, not of pixels, and the decoder is
trained as a GAN's generator, too (Larsen et al. 2016, https://arxiv.org/abs/1512.09300). The model
in the output folder is the autoencoder alone, at any time the best so far, in diffusers' layout.
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
from torch import Tensor, nn

from genkit import machine
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.errors import clean_errors
from genkit.hub import card, vendoring
from genkit.models import autoencoder, autoencoder_losses, gan, gan_losses
from genkit.models.gan_losses import Batch, Game
from genkit.training.curves import loss_curve
from genkit.training.image_data import ImageSettings, load_for_run
from genkit.training.optim import optimizers, player_optimizers
from genkit.training.run import Run
from genkit.training.settings import parse, setting
from genkit.vision import gallery, image_grid

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/vaegan", "folder of the run and of the model")
    widths: list[int] = setting(
        (16, 32, 64), "features of the encoder's layers; the decoder mirrors them", least=1
    )
    discriminator_widths: list[int] | None = setting(
        None, "features of the discriminator, the full size first", least=1
    )
    latent_dim: int = setting(32, "length of the latent vector", least=1)
    beta: float = setting(1.0, "weight of the KL divergence from the prior", least=0)
    gamma: float = setting(
        0.01, "weight of the reconstruction against the adversarial loss", above=0
    )
    loss: str = setting("relativistic", "adversarial loss", choices=gan_losses.LOSSES)
    r1: float = setting(1.0, "weight of the squared gradient at real images", least=0)
    r2: float = setting(1.0, "weight of the squared gradient at generated images", least=0)
    penalty_every: int = setting(
        4, "steps between two penalties, whose weight is multiplied by it", least=1
    )
    clip: float = setting(0.0, "largest norm of the gradient; 0 for no limit", least=0)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if self.compile:
            raise ValueError("--compile is impossible: a penalty needs the gradient of a gradient")
        if self.loss == "wasserstein" and not self.r1:
            raise ValueError("--loss wasserstein requires --r1 above 0")


BLOCK = 100  # images evaluated together
LIMIT = 8  # the largest side of the last feature map of the discriminator
BETAS = (0.0, 0.99)  # of AdamW: no momentum, as the direction of adversarial gradients changes


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    values: dict[str, Any] = {"batch_size": 64, "ema": 0.999, "optimizer": "muon"}
    values |= {"max_steps": 20_000} if device == "accelerator" else {"max_minutes": 5.0}
    values |= {"learning_rate": 1e-3, "muon_learning_rate": 0.02, "weight_decay": 0.0}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    return values | precision | {"compile": False}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    game = Game(settings.loss, settings.r1, settings.r2)

    with Run(settings) as run:
        # ---- data
        train, val, order = load_for_run(run, settings)

        # ---- model
        network, discriminator = make_networks(settings, train)
        model = run.network("model", network, optimizers(network, settings))
        rates = player_optimizers(discriminator, settings, BETAS)
        wrapped = run.network("discriminator", discriminator, rates, averaged=False)
        # each loss calls the other network unwrapped: only its own gradients are exchanged
        d_loss = run.autocast(partial(discriminator_loss, game, wrapped, network))
        g_loss = run.autocast(partial(model_loss, settings, game, discriminator, model, network))
        get_batch = partial(make_batch, settings, train, run.device)
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
                run.backward(d_loss(*get_batch(order(rows)[1]), penalty), "discriminator")
            run.update("discriminator")
            discriminator.requires_grad_(False)
            for rows in run.rows():
                run.backward(g_loss(*get_batch(order(rows)[1])))
            run.update()
            discriminator.requires_grad_(True)
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, val)
                    if run.report("mse", metrics, curve=partial(loss_curve, unit="")):
                        run.publish(partial(save_model, run, settings, train, val, metrics))


def make_networks(
    settings: Settings, train: Images
) -> tuple[autoencoder.Autoencoder, gan.Discriminator]:
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


def make_batch(
    settings: Settings, train: Images, device: torch.device, which: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Look up images, and draw noise for their latents and for new ones, (2, n, latent_dim)."""
    noise = torch.randn(2, len(which), settings.latent_dim)
    return train.batch(which, device), noise.to(device)


def discriminator_loss(
    game: Game,
    wrapped: nn.Module,
    network: autoencoder.Autoencoder,
    real: Tensor,
    noise: Tensor,
    penalty: float,
) -> Tensor:
    """Loss of the discriminator: real images against reconstructions and samples."""
    with torch.no_grad():
        latents = autoencoder.reparameterize(network.encode(real).latent_dist, noise[0])
    batch = pair_images(real, latents, noise)
    return game.discriminator_loss(wrapped, network.predict, batch, penalty)


def model_loss(
    settings: Settings,
    game: Game,
    discriminator: gan.Discriminator,
    model: nn.Module,
    network: autoencoder.Autoencoder,
    real: Tensor,
    noise: Tensor,
) -> Tensor:
    """Loss of the autoencoder: divergence, error of features, and the generator's loss.

    The adversarial loss has no gradient for the encoder. The paper weighs the reconstruction by
    gamma in the decoder; here the whole loss is divided by gamma, which changes only its rate.
    """
    out = model(real, noise[:1])
    kl = autoencoder_losses.gaussian_kl(out["mean"], out["logvar"]).sum(1).mean()
    with torch.no_grad():
        wanted = discriminator.features(real).float()
    features = discriminator.features(out["prediction"][0]).float()
    error = (features - wanted).square().sum(1).mean() / 2  # nats of a Gaussian of variance 1
    batch = pair_images(real, out["latents"][0].detach(), noise)
    adversarial = game.generator_loss(discriminator, network.predict, batch)
    return settings.beta * kl + error + adversarial / settings.gamma


def pair_images(real: Tensor, latents: Tensor, noise: Tensor) -> Batch:
    """Pair half of the real images with their reconstructions, the others with samples."""
    half = len(real) // 2
    u = torch.zeros(len(real), gan_losses.UNIFORMS, device=real.device)  # none is used
    return Batch(real, torch.cat([latents[:half], noise[1, half:]]), u)


# ---- evaluate


@torch.inference_mode()
def evaluate(run: Run, val: Images) -> dict[str, float]:
    """Evaluate the model on the validation images, and save pictures."""
    network = run.weights().eval()
    chunks = list(blocks(len(val), BLOCK))
    sums = torch.zeros(2, dtype=torch.float64)
    for i in range(run.accelerator.process_index, len(chunks), run.processes):
        real = val.batch(chunks[i], run.device)
        out = network(real)
        error = F.mse_loss(out["prediction"][0], real).item() / 4  # of values in [0, 1]
        kl = autoencoder_losses.gaussian_kl(out["mean"], out["logvar"]).sum(1).mean().item()
        sums += len(real) * torch.tensor([error, kl], dtype=torch.float64)
    error, kl = (run.sum(sums) / len(val)).tolist()
    if run.is_main:
        save_pictures(run, autoencoder.AutoencoderPipeline(network), val)
    network.train()
    return {"mse": error, "kl": kl}


def save_pictures(run: Run, pipeline: autoencoder.AutoencoderPipeline, val: Images) -> None:
    """Save samples of the same seeds at every evaluation, and reconstructions."""
    generators = gallery.sample_generators()
    samples = pipeline(gallery.COUNT, generators, output_type="pt").images
    gallery.save_samples(run.folder.path, run.progress.step, 2 * samples - 1)
    images = val.batch(np.unique(np.linspace(0, len(val) - 1, 12, dtype=int)))
    named = {"original": images, "reconstruction": pipeline.reconstruct(images)}
    image_grid.rows(named, run.folder.path / "reconstructions.png")


# ---- save


def save_model(
    run: Run, settings: Settings, train: Images, val: Images, metrics: dict[str, float], path: Path
) -> None:
    """Write the model as diffusers does, with its card."""
    network = run.weights()
    vendoring.save_pipeline(autoencoder.AutoencoderPipeline(network), path)
    card.write_card(
        path,
        run.folder.path,
        title="A VAE-GAN of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} for {run.progress.step:,} steps beside a discriminator.",
        usage=card.PIPELINE_USAGE.format(labels=""),
        figures=metrics,
        protocol=f"Over all {len(val):,} validation images: mse is a pixel's squared error in "
        "[0, 1], reconstructed from mean latents; kl is in nats an image.",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
