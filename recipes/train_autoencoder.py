"""Train an autoencoder on images: it learns to squeeze them through a few numbers, and back.

    accelerate launch recipes/train_autoencoder.py
    accelerate launch recipes/train_autoencoder.py --network conv --latent_dim 32
    accelerate launch recipes/train_autoencoder.py --noise salt --amount 0.3
    accelerate launch recipes/train_autoencoder.py --head_weight 0.1
    accelerate launch recipes/train_autoencoder.py --output_dir runs/autoencoder --resume

With --noise it learns to clean images; with --head_weight a linear layer on its latents tells
their class, too. The model in the output folder is at any time the best so far, in diffusers'
layout.
"""

from __future__ import annotations

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
from genkit.models import autoencoder, autoencoder_losses
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting
from genkit.vision import image_grid, latent, pipelines

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/autoencoder", "folder of the run and of the model")
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
    network: str = setting("dense", "dense or conv")
    widths: list[int] | None = setting(None, "of the encoder's layers; the decoder mirrors them")
    latent_dim: int = setting(32, "length of the latent vector")
    likelihood: str = setting("gaussian", "gaussian for squared error, bernoulli for cross-entropy")
    invert: bool = setting(False, "turn black into white first")
    noise: str | None = setting(None, "to clean: gaussian, mask or salt")
    amount: float | None = setting(None, "of noise: standard deviation, or part of the pixels")
    head_weight: float = setting(0.0, "weight of telling the class from the latents; 0 for no head")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        for name, allowed in {
            "network": autoencoder.NETWORKS,
            "likelihood": autoencoder.LIKELIHOODS,
            "noise": (None, *autoencoder_losses.NOISES),
        }.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice)
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        if not self.head_weight >= 0:
            raise ValueError(f"head_weight must be 0 or more, got {self.head_weight}")
        for width in (self.latent_dim, *(self.widths or [])):
            if width < 1:
                raise ValueError(f"latent_dim and widths must be 1 or more, got {width}")
        if self.amount is not None and not self.noise:
            raise ValueError(f"amount: {self.amount} of which noise? Add --noise")
        most = 1.0 if self.noise in ("mask", "salt") else float("inf")
        if self.amount is not None and not 0 < self.amount <= most:
            raise ValueError(
                f"amount must be above 0, and at most 1 for mask and salt, got {self.amount}"
            )


WIDTHS = {"dense": [400], "conv": [16, 32, 64]}
COLUMNS = 12  # images in a picture
BLOCK = 500  # images judged together, by draws of their own
MAPPED = 2000  # images, at most, on the map of the latents
FITTED = 10_000  # training images, at most, that the Gaussian over the latents is fitted to


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    run: dict[str, Any] = {"widths": WIDTHS[settings.network], "batch_size": 64}
    run |= {"amount": 0.5 if settings.noise else None, "ema": 0.0}
    run |= {"max_steps": 20_000} if device == "cuda" else {"max_minutes": 2.0}
    rates: dict[str, Any] = {"learning_rate": 2e-3, "muon_learning_rate": 0.02, "weight_decay": 0.0}
    # convolutions learn more from a step by Muon, and dense layers more from a minute by AdamW
    rates |= {"optimizer": "adamw" if settings.network == "dense" else "muon"}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    return run | rates | precision | {"compile": machine.can_compile()}


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
        if len(train) < 2:
            raise ValueError("images: there is 1 to train on; give two or more")
        order = Order(len(train), settings.seed)

        # ---- model
        network = autoencoder.Autoencoder(
            image_size=train.size,
            latent_dim=settings.latent_dim,
            network=settings.network,
            widths=settings.widths,
            likelihood=settings.likelihood,
            head=train.count_classes() if settings.head_weight else 0,
            inverted=settings.invert,
        )
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(partial(total_loss, settings))
        look_up = partial(batch, settings, train, run.device)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} to train on, {len(val):,} to validate"
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
                    metrics = evaluate(run, settings, val)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save, run, settings, train, val, metrics))
        run.log(f"the best model is in {run.folder.path}")


# ---- loss


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def batch(
    settings: Settings,
    part: Images,
    device: torch.device,
    which: np.ndarray,
    generator: torch.Generator | None = None,
) -> Parts:
    """Look up images: as they are seen, as they should come out, and their classes for the head."""
    clean = noisy = part.batch(which)
    if settings.noise:
        noisy = autoencoder_losses.corrupt(clean, settings.noise, settings.amount, generator)
    labels = part.classes(which, device) if settings.head_weight else None
    return noisy.to(device), clean.to(device), labels


def total_loss(
    settings: Settings,
    model: torch.nn.Module,
    noisy: torch.Tensor,
    clean: torch.Tensor,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """Return the reconstruction's loss and, weighted, that of telling the class."""
    sign = -1 if settings.invert else 1
    seen = model(sign * noisy)
    loss = autoencoder_losses.reconstruction_loss(seen, sign * clean, settings.likelihood)
    if labels is None:
        return loss
    return loss + settings.head_weight * F.cross_entropy(seen["logits"], labels)


# ---- evaluate


def evaluate(run: Run, settings: Settings, val: Images) -> dict[str, float]:
    """Judge the model on all validation images, and draw what it makes of some."""
    network = run.weights().eval()
    chunks = list(blocks(len(val), BLOCK))
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(run.accelerator.process_index, len(chunks), run.processes):
        # what is drawn depends on the block alone, so that evaluations compare
        generator = torch.Generator().manual_seed(i)
        sums += judge(settings, network, batch(settings, val, run.device, chunks[i], generator))
    loss, error, right = (run.sum(sums) / len(val)).tolist()
    metrics = {"val_loss": loss, "mse": error}
    if settings.head_weight:
        metrics["accuracy"] = right
    if run.is_main:
        draw(run, settings, autoencoder.AutoencoderPipeline(network), val)
    network.train()
    return metrics


@torch.inference_mode()
def judge(settings: Settings, network: autoencoder.Autoencoder, parts: Parts) -> torch.Tensor:
    """Return sums over images: loss, mean squared error in [0, 1], classes told rightly."""
    noisy, clean, labels = parts
    loss = total_loss(settings, network, *parts).item()
    sign = -1 if settings.invert else 1
    seen = network(sign * noisy)
    error = F.mse_loss(network.decode(seen["latents"][0]).sample, sign * clean).item() / 4
    right = 0.0 if labels is None else (seen["logits"].argmax(1) == labels).float().mean().item()
    return len(clean) * torch.tensor([loss, error, right], dtype=torch.float64)


def draw(
    run: Run, settings: Settings, pipeline: autoencoder.AutoencoderPipeline, val: Images
) -> None:
    """Draw originals over reconstructions, and how these came to be."""
    some = np.unique(np.linspace(0, len(val) - 1, COLUMNS, dtype=int))
    generator = torch.Generator().manual_seed(0)
    noisy, clean, _ = batch(settings, val, run.device, some, generator)
    made = pipeline.reconstruct(noisy)
    named = {"original": clean} | ({"noisy": noisy} if settings.noise else {})
    named["cleaned" if settings.noise else "reconstruction"] = made
    image_grid.rows(named, run.folder.path / "reconstructions.png")
    folder = run.folder.path / "samples"
    folder.mkdir(exist_ok=True)
    image_grid.grid(made, folder / f"step-{run.progress.step:08d}.png", COLUMNS)
    grids = gallery.list_samples(run.folder.path, ".png")
    names = [f"step {gallery.step_of(grid)}" for grid in grids]
    image_grid.progress(grids, names, run.folder.path / "progress.png", 1)
    if settings.latent_dim > 1 and len(val) > 2:
        draw_map(run, settings, pipeline, val)


def draw_map(
    run: Run, settings: Settings, pipeline: autoencoder.AutoencoderPipeline, val: Images
) -> None:
    """Draw where images lie among the latents, coloured by class, and what lies in between."""
    some = np.arange(min(MAPPED, len(val)))
    generator = torch.Generator().manual_seed(0)
    _, clean, _ = batch(settings, val, run.device, some, generator)
    classes = val.classes(some) if val.labels is not None else None
    latents = pipelines.encode(pipeline, clean)
    if not (latents == latents[0]).all():
        found = latent.scatter(latents, classes, val.names)
        found.save(run.folder.path / "latents.png")
    pipeline.vae.fit_prior(latents)
    latent.plane(pipeline).save(run.folder.path / "plane.png")


# ---- save


USAGE = """
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)

import genkit
from genkit import images

pipeline = genkit.load(model)  # the same, without running that code
some = images.load("{images}"{options}).batch([0, 1, 2])  # in [-1, 1]
latents = pipeline.encode(some)
again = pipeline.decode(latents)
"""


def save(
    run: Run,
    settings: Settings,
    train: Images,
    val: Images,
    metrics: dict[str, float],
    folder: Path,
) -> None:
    """Write the model as diffusers does, with its card and a Gaussian over its latents."""
    network, weights = run.weights().eval(), "averaged" if settings.ema else "raw"
    pipeline = autoencoder.AutoencoderPipeline(network)
    some = np.arange(0, len(train), -(-len(train) // FITTED))
    seen = (batch(settings, train, run.device, part)[1] for part in np.array_split(some, 10))
    network.fit_prior(torch.cat([pipeline.encode(each) for each in seen]))
    vendoring.save_pipeline(pipeline, folder)
    network.train()
    names = ("resolution", "channels", "skip_corrupt")
    options = [f", {n}={v}" for n in names if (v := getattr(settings, n))]
    unit = "nats" if settings.likelihood == "bernoulli" else "squared error in [-1, 1]"
    told = f" plus {settings.head_weight:g} times the nats of a class" * bool(settings.head_weight)
    noise = f"{settings.noise} noise of {settings.amount:g}" if settings.noise else "no noise"
    text = card.card(
        run.folder.path,
        title="An autoencoder of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} for {run.progress.step:,} steps{', inverted' * settings.invert}.",
        usage=USAGE.format(images=settings.images, options="".join(options)),
        figures=metrics,
        protocol=f"Over all {len(val):,} validation images: mse is a pixel's squared error in "
        f"[0, 1], val_loss a pixel's {unit}{told}, accuracy the share of classes told rightly; "
        f"with {noise}; {weights} weights, float32; images {train.sha256}, validation "
        f"{val.sha256}; seed {settings.seed}. Samples come from a Gaussian that was fitted to the "
        f"latents of {len(some):,} training images.",
        data=settings.images,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
