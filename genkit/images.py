"""Images with labels: from a folder, a table or a dataset, decoded once into a memory map.

An epoch then costs memory bandwidth, not the decoding of PNG files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from genkit import pixels, tables, workers
from genkit.data import is_saved_dataset, load_hub, take_split
from genkit.encoding import cache_folder, written_whole
from genkit.files import open_regular
from genkit.pixels import ImageError

DIGITS = "digits"
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
SPLITS = {"train", "test", "val", "valid", "validation"}
VERSION = 3  # of the cache: raised when decoding changes


@dataclass(frozen=True)
class Images:
    """Decoded images, some or all of a memory map."""

    pixels: np.ndarray  # (all of them, channels, height, width), uint8
    labels: np.ndarray | None  # (all of them,), int64
    names: list[str]  # of the classes
    rows: np.ndarray  # which of them are meant
    sha256: str  # of what is meant
    skipped: list[str] = dataclasses.field(default_factory=list)  # files that were no images

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
            ValueError: there are none.
        """
        if self.labels is None:
            raise ValueError(
                "labels: these images have none; give a folder with a folder for each class, or a "
                "table with a column of labels"
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
        """Return some of the images."""
        rows = self.rows[which]
        digest = hashlib.sha256(self.sha256.encode() + rows.astype("<i8").tobytes()).hexdigest()
        return dataclasses.replace(self, rows=rows, sha256=digest)


def load(
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
    """Decode images, or find them in the cache.

    Args:
        source: "digits", scikit-learn's 8 x 8 ones; a folder of images, in which folders are
            classes; a table (parquet, json, jsonl, csv) or a dataset saved by `datasets`, with a
            column of images, or of paths from the table's folder; or the id of a Hub dataset.
        resolution: side of the squares to make, by scaling and cropping; None if all have one size.
        channels: 1 for grey, 3 for colour, None for what the first image has.
        skip_corrupt: leave out what is no image; `Images.skipped` names it.
        column, label_column: of a table or a dataset.
        split: of a Hub dataset, by its name.
        allow_outside: read pictures outside the folder too, where cells of a table or links in a
            folder name them.
        max_pixels: of a picture, by its header; more is an error, or skipped as corrupt.
        max_bytes: of a picture's file.
        table_memory: MiB of the process that reads a table, and the most that it may hold if it is
            not as large.

    Raises:
        ImageError: a file is no image, or not like the others.
        ValueError: there is nothing there, or an argument is out of range.
    """
    if resolution is not None and resolution < pixels.MIN_SIDE:
        raise ValueError(f"resolution must be {pixels.MIN_SIDE} or more, got {resolution}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 for grey or 3 for colour, got {channels}")
    for name, value in {"max_pixels": max_pixels, "max_bytes": max_bytes}.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    found = Source(str(source), column, label_column, split, allow_outside, max_bytes, table_memory)
    identity, open_images = _find(found)
    options = workers.Options(resolution, channels, max_pixels, max_bytes)
    facts_of = [VERSION, Image.__version__, identity, dataclasses.asdict(options), skip_corrupt]
    key = hashlib.sha256(json.dumps(facts_of).encode()).hexdigest()
    path = cache_folder() / f"{key}.pixels"
    facts = _known(path) or _decode(open_images(), path, options, skip_corrupt)
    labels = None if facts["labels"] is None else np.array(facts["labels"], np.int64)
    return Images(
        np.memmap(path, np.uint8, "r", shape=tuple(facts["shape"])),
        labels,
        facts["names"],
        np.arange(facts["shape"][0]),
        facts["sha256"],
        facts["skipped"],
    )


def parts(
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
        source, resolution, channels, skip_corrupt, options: see `load`.
        val_source: other images to validate on; None for a part of the same.
        val_fraction: how large a part.

    Raises:
        ValueError: see `load` and `split`.
    """
    whole = load(source, resolution, channels, skip_corrupt, **options)
    if val_source is None:
        return split(whole, None, val_fraction)
    val = load(val_source, resolution, channels, skip_corrupt, **options)
    return split(whole, val, val_fraction)


def split(images: Images, val_images: Images | None, val_fraction: float) -> tuple[Images, Images]:
    """Return the images to train on and those to validate on.

    Args:
        val_images: other images to validate on; None for a part of the same, drawn once and for
            all, whatever the run's seed.
        val_fraction: how large a part.

    Raises:
        ValueError: there are too few, or the two are not alike.
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


def blocks(count: int, size: int) -> Iterator[np.ndarray]:
    """Yield the numbers below `count`, `size` at a time."""
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


# ---------------------------------------------------------------------------------------------
# Where images come from


@dataclass(frozen=True)
class Source:
    """Where images are, as `load` is told."""

    name: str
    column: str
    label_column: str
    split: str
    allow_outside: bool
    max_bytes: int
    table_memory: int


@dataclass(frozen=True)
class Encoded:
    """Image files in a fixed order."""

    count: int
    files: Iterator[workers.File]
    labels: np.ndarray | None
    names: list[str]
    paths: list[Path] = dataclasses.field(default_factory=list)  # that a table names


def _find(source: Source) -> tuple[str, Callable[[], Encoded]]:
    """Return what changes when the images do, and what opens them."""
    path = Path(source.name).expanduser()
    if source.name == DIGITS:
        return DIGITS, _digits
    if path.suffix in tables.KINDS and path.is_file():
        return _table(tables.KINDS[path.suffix], [path], path.resolve().parent, source)
    if is_saved_dataset(path):
        return _table(tables.ARROW, _saved(path), path.resolve(), source)
    if path.is_dir():
        return _folder(path, source)
    if source.name.count("/") == 1 and not source.name.startswith((".", "~", "/")):
        found = load_hub("images", source.name)
        files = take_split("images", source.name, found, source.split)
        return _table(tables.ARROW, files, _hub_folder(source.name), source)
    raise ValueError(
        f"images: {source.name!r} is no folder, table or dataset; give a folder of images, a "
        f"parquet file, the id of a Hub dataset, or {DIGITS!r}, which every installation has"
    )


def _hub_folder(name: str) -> Path:
    """Return where the files of a Hub dataset are, which its cells may name."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset")).resolve()


def _digits() -> Encoded:
    from sklearn.datasets import load_digits

    data = load_digits()
    values = np.round(data.images * (255 / 16)).astype(np.uint8)
    files = ((f"digit {i}", _png(value)) for i, value in enumerate(values))
    names = [str(name) for name in data.target_names]
    return Encoded(len(values), files, data.target.astype(np.int64), names)


def _png(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(value).save(file, "png")
    return file.getvalue()


def _folder(path: Path, source: Source) -> tuple[str, Callable[[], Encoded]]:
    """Open a folder: of images, or of folders of images, which are classes."""
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if SPLITS >= set(names) != set():
        one = "train" if "train" in names else names[0]
        raise ValueError(
            f"images: {path} holds {names}, which look like splits; give one of them, such as "
            f"--images {path / one}, and another as --val_images"
        )
    loose = [p for p in path.iterdir() if _is_image(p)]
    if bool(names) == bool(loose):
        what = f"{loose[0].name} beside the folders {names}" if loose else "no image"
        raise ValueError(
            f"images: {path} holds {what}; put images ({', '.join(sorted(SUFFIXES))}) into it, or "
            "into a folder for each class"
        )
    classes = [_below(path / name) for name in names]
    if [] in classes:
        raise ValueError(f"images: the folder {path / names[classes.index([])]} holds no image")
    found = [file for files in classes for file in files] or sorted(loose)
    labels = np.repeat(np.arange(len(names)), [len(files) for files in classes]) if names else None
    folder = path.resolve()
    for file in found:
        _inside(folder, file, str(file), source)
    identity = json.dumps([str(folder), _stats(found)])
    files = ((str(p), _read(p, source)) for p in found)
    return identity, lambda: Encoded(len(found), files, labels, names)


def _inside(folder: Path, file: Path, what: str, source: Source) -> None:
    """Refuse a file that leads out of a folder, unless that is allowed."""
    if not source.allow_outside and not Path(os.path.realpath(file)).is_relative_to(folder):
        raise ValueError(
            f"images: {what} leads out of the folder {folder}; copy it there, or pass "
            "--allow_outside (in Python, allow_outside=True)"
        )


def _below(folder: Path) -> list[Path]:
    """Find the images in a folder, which may be a link, and in those below, which may not."""
    found = (p for p in folder.rglob("*") if _is_image(p))
    return sorted(
        p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )


def _is_image(path: Path) -> bool:
    """Tell whether a path has an image's name; one that leads nowhere is told of when read."""
    named = path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    return named and (path.is_file() or not path.exists())


def _stats(paths: list[Path]) -> list[list[Any]]:
    """Return what changes when files do.

    Raises:
        ValueError: one is not there.
    """
    try:
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    except OSError as error:
        raise ValueError(f"images: cannot read {error.filename}: {error.strerror}") from None


def _read(path: Path, source: Source) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(source.max_bytes + 1)
    except (OSError, ValueError) as error:  # which is no reason to skip it
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"images: cannot read {path}: {why}") from None


def _saved(path: Path) -> list[Path]:
    try:
        found = tables.saved(path)
    except ValueError as error:
        raise ValueError(f"images: cannot load {path}: {error}") from None
    if None not in found:
        raise ValueError(
            f"images: {path} holds the splits {list(found)}; give the folder of one of them"
        )
    return found[None]


def _table(
    kind: str, files: list[Path], folder: Path, source: Source
) -> tuple[str, Callable[[], Encoded]]:
    """Open a table; paths in it start at the folder."""
    name = f"images: the table {source.name}"
    table = tables.hashed(name, kind, files, source.table_memory)
    columns = [source.column, source.label_column, source.allow_outside]
    identity = f"{folder} {table.sha256} {json.dumps(columns)}"
    return identity, partial(_rows, table, folder, source)


def _rows(table: tables.Table, folder: Path, source: Source) -> Encoded:
    """Look at all rows but for their bytes, before any is decoded."""
    given: list[Any] = []
    paths: list[Path] = []
    count = 0
    columns = source.column, source.label_column
    with tables.opened(table, columns, columns[0], columns[1]) as (head, rows):
        if source.column not in head.columns:
            raise ValueError(
                f"images: there is no column {source.column!r}; there are {head.columns}"
            )
        labelled = source.label_column in head.columns
        for i, row in enumerate(rows):
            given += [row.get(source.label_column)] if labelled else []
            name = _file_of(row[source.column], table, folder)
            if name is not None:
                place = f"row {i} of {source.name}, column {source.column!r},"
                paths.append(_named(folder, name, place, source))
            count = i + 1
    if not count:
        raise ValueError(f"images: {source.name} has no rows, and so no data")
    labels: np.ndarray | None = None
    names: list[str] = []
    if labelled:
        given = _numbers(given) if table.kind == "csv" else given
        labels, names = _labels(given, head.classes, source.label_column)
    return Encoded(count, _cells(table, folder, source), labels, names, paths)


def _cells(table: tables.Table, folder: Path, source: Source) -> Iterator[workers.File]:
    """Yield the bytes of all rows."""
    with tables.opened(table, [source.column], picture=source.column, largest=source.max_bytes) as (
        _,
        rows,
    ):
        for i, row in enumerate(rows):
            cell, place = row[source.column], f"row {i}"
            name = _file_of(cell, table, folder)
            if name is None:
                yield place, cell["bytes"] or b""
            else:
                yield place, _read(_named(folder, name, place, source), source)


def _file_of(cell: dict[str, Any], table: tables.Table, folder: Path) -> str | None:
    """Return the name of a file in a cell, if it has no bytes."""
    if cell["bytes"] is not None or cell["path"] is None:
        return None
    # `datasets` writes down the whole path of what it has fetched
    return str(cell["path"]).removeprefix(f"{folder}/" if table.kind == tables.ARROW else "")


def _named(folder: Path, name: str, place: str, source: Source) -> Path:
    """Find the file that a cell names."""
    if "://" in name or "\0" in name:
        raise ValueError(
            f"images: {place} names {name!r:.200}, which is no file; nothing is fetched"
        )
    path = Path(name)
    if not source.allow_outside and (path.is_absolute() or ".." in path.parts):
        raise ValueError(
            f"images: {place} names {name!r}, which is no path below the folder {folder}; move the "
            "file there, or pass --allow_outside (in Python, allow_outside=True)"
        )
    _inside(folder, folder / path, f"{place} names {name!r}, which", source)
    return folder / path


def _numbers(texts: list[str]) -> list[Any]:
    """Turn the labels of a CSV file into numbers if all of them are whole ones."""
    whole = all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) for text in texts)
    return [int(text) if whole else text or None for text in texts]


def _labels(
    given: list[Any], classes: list[str] | None, column: str
) -> tuple[np.ndarray, list[str]]:
    """Return the place of each label among the classes, and their names."""
    absent = (None,) if classes is None else (None, -1)
    for i, label in enumerate(given):
        if label in absent:
            raise ValueError(f"images: row {i} has no label in column {column!r}")
        known = classes is None or label in range(len(classes))
        if not isinstance(label, str | int) or not known:
            raise ValueError(f"images: row {i} of column {column!r} is no label: {label!r}")
    if classes is None and len({type(label) for label in given}) > 1:
        raise ValueError(f"images: column {column!r} holds both texts and numbers")
    kinds = sorted(set(given)) if classes is None else range(len(classes))
    place = {kind: i for i, kind in enumerate(kinds)}
    labels = np.array([place[label] for label in given], np.int64)
    return labels, [str(kind) for kind in kinds] if classes is None else classes


# ---------------------------------------------------------------------------------------------
# Decoding


def _known(path: Path) -> dict[str, Any] | None:
    """Return what is known of pixels in the cache; None if there are none, or older ones."""
    file = path.with_suffix(".json")
    if not file.exists() or not path.exists():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    return facts if facts["files"] == _stats([Path(name) for name, *_ in facts["files"]]) else None


def _decode(
    found: Encoded, path: Path, options: workers.Options, skip_corrupt: bool
) -> dict[str, Any]:
    """Write all pixels into one file, and what is known of them beside it; return that."""
    kept: list[int] = []
    skipped: list[str] = []
    first: tuple[str, tuple[int, ...]] | None = None
    digest = hashlib.sha256()
    files = _stats(found.paths)
    with (
        written_whole(path) as scratch,
        scratch.open("wb") as file,
        contextlib.closing(workers.decode(found.files, found.count, options)) as decoded,
        tqdm(total=found.count, desc="decoding", unit=" images", delay=2, leave=False) as bar,
    ):
        for place, (name, result) in enumerate(decoded):
            bar.update()
            if isinstance(result, ImageError):
                if not skip_corrupt:
                    raise ImageError(f"{result}. Mend it, take it away, or pass --skip_corrupt")
                skipped.append(str(result))
                continue
            first = first or (name, result.shape)
            _check_alike(name, result.shape, *first)
            values = result.tobytes()
            file.write(values)
            digest.update(values)
            kept.append(place)
        if first is None:
            raise ImageError(
                f"images: not one of {found.count} is an image; the first: {skipped[0]}"
            )
    labels = None if found.labels is None else found.labels[kept].tolist()
    digest.update(json.dumps([first[1], labels, found.names]).encode())
    facts = {
        "shape": [len(kept), *first[1]],
        "labels": labels,
        "names": found.names,
        "sha256": digest.hexdigest(),
        "skipped": skipped,
        "files": files,
    }
    with written_whole(path.with_suffix(".json")) as scratch:
        scratch.write_text(json.dumps(facts), encoding="utf-8")
    return facts


def _check_alike(
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
