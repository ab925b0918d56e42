"""Train a classifier of images.

    accelerate launch recipes/train_classifier.py
    accelerate launch recipes/train_classifier.py --images train.parquet --val_images test.parquet
    accelerate launch recipes/train_classifier.py --images pictures --resolution 64
    accelerate launch recipes/train_classifier.py --adversarial pgd --images train.parquet
    accelerate launch recipes/train_classifier.py --output_dir runs/classifier --resume

The output folder is an ordinary transformers model, at any time the best one so far: the one of
the highest accuracy or, with --adversarial, of the highest accuracy under attack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch

from genkit import machine, plots
from genkit.data.images import Images
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.models import classifier
from genkit.training.curves import robustness_curve
from genkit.training.image_data import ImageSettings, load_for_run
from genkit.training.optim import optimizers
from genkit.training.progress import count_steps
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.vision import perturbations
from genkit.vision.perturbations import Budget

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/classifier", "folder of the run and of the model")
    depth: int = setting(CHOSEN, "blocks in each stage", least=1)
    width: int = setting(
        CHOSEN, "channels of the first stage; each later one has twice as many", least=1
    )
    label_smoothing: float = setting(
        CHOSEN, "probability that is spread over all classes", least=0, below=1
    )
    shift: int = setting(
        CHOSEN, "largest random shift of training images, in pixels; 1/14 of a side", least=0
    )
    adversarial: str = setting(
        "no",
        "train on images under attack: by one step from a random start, or by several of PGD",
        choices=("no", "fast", "pgd"),
    )
    epsilon: float = setting(
        CHOSEN,
        "largest change of a pixel by the attack, of [0, 1]; 0.3 for grey images, 8/255 in colour",
        above=0,
        most=1,
    )
    epochs: float | None = setting(
        None, "passes over the data, unless max_steps is fewer steps", above=0
    )


EPSILON = {1: 0.3, 3: 8 / 255}  # by the channels: as published for MNIST and for CIFAR-10
STEPS = {"fast": 1, "pgd": 5}  # of the attack in training
GROWTH = 0.3  # part of the run over which the attack's epsilon grows from 0
ROBUST, WATCHED = 10, 1000  # steps of PGD, and images attacked, at an evaluation
SHIFT = 14  # side of an image over the largest shift
BLOCK = 500  # images evaluated together
SHOWN = 24  # mistakes in the picture


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        run: dict[str, Any] = {"depth": 2, "width": 64, "batch_size": 256}
    else:
        run = {"depth": 1, "width": 32, "batch_size": 128}
    plain = settings.adversarial == "no"
    if not (settings.epochs or settings.max_steps or settings.max_minutes):
        minutes = 3.5 if plain else 20.0
        run |= {"epochs": 30.0} if device == "accelerator" else {"max_minutes": minutes}
    if plain:
        run |= {"label_smoothing": 0.1, "optimizer": "adamw"}
    else:  # attacked images need no other change
        run |= {"label_smoothing": 0.0, "shift": 0, "optimizer": "muon"}
        run |= {"width": 64 if device == "accelerator" else 24}
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.05}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # on a CPU, compiled convolutions are slower than oneDNN's own
    return run | rates | precision | {"ema": 0.0, "compile": False}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        train, val, order = load_for_run(run, settings)
        check_images(run, settings, train)
        if settings.shift is None:
            settings.shift = round(min(train.size[1:]) / SHIFT)
        robust = settings.adversarial != "no"
        if robust and settings.epsilon is None:
            settings.epsilon = EPSILON[train.size[0]]

        # ---- model
        make = classifier.make_robust_model if robust else classifier.make_model
        network = make(train.names, train.size, settings.depth, settings.width)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(classifier.loss)
        attack = make_attack(run, settings) if robust else None
        get_batch = partial(make_batch, train, settings.shift, attack, run.device)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} in {len(train.names)} classes to train on, "
            f"{len(val):,} to validate"
        )

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        settings.max_steps = count_steps(
            settings.epochs, len(train), settings.batch_size, settings.max_steps
        )
        smoothing = settings.label_smoothing
        best, curve = ("robust_accuracy", robustness_curve) if robust else ("accuracy", None)
        run.warm_up(lambda rows: loss(model, *get_batch(order(rows)[1]), smoothing))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *get_batch(order(rows)[1]), smoothing))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, val)
                    if robust:
                        metrics |= evaluate_attacked(run, val, settings.epsilon)
                    if run.report(best, metrics, lower_is_better=False, curve=curve):
                        run.publish(partial(save_model, run, settings, train, val, metrics))


def check_images(run: Run, settings: Settings, train: Images) -> None:
    """Refuse images of one class, shifts beyond them, and batches of 1, which have no variance.

    Also an epsilon without the training that has it.
    """
    classes = train.count_classes()
    if classes < 2:
        raise ValueError(f"images: two or more classes are needed, got only {train.names[0]!r}")
    if settings.epsilon is not None and settings.adversarial == "no":
        raise ValueError(f"--epsilon {settings.epsilon} is for --adversarial fast or pgd")
    side = min(train.size[1:])
    if settings.shift is not None and settings.shift >= side:
        raise ValueError(f"--shift must be below the side of {side} pixels, got {settings.shift}")
    rows = run.batch_size // run.processes // settings.gradient_accumulation
    if rows < 2:
        raise ValueError(
            f"--batch_size {run.batch_size} leaves 1 image for a batch normalisation; give "
            f"{2 * run.processes * settings.gradient_accumulation} or more"
        )


Attack = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_batch(
    train: Images, shift: int, attack: Attack | None, device: torch.device, which: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up images, shifted and under attack, and their classes."""
    images = classifier.random_shift(train.batch(which, device), shift)
    labels = train.classes(which, device)
    return images if attack is None else attack(images, labels), labels


def make_attack(run: Run, settings: Settings) -> Attack:
    """Return the attack of a training step, on the network as it is, in training mode."""
    predict = run.autocast(partial(classifier.predict, run.networks["model"].module))
    steps = STEPS[settings.adversarial]

    def attack(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        grown = settings.epsilon * min(1.0, run.fraction / GROWTH)
        changed = perturbations.training_examples(
            lambda pixels: predict(2 * pixels - 1), (images + 1) / 2, labels, grown, steps
        )
        return 2 * changed - 1

    return attack


# ---- evaluate


def evaluate(run: Run, val: Images) -> dict[str, float]:
    """Evaluate the model on all validation images, and save pictures of its mistakes."""
    network = synchronized(run).eval()
    shard = predict_shard(network, val, np.array(run.shard(len(val)), int), run.device)
    network.train()
    predicted, confidences, nats = run.gather_arrays(*shard)
    true = val.classes(np.arange(len(val))).numpy()
    if run.is_main:
        save_pictures(run, val, true, predicted, confidences)
    return {"accuracy": float((predicted == true).mean()), "val_loss": float(nats.mean())}


def evaluate_attacked(run: Run, val: Images, epsilon: float) -> dict[str, float]:
    """Return the accuracy under PGD on some validation images, whose starts have fixed seeds."""
    network = synchronized(run).eval()
    some = np.unique(np.linspace(0, len(val) - 1, WATCHED).round().astype(int))
    kept = 0
    shard = some[np.array(run.shard(len(some)), int)]
    for which in np.split(shard, range(BLOCK, len(shard), BLOCK)):
        found = perturbations.pgd(
            lambda pixels: classifier.predict(network, 2 * pixels - 1),
            (val.batch(which, run.device) + 1) / 2,
            val.classes(which, run.device),
            Budget(epsilon),
            steps=ROBUST,
            seeds=which.tolist(),
        )
        kept += int((~found.fooled).sum())
    network.train()
    return {"robust_accuracy": run.sum(torch.tensor([kept])).item() / len(some)}


def synchronized(run: Run) -> torch.nn.Module:
    """Return the network with the main process's running statistics: each has its own."""
    network = run.weights()
    for buffer in network.buffers():
        accelerate.utils.broadcast(buffer)
    return network


@torch.inference_mode()
def predict_shard(
    network: torch.nn.Module, val: Images, which: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predicted classes, their probabilities and cross-entropies in nats, (n,) each."""
    blocks = np.split(which, range(BLOCK, len(which), BLOCK))
    logits = [network(classifier.in_colour(val.batch(b, device))).logits for b in blocks]
    scores = torch.cat(logits).log_softmax(1)
    best, predicted = scores.max(1)
    nats = -scores.gather(1, val.classes(which, device)[:, None])[:, 0]
    return predicted.cpu().numpy(), best.exp().cpu().numpy(), nats.cpu().numpy()


def save_pictures(
    run: Run, val: Images, true: np.ndarray, predicted: np.ndarray, confidences: np.ndarray
) -> None:
    """Save the confusion matrix, and the mistakes with the highest confidence."""
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


def save_model(
    run: Run, settings: Settings, train: Images, val: Images, metrics: dict[str, float], path: Path
) -> None:
    """Write the model as transformers does, with its card."""
    network = run.weights()
    classifier.save_classifier(network, train.size, path)
    attacked = ""
    if "robust_accuracy" in metrics:
        attacked = (
            f" Of at most {WATCHED:,} of them, the share that stays right under PGD of {ROBUST} "
            f"steps within {settings.epsilon:.3g} (linf, pixels in [0, 1])."
        )
    card.write_card(
        path,
        run.folder.path,
        title="A classifier of images",
        task="image-classification",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} in {len(train.names)} classes for {run.progress.step:,} steps.",
        usage=USAGE,
        figures=metrics,
        protocol=f"All {len(val):,} validation images, each once and unshifted: the share whose "
        "most probable class is right, and the mean cross-entropy in nats." + attacked,
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
