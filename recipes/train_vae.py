"""Train a variational autoencoder on images: it learns to draw them, and to place them on a map.

    accelerate launch recipes/train_vae.py
    accelerate launch recipes/train_vae.py --images photos --resolution 32 --network conv
    accelerate launch recipes/train_vae.py --output_dir runs/vae --resume

Latents are vectors, of dense or convolutional networks of ours, or feature maps, of diffusers'
own AutoencoderKL (--network spatial). The model in the output folder is at any time the best so
far, in diffusers' layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from genkit import machine
from genkit.data import images, pixels, tables
from genkit.data.images import Images
from genkit.data.order import Order, blocks
from genkit.errors import clean_errors
from genkit.hub import card, gallery, vendoring
from genkit.models import autoencoder, autoencoder_losses
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting
from genkit.vision import image_grid, latent, pipelines

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/vae", "folder of the run and of the model")
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
    network: str = setting("dense", "dense or conv, with latents in a vector; or spatial")
    widths: list[int] | None = setting(None, "of the encoder's layers; the decoder mirrors them")
    latent_dim: int | None = setting(None, "length of the latent vector; channels if spatial")
    likelihood: str | None = setting(None, "of a pixel: bernoulli or gaussian")
    scale: float | None = setting(None, "standard deviation of the Gaussian; images span -1 to 1")
    binarize: bool = setting(False, "toss a coin for each pixel, anew whenever it is seen")
    conditional: bool = setting(False, "tell encoder and decoder the class")
    beta: float = setting(1.0, "weight of the divergence from the prior")
    kl_warmup: float = setting(0.0, "part of the run over which that weight rises from 0")
    free_bits: float = setting(0.0, "nats of each latent that cost nothing")
    importance_samples: int = setting(1, "more than 1 train the importance-weighted bound")
    sample_warmup: float | None = setting(None, "part of the run before there is more than 1")
    nll_samples: int = setting(200, "draws an image to estimate the likelihood by")
    nll_images: int = setting(1000, "validation images to estimate it on; 0 for none")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        for name, allowed in {
            "network": (*autoencoder.NETWORKS, "spatial"),
            "likelihood": (None, *autoencoder.LIKELIHOODS),
        }.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice)
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        for name in ("kl_warmup", "sample_warmup"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name} must be a part of the run, got {getattr(self, name)}")
        for name in ("beta", "free_bits", "nll_images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("scale", "importance_samples", "nll_samples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.sample_warmup is not None and self.importance_samples == 1:
            raise ValueError("sample_warmup: there is 1 importance sample all the time")
        for width in (self.latent_dim, *(self.widths or [])):
            if width is not None and width < 1:
                raise ValueError(f"latent_dim and widths must be 1 or more, got {width}")
        if self.importance_samples > 1 and (self.beta, self.free_bits, self.kl_warmup) != (1, 0, 0):
            raise ValueError("importance_samples: that bound has no beta, free_bits or kl_warmup")
        if self.network == "spatial" and (self.conditional or self.likelihood == "bernoulli"):
            raise ValueError("network: spatial is AutoencoderKL: Gaussian, and told no classes")
        if self.binarize and self.likelihood == "gaussian":
            raise ValueError("binarize: pixels that are on or off are no Gaussians; be bernoulli")


WIDTHS = {"dense": [512, 512], "conv": [16, 32, 64], "spatial": [16, 32]}
SIDE = 8  # of the grid of samples
BLOCK = 100  # images judged together, by draws of their own
MAPPED = 2000  # images, at most, on the map of the latents


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    spatial = settings.network == "spatial"
    shape: dict[str, Any] = {"widths": WIDTHS[settings.network], "latent_dim": 4 if spatial else 32}
    shape |= {"likelihood": "gaussian" if spatial else "bernoulli"}
    run: dict[str, Any] = {"batch_size": 64 if spatial else 256, "ema": 0.0}
    run |= {"max_steps": 20_000} if device == "cuda" else {"max_minutes": 2.0}
    likelihood = settings.likelihood or shape["likelihood"]
    if settings.scale and likelihood == "bernoulli":
        raise ValueError("scale: Bernoulli pixels have none; add --likelihood gaussian")
    shape |= {"scale": 0.2} if likelihood == "gaussian" else {}
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
        with run.accelerator.local_main_process_first():
            train, val = images.parts(
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
        network = make(settings, train)
        model = run.network("model", network, optimizers(network, settings))
        elbo, bound = (
            run.autocast(partial(elbo_loss, settings)),
            run.autocast(partial(bound_loss, settings)),
        )
        look_up = partial(batch, settings, train, pipeline(network).latent_shape, run.device)
        run.log(
            f"{sum(p.numel() for p in network.parameters()):,} parameters · {len(train):,} images "
            f"of {' x '.join(map(str, train.size))} to train on, {len(val):,} to validate"
        )

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.restore()
        run.warm_up(lambda rows: elbo(model, *look_up(order(rows)[1], 1), torch.tensor(1.0)))
        if settings.importance_samples > 1:
            many = settings.importance_samples
            run.warm_up(lambda rows: bound(model, *look_up(order(rows)[1], many)))
        for _ in run.steps():
            for rows in run.rows():
                if settings.importance_samples > 1 and run.fraction >= settings.sample_warmup:
                    parts = look_up(order(rows)[1], settings.importance_samples)
                    run.backward(bound(model, *parts))
                else:
                    parts = look_up(order(rows)[1], 1)
                    run.backward(elbo(model, *parts, weight(settings, run.fraction)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, val)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save, run, settings, train, val, metrics))
        run.log(f"the best model is in {run.folder.path}")


def make(settings: Settings, train: Images) -> torch.nn.Module:
    """Build a new model."""
    if settings.network == "spatial":
        return autoencoder.Spatial(stock(settings, train))
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


def stock(settings: Settings, train: Images) -> AutoencoderKL:
    """Build diffusers' own autoencoder, which halves the image between any two widths."""
    channels, height, width = train.size
    levels = len(settings.widths)
    if height != width or height % 2 ** (levels - 1):
        raise ValueError(
            f"resolution: AutoencoderKL of {levels} widths takes squares whose side divides by "
            f"{2 ** (levels - 1)}, these images are {width} x {height}; give --resolution"
        )
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=settings.widths,
        norm_num_groups=math.gcd(32, *settings.widths),
        latent_channels=settings.latent_dim,
        sample_size=width,
        scaling_factor=1.0,
    )


def pipeline(network: torch.nn.Module) -> autoencoder.AutoencoderPipeline:
    """Wrap a network for use."""
    spatial = isinstance(network, autoencoder.Spatial)
    return autoencoder.AutoencoderPipeline(network.vae if spatial else network)


# ---- loss


def weight(settings: Settings, fraction: float) -> torch.Tensor:
    """Return the divergence's weight where the run is; a tensor, so that it compiles once."""
    risen = min(1.0, fraction / settings.kl_warmup) if settings.kl_warmup else 1.0
    return torch.tensor(settings.beta * risen)


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def batch(
    settings: Settings,
    train: Images,
    latent_shape: tuple[int, ...],
    device: torch.device,
    which: np.ndarray,
    samples: int,
    generator: torch.Generator | None = None,
) -> Parts:
    """Look up images, the noise of their latents and, if they are told, their classes."""
    seen = train.batch(which)
    if settings.binarize:
        seen = 2 * torch.bernoulli((seen + 1) / 2, generator=generator) - 1
    noise = torch.randn(samples, len(which), *latent_shape, generator=generator)
    labels = train.classes(which, device) if settings.conditional else None
    return seen.to(device), noise.to(device), labels


def elbo_loss(
    settings: Settings,
    model: torch.nn.Module,
    seen: torch.Tensor,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    beta: torch.Tensor | float,
) -> torch.Tensor:
    """Negative evidence lower bound, by one sample."""
    pixels = settings.likelihood, settings.scale or 1.0
    out = model(seen, noise, labels)
    return autoencoder_losses.variational_loss(out, seen, *pixels, beta, settings.free_bits)


def bound_loss(
    settings: Settings,
    model: torch.nn.Module,
    seen: torch.Tensor,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """Negative importance-weighted bound, by as many samples as there is noise for."""
    pixels = settings.likelihood, settings.scale or 1.0
    out = model(seen, noise, labels)
    return -autoencoder_losses.importance_weighted_bound(out, noise, seen, *pixels).mean()


# ---- evaluate


def evaluate(run: Run, settings: Settings, val: Images) -> dict[str, float]:
    """Judge the model on the validation images, and draw what it makes of some."""
    network = run.weights().eval()
    pipe, samples = pipeline(network), settings.importance_samples
    chunks = list(blocks(len(val), BLOCK))
    sums = torch.zeros(5, dtype=torch.float64)
    for i in range(run.accelerator.process_index, len(chunks), run.processes):
        # what is drawn depends on the block alone, so that evaluations compare
        generator = torch.Generator().manual_seed(i)
        parts = batch(settings, val, pipe.latent_shape, run.device, chunks[i], samples, generator)
        sums += judge(settings, network, parts, settings.nll_images - BLOCK * i, generator)
    loss, count, kl, nats, estimated = run.sum(sums).tolist()
    metrics = {"val_loss": loss / count, "kl": kl / count}
    if settings.nll_images:
        metrics["nll"] = nats / estimated
    if run.is_main:
        draw(run, settings, pipe, val)
    network.train()
    return metrics


@torch.inference_mode()
def judge(
    settings: Settings,
    network: torch.nn.Module,
    parts: Parts,
    some: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return sums over images: loss, count, divergence; nats of the first `some`, their count."""
    seen, noise, labels = parts
    pixels = settings.likelihood, settings.scale or 1.0
    out = network(*parts)
    kl = autoencoder_losses.gaussian_kl(out["mean"], out["logvar"]).sum()
    if settings.importance_samples > 1:
        loss = -autoencoder_losses.importance_weighted_bound(out, noise, seen, *pixels).mean()
    else:
        loss = autoencoder_losses.variational_loss(
            out, seen, *pixels, settings.beta, settings.free_bits
        )
    sums = [len(seen) * loss.item(), len(seen), kl.item(), 0.0, 0.0]
    if (count := min(len(seen), some)) > 0:
        known = labels[:count] if labels is not None else None
        nats = autoencoder_losses.negative_log_likelihood(
            network, seen[:count], settings.nll_samples, *pixels, generator, known
        )
        sums[3:] = [nats.sum().item(), count]
    return torch.tensor(sums, dtype=torch.float64)


def draw(run: Run, settings: Settings, pipe: Any, val: Images) -> None:
    """Draw samples of the same seeds at every evaluation, their progress, and reconstructions."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(SIDE * SIDE)]
    told = np.arange(SIDE * SIDE) % len(val.names) if settings.conditional else None
    samples = pipe(SIDE * SIDE, generators, told, output_type="pt").images
    folder = run.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    image_grid.grid(2 * samples - 1, folder / f"step-{run.progress.step:08d}.png", SIDE)
    grids = gallery.find(run.folder.path, ".png")
    names = [f"step {gallery.step(grid)}" for grid in grids]
    image_grid.progress(grids, names, run.folder.path / "progress.png", SIDE)
    some = np.unique(np.linspace(0, len(val) - 1, 12, dtype=int))
    parts = batch(settings, val, pipe.latent_shape, run.device, some, 1, generators[0])
    named = {"original": parts[0], "reconstruction": pipe.reconstruct(parts[0], parts[2])}
    image_grid.rows(named, run.folder.path / "reconstructions.png")
    draw_map(run, settings, pipe, val)


def draw_map(run: Run, settings: Settings, pipe: Any, val: Images) -> None:
    """Draw where images lie among the latents, coloured by class, and what lies in between."""
    if math.prod(pipe.latent_shape) < 2 or len(val) < 3:
        return
    some = np.arange(min(MAPPED, len(val)))
    generator = torch.Generator().manual_seed(0)
    seen, _, told = batch(settings, val, pipe.latent_shape, run.device, some, 1, generator)
    classes = val.classes(some) if val.labels is not None else None
    latents = pipelines.encode(pipe, seen, told)
    if not (latents == latents[0]).all():
        found = latent.scatter(latents, classes, val.names)
        found.save(run.folder.path / "latents.png")
    if settings.network != "spatial":
        label = 0 if settings.conditional else None
        latent.plane(pipe, label=label).save(run.folder.path / "plane.png")


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
    """Write the model as diffusers does, with its card."""
    network, weights = run.weights(), "averaged" if settings.ema else "raw"
    vendoring.save_pipeline(pipeline(network), folder)
    bound = f"{settings.importance_samples} importance samples"
    plain = f"beta {settings.beta:g} and {settings.free_bits:g} nats free in each latent"
    how = bound if settings.importance_samples > 1 else plain
    pixels = "binarised by fixed draws" if settings.binarize else "greys scored as probabilities"
    if settings.likelihood == "gaussian":
        pixels = f"of standard deviation {settings.scale:g}, so nats are of a density"
    told = f", labels={[i % len(val.names) for i in range(4)]}" if settings.conditional else ""
    count = min(settings.nll_images, len(val))
    text = card.card(
        run.folder.path,
        title="A variational autoencoder of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{sum(p.numel() for p in network.parameters()):,} parameters, trained on "
        f"{len(train):,} images of {settings.images} for {run.progress.step:,} steps.",
        usage=USAGE.format(labels=told),
        figures=metrics,
        protocol=f"Nats an image over all {len(val):,} validation images, the loss with {how}; nll "
        f"by {settings.nll_samples} importance samples on the first {count:,}. "
        f"{settings.likelihood.capitalize()} pixels, {pixels}; {weights} weights, float32; "
        f"images {train.sha256}, validation {val.sha256}; seed {settings.seed}.",
        data=settings.images,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
