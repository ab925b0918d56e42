"""Train a variational autoencoder on images: it generates images, and maps them to latents.

    accelerate launch recipes/train_vae.py
    accelerate launch recipes/train_vae.py --images photos --resolution 32 --network conv
    accelerate launch recipes/train_vae.py --images photos --network spatial --adversarial 0.1
    accelerate launch recipes/train_vae.py --output_dir runs/vae --resume

Latents are vectors, of genkit's dense or convolutional networks, or feature maps, of diffusers'
AutoencoderKL (--network spatial), in which train_diffusion --latent trains. The model in the output
folder is at any time the best so far, with --adversarial the last, in diffusers' layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genkit import machine
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.errors import clean_errors
from genkit.hub import card, vendoring
from genkit.models import autoencoder, autoencoder_losses
from genkit.models.translation_losses import PatchDiscriminator
from genkit.training.image_data import ImageSettings, load_for_run
from genkit.training.optim import optimizers, player_optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.vision import gallery, image_grid

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/vae", "folder of the run and of the model")
    network: str = setting(
        "dense",
        "dense or conv, whose latents are vectors, or spatial, AutoencoderKL",
        choices=(*autoencoder.NETWORKS, "spatial"),
    )
    widths: list[int] = setting(
        CHOSEN, "features of the encoder's layers; the decoder mirrors them", least=1
    )
    latent_dim: int = setting(
        CHOSEN, "length of the latent vector; latent channels of spatial", least=1
    )
    likelihood: str = setting(CHOSEN, "of a pixel", choices=autoencoder.LIKELIHOODS)
    scale: float | None = setting(
        None, "deviation of a Gaussian or Laplace likelihood; images span -1 to 1", above=0
    )
    adversarial: float = setting(
        0.0, "nats a pixel that the loss of a patch discriminator weighs; 0 for none", least=0
    )
    binarize: bool = setting(False, "binarize each pixel by a Bernoulli draw, every time anew")
    conditional: bool = setting(False, "condition encoder and decoder on the class")
    beta: float = setting(1.0, "weight of the KL divergence from the prior", least=0)
    kl_warmup: float = setting(
        0.0, "part of the run over which that weight rises from 0", least=0, most=1
    )
    free_bits: float = setting(0.0, "nats of each latent that the loss leaves free", least=0)
    importance_samples: int = setting(
        1, "samples of the loss; more than 1 train the importance-weighted bound", least=1
    )
    sample_warmup: float | None = setting(
        None, "part of the run, at its start, with 1 importance sample", least=0, most=1
    )
    nll_samples: int = setting(200, "samples that estimate the likelihood of an image", least=1)
    nll_images: int = setting(
        1000, "validation images whose likelihood is estimated; 0 for none", least=0
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if self.sample_warmup is not None and self.importance_samples == 1:
            raise ValueError("--sample_warmup requires --importance_samples of 2 or more")
        if self.importance_samples > 1 and (self.beta, self.free_bits, self.kl_warmup) != (1, 0, 0):
            raise ValueError("--importance_samples excludes --beta, --free_bits and --kl_warmup")
        if self.network == "spatial" and (self.conditional or self.likelihood == "bernoulli"):
            other = "--conditional" if self.conditional else "--likelihood bernoulli"
            raise ValueError(f"--network spatial excludes {other}")
        if self.binarize and self.likelihood in ("gaussian", "laplace"):
            raise ValueError("--binarize requires --likelihood bernoulli")
        if self.adversarial and (self.network != "spatial" or self.importance_samples > 1):
            needs = "requires --network spatial and one of --importance_samples"
            raise ValueError(f"--adversarial {self.adversarial} {needs}")


WIDTHS = {"dense": [512, 512], "conv": [16, 32, 64], "spatial": [16, 32]}
BLOCK = 100  # images evaluated together, with random numbers of their own
GAME = 0.5  # part of a run, at its start, without the discriminator
CRITIC_RATE, BETAS = 1e-3, (0.5, 0.999)  # of its Adam


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    spatial = settings.network == "spatial"
    shape: dict[str, Any] = {"widths": WIDTHS[settings.network], "latent_dim": 4 if spatial else 32}
    shape |= {"likelihood": "gaussian" if spatial else "bernoulli"}
    run: dict[str, Any] = {"batch_size": 64 if spatial else 256, "ema": 0.0}
    run |= {"max_steps": 20_000} if device == "accelerator" else {"max_minutes": 2.0}
    likelihood = settings.likelihood or shape["likelihood"]
    if settings.scale and likelihood == "bernoulli":
        raise ValueError(f"--scale {settings.scale} requires --likelihood gaussian or laplace")
    shape |= {"scale": 0.2} if likelihood != "bernoulli" else {}
    shape |= {"sample_warmup": 0.5} if settings.importance_samples > 1 else {}
    rates: dict[str, Any] = {"learning_rate": 2e-3, "muon_learning_rate": 0.02, "weight_decay": 0.0}
    # convolutions learn more from a step by Muon, and dense layers more from a minute by AdamW
    rates |= {"optimizer": "adamw" if settings.network == "dense" else "muon"}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # AutoencoderKL compiles for longer than it is faster
    return shape | run | rates | precision | {"compile": machine.can_compile() and not spatial}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        train, val, order = load_for_run(run, settings)

        # ---- model
        network = make_network(settings, train)
        model = run.network("model", network, optimizers(network, settings))
        elbo = run.autocast(partial(elbo_loss, settings, None))
        bound = run.autocast(partial(bound_loss, settings))
        game = make_game(run, settings, network, *train.size[:2]) if settings.adversarial else None
        get_batch = partial(make_batch, settings, train, wrap(network).latent_shape, run.device)
        run.log(
            f"{sum(p.numel() for p in network.parameters()):,} parameters · {len(train):,} images "
            f"of {' x '.join(map(str, train.size))} to train on, {len(val):,} to validate"
        )

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        samples = settings.importance_samples
        run.warm_up(lambda rows: elbo(model, *get_batch(order(rows)[1], 1), torch.tensor(1.0)))
        if samples > 1:
            run.warm_up(lambda rows: bound(model, *get_batch(order(rows)[1], samples)))
        run.restore()
        for _ in run.steps():
            loss = elbo
            if game and run.fraction > GAME:
                d_loss, loss = game
                for rows in run.rows():
                    run.backward(d_loss(*get_batch(order(rows)[1], 1)), "discriminator")
                run.update("discriminator")
            for rows in run.rows():
                if samples > 1 and run.fraction >= (settings.sample_warmup or 0):
                    run.backward(bound(model, *get_batch(order(rows)[1], samples)))
                else:
                    beta = kl_weight(settings, run.fraction)
                    run.backward(loss(model, *get_batch(order(rows)[1], 1), beta))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, val)
                    if run.report("val_loss", metrics) or game:  # which is not for this loss
                        run.publish(partial(save_model, run, settings, train, val, metrics))


def make_network(settings: Settings, train: Images) -> nn.Module:
    """Build a new model."""
    if settings.network == "spatial":
        vae = autoencoder.make_spatial(train.size, settings.widths, settings.latent_dim)
        return autoencoder.Spatial(vae)
    labels = train.count_classes() if settings.conditional else 0
    return autoencoder.Autoencoder(
        image_size=train.size,
        latent_dim=settings.latent_dim,
        network=settings.network,
        widths=settings.widths,
        variational=True,
        likelihood=settings.likelihood,
        labels=labels,
    )


def wrap(network: nn.Module) -> autoencoder.AutoencoderPipeline:
    """Wrap a network in a pipeline."""
    spatial = isinstance(network, autoencoder.Spatial)
    return autoencoder.AutoencoderPipeline(network.vae if spatial else network)


# ---- loss


def kl_weight(settings: Settings, fraction: float) -> Tensor:
    """Return the weight of the KL divergence; a tensor, so that the loss compiles only once."""
    risen = min(1.0, fraction / settings.kl_warmup) if settings.kl_warmup else 1.0
    return torch.tensor(settings.beta * risen)


Batch = tuple[Tensor, Tensor, Tensor | None]
Game = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def make_batch(
    settings: Settings,
    part: Images,
    latent_shape: tuple[int, ...],
    device: torch.device,
    which: np.ndarray,
    samples: int,
    generator: torch.Generator | None = None,
) -> Batch:
    """Look up images, noise for their latents and, for a conditional model, their classes."""
    images = part.batch(which)
    if settings.binarize:
        images = 2 * torch.bernoulli((images + 1) / 2, generator=generator) - 1
    noise = torch.randn(samples, len(which), *latent_shape, generator=generator)
    labels = part.classes(which, device) if settings.conditional else None
    return images.to(device), noise.to(device), labels


def elbo_loss(
    settings: Settings,
    discriminator: nn.Module | None,
    model: nn.Module,
    images: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    beta: Tensor | float,
) -> Tensor:
    """Negative evidence lower bound, estimated with one sample; and, weighted, the other's loss."""
    pixels = settings.likelihood, settings.scale or 1.0
    out = model(images, noise, labels)
    loss = autoencoder_losses.variational_loss(out, images, *pixels, beta, settings.free_bits)
    if discriminator is None:
        return loss
    fooled = autoencoder_losses.adversarial_loss(discriminator, out["prediction"][0])
    return loss + settings.adversarial * images[0].numel() * fooled


def make_game(run: Run, settings: Settings, network: nn.Module, channels: int, side: int) -> Game:
    """Add a discriminator to the run; return its loss, and the model's against it."""
    discriminator = PatchDiscriminator(channels, side)
    own = dataclasses.replace(settings, learning_rate=CRITIC_RATE, optimizer="adamw")
    players = player_optimizers(discriminator, own, BETAS)
    wrapped = run.network("discriminator", discriminator, players, averaged=False)
    # each loss calls the other network unwrapped: only its own gradients are exchanged
    d_loss = partial(autoencoder_losses.discriminator_loss, wrapped, network)
    return run.autocast(d_loss), run.autocast(partial(elbo_loss, settings, discriminator))


def bound_loss(
    settings: Settings, model: nn.Module, images: Tensor, noise: Tensor, labels: Tensor | None
) -> Tensor:
    """Negative importance-weighted bound, with one sample for each row of the noise."""
    pixels = settings.likelihood, settings.scale or 1.0
    out = model(images, noise, labels)
    return -autoencoder_losses.importance_weighted_bound(out, noise, images, *pixels).mean()


# ---- evaluate


def evaluate(run: Run, settings: Settings, val: Images) -> dict[str, float]:
    """Evaluate the model on the validation images, and save pictures."""
    network = run.weights().eval()
    pipeline, samples = wrap(network), settings.importance_samples
    chunks = list(blocks(len(val), BLOCK))
    sums = torch.zeros(5, dtype=torch.float64)
    for i in range(run.accelerator.process_index, len(chunks), run.processes):
        # random numbers depend on the block alone, so that evaluations compare
        generator = torch.Generator().manual_seed(i)
        shape = pipeline.latent_shape
        batch = make_batch(settings, val, shape, run.device, chunks[i], samples, generator)
        count = min(len(chunks[i]), max(0, settings.nll_images - BLOCK * i))
        sums += sum_metrics(settings, network, batch, count, generator)
    loss, images, kl, nats, estimated = run.sum(sums).tolist()
    metrics = {"val_loss": loss / images, "kl": kl / images}
    if settings.nll_images:
        metrics["nll"] = nats / estimated
    if run.is_main:
        save_pictures(run, settings, pipeline, val)
    network.train()
    return metrics


@torch.inference_mode()
def sum_metrics(
    settings: Settings, network: nn.Module, batch: Batch, count: int, generator: torch.Generator
) -> Tensor:
    """Return sums over images: loss, images, KL; and nats of the first `count`, count."""
    images, noise, labels = batch
    pixels = settings.likelihood, settings.scale or 1.0
    out = network(*batch)
    kl = autoencoder_losses.gaussian_kl(out["mean"], out["logvar"]).sum()
    if settings.importance_samples > 1:
        loss = -autoencoder_losses.importance_weighted_bound(out, noise, images, *pixels).mean()
    else:
        loss = autoencoder_losses.variational_loss(
            out, images, *pixels, settings.beta, settings.free_bits
        )
    nats = 0.0
    if count:
        own = labels[:count] if labels is not None else None
        nll = autoencoder_losses.negative_log_likelihood(
            network, images[:count], settings.nll_samples, *pixels, generator, own
        )
        nats = nll.sum().item()
    sums = [len(images) * loss.item(), len(images), kl.item(), nats, count]
    return torch.tensor(sums, dtype=torch.float64)


def save_pictures(run: Run, settings: Settings, pipeline: Any, val: Images) -> None:
    """Save samples of the same seeds at every evaluation, and reconstructions."""
    labels = torch.arange(gallery.COUNT) % len(val.names) if settings.conditional else None
    generators = gallery.sample_generators()
    samples = pipeline(gallery.COUNT, generators, labels, output_type="pt").images
    gallery.save_samples(run.folder.path, run.progress.step, 2 * samples - 1)
    some = np.unique(np.linspace(0, len(val) - 1, 12, dtype=int))
    shape = pipeline.latent_shape
    images, _, classes = make_batch(settings, val, shape, run.device, some, 1, generators[0])
    named = {"original": images, "reconstruction": pipeline.reconstruct(images, classes)}
    image_grid.rows(named, run.folder.path / "reconstructions.png")
    if math.prod(shape) > 1 and len(val) > 2:
        some, generator = np.arange(min(gallery.MAPPED, len(val))), torch.Generator().manual_seed(0)
        images, _, labels = make_batch(settings, val, shape, run.device, some, 1, generator)
        classes = val.classes(some) if val.labels is not None else None
        gallery.save_map(run.folder.path, pipeline, images, labels, classes, val.names)
        if settings.network != "spatial":
            gallery.save_plane(run.folder.path, pipeline, 0 if settings.conditional else None)


# ---- save


def save_model(
    run: Run, settings: Settings, train: Images, val: Images, metrics: dict[str, float], path: Path
) -> None:
    """Write the model as diffusers does, with its card."""
    network = run.weights()
    vendoring.save_pipeline(wrap(network), path)
    bound = f"{settings.importance_samples} importance samples"
    plain = f"beta {settings.beta:g} and {settings.free_bits:g} nats free in each latent"
    loss = bound if settings.importance_samples > 1 else plain
    pixels = "binarized by fixed draws" if settings.binarize else "greys scored as probabilities"
    if settings.likelihood != "bernoulli":
        pixels = f"of deviation {settings.scale:g}, so nats are of a density"
    labels = f", labels={[i % len(val.names) for i in range(4)]}" if settings.conditional else ""
    count = min(settings.nll_images, len(val))
    card.write_card(
        path,
        run.folder.path,
        title="A variational autoencoder of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{sum(p.numel() for p in network.parameters()):,} parameters, trained on "
        f"{len(train):,} images of {settings.images} for {run.progress.step:,} steps.",
        usage=card.PIPELINE_USAGE.format(labels=labels),
        figures=metrics,
        protocol=f"Nats an image over all {len(val):,} validation images, the loss with {loss}; "
        f"nll by {settings.nll_samples} importance samples on the first {count:,}. "
        f"{settings.likelihood.capitalize()} pixels, {pixels}.",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
