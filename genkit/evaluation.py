"""`genkit.evaluate`: images, or a model that makes them, before the judge."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genkit import autoencoder
from genkit import images as image_data
from genkit.features import Extractor
from genkit.images import Images, blocks
from genkit.judge import GIVEN, SURE, Evaluation, Figure, Judge, Labels, as_images, named
from genkit.metrics.images import reconstruction_error
from genkit.metrics.neighbours import K

MOST = 10_000  # images that are drawn from a model unless told
BATCH = 256  # images drawn at a time


def evaluate(
    images: str | Path | Images | torch.Tensor,
    data: str | Path | Images = image_data.DIGITS,
    *,
    extractor: str | Path | Extractor,
    count: int | None = None,
    labels: Labels | None = None,
    train: str | Path | Images | None = None,
    real_count: int | None = None,
    k: int = K,
    seed: int = 0,
    weights: str | None = None,
    sampler: str | None = None,
    evaluations: int | None = None,
) -> Evaluation:
    """Measure how well generated images match real ones.

    Args:
        images: the folder of a saved image model, which is drawn from; or generated images: what
            `images.load` takes or returns, or a tensor in [-1, 1], (n, channels, height, width).
        data: real images; see `Judge`.
        extractor: folder or Hub id of an image classifier, "inception", or what
            `features.load_extractor` returned.
        count: images to draw, or the first of those given; unless given as many as half of the
            data, but 10,000 at most, or all that are given.
        labels: what each image should show; see `Judge.judge`. Of a model that is told classes, in
            the data's proportions unless given.
        train, real_count, k: see `Judge`.
        seed: image i is drawn with seed + i; also that of `Judge`.
        weights, sampler, evaluations: for the protocol of images that are given.

    Returns:
        The figures with margins, floors and protocol.

    Raises:
        ValueError: an argument cannot work; it is named.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    judge = Judge(data, extractor=extractor, train=train, real_count=real_count, k=k, seed=seed)
    if isinstance(images, str | Path) and (Path(images) / "model_index.json").exists():
        return _evaluate_model(judge, images, count, labels, seed, weights)
    if isinstance(images, torch.Tensor):
        name, given = GIVEN, as_images(images, None, [])
    else:
        name, given = named(images)
    if count is not None:
        if count > len(given):
            raise ValueError(f"count must be at most {len(given):,}, got {count:,}")
        given = given.take(np.arange(count))
    return judge.judge(
        given, labels, name=name, weights=weights, sampler=sampler, evaluations=evaluations
    )


def _evaluate_model(
    judge: Judge,
    folder: str | Path,
    count: int | None,
    labels: Labels | None,
    seed: int,
    weights: str | None,
) -> Evaluation:
    """Draw from a saved model, and judge that and how well it rebuilds real images."""
    pipeline = autoencoder.load(folder).to(judge.extractor.device)
    count = count or min(MOST, len(judge.stand_ins))
    tells = bool(pipeline.vae.config.get("labels", 0))
    if tells:  # real images are rebuilt by their class, too
        share = proportional(judge.real_images, count)
        labels = share if labels is None else labels
    drawn = sample(pipeline, count, labels, seed)
    record = judge.judge(
        drawn,
        labels,
        name=str(folder),
        seed=seed,
        weights=weights,
        sampler="one draw from the prior",
        evaluations=1,
    )
    errors = []
    some = judge.stand_in_images.take(np.arange(min(count, len(judge.stand_ins))))
    for which in blocks(len(some), BATCH):
        batch = some.batch(which)
        rebuilt = pipeline.reconstruct(batch, some.classes(which) if tells else None)
        errors.append(reconstruction_error(batch, rebuilt.cpu()))
    every = torch.cat(errors)
    margin = SURE * every.std().item() / math.sqrt(len(every))
    rebuilding = {"reconstruction error": Figure(every.mean().item(), margin, 0.0)}
    return dataclasses.replace(record, figures=record.figures | rebuilding)


def sample(pipeline: Any, count: int, labels: Labels | None = None, seed: int = 0) -> torch.Tensor:
    """Draw images from a pipeline, image i with seed + i, whatever the batch.

    Args:
        pipeline: called as `AutoencoderPipeline` is.
        labels: the class of each, (count,), for a model that is told.

    Returns:
        In [-1, 1], (count, channels, height, width).
    """
    told, drawn = None if labels is None else torch.as_tensor(labels), []
    with tqdm(total=count, desc="drawing", unit=" images", delay=2, leave=False) as bar:
        for which in blocks(count, BATCH):
            own = [torch.Generator().manual_seed(seed + int(i)) for i in which]
            some = None if told is None else told[which]
            batch = pipeline(len(which), own, some, output_type="pt").images
            drawn.append(batch.cpu() * 2 - 1)
            bar.update(len(which))
    return torch.cat(drawn)


def proportional(images: Images, count: int) -> np.ndarray:
    """Return `count` labels, (count,), in the proportions that those of images have."""
    labels = np.sort(images.classes(np.arange(len(images))).numpy())
    return labels[((np.arange(count) + 0.5) * len(labels) / count).astype(int)]
