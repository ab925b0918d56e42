"""Train an autoencoder on images: it compresses them into a few numbers, and restores them.

    accelerate launch recipes/train_autoencoder.py
    accelerate launch recipes/train_autoencoder.py --network conv --latent_dim 32
    accelerate launch recipes/train_autoencoder.py --noise salt --amount 0.3
    accelerate launch recipes/train_autoencoder.py --head_weight 0.1
    accelerate launch recipes/train_autoencoder.py --output_dir runs/autoencoder --resume

With --noise it learns to denoise images; with --head_weight a linear layer on its latents predicts
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
from torch import Tensor, nn

from genkit import machine
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.errors import clean_errors
from genkit.hub import card, vendoring
from genkit.models import autoencoder, autoencoder_losses
from genkit.training.curves import loss_curve
from genkit.training.image_data import ImageSettings, load_for_run
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.vision import gallery, image_grid

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/autoencoder", "folder of the run and of the model")
    network: str = setting("dense", "layers of both networks", choices=autoencoder.NETWORKS)
    widths: list[int] = setting(
        CHOSEN, "features of the encoder's layers; the decoder mirrors them", least=1
    )
    latent_dim: int = setting(32, "length of the latent vector", least=1)
    likelihood: str = setting(
        "gaussian",
        "of a pixel: gaussian for squared error, laplace for absolute, bernoulli for cross-entropy",
        choices=autoencoder.LIKELIHOODS,
    )
    invert: bool = setting(False, "invert the images first: black becomes white")
    noise: str | None = setting(
        None, "noise to remove from images", choices=autoencoder_losses.NOISES
    )
    amount: float | None = setting(
        None, "standard deviation of gaussian noise; part of the pixels of other noise", above=0
    )
    head_weight: float = setting(
        0.0, "weight of the loss of a classifier on the latents; 0 for none", least=0
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if self.amount is not None and not self.noise:
            raise ValueError(f"--amount {self.amount} requires --noise")
        if self.amount is not None and self.noise != "gaussian" and self.amount > 1:
            raise ValueError(f"--amount must be 1 or less for {self.noise}, got {self.amount}")


WIDTHS = {"dense": [400], "conv": [16, 32, 64]}
COLUMNS = 12  # images in a picture
BLOCK = 500  # images evaluated together, with random numbers of their own
FITTED = 10_000  # most training images that the Gaussian over the latents is fitted to


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    run: dict[str, Any] = {"widths": WIDTHS[settings.network], "batch_size": 64}
    run |= {"amount": 0.5 if settings.noise else None, "ema": 0.0}
    run |= {"max_steps": 20_000} if device == "accelerator" else {"max_minutes": 2.0}
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
        train, val, order = load_for_run(run, settings)
        if len(train) < 2:
            raise ValueError("images: two or more are needed to train on, got 1")

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
        get_batch = partial(make_batch, settings, train, run.device)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} to train on, {len(val):,} to validate"
        )

        # ---- loop
        curve = partial(loss_curve, unit=loss_unit(settings))
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.warm_up(lambda rows: loss(model, *get_batch(order(rows)[1])))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *get_batch(order(rows)[1])))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, val)
                    if run.report("val_loss", metrics, curve=curve):
                        run.publish(partial(save_model, run, settings, train, val, metrics))


# ---- loss


Batch = tuple[Tensor, Tensor, Tensor | None]


def make_batch(
    settings: Settings,
    part: Images,
    device: torch.device,
    which: np.ndarray,
    generator: torch.Generator | None = None,
) -> Batch:
    """Look up images: noisy, clean, and their classes for the head."""
    clean = noisy = part.batch(which)
    if settings.noise and settings.amount:
        noisy = autoencoder_losses.corrupt(clean, settings.noise, settings.amount, generator)
    labels = part.classes(which, device) if settings.head_weight else None
    return noisy.to(device), clean.to(device), labels


def total_loss(
    settings: Settings, model: nn.Module, noisy: Tensor, clean: Tensor, labels: Tensor | None
) -> Tensor:
    """Return the reconstruction loss and, weighted, the cross-entropy of the head."""
    sign = -1 if settings.invert else 1
    out = model(sign * noisy)
    loss = autoencoder_losses.reconstruction_loss(out, sign * clean, settings.likelihood)
    if labels is None:
        return loss
    return loss + settings.head_weight * F.cross_entropy(out["logits"], labels)


def loss_unit(settings: Settings) -> str:
    """Return the unit of the loss, for pictures and the card."""
    errors = {"gaussian": "squared error in [-1, 1]", "laplace": "absolute error in [-1, 1]"}
    unit = errors.get(settings.likelihood, "nats")
    head = f" plus {settings.head_weight:g} times the nats of a class"
    return unit + head * bool(settings.head_weight)


# ---- evaluate


def evaluate(run: Run, settings: Settings, val: Images) -> dict[str, float]:
    """Evaluate the model on all validation images, and save pictures."""
    network = run.weights().eval()
    chunks = list(blocks(len(val), BLOCK))
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(run.accelerator.process_index, len(chunks), run.processes):
        # random numbers depend on the block alone, so that evaluations compare
        generator = torch.Generator().manual_seed(i)
        batch = make_batch(settings, val, run.device, chunks[i], generator)
        sums += sum_metrics(settings, network, batch)
    loss, error, right = (run.sum(sums) / len(val)).tolist()
    metrics = {"val_loss": loss, "mse": error}
    if settings.head_weight:
        metrics["accuracy"] = right
    if run.is_main:
        save_pictures(run, settings, autoencoder.AutoencoderPipeline(network), val)
    network.train()
    return metrics


@torch.inference_mode()
def sum_metrics(settings: Settings, network: autoencoder.Autoencoder, batch: Batch) -> Tensor:
    """Return sums over images: loss, mean squared error in [0, 1], right classes."""
    noisy, clean, labels = batch
    loss = total_loss(settings, network, *batch).item()
    sign = -1 if settings.invert else 1
    out = network(sign * noisy)
    error = F.mse_loss(network.decode(out["latents"][0]).sample, sign * clean).item() / 4
    right = 0.0 if labels is None else (out["logits"].argmax(1) == labels).float().mean().item()
    return len(clean) * torch.tensor([loss, error, right], dtype=torch.float64)


def save_pictures(
    run: Run, settings: Settings, pipeline: autoencoder.AutoencoderPipeline, val: Images
) -> None:
    """Save originals over reconstructions, their progress, and a map of the latents."""
    some = np.unique(np.linspace(0, len(val) - 1, COLUMNS, dtype=int))
    generator, folder = torch.Generator().manual_seed(0), run.folder.path
    noisy, clean, _ = make_batch(settings, val, run.device, some, generator)
    restored = pipeline.reconstruct(noisy)
    named = {"original": clean} | ({"noisy": noisy} if settings.noise else {})
    named["cleaned" if settings.noise else "reconstruction"] = restored
    image_grid.rows(named, folder / "reconstructions.png")
    gallery.save_samples(folder, run.progress.step, restored, columns=COLUMNS, film=False)
    if settings.latent_dim > 1 and len(val) > 2:
        some = np.arange(min(gallery.MAPPED, len(val)))
        classes = val.classes(some) if val.labels is not None else None
        latents = gallery.save_map(
            folder, pipeline, val.batch(some, run.device), None, classes, val.names
        )
        pipeline.vae.fit_prior(latents)
        gallery.save_plane(folder, pipeline)


# ---- save


USAGE = """
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)

import genkit
from genkit.data import images

pipeline = genkit.load(model)  # the same, without running that code
some = images.load_images("{images}"{options}).batch([0, 1, 2])  # in [-1, 1]
latents = pipeline.encode(some)
again = pipeline.decode(latents)
"""


def save_model(
    run: Run, settings: Settings, train: Images, val: Images, metrics: dict[str, float], path: Path
) -> None:
    """Write the model as diffusers does, with its card and a Gaussian over its latents."""
    network = run.weights().eval()
    pipeline = autoencoder.AutoencoderPipeline(network)
    some = np.arange(0, len(train), -(-len(train) // FITTED))
    parts = (make_batch(settings, train, run.device, p)[1] for p in np.array_split(some, 10))
    network.fit_prior(torch.cat([pipeline.encode(part) for part in parts]))
    vendoring.save_pipeline(pipeline, path)
    network.train()
    names = ("resolution", "channels", "skip_corrupt")
    options = [f", {n}={v}" for n in names if (v := getattr(settings, n))]
    noise = f"{settings.noise} noise of {settings.amount:g}" if settings.noise else "no noise"
    card.write_card(
        path,
        run.folder.path,
        title="An autoencoder of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} for {run.progress.step:,} steps{', inverted' * settings.invert}.",
        usage=USAGE.format(images=settings.images, options="".join(options)),
        figures=metrics,
        protocol=f"Over all {len(val):,} validation images: mse is a pixel's squared error in "
        f"[0, 1], val_loss a pixel's {loss_unit(settings)}, accuracy the share of classes "
        f"predicted correctly; with {noise}. Samples come from a Gaussian fitted to the latents of "
        f"{len(some):,} training images.",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
