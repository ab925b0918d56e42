"""How useful generated images are: a classifier that has seen only them is tested on real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import console
from genkit.data.images import Images
from genkit.data.order import Order, blocks
from genkit.metrics.given_images import Given, Labels, as_images, check_size, load_named
from genkit.metrics.judge import SURE
from genkit.models import classifier
from genkit.notebook import TextRecord
from genkit.vision import pipelines
from genkit.vision.sampling import draw_samples

COUNT = 60_000  # images that are sampled, as many as MNIST has to train on
DEPTH, WIDTH = 1, 32  # of the classifier, as train_classifier has on a CPU
STEPS, BATCH, RATE, DECAY = 1000, 128, 3e-3, 0.05  # of its training, by AdamW


@dataclass(frozen=True)
class Usefulness(TextRecord):
    """Accuracy on real images of a classifier that was trained on generated ones.

    Args:
        accuracy: share of the real images whose most probable class is theirs.
        margin: half of a 95 % interval, over other real images.
        count, real: numbers of generated and of real images.
        images, data, data_sha256: what was compared.
        seed: image i is sampled with seed + i; also of the classifier's training.
        steps: of that training.
    """

    accuracy: float
    margin: float
    count: int
    real: int
    images: str
    data: str
    data_sha256: str
    seed: int
    steps: int

    def __str__(self) -> str:
        return (
            f"accuracy  {self.accuracy:.4f} ± {self.margin:.4f}\n\n"
            f"of a ResNet trained for {self.steps:,} steps of {BATCH} images,\n"
            f"on {self.count:,} of {self.images}, seed {self.seed},\n"
            f"tested on {self.real:,} of {self.data} (SHA-256 {self.data_sha256[:12]}…)"
        )


def measure_usefulness(
    model: Any,
    data: str | Path | Given,
    *,
    name: str,
    pipeline: Any = None,
    count: int | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    **reading: Any,
) -> Usefulness:
    """Train a classifier on generated images, and test it on real ones.

    Args:
        model: generated images with labels, if there is no pipeline.
        data: real images with labels.
        name: of the generated images.
        pipeline: a class-conditional model to sample from.
        count: images to train on; default: 60,000 that are sampled, or all that are given.
        labels: classes of the given images; default: their own.
        seed: of the first image, and of the classifier.
        reading: options of `load_images`.

    Raises:
        ValueError: an argument is invalid.
    """
    data_name, real = load_named(data, "data", **reading)
    classes = real.count_classes()
    if pipeline is None:
        given = as_images(load_named(model, "model", **reading)[1], labels, real.names)
        given = given if count is None else given.take(np.arange(count))
    else:
        given = _sample(pipeline, real, count or COUNT, seed)
    if given.labels is None:
        raise ValueError("task='classify' requires images with labels, or a conditional model")
    check_size(given, real, "model")
    if len(given.names) != classes:
        raise ValueError(f"data has {classes} classes, the images have {len(given.names)}")
    accuracy = measure_accuracy(train_classifier(given, seed), real)
    margin = SURE * math.sqrt(accuracy * (1 - accuracy) / len(real))
    return Usefulness(
        accuracy, margin, len(given), len(real), name, data_name, real.sha256, seed, STEPS
    )


def _sample(pipeline: Any, real: Images, count: int, seed: int) -> Images:
    """Sample images of all classes in turn."""
    classes = pipelines.count_classes(pipeline)
    if not classes:
        raise ValueError("task='classify' requires a class-conditional model")
    if classes != len(real.names):
        raise ValueError(f"data has {len(real.names)} classes, the model has {classes}")
    labels = np.arange(count) % classes
    drawn = draw_samples(pipeline, range(seed, seed + count), labels)
    return as_images(drawn, labels, real.names)


def train_classifier(images: Images, seed: int) -> torch.nn.Module:
    """Train a small ResNet on images with labels; global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = classifier.make_model(images.names, images.size, DEPTH, WIDTH).train()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    order = Order(len(images), seed)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    with console.bar(None, "training a classifier", STEPS, " steps") as bar:
        for step in range(STEPS):
            _, some = order(np.arange(step * BATCH, (step + 1) * BATCH))
            loss = classifier.loss(network, images.batch(some), images.classes(some), 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return network.eval()


@torch.inference_mode()
def measure_accuracy(network: torch.nn.Module, images: Images) -> float:
    """Return the share of images whose most probable class is theirs."""
    right = 0
    for which in blocks(len(images), 1000):
        predicted = classifier.predict(network, images.batch(which)).argmax(1)
        right += int((predicted == images.classes(which)).sum())
    return right / len(images)
