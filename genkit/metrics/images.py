"""What images show, and how well they are rebuilt: classes, labels, reconstruction error."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import torch

# ---- classes


def class_shares(classes: npt.ArrayLike, count: int) -> np.ndarray:
    """Return the part of the images that each class has, (count,).

    Args:
        classes: of each image, (n,), between 0 and count - 1.
        count: how many classes there are.

    Raises:
        ValueError: an argument cannot work; it is named.
    """
    found = _classes(classes, "classes")
    beyond = np.flatnonzero((found < 0) | (found >= count))
    if beyond.size:
        raise ValueError(
            f"classes[{beyond[0]}] must be between 0 and {count - 1}, got {found[beyond[0]]}"
        )
    return np.bincount(found, minlength=count) / len(found)


def histogram_distance(real: npt.ArrayLike, fake: npt.ArrayLike) -> float:
    """Return the part of the images that would have to change class for two histograms to agree.

    This is their total variation: 0 if they are the same, 1 if they share no class.

    Args:
        real: parts that add up to 1, (classes,).
        fake: the same of generated images.
    """
    return float(np.abs(np.asarray(real) - np.asarray(fake)).sum() / 2)


def label_accuracy(classes: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the part of the images that show what they were asked to.

    Args:
        classes: what a classifier holds each for, (n,).
        labels: what each should be, (n,).

    Raises:
        ValueError: an argument cannot work; it is named.
    """
    found, wanted = _classes(classes, "classes"), _classes(labels, "labels")
    if found.shape != wanted.shape:
        raise ValueError(f"labels must be {found.shape} as classes, got {wanted.shape}")
    return float((found == wanted).mean())


def _classes(values: npt.ArrayLike, name: str) -> np.ndarray:
    found = np.asarray(values)
    if found.ndim != 1 or not found.size:
        raise ValueError(f"{name} must be (n,) with n above 0, got the shape {found.shape}")
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {found.dtype}")
    return found


# ---- reconstruction


def reconstruction_error(images: npt.ArrayLike, rebuilt: npt.ArrayLike) -> torch.Tensor:
    """Return the mean squared error of each image over its values, (n,), float64.

    Args:
        images: in [-1, 1], (n, …).
        rebuilt: the same after the way through a model.

    Raises:
        ValueError: they do not have the same shape.
    """
    before, after = (torch.as_tensor(each, dtype=torch.float64) for each in (images, rebuilt))
    if before.shape != after.shape or before.ndim < 2 or not before.numel():
        raise ValueError(
            f"rebuilt must be (n, …) as images, {tuple(before.shape)}, got {tuple(after.shape)}"
        )
    return (before - after).square().flatten(1).mean(1)


# ---- evaluate


class ClassMetric(evaluate.Metric):
    """Label accuracy and `histogram_distance` as an `evaluate.Metric`, which needs no network.

    ClassMetric().compute(predictions=classes_of_images, references=labels_asked_for)
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Whether generated images show what they were asked to.",
            citation="",
            inputs_description="predictions: classes that a classifier tells. references: labels.",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        count = 1 + max(*predictions, *references)
        shares = [class_shares(each, count) for each in (references, predictions)]
        return {
            "label_accuracy": label_accuracy(predictions, references),
            "histogram_distance": histogram_distance(*shares),
        }


class ReconstructionMetric(evaluate.Metric):
    """Mean `reconstruction_error` as an `evaluate.Metric`, which needs no network.

    ReconstructionMetric().compute(predictions=rebuilt.flatten(1), references=images.flatten(1))
    """

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Mean squared error of rebuilt images.",
            citation="",
            inputs_description="predictions: rebuilt images as rows. references: the images.",
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]]
    ) -> dict[str, Any]:
        errors = reconstruction_error(references, predictions)
        return {"reconstruction_error": errors.mean().item(), "total": len(errors)}
