"""Images that are given for an evaluation: paths, tensors, arrays, or pictures of Pillow."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genkit.data.images import Images, load_images
from genkit.data.pixels import image_to_array
from genkit.metrics.features import to_uint8

GIVEN = "the images given"
KINDS = (
    "a path, images by genkit.data.images.load_images, a float tensor in [-1, 1] of the shape (n, "
    "channels, height, width), a uint8 array of the shape (n, height, width, channels) or (n, "
    "height, width), or a list of PIL images of one size in mode L or RGB"
)

Labels = Sequence[int] | np.ndarray | torch.Tensor
Given = Images | torch.Tensor | np.ndarray | Sequence[Image.Image]


def load_named(images: str | Path | Given, name: str, **options: Any) -> tuple[str, Images]:
    """Return a name for the protocol, and the images, loaded if necessary.

    Args:
        name: of the argument, for messages.
        options: of `load_images`, for a path.
    """
    if isinstance(images, str | Path):
        return str(images), load_images(images, **options)
    return GIVEN, as_images(images, None, [], name)


def as_images(
    images: Given, labels: Labels | None, names: list[str], name: str = "images"
) -> Images:
    """Return tensors, arrays and pictures as `Images`, and add labels.

    Args:
        labels: class of each image; default: the images' own.
        names: of the classes, if the images have none.
        name: of the argument, for messages.

    Raises:
        ValueError: an argument is invalid.
    """
    if not isinstance(images, Images):
        pixels = _as_pixels(images, name)
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        images = Images(pixels, None, [], np.arange(len(pixels)), digest)
    return images if labels is None else _add_labels(images, labels, images.names or names)


def _as_pixels(images: Any, name: str) -> np.ndarray:
    """Return (n, channels, height, width), uint8."""
    if isinstance(images, torch.Tensor):
        _check_tensor(images, name)
        return to_uint8(images.detach()).cpu().numpy()
    if isinstance(images, np.ndarray):
        return _from_array(images, name)
    if isinstance(images, list | tuple) and all(isinstance(i, Image.Image) for i in images):
        return _from_pictures(images, name)
    raise ValueError(f"{name} must be {KINDS}, got {type(images).__name__} {images!r:.60}")


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    grey = array.ndim == 3
    fits = array.dtype == np.uint8 and array.size and (grey or array.ndim == 4)
    if not fits or not (grey or array.shape[3] in (1, 3)):
        raise ValueError(
            f"{name} must be uint8 of the shape (n, height, width, 1 or 3) or (n, height, width), "
            f"if they are an array, got {array.dtype} of the shape {array.shape}; a tensor may be "
            "floats in [-1, 1] of the shape (n, channels, height, width)"
        )
    return array[:, None] if grey else np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def _from_pictures(pictures: Sequence[Image.Image], name: str) -> np.ndarray:
    kinds = {(picture.mode, picture.size) for picture in pictures}
    if len(kinds) != 1 or next(iter(kinds))[0] not in ("L", "RGB"):
        some = ", ".join(f"{mode} of {w} x {h}" for mode, (w, h) in sorted(kinds)[:3]) or "none"
        raise ValueError(
            f"{name} must be PIL images of one size, all in mode L or all in RGB, got {some}; "
            'convert each by picture.convert("RGB").resize((width, height))'
        )
    channels = len(pictures[0].getbands())
    return np.stack([image_to_array(picture, None, channels) for picture in pictures])


def _check_tensor(images: torch.Tensor, name: str) -> None:
    if images.ndim != 4 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            f"{name} must be floats, (n, channels, height, width), not empty, got "
            f"{images.dtype} of the shape {tuple(images.shape)}"
        )
    wrong = (~(images.abs() <= 1 + 1e-4)).flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{name}[{wrong[0]}] must be in [-1, 1], got values from {images[wrong[0]].min():g} to "
            f"{images[wrong[0]].max():g}"
        )


def _add_labels(images: Images, labels: Labels, names: list[str]) -> Images:
    given = torch.as_tensor(labels).cpu().numpy()
    if not names:
        raise ValueError("labels need class names: of the images, the data or the extractor")
    if given.shape != (len(images),) or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"labels must be {len(images):,} integers, one for each image, got {given.dtype} of "
            f"the shape {given.shape}"
        )
    beyond = np.flatnonzero((given < 0) | (given >= len(names)))
    if beyond.size:
        raise ValueError(
            f"labels[{beyond[0]}] must be one of {len(names)} classes, 0 to {len(names) - 1}, got "
            f"{given[beyond[0]]}"
        )
    every = np.zeros(len(images.pixels), np.int64)
    every[images.rows] = given
    return dataclasses.replace(images, labels=every, names=names)


def check_size(images: Images, data: Images, name: str) -> None:
    """Refuse images of another shape than the real ones."""
    if images.size != data.size:
        raise ValueError(
            f"{name} must have the data's shape {data.size} (channels, height, width), got "
            f"{images.size}; give resolution= and channels= (--resolution, --channels), which "
            "convert images that are read from files"
        )


def check_enough(count: int, name: str, k: int, parts: int = 1) -> None:
    """Refuse too few images: half samples must have a k-th neighbour.

    Args:
        parts: of the images that are given, of which the count is one.
    """
    if count >= 2 * (k + 1):
        return
    most = count // 2 - 1
    advice = f"k={most} (--k {most}) or less, or " if most >= 1 else ""
    raise ValueError(
        f"{name} must be at least {2 * (k + 1)} for k={k}, got {count}; give {advice}"
        f"{2 * (k + 1) * parts} or more images"
    )
