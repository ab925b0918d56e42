"""Train a model that translates images: grey to colour, small to large, edges to photographs.

    accelerate launch recipes/train_translation.py --images photos --condition grey
    accelerate launch recipes/train_translation.py --images photos --condition low --resolution 64
    accelerate launch recipes/train_translation.py --pairs maps photos --method pix2pix
    accelerate launch recipes/train_translation.py --output_dir runs/translation --resume

Conditions are made of the images themselves, or are those of pairs: two folders whose images have
the same names. A diffusion model or a flow draws another image for every seed; its rivals, a
regression and pix2pix, always the same one. The model in the output folder is at any time the best
so far, of pix2pix the last, in diffusers' layout; it takes images of any size:

    genkit translate old.png --model runs/translation --seed 0 1 2 3
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
from diffusers import UNet2DModel

from genkit import machine
from genkit.data.order import Order
from genkit.data.pairs import check_folders
from genkit.errors import clean_errors
from genkit.hub import card, vendoring
from genkit.models import denoisers, diffusion, diffusion_losses, translation, translation_losses
from genkit.models.translation import TranslationPipeline
from genkit.models.translation_losses import draw_numbers
from genkit.training.curves import loss_curve
from genkit.training.image_data import ImageSettings
from genkit.training.optim import optimizers, player_optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.training.translation_data import Translations, load_translations
from genkit.vision import gallery, image_grid

METHODS = ("diffusion", "regression", "pix2pix")
MADE = tuple(kind for kind in translation.CONDITIONS if kind != "pairs")

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/translation", "folder of the run and of the model")
    condition: str = setting(CHOSEN, "what is made of the images; default: grey", choices=MADE)
    pairs: list[str] | None = setting(
        None, "two folders instead: of what is given, and of what to make of it"
    )
    method: str = setting("diffusion", "how to learn the translation", choices=METHODS)
    objective: str = setting(
        CHOSEN, "prediction of a diffusion model; default: v", choices=diffusion.OBJECTIVES
    )
    schedule: str | None = setting(
        None,
        "noise schedule; default: linear for epsilon, cosine for v and x0",
        choices=tuple(diffusion.SCHEDULES),
    )
    min_snr: float = setting(
        0.0, "cap of the signal-to-noise ratio that weights the loss; 0 for no weights", least=0
    )
    widths: list[int] | None = setting(
        None, "channels of the feature maps, the largest map first", least=1
    )
    layers: int = setting(1, "residual blocks at each size", least=1)
    attention: bool = setting(False, "self-attention in the smallest feature map")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        flow = self.objective == "flow"
        for name in ("objective", "schedule", "min_snr"):
            value = getattr(self, name)
            if value and (self.method != "diffusion" or (flow and name != "objective")):
                other = f"--method {self.method}" if self.method != "diffusion" else "flow"
                raise ValueError(f"--{name} {value} excludes {other}")
        if self.pairs is not None:
            self._check_pairs(self.pairs)

    def _check_pairs(self, pairs: list[str]) -> None:
        for name in ("condition", "val_images", "skip_corrupt"):
            if getattr(self, name):
                raise ValueError(f"--{name} {getattr(self, name)} excludes --pairs")
        if len(pairs) != 2:
            raise ValueError(f"--pairs must be two folders, got {pairs}")
        check_folders(pairs)


SCHEDULES = {"epsilon": "linear", "v": "cosine", "x0": "cosine"}
SMALLEST = 8  # largest side of the smallest feature map
GROWTH = (1, 2, 6, 8)  # of the channels, where the map gets smaller
GENERATOR, CRITIC = 0.6, 0.8  # parts of a run of pix2pix: until when each learns alone
CRITIC_RATE, BETAS = 1e-3, (0.5, 0.999)  # of Adam; the rate has fallen when the critic begins
UNITS = {
    "diffusion": "mean squared error of the prediction",
    "regression": "mean squared error",
    "pix2pix": "100 x mean absolute error",
}
VAL_ROWS, BLOCK = 256, 32  # most images whose loss is measured, and how many at once
COLUMNS, SEEDS = 8, 3  # images in a picture, and translations of each
STEPS = 10  # of the sampler, in these pictures


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        run: dict[str, Any] = {"max_steps": 20_000, "batch_size": 128}
    else:
        run = {"max_minutes": 10.0, "batch_size": 64}
    if settings.compile and device != "accelerator":
        raise ValueError("--compile requires a GPU: on a CPU, its gradients are wrong")
    if settings.method == "diffusion":
        run["objective"] = objective = settings.objective or "v"
        run |= {"schedule": SCHEDULES[objective]} if objective in SCHEDULES else {}
    if settings.method == "pix2pix":
        run["ema"] = 0.99  # of a game of few steps
    if settings.pairs is None:
        run["condition"] = "grey"
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.008, "weight_decay": 0.0}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    return {"optimizer": "muon", "ema": 0.999, "compile": False} | rates | precision | run


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    kind = "pairs" if settings.pairs else settings.condition

    with Run(settings) as run:
        # ---- data
        train, val, order = load_translations(run, settings, kind, settings.pairs)

        # ---- model
        scheduler = make_scheduler(settings)
        network = make_network(settings, train, run.device.type)
        model = run.network("model", network, optimizers(network, settings))
        losses = {"model": run.autocast(partial(make_loss(settings), model))}
        if settings.method == "pix2pix":
            losses |= make_game(run, settings, model, network)
        get_batch = partial(make_batch, run, settings, scheduler, train, order)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.images.size))} to train on, {len(val):,} to validate · "
            f"{settings.method} from {kind}"
        )
        pipeline = TranslationPipeline(run.weights(), scheduler, kind)

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.warm_up(lambda rows: losses["model"](*get_batch(rows)))
        run.restore()
        for _ in run.steps():
            for name, loss in whose_turn(run.fraction, losses):
                for rows in run.rows():
                    run.backward(loss(*get_batch(rows)), name)
                run.update(name)
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, pipeline, val)
                    curve = partial(loss_curve, unit=UNITS[settings.method])
                    better = run.report("val_loss", metrics, curve=curve)
                    if better or settings.method == "pix2pix":  # whose L1 is not what it is for
                        save = partial(save_model, run, settings, pipeline, train, val, metrics)
                        run.publish(save)


def make_scheduler(settings: Settings) -> diffusion.Scheduler | None:
    """Build the scheduler of the objective; None where there is no noise."""
    if settings.method != "diffusion":
        return None
    return diffusion.make_scheduler(settings.objective, settings.schedule or "linear")


def make_network(settings: Settings, train: Translations, device: str) -> UNet2DModel:
    """Build a new model, of a size that fits the images and the machine."""
    size = train.images.size
    halvings = max(1, math.ceil(math.log2(max(size[1:]) / SMALLEST)))
    fewest = 16 if device == "cpu" else 64  # channels of the largest map
    grown = [fewest * GROWTH[min(i, len(GROWTH) - 1)] for i in range(halvings + 1)]
    inputs, widths = train.condition_channels, settings.widths or grown
    inputs += size[0] if settings.method == "diffusion" else 0
    return denoisers.make_unet(size, widths, settings.layers, settings.attention, inputs=inputs)


# ---- losses and batches

Loss = Callable[..., torch.Tensor]


def make_loss(settings: Settings) -> Loss:
    """Return the loss of a model on a batch by `make_batch`, outside of a game."""
    if settings.method == "diffusion":
        return partial(diffusion_loss, settings.objective, settings.min_snr)
    if settings.method == "regression":
        return translation_losses.regression_loss
    return translation_losses.absolute_loss


def diffusion_loss(
    objective: str,
    min_snr: float,
    model: torch.nn.Module,
    images: torch.Tensor,
    condition: torch.Tensor,
    *noise: torch.Tensor,
) -> torch.Tensor:
    """Return the loss of a diffusion model, a scalar; see `diffusion_losses.loss`."""
    wrapped: Any = translation_losses.beside(model, condition)
    drawn, timesteps, alpha, sigma = noise
    levels = timesteps, alpha, sigma
    return diffusion_losses.loss(wrapped, images, drawn, None, *levels, objective, min_snr)


def make_game(
    run: Run, settings: Settings, model: torch.nn.Module, network: UNet2DModel
) -> dict[str, Loss]:
    """Add a discriminator to the run, and return the losses of both networks in the game."""
    size = network.config.sample_size
    channels = network.config.in_channels + network.config.out_channels
    side = size if isinstance(size, int) else max(size)
    discriminator = translation_losses.PatchDiscriminator(channels, side)
    own = dataclasses.replace(settings, learning_rate=CRITIC_RATE, optimizer="adamw")
    players = player_optimizers(discriminator, own, BETAS)
    wrapped = run.network("discriminator", discriminator, players, averaged=False)

    def game_loss(*batch: torch.Tensor) -> torch.Tensor:
        discriminator.requires_grad_(False)
        loss = translation_losses.generator_loss(discriminator, model, *batch)
        discriminator.requires_grad_(True)
        return loss

    # each loss calls the other network unwrapped: only its own gradients are exchanged
    d_loss = partial(translation_losses.discriminator_loss, wrapped, network)
    return {"game": run.autocast(game_loss), "discriminator": run.autocast(d_loss)}


def whose_turn(fraction: float, losses: dict[str, Loss]) -> list[tuple[str, Loss]]:
    """Return which networks a step trains, and by which loss.

    Of pix2pix first the generator learns alone, then the discriminator on its images, and only at
    the end do both play: NoGAN (Antic 2019, https://github.com/jantic/DeOldify).
    """
    if "game" not in losses or fraction < GENERATOR:
        return [("model", losses["model"])]
    critic = [("discriminator", losses["discriminator"])]
    return critic if fraction < CRITIC else [*critic, ("model", losses["game"])]


def make_batch(
    run: Run,
    settings: Settings,
    scheduler: diffusion.Scheduler | None,
    train: Translations,
    order: Order,
    rows: np.ndarray,
) -> tuple[torch.Tensor, ...]:
    """Look up images and draw random numbers: the same for a row at any number of processes.

    Returns:
        images and conditions, (n, channels, height, width); of a diffusion model also noise like
        the images; timesteps, alpha and sigma, (n,).
    """
    _, which = order(rows)
    slots = torch.from_numpy(rows - run.first_row)
    words = np.random.SeedSequence((settings.seed, run.turn))
    seed = int(words.generate_state(1, np.uint64)[0])
    size = train.images.size
    u, *drawn = (each[slots] for each in draw_numbers(scheduler, size, run.batch_size, seed))
    return *train.batch(which, u, run.device), *(each.to(run.device) for each in drawn)


# ---- evaluate


def evaluate(
    run: Run, settings: Settings, pipeline: TranslationPipeline, val: Translations
) -> dict[str, float]:
    """Measure the loss on fixed noise on the main process, and save pictures."""
    network = run.weights().eval()
    metrics: dict[str, float] = {}
    if run.is_main:
        some = np.unique(np.linspace(0, len(val) - 1, VAL_ROWS, dtype=int))
        drawn = draw_numbers(pipeline.scheduler, val.images.size, len(some), 0)
        loss, total = make_loss(settings), 0.0
        with torch.no_grad():
            for slots in torch.arange(len(some)).split(BLOCK):
                u, *noise = (each[slots].to(run.device) for each in drawn)
                batch = val.batch(some[slots.numpy()], u, run.device)
                total += loss(network, *batch, *noise).item() * len(slots)
        metrics = {"val_loss": total / len(some)}
        save_pictures(run, pipeline, val)
    network.train()
    return run.broadcast(metrics)


def save_pictures(run: Run, pipeline: TranslationPipeline, val: Translations) -> None:
    """Save validation images with their conditions and translations, and their progress."""
    some = np.unique(np.linspace(0, len(val) - 1, COLUMNS, dtype=int))
    u = draw_numbers(None, (), len(some), 0)[0]
    images, condition = val.batch(some, u, run.device)
    shown = condition[:, :-1] if pipeline.condition == "mask" else condition
    rows, steps = {"given": shown}, None if pipeline.deterministic else STEPS
    for seed in range(1 if pipeline.deterministic else SEEDS):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        made = pipeline.translate(condition, noise, steps)
        rows |= {"translated" if pipeline.deterministic else f"seed {seed}": made}
    image_grid.rows(rows | {"image": images}, run.folder.path / "translations.png")
    gallery.save_samples(run.folder.path, run.progress.step, made, columns=COLUMNS)


# ---- save


USAGE = """
from diffusers import DiffusionPipeline
from PIL import Image

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
pipeline(Image.open("old.png"){mask}).images[0].save("translated.png")

import genkit

# without running that code, of any size
genkit.translate("old.png", model=model{mask}, seed=[0, 1, 2, 3]).save("translated.png")
"""


def save_model(
    run: Run,
    settings: Settings,
    pipeline: TranslationPipeline,
    train: Translations,
    val: Translations,
    metrics: dict[str, float],
    path: Path,
) -> None:
    """Write the model as diffusers does, with its card."""
    vendoring.save_pipeline(pipeline, path)
    mask = ', mask=Image.open("mask.png")' if pipeline.condition == "mask" else ""
    objective = f" of {settings.objective}" if settings.objective else ""
    source = settings.pairs[1] if settings.pairs else settings.images
    card.write_card(
        path,
        run.folder.path,
        title="A model that translates images",
        task="image-to-image",
        library="diffusers",
        about=f"{pipeline.unet.num_parameters():,} parameters, {settings.method}{objective}, "
        f"condition {pipeline.condition}, trained on {len(train):,} images of {source}, of which "
        f"it was shown {run.progress.rows:,}.",
        usage=USAGE.format(mask=mask),
        figures=metrics,
        protocol=f"val_loss is the {UNITS[settings.method]} on {min(VAL_ROWS, len(val)):,} "
        f"validation images, evenly from {len(val):,}, with noise of a fixed seed.",
        data=source,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
