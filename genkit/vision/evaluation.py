"""`genkit.evaluate`: images, or a model that makes them, before the judge."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.data import image_files
from genkit.data.images import Images, proportional
from genkit.data.order import blocks
from genkit.hub import download
from genkit.metrics.features import Extractor
from genkit.metrics.images import reconstruction_error
from genkit.metrics.judge import (
    GIVEN,
    SURE,
    Evaluation,
    Figure,
    Judge,
    Labels,
    as_images,
    load_named,
)
from genkit.metrics.neighbours import K
from genkit.vision import pipelines, sampling
from genkit.vision.pipelines import Encoder

MOST = 10_000  # images that are drawn from a model unless told
BATCH = 256  # images drawn at a time


def evaluate(
    images: str | Path | Images | torch.Tensor,
    data: str | Path | Images = image_files.DIGITS,
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
        images: folder or Hub id of a saved image model, which is drawn from; or generated images:
            what `images.load` takes or returns, or a tensor in [-1, 1], of the shape
            (n, channels, height, width).
        data: real images; see `Judge`.
        extractor: folder or Hub id of an image classifier, "inception", or what
            `features.load_extractor` returned.
        count: images to draw, or the first of those given; unless given as many as half of the
            data, but 10,000 at most, or all that are given.
        labels: what each image should show; see `Judge.judge`. Of a model that is told classes, in
            the data's proportions unless given.
        train, real_count, k: see `Judge`.
        seed: image i is drawn with seed + i; also that of `Judge`.
        weights: for the protocol; also which to load, see `pipelines.load`.
        sampler, evaluations: for the protocol of images that are given.

    Returns:
        The figures with margins, floors and protocol.

    Raises:
        ValueError: an argument cannot work; it is named.
    """
    if count is not None and count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    saved = download.find_model(images) if isinstance(images, str | Path) else None
    pipeline = None if saved is None else pipelines.load_pipeline(saved, weights)
    judge = Judge(data, extractor=extractor, train=train, real_count=real_count, k=k, seed=seed)
    if pipeline is not None:
        return _evaluate_model(judge, pipeline, str(images), count, labels, seed, weights)
    if isinstance(images, torch.Tensor):
        name, given = GIVEN, as_images(images, None, [])
    else:
        name, given = load_named(images)
    if count is not None:
        if count > len(given):
            raise ValueError(f"count must be at most {len(given):,}, got {count:,}")
        given = given.take(np.arange(count))
    return judge.judge(
        given, labels, name=name, weights=weights, sampler=sampler, evaluations=evaluations
    )


def _evaluate_model(
    judge: Judge,
    pipeline: Any,
    name: str,
    count: int | None,
    labels: Labels | None,
    seed: int,
    weights: str | None,
) -> Evaluation:
    """Draw from a saved model, and judge that and, if it encodes, how well it rebuilds images."""
    pipeline.to(judge.extractor.device)
    encodes, told = isinstance(pipeline, Encoder), pipelines.count_classes(pipeline) > 0
    count = count or min(MOST, len(judge.held_out))
    if told and (encodes or labels is None):  # real images are rebuilt by their class, too
        share = proportional(judge.real_images, count)
        labels = share if labels is None else labels
    how = sampling.resolve_sampler(pipeline)
    record = judge.judge(
        sample(pipeline, count, labels, seed, **how.arguments),
        labels,
        name=name,
        seed=seed,
        weights=weights,
        sampler=how.words,
        evaluations=how.evaluations,
    )
    if not encodes:
        return record
    some = judge.held_out_images.take(np.arange(min(count, len(judge.held_out))))
    rebuilding = {"reconstruction error": measure_reconstruction(pipeline, some, told)}
    return dataclasses.replace(record, figures=record.figures | rebuilding)


def measure_reconstruction(pipeline: Any, images: Images, told: bool) -> Figure:
    """Measure how far reconstructions are from images, rebuilt by their class if it is `told`."""
    errors = []
    for which in blocks(len(images), BATCH):
        batch = images.batch(which)
        made = pipeline.reconstruct(batch, images.classes(which) if told else None)
        errors.append(reconstruction_error(batch, made.cpu()))
    every = torch.cat(errors)
    margin = SURE * every.std().item() / math.sqrt(len(every))
    return Figure(every.mean().item(), margin, 0.0)


def sample(
    pipeline: Any, count: int, labels: Labels | None = None, seed: int = 0, **options: Any
) -> torch.Tensor:
    """Draw images from a pipeline, image i with seed + i, whatever the batch.

    Args:
        pipeline: of any family.
        labels: the class of each, (count,), for a model that is told.
        options: of the call, such as a GAN's truncation.

    Returns:
        In [-1, 1], (count, channels, height, width).
    """
    return sampling.draw_samples(pipeline, range(seed, seed + count), labels, options)
