"""Metrics of images: class shares, label accuracy, reconstruction error."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt
import torch

# ---- classes


def class_shares(classes: npt.ArrayLike, count: int) -> np.ndarray:
    """Return the share of images of each class, (count,).

    Args:
        classes: of each image, (n,), between 0 and count - 1.
        count: number of classes.

    Raises:
        ValueError: an argument is invalid.
    """
    indices = _classes(classes, "classes")
    beyond = np.flatnonzero((indices < 0) | (indices >= count))
    if beyond.size:
        raise ValueError(
            f"classes[{beyond[0]}] must be between 0 and {count - 1}, got {indices[beyond[0]]}"
        )
    return np.bincount(indices, minlength=count) / len(indices)


def histogram_distance(real: npt.ArrayLike, fake: npt.ArrayLike) -> float:
    """Return the total variation distance of two class histograms, from 0 to 1.

    It is the share of images that would have to change class for the histograms to agree.

    Args:
        real: shares that add up to 1, (classes,).
        fake: those of generated images, (classes,).
    """
    return float(np.abs(np.asarray(real) - np.asarray(fake)).sum() / 2)


def label_accuracy(classes: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the share of images whose predicted class is their label.

    Args:
        classes: predicted by a classifier, (n,).
        labels: the class that each should show, (n,).

    Raises:
        ValueError: an argument is invalid.
    """
    predicted, wanted = _classes(classes, "classes"), _classes(labels, "labels")
    if predicted.shape != wanted.shape:
        raise ValueError(f"labels must be {predicted.shape} as classes, got {wanted.shape}")
    return float((predicted == wanted).mean())


def _classes(values: npt.ArrayLike, name: str) -> np.ndarray:
    classes = np.asarray(values)
    if classes.ndim != 1 or not classes.size:
        raise ValueError(f"{name} must be (n,) with n above 0, got the shape {classes.shape}")
    if not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {classes.dtype}")
    return classes


# ---- reconstruction


def reconstruction_error(images: npt.ArrayLike, rebuilt: npt.ArrayLike) -> torch.Tensor:
    """Return the mean squared error of each image over its values, (n,), float64.

    Args:
        images: in [-1, 1], (n, …).
        rebuilt: their reconstructions, (n, …).

    Raises:
        ValueError: the shapes differ.
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
            description="Whether generated images show their class.",
            citation="",
            inputs_description="predictions: classes by a classifier. references: labels.",
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
