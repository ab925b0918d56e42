"""Train a network to tell images apart.

    accelerate launch recipes/train_classifier.py
    accelerate launch recipes/train_classifier.py --images train.parquet --val_images test.parquet
    accelerate launch recipes/train_classifier.py --images pictures --resolution 64
    accelerate launch recipes/train_classifier.py --output_dir runs/classifier --resume

The output folder is an ordinary transformers model, at any time the best one so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch

from genkit import machine, plots
from genkit.data import images, pixels, tables
from genkit.data.images import Images
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.models import classifier
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/classifier", "folder of the run and of the model")
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
    depth: int | None = setting(None, "blocks in each of the up to three stages")
    width: int | None = setting(None, "channels of the first stage; others have 2 and 4 times that")
    label_smoothing: float = setting(0.1, "probability that is spread over all classes")
    shift: int | None = setting(None, "most pixels that training moves images by; 1/14 of a side")
    epochs: float | None = setting(None, "times through the data, if max_steps is not fewer steps")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        for name in ("depth", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.shift is not None and self.shift < 0:
            raise ValueError(f"shift must be 0 or more, got {self.shift}")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")


SHIFT = 14  # how many times the side of an image is what it is shifted by at most
BLOCK = 500  # images judged together
SHOWN = 24  # mistakes in the picture


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "cuda":
        run: dict[str, Any] = {"depth": 2, "width": 64, "batch_size": 256}
    else:
        run = {"depth": 1, "width": 32, "batch_size": 128}
    if not (settings.epochs or settings.max_steps or settings.max_minutes):
        run |= {"epochs": 30.0} if device == "cuda" else {"max_minutes": 3.5}
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.05}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # on a CPU, what is compiled is slower than oneDNN's own convolutions
    return run | rates | precision | {"optimizer": "adamw", "ema": 0.0, "compile": False}


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
        check(run, settings, train)
        if settings.shift is None:
            settings.shift = round(min(train.size[1:]) / SHIFT)
        order = Order(len(train), settings.seed)

        # ---- model
        network = classifier.make_model(train.names, train.size, settings.depth, settings.width)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(classifier.loss)
        look_up = partial(batch, train, settings.shift, run.device)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} in {len(train.names)} classes to train on, "
            f"{len(val):,} to validate"
        )

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        if settings.epochs:
            steps = math.ceil(settings.epochs * len(train) / settings.batch_size)
            settings.max_steps = min(steps, settings.max_steps or steps)
        smoothing = settings.label_smoothing
        # before the state is restored: it moves the running statistics
        run.warm_up(lambda rows: loss(model, *look_up(order(rows)[1]), smoothing))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *look_up(order(rows)[1]), smoothing))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, val)
                    if run.report("accuracy", metrics, lower_is_better=False):
                        run.publish(partial(save, run, settings, train, val, metrics))
        run.log(f"the best model is in {run.folder.path}")


def check(run: Run, settings: Settings, train: Images) -> None:
    """Refuse images that nothing can be learnt from, and a batch that cannot be normalised."""
    classes = train.count_classes()
    if classes < 2:
        raise ValueError(f"images: all are of the class {train.names[0]!r}; give two or more")
    side = min(train.size[1:])
    if settings.shift is not None and settings.shift >= side:
        raise ValueError(f"shift: {settings.shift} pixels would move images of {side} out of sight")
    rows = run.batch_size // run.processes // settings.gradient_accumulation
    if rows < 2:
        raise ValueError(
            f"batch_size: {run.batch_size} leaves 1 image a part, which cannot be normalised by "
            f"others; give {2 * run.processes * settings.gradient_accumulation} or more"
        )


def batch(
    train: Images, shift: int, device: torch.device, which: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up images, shifted, and their classes."""
    return classifier.random_shift(train.batch(which, device), shift), train.classes(which, device)


# ---- evaluate


def evaluate(run: Run, val: Images) -> dict[str, float]:
    """Judge the model on all validation images, and draw where it errs."""
    network = run.weights().eval()
    for buffer in network.buffers():  # each process has running statistics of its own
        accelerate.utils.broadcast(buffer)
    mine = judge(network, val, np.array(run.shard(len(val)), int), run.device)
    network.train()
    gathered = zip(*accelerate.utils.gather_object([mine]), strict=True)
    predicted, confidences, nats = (np.concatenate(each) for each in gathered)
    true = val.classes(np.arange(len(val))).numpy()
    if run.is_main:
        draw(run, val, true, predicted, confidences)
    return {"accuracy": float((predicted == true).mean()), "val_loss": float(nats.mean())}


@torch.inference_mode()
def judge(
    network: torch.nn.Module, val: Images, which: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predicted classes, their probabilities and cross-entropies in nats, (n,) each."""
    blocks = np.split(which, range(BLOCK, len(which), BLOCK))
    logits = [network(classifier.in_colour(val.batch(b, device))).logits for b in blocks]
    scores = torch.cat(logits).log_softmax(1)
    best, predicted = scores.max(1)
    nats = -scores.gather(1, val.classes(which, device)[:, None])[:, 0]
    return predicted.cpu().numpy(), best.exp().cpu().numpy(), nats.cpu().numpy()


def draw(
    run: Run, val: Images, true: np.ndarray, predicted: np.ndarray, confidences: np.ndarray
) -> None:
    """Draw what is taken for what, and the mistakes that it is surest of."""
    matrix = np.zeros((len(val.names), len(val.names)), int)
    np.add.at(matrix, (true, predicted), 1)
    plots.confusion(matrix, val.names, run.folder.path / "confusion.png")
    wrong = np.flatnonzero(predicted != true)
    worst = wrong[np.argsort(-confidences[wrong], kind="stable")][:SHOWN]
    picture = run.folder.path / "mistakes.png"
    if not len(worst):
        picture.unlink(missing_ok=True)
        return
    shown = classifier.in_colour(val.batch(worst)).permute(0, 2, 3, 1).numpy()
    captions = [
        f"{val.names[true[i]]}\ntaken for {val.names[predicted[i]]}, {confidences[i]:.0%}"
        for i in worst
    ]
    plots.captioned((shown + 1) / 2, captions, picture)


# ---- save


USAGE = """
from PIL import Image
from transformers import pipeline

print(pipeline("image-classification", model)(Image.open("picture.png")))
"""


def save(
    run: Run,
    settings: Settings,
    train: Images,
    val: Images,
    metrics: dict[str, float],
    folder: Path,
) -> None:
    """Write the model as transformers does, with its card."""
    network, weights = run.weights(), "averaged" if settings.ema else "raw"
    classifier.save_classifier(network, train.size, folder)
    text = card.card(
        run.folder.path,
        title="A classifier of images",
        task="image-classification",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} in {len(train.names)} classes for {run.progress.step:,} steps.",
        usage=USAGE,
        figures=metrics,
        protocol=f"All {len(val):,} validation images, seen once and unshifted: the share whose "
        "likeliest class is right, and the mean cross-entropy in nats; "
        f"{weights} weights, float32; images {train.sha256}, validation {val.sha256}; seed "
        f"{settings.seed}.",
        data=settings.images,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
