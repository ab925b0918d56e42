"""Images with labels: from a folder, a table or a dataset, decoded once into a memory map.

So an epoch costs memory bandwidth, and no decoding of files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from genkit import console
from genkit.data import pixels, tables, workers
from genkit.data.image_files import EncodedImages, ImageSource, file_stats, find_images
from genkit.data.pixels import ImageError, UnsuitableError
from genkit.files import cache_folder, written_whole

VERSION = 4  # of the cache: raised when decoding changes


@dataclass(frozen=True)
class Images:
    """Decoded images: the rows of a memory map, or some of them."""

    pixels: np.ndarray  # (rows of the map, channels, height, width), uint8
    labels: np.ndarray | None  # (rows of the map,), int64
    names: list[str]  # of the classes
    rows: np.ndarray  # (images,): which rows of the map these images are
    sha256: str  # of these images and their labels
    skipped: list[str] = dataclasses.field(default_factory=list)  # unreadable files
    notes: list[str] = dataclasses.field(default_factory=list)  # of other files that were left out

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def batch(self, which: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Look up images: float32 in [-1, 1], (len(which), channels, height, width)."""
        chosen = torch.from_numpy(self.pixels[self.rows[which]]).to(device)
        return chosen.float().div_(127.5).sub_(1)

    def classes(self, which: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Look up labels, (len(which),), int64.

        Raises:
            ValueError: the images have no labels.
        """
        if self.labels is None:
            raise ValueError(
                "labels: these images have no labels; give a folder with a folder for each class, "
                "or a table with a column of labels"
            )
        return torch.from_numpy(self.labels[self.rows[which]]).to(device)

    def count_classes(self) -> int:
        """Count the classes.

        Raises:
            ValueError: the images have no labels.
        """
        self.classes(np.arange(0))
        return len(self.names)

    def take(self, which: np.ndarray) -> Images:
        """Return some of the images, by index or by a mask."""
        rows = self.rows[which]
        digest = hashlib.sha256(self.sha256.encode() + rows.astype("<i8").tobytes()).hexdigest()
        return dataclasses.replace(self, rows=rows, sha256=digest)


def load_images(
    source: str | Path,
    resolution: int | None = None,
    channels: int | None = None,
    skip_corrupt: bool = False,
    column: str = "image",
    label_column: str = "label",
    split: str = "train",
    allow_outside: bool = False,
    max_pixels: int = pixels.MAX_PIXELS,
    max_bytes: int = pixels.MAX_BYTES,
    table_memory: int = tables.MEMORY,
) -> Images:
    """Decode images, or load them from the cache.

    Args:
        source: "digits", the 8 x 8 digits of scikit-learn; a folder of images, in which folders are
            classes; a table (parquet, json, jsonl, csv) or a dataset saved by `datasets`, with a
            column of images, or of paths from the table's folder; or the id of a Hub dataset.
        resolution: side of squares to scale and crop images to; default: the size that all have.
        channels: 1 for grey, 3 for colour; default: as the first image has. Where images are grey,
            so is one of three equal channels, as formats without grey have.
        skip_corrupt: leave out unreadable files; `Images.skipped` lists them. Intact images that
            cannot be trained on as they are, such as transparent ones, are errors nevertheless.
        column, label_column: of a table or a dataset.
        split: of a Hub dataset, by its name.
        allow_outside: also read images outside the folder, where cells of a table or links in a
            folder name them.
        max_pixels: limit of an image, by its header; a larger one is unreadable.
        max_bytes: limit of an image's file; a larger one is unreadable.
        table_memory: MiB of memory of the process that reads a table; also the most bytes of its
            rows, if its files are small.

    Raises:
        ImageError: a file is unreadable, or its image has another shape than the others.
        ValueError: there are no images, or an argument is out of range.
    """
    if resolution is not None and resolution < pixels.MIN_SIDE:
        raise ValueError(f"resolution must be {pixels.MIN_SIDE} or more, got {resolution}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 for grey or 3 for colour, got {channels}")
    for name, value in {"max_pixels": max_pixels, "max_bytes": max_bytes}.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    where = ImageSource(
        str(source), column, label_column, split, allow_outside, max_bytes, table_memory
    )
    identity, open_images = find_images(where)
    options = workers.DecodeOptions(resolution, channels, max_pixels, max_bytes)
    content = [VERSION, Image.__version__, identity, dataclasses.asdict(options), skip_corrupt]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path = cache_folder() / f"{key}.pixels"
    facts = _read_facts(path) or _decode_to_cache(open_images, path, options, skip_corrupt)
    labels = None if facts["labels"] is None else np.array(facts["labels"], np.int64)
    return Images(
        np.memmap(path, np.uint8, "r", shape=tuple(facts["shape"])),
        labels,
        facts["names"],
        np.arange(facts["shape"][0]),
        facts["sha256"],
        facts["skipped"],
        facts["notes"],
    )


def load_train_val(
    source: str,
    val_source: str | None,
    val_fraction: float,
    resolution: int | None = None,
    channels: int | None = None,
    skip_corrupt: bool = False,
    **options: Any,
) -> tuple[Images, Images]:
    """Return the images to train on and those to validate on.

    Args:
        source, resolution, channels, skip_corrupt, options: see `load_images`.
        val_source: other images to validate on; default: a part of the same.
        val_fraction: fraction of the images in that part.

    Raises:
        ValueError: see `load_images` and `split_images`.
    """
    images = load_images(source, resolution, channels, skip_corrupt, **options)
    if val_source is None:
        return split_images(images, None, val_fraction)
    val = load_images(val_source, resolution, channels, skip_corrupt, **options)
    return split_images(images, val, val_fraction)


def split_images(
    images: Images, val_images: Images | None, val_fraction: float
) -> tuple[Images, Images]:
    """Return the images to train on and those to validate on.

    Args:
        val_images: other images to validate on; None: a random part of the same, which does not
            depend on the run's seed.
        val_fraction: fraction of the images in that part.

    Raises:
        ValueError: there are too few images, or the two differ in their shape or classes.
    """
    if val_images is None:
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        order = np.random.default_rng(0).permutation(len(images))
        border = len(images) - max(1, round(val_fraction * len(images)))
        if border < 1:
            raise ValueError(f"images: {len(images)} are too few to train and validate on")
        return images.take(np.sort(order[:border])), images.take(np.sort(order[border:]))
    if val_images.size != images.size:
        raise ValueError(
            f"val_images: they are {val_images.size} (channels, height, width), those to train on "
            f"{images.size}; give --resolution, --channels, or other images"
        )
    if val_images.names != images.names:
        raise ValueError(
            f"val_images: their classes are {val_images.names}, those to train on {images.names}"
        )
    return images, val_images


def _read_facts(path: Path) -> dict[str, Any] | None:
    """Return the facts of pixels in the cache; None if there are none, or files have changed."""
    file = path.with_suffix(".json")
    if not file.exists() or not path.exists():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    current = file_stats([Path(name) for name, *_ in facts["files"]])
    return facts if facts["files"] == current else None


class _GreyError(Exception):
    """The images are grey, though the first of them have three channels, which are equal."""


def _decode_to_cache(
    open_images: Callable[[], EncodedImages],
    path: Path,
    options: workers.DecodeOptions,
    skip_corrupt: bool,
) -> dict[str, Any]:
    """Write all pixels into one file, and the facts about them beside it; return the facts."""
    try:
        facts = _write_pixels(open_images(), path, options, skip_corrupt)
    except _GreyError:
        facts = _write_pixels(open_images(), path, options, skip_corrupt, grey=True)
    with written_whole(path.with_suffix(".json"), shared=True) as scratch:
        scratch.write_text(json.dumps(facts), encoding="utf-8")
    return facts


def _write_pixels(
    found: EncodedImages,
    path: Path,
    options: workers.DecodeOptions,
    skip_corrupt: bool,
    grey: bool = False,
) -> dict[str, Any]:
    """Write all pixels into one file, and return the facts about them.

    Args:
        grey: take the first image as grey if its three channels are equal.
    """
    kept: list[int] = []
    skipped: list[str] = []
    files = file_stats(found.paths)
    with (
        written_whole(path, shared=True) as scratch,
        scratch.open("wb") as file,
        contextlib.closing(workers.decode_files(found.files, found.count, options)) as decoded,
        console.bar(None, "decoding", found.count, " images") as bar,
    ):
        writer = _PixelWriter(file, grey)
        for index, (name, result) in enumerate(decoded):
            bar.update()
            if isinstance(result, ImageError):
                skipped.append(_skip(result, skip_corrupt))
            else:
                writer.write(name, result)
                kept.append(index)
        if writer.first is None:
            raise ImageError(
                f"images: all {found.count} files are unreadable; the first: {skipped[0]}"
            )
    shape = writer.first[1]
    labels = None if found.labels is None else found.labels[kept].tolist()
    writer.digest.update(json.dumps([shape, labels, found.names]).encode())
    return {
        "shape": [len(kept), *shape],
        "labels": labels,
        "names": found.names,
        "sha256": writer.digest.hexdigest(),
        "skipped": skipped,
        "notes": found.notes,
        "files": files,
    }


class _PixelWriter:
    """Writes images of one shape into a file, one after the other.

    Args:
        file: open for writing.
        grey: take the first image as grey if its three channels are equal.
    """

    def __init__(self, file: BinaryIO, grey: bool) -> None:
        self.file, self.grey = file, grey
        self.first: tuple[str, tuple[int, ...]] | None = None  # name and shape
        self.digest = hashlib.sha256()
        self._equal = True  # the channels of all images so far

    def write(self, name: str, values: np.ndarray) -> None:
        """Write an image, (channels, height, width).

        Raises:
            ImageError: its shape is not that of the first one.
            _GreyError: it is grey, as all before it were, though the first has three channels.
        """
        is_grey = _is_grey(values)
        self._equal = self._equal and is_grey
        if (self.first[1][0] == 1 if self.first else self.grey) and is_grey:
            values = values[:1]
        self.first = self.first or (name, values.shape)
        if self._equal and len(values) < self.first[1][0]:
            raise _GreyError
        _check_shape(name, values.shape, *self.first)
        written = values.tobytes()
        self.file.write(written)
        self.digest.update(written)


def _skip(error: ImageError, skip_corrupt: bool) -> str:
    """Return why a file is left out, or raise the error if it is not to be."""
    if isinstance(error, UnsuitableError):
        raise error
    if not skip_corrupt:
        raise ImageError(f"{error}. Repair it, remove it, or pass --skip_corrupt")
    return str(error)


def _is_grey(values: np.ndarray) -> bool:
    """Return whether all channels are equal; values: (channels, height, width)."""
    return bool((values[1:] == values[:1]).all())


def _check_shape(
    name: str, shape: tuple[int, ...], first_name: str, first_shape: tuple[int, ...]
) -> None:
    if shape[0] != first_shape[0]:
        kinds = {1: "grey", 3: "colour"}
        raise ImageError(
            f"{name} is {kinds[shape[0]]}, but {first_name} is {kinds[first_shape[0]]}; pass "
            "--channels 1 or 3"
        )
    if shape != first_shape:
        sizes = [f"{width} x {height}" for _, height, width in (shape, first_shape)]
        raise ImageError(f"{name} is {sizes[0]}, but {first_name} is {sizes[1]}; pass --resolution")


def proportional_labels(images: Images, count: int) -> np.ndarray:
    """Return `count` labels, (count,), in the proportions of those of the images."""
    labels = np.sort(images.classes(np.arange(len(images))).numpy())
    return labels[((np.arange(count) + 0.5) * len(labels) / count).astype(int)]
