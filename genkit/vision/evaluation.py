"""genkit.evaluate: measure a model of text or images, or generated images."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import machine
from genkit.data import image_files, utf8
from genkit.data.images import Images, proportional_labels
from genkit.data.order import blocks
from genkit.hub import download, kinds, names
from genkit.metrics.features import Extractor
from genkit.metrics.given_images import Given, Labels, check_enough, load_named
from genkit.metrics.images import reconstruction_error
from genkit.metrics.judge import SURE, Evaluation, Figure, Judge
from genkit.metrics.neighbours import K
from genkit.tabular.evaluation import TableEvaluation, evaluate_table
from genkit.tabular.model import TableModel
from genkit.text.language_model import LanguageModel
from genkit.text.perplexity import Perplexity, perplexity
from genkit.vision import pipelines, sampling
from genkit.vision.pipelines import Encoder
from genkit.vision.usefulness import Usefulness, measure_usefulness

HINT = "Give the folder or Hub id of a model, or a folder or table of images"
MOST = 10_000  # images that are sampled from a model by default
BATCH = 256  # images reconstructed at once


def evaluate(
    model: str | Path | LanguageModel | Given,
    data: str | Path | Given | Sequence[str] = image_files.DIGITS,
    *,
    task: str | None = None,
    extractor: str | Path | Extractor | None = None,
    count: int | None = None,
    labels: Labels | None = None,
    train: str | Path | Given | None = None,
    real_count: int | None = None,
    k: int = K,
    seed: int = 0,
    weights: str | None = None,
    sampler: str | None = None,
    evaluations: int | None = None,
    stride: int | None = None,
    target: str | None = None,
    device: str | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    skip_corrupt: bool = False,
    allow_outside: bool = False,
) -> Evaluation | Perplexity | Usefulness | TableEvaluation:
    """Measure how well a model predicts texts, or generated images or rows match real ones.

    Args:
        model: saved model of text, images or tables, a folder or Hub id; a loaded language model or
            table model; or generated images: a path, `Images`, a tensor in [-1, 1], (n, channels,
            height, width), a uint8 array, (n, height, width, channels), or a list of PIL images.
        data: texts, or a text file, for a language model; a table for a table model, see
            `evaluate_table`; otherwise real images, see `Judge`.
        task: classify, to train a classifier on the images, of all classes alike if sampled,
            and test it on the data, without an extractor; default: compare features; images only.
        extractor: image classifier that gives features: folder, Hub id or inception; images only.
        count: images or rows to sample, or images to use of those given; default: half as many as
            the real ones, at most 10,000, for a task 60,000, or all that are given; of rows 200 or
            more.
        labels: class that each image should show, see `Judge.judge`; default for a
            class-conditional model: as in the real images; images only.
        train: training images or rows, among which copies are searched, see `Judge`; images and
            tables only.
        real_count: real images to use; default: all; images only.
        k: the neighbour of precision, recall and coverage; default: 5; images only.
        seed: image or row i is sampled with seed + i; images and tables only.
        weights: averaged or raw weights of a GAN; for given images a note; images only.
        sampler, evaluations: notes in the protocol of given images; images only.
        stride: tokens that a window moves at a time, see `perplexity`; text only.
        target: column of categories that a classifier learns from synthetic rows; default: the
            last one of 2 to 20 categories; tables only.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        resolution: scale and crop images that are read from files to squares of this side; default:
            the size that all have; images only.
        channels: 1 for grey, 3 for colour; default: as the first image has; images only.
        skip_corrupt: leave out unreadable files; images only.
        allow_outside: read images that a table or a link names elsewhere; images only.

    Returns:
        The figures with their protocol; of images also margins and baselines; of a task the
        accuracy on the data.

    Raises:
        ValueError: an argument is invalid.
    """
    machine.find_device(device)
    options: dict[str, Any] = {"task": task, "extractor": extractor, "count": count}
    options |= {"labels": labels}
    options |= {"train": train, "real_count": real_count, "k": k, "seed": seed}
    options |= {"weights": weights, "sampler": sampler, "evaluations": evaluations}
    reading: dict[str, Any] = {"resolution": resolution, "channels": channels}
    reading |= {"skip_corrupt": skip_corrupt, "allow_outside": allow_outside}
    saved = _find_model(model)
    if isinstance(model, TableModel) or (saved and kinds.kind_of(saved) == kinds.TABLE):
        return _evaluate_table(model, data, target, device, options | reading | {"stride": stride})
    if target is not None:
        raise ValueError(f"target={target!r:.80} is for models of tables; leave it out")
    if isinstance(model, LanguageModel) or (saved and kinds.kind_of(saved) == kinds.TEXT):
        return _evaluate_text(model, data, stride, device, options | reading)
    if stride is not None:
        raise ValueError(f"stride={stride} is for language models; leave it out")
    _check_reading(reading, [data, train, None if saved else model])
    return _evaluate_images(model, saved, data, reading, device=device, **options)


def _evaluate_table(
    model: Any, data: Any, target: str | None, device: str | None, options: dict[str, Any]
) -> TableEvaluation:
    """Compare the synthetic rows of a table model with real ones."""
    taken = {name: options.pop(name) for name in ("count", "train", "seed")}
    for name, value in options.items():
        if value not in (None, False) and (name, value) != ("k", K):
            raise ValueError(f"{name}={value!r:.80} is not for models of tables; leave it out")
    if data == image_files.DIGITS:
        raise ValueError("data is required: a table of real rows, such as test.csv")
    return evaluate_table(model, data, target=target, device=device, **taken)


def _find_model(model: Any) -> Path | None:
    """Return the folder of a saved model; None for a loaded one and for images."""
    if isinstance(model, TableModel):
        return None
    kinds.check_loaded(model, takes="LanguageModel")
    if not isinstance(model, str | Path):
        return None
    saved = download.find_model(model)
    path = os.path.expanduser(model)  # noqa: PTH111  Path's own raises for unknown users
    if saved is None and names.is_path(str(model)) and not os.path.exists(path):  # noqa: PTH110
        download.refuse_missing(str(model), hint=HINT)
    return saved


def _check_reading(reading: dict[str, Any], sources: list[Any]) -> None:
    """Refuse options of reading files if none is read."""
    for name, value in reading.items():
        given = value is not None and value is not False
        if given and not any(isinstance(source, str | Path) for source in sources):
            raise ValueError(f"{name}={value} is for images that are read from files; leave it out")


def _evaluate_text(
    model: Any, data: Any, stride: int | None, device: str | None, image_options: dict[str, Any]
) -> Perplexity:
    """Measure the perplexity of a language model on texts, or on a text file."""
    for name, value in image_options.items():
        given = value is not None and value is not False
        if given and (name, value) not in (("k", K), ("seed", 0)):
            raise ValueError(f"{name}={value!r:.80} is for image models; leave it out")
    if isinstance(data, str | Path):
        if not names.as_path(str(data), "data").exists():
            raise ValueError(
                f"data must be a text file or a list of texts, got {names.quote(str(data))}; there "
                "is no such file"
            )
        data = "".join(utf8.read_pieces(Path(data), "data"))
    elif isinstance(data, Images):
        raise ValueError("data must be a text file or a list of texts for a language model")
    return perplexity(data, model=model, device=device, stride=stride)


def _evaluate_images(
    images: Any,
    saved: Path | None,
    data: Any,
    reading: dict[str, Any],
    *,
    task: str | None,
    extractor: str | Path | Extractor | None,
    count: int | None,
    labels: Labels | None,
    weights: str | None,
    sampler: str | None,
    evaluations: int | None,
    device: str | None,
    k: int,
    **options: Any,
) -> Evaluation | Usefulness:
    """Compare the samples of a saved model, or given images, with real images; see `evaluate`."""
    if task is not None:
        options |= {"weights": weights, "device": device, "extractor": extractor}
        options |= {"sampler": sampler, "evaluations": evaluations, "k": k}
        return _evaluate_task(task, images, saved, data, count, labels, options, reading)
    if extractor is None:
        raise ValueError("extractor is required for images: give the output of train_classifier")
    if count is not None and count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    if device is not None and not isinstance(extractor, str | Path):
        raise ValueError(f"device={device!r} is for loading; the extractor given is loaded")
    pipeline = None if saved is None else pipelines.load_pipeline(saved, weights)
    if pipeline is None:
        name, given = load_named(images, "model", **reading)
        if count is not None and count > len(given):
            raise ValueError(f"count must be at most {len(given):,}, got {count:,}")
        given = given if count is None else given.take(np.arange(count))
        check_enough(len(given), "images", k)
    elif count is not None:
        check_enough(count, "count", k)
    judge = Judge(data, extractor=extractor, k=k, device=device, **reading, **options)
    if pipeline is not None:
        return _evaluate_pipeline(judge, pipeline, str(images), count, labels, weights)
    return judge.judge(
        given, labels, name=name, weights=weights, sampler=sampler, evaluations=evaluations
    )


def _evaluate_task(
    task: str,
    images: Any,
    saved: Path | None,
    data: Any,
    count: int | None,
    labels: Labels | None,
    options: dict[str, Any],
    reading: dict[str, Any],
) -> Usefulness:
    """Measure how useful a saved model's samples, or given images, are for a task."""
    if task != "classify":
        raise ValueError(f"task must be classify, got {task!r:.80}")
    seed, weights, device = (options.pop(name) for name in ("seed", "weights", "device"))
    for name, value in options.items():
        if value is not None and (name, value) != ("k", K):
            raise ValueError(f"{name}={value!r:.80} compares features; leave it out with a task")
    if count is not None and count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    pipeline = None if saved is None else pipelines.load_pipeline(saved, weights)
    if pipeline is not None:
        pipeline.to(machine.find_device(device))
    return measure_usefulness(
        images,
        data,
        name=str(images) if isinstance(images, str | Path) else "the images given",
        pipeline=pipeline,
        count=count,
        labels=labels,
        seed=seed,
        **reading,
    )


def _evaluate_pipeline(
    judge: Judge,
    pipeline: Any,
    name: str,
    count: int | None,
    labels: Labels | None,
    weights: str | None,
) -> Evaluation:
    """Evaluate samples of a pipeline and, if it has an encoder, its reconstructions."""
    pipeline.to(judge.extractor.device)
    encodes, conditional = isinstance(pipeline, Encoder), pipelines.count_classes(pipeline) > 0
    count = count or min(MOST, len(judge.held_out))
    if conditional and (encodes or labels is None):  # reconstruction needs labelled images, too
        proportional = proportional_labels(judge.real_images, count)
        labels = proportional if labels is None else labels
    options = sampling.resolve_sampler(pipeline)
    seeds = range(judge.seed, judge.seed + count)
    record = judge.judge(
        sampling.draw_samples(pipeline, seeds, labels, options.arguments),
        labels,
        name=name,
        seed=judge.seed,
        weights=weights,
        sampler=options.description,
        evaluations=options.evaluations,
    )
    if not encodes:
        return record
    some = judge.held_out_images.take(np.arange(min(count, len(judge.held_out))))
    error = {"reconstruction error": measure_reconstruction(pipeline, some, conditional)}
    return dataclasses.replace(record, figures=record.figures | error)


def measure_reconstruction(pipeline: Any, images: Images, conditional: bool) -> Figure:
    """Return the mean squared error of reconstructions; conditional: with the images' classes."""
    errors = []
    for which in blocks(len(images), BATCH):
        batch = images.batch(which)
        rebuilt = pipeline.reconstruct(batch, images.classes(which) if conditional else None)
        errors.append(reconstruction_error(batch, rebuilt.cpu()))
    every = torch.cat(errors)
    margin = SURE * every.std().item() / math.sqrt(len(every))
    return Figure(every.mean().item(), margin, 0.0)
