"""Find image files and their labels: the embedded digits, folders, tables and datasets."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genkit.data import pixels, tables, workers
from genkit.data.tables import is_saved_dataset
from genkit.data.text import load_hub_dataset, take_split
from genkit.files import open_regular
from genkit.hub import names

DIGITS = "digits"
SPLITS = {
    *("train", "training", "test", "testing", "val", "valid", "validation", "validate", "dev"),
    *("eval", "evaluation", "holdout"),
}
FILLERS = {"set", "data", "dataset", "split", "images", "image", "imgs", "a", "b"}  # beside one
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
SHOWN = 3  # names of files in a note


@dataclass(frozen=True)
class ImageSource:
    """Arguments of `images.load_images` that say where images are."""

    name: str
    column: str
    label_column: str
    split: str
    allow_outside: bool
    max_bytes: int
    table_memory: int


@dataclass(frozen=True)
class EncodedImages:
    """Image files, not decoded yet, in a fixed order."""

    count: int
    files: Iterator[workers.File]
    labels: np.ndarray | None  # (count,), int64
    names: list[str]  # of the classes
    paths: list[Path] = field(default_factory=list)  # files that a table names
    notes: list[str] = field(default_factory=list)  # see `images.Images`


def find_images(source: ImageSource) -> tuple[str, Callable[[], EncodedImages]]:
    """Find images, without reading them.

    Returns:
        A string that changes when the images do, and a function that opens them.

    Raises:
        ValueError: there are no images.
    """
    check_source(source.name)
    path = names.as_path(source.name, "images")
    if source.name == DIGITS:
        return DIGITS, _digits
    if (kind := tables.find_kind(path)) and path.is_file():
        return _table(kind, [path], path.resolve().parent, source)
    if is_saved_dataset(path):
        return _table(tables.ARROW, _list_saved(path), path.resolve(), source)
    if path.is_dir():
        return _folder(path, source)
    return _hub_dataset(source)


def check_source(name: str | None, argument: str = "images") -> None:
    """Refuse, before any long work, a name that no images can have; None is no name.

    Raises:
        ValueError: it is neither here nor the id of a dataset, or an archive.
    """
    if name is None:
        return
    path = names.as_path(name, argument)
    if path.suffix.lower() in ARCHIVES and path.is_file():
        raise ValueError(f"{argument}: {name} is an archive; unpack it, and give its folder")
    here = path.is_dir() or (path.is_file() and tables.find_kind(path))
    if name != DIGITS and not here and not names.is_dataset_id(name):
        raise ValueError(
            f"{argument}: {name!r} is no folder, table or dataset; give a folder of images, a "
            f"parquet file, the id of a Hub dataset, or {DIGITS!r}, which needs no download"
        )


def _hub_folder(name: str) -> Path:
    """Return the folder of a Hub dataset in the cache, whose files its cells may name."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset")).resolve()


def _digits() -> EncodedImages:
    from sklearn.datasets import load_digits

    data = load_digits()
    values = np.round(data.images * (255 / 16)).astype(np.uint8)
    files = ((f"digit {i}", _encode_png(value)) for i, value in enumerate(values))
    names = [str(name) for name in data.target_names]
    return EncodedImages(len(values), files, data.target.astype(np.int64), names)


def _encode_png(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(value).save(file, "png")
    return file.getvalue()


def _hub_dataset(source: ImageSource) -> tuple[str, Callable[[], EncodedImages]]:
    """Find the images of one split of a Hub dataset."""
    splits = load_hub_dataset("images", source.name)
    files = take_split("images", source.name, splits, source.split)
    return _table(tables.ARROW, files, _hub_folder(source.name), source)


def _folder(path: Path, source: ImageSource) -> tuple[str, Callable[[], EncodedImages]]:
    """Find the images of a folder, or of the folders in it, which are classes."""
    names = _class_names(path)
    loose, others = _sort_out([p for p in path.iterdir() if not p.name.startswith(".")])
    if bool(names) == bool(loose):
        what = f"{loose[0].name} beside the folders {names}" if loose else "no image"
        raise ValueError(
            f"images: {path} holds {what}{_left_out(others)}; put images (.png, .jpg, .webp and "
            "others) into it, or into a folder for each class"
        )
    classes, left = _find_classes([path / name for name in names])
    found = [file for files in classes for file in files] or loose
    labels = np.repeat(np.arange(len(names)), [len(files) for files in classes]) if names else None
    folder = path.resolve()
    for file in found:
        _check_inside(folder, file, str(file), source)
    notes = _describe_depth(path, names, classes) + _describe_others(path, others + left)
    identity = json.dumps([str(folder), file_stats(found), notes])

    def open_images() -> EncodedImages:
        files = ((str(p), _read_file(p, source)) for p in found)
        return EncodedImages(len(found), files, labels, names, notes=notes)

    return identity, open_images


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder, or of the folders in it, in the order that they are read in."""
    loose, _ = _sort_out([p for p in folder.iterdir() if not p.name.startswith(".")])
    classes, _ = _find_classes([folder / name for name in _class_names(folder)])
    return [file for files in classes for file in files] or loose


def _find_classes(folders: list[Path]) -> tuple[list[list[Path]], list[Path]]:
    """Return the images of each class, and the other files in all of them."""
    sorted_out = [_sort_out(_files_below(folder)) for folder in folders]
    for folder, (files, others) in zip(folders, sorted_out, strict=True):
        if not files:
            raise ValueError(f"images: the folder {folder} holds no image{_left_out(others)}")
    return [files for files, _ in sorted_out], [p for _, others in sorted_out for p in others]


def _class_names(path: Path) -> list[str]:
    """List the folders in a folder of images; refuse splits, which are no classes."""
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if names and all(map(_split_of, names)):
        one = min(names, key=lambda name: not _split_of(name).startswith("train"))
        rest = [name for name in names if _split_of(name) != _split_of(one)]
        val = f", and another, such as {path / rest[0]}, as --val_images" if rest else ""
        raise ValueError(
            f"images: {path} holds {names}, which look like splits; give one of them as "
            f"--images, such as {path / one}{val}"
        )
    return names


def _check_inside(folder: Path, file: Path, what: str, source: ImageSource) -> None:
    """Refuse a file that leads out of a folder, unless that is allowed."""
    if not source.allow_outside and not Path(os.path.realpath(file)).is_relative_to(folder):
        raise ValueError(
            f"images: {what} leads out of the folder {folder}; copy it there, or pass "
            "--allow_outside (in Python, allow_outside=True)"
        )


def _split_of(name: str) -> str:
    """Return the split that a folder is named after, in lower case; "" if it is none."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+", name)]
    words = [word.removesuffix("set") if word != "set" else word for word in words]
    splits = [word for word in words if word in SPLITS]
    return splits[0] if len(splits) == 1 and set(words) <= {*splits, *FILLERS} else ""


def _files_below(folder: Path) -> list[Path]:
    """List the files below a folder, which may be a link; links to folders are not followed."""
    return [
        p
        for p in folder.rglob("*")
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]


def _sort_out(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """Return the images among files and folders, and the other files, both sorted.

    A file is an image by its suffix or, if it has none, by its first bytes. A broken link with the
    suffix of one is an error when it is read.
    """
    files = sorted(p for p in paths if p.is_file() or (p.is_symlink() and not p.exists()))
    images = [p for p in files if _is_named_like_image(p)]
    return images, sorted(set(files) - set(images))


def _is_named_like_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in pixels.suffixes() if suffix else pixels.starts_like_image(path)


def _describe_depth(path: Path, names: list[str], classes: list[list[Path]]) -> list[str]:
    """Say which folders became classes, if there are folders in them."""
    pairs = zip(names, classes, strict=True)
    if not any(file.parent != path / name for name, files in pairs for file in files):
        return []
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return [f"classes are the {len(names)} folders of {path}, with all that is below: {listed}"]


def _describe_others(path: Path, others: list[Path]) -> list[str]:
    """Say which files were left out."""
    return [f"images of {path}{_left_out(others)}"] if others else []


def _left_out(others: list[Path]) -> str:
    """Count files that are not read as images, by suffix, and name some."""
    if not others:
        return ""
    counts = Counter(p.suffix or "without suffix" for p in others)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
    some = ", ".join(p.name for p in others[:SHOWN]) + (", …" if len(others) > SHOWN else "")
    return f" (left out as other files: {kinds}; {some})"


def file_stats(paths: list[Path]) -> list[list[Any]]:
    """Return the path, the size and the time of change of each file.

    Raises:
        ValueError: a file cannot be read.
    """
    try:
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    except OSError as error:
        raise ValueError(f"images: cannot read {error.filename}: {error.strerror}") from None


def _read_file(path: Path, source: ImageSource) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(source.max_bytes + 1)  # one byte more than is decoded
    except (OSError, ValueError) as error:  # not an ImageError: --skip_corrupt does not skip it
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"images: cannot read {path}: {why}") from None


def _list_saved(path: Path) -> list[Path]:
    try:
        splits = tables.saved_files(path)
    except ValueError as error:
        raise ValueError(f"images: cannot load {path}: {error}") from None
    if None not in splits:
        raise ValueError(
            f"images: {path} holds the splits {list(splits)}; give the folder of one of them"
        )
    return splits[None]


def _table(
    kind: str, files: list[Path], folder: Path, source: ImageSource
) -> tuple[str, Callable[[], EncodedImages]]:
    """Find the images of a table; paths in it are relative to the folder."""
    name = f"images: the table {source.name}"
    table = tables.hash_files(name, kind, files, source.table_memory)
    columns = [source.column, source.label_column, source.allow_outside]
    identity = f"{folder} {table.sha256} {json.dumps(columns)}"
    return identity, partial(_open_rows, table, folder, source)


def _check_column(column: str, columns: list[str]) -> None:
    if column not in columns:
        raise ValueError(f"images: there is no column {column!r}; there are {columns}")


def _open_rows(table: tables.Table, folder: Path, source: ImageSource) -> EncodedImages:
    """Check the labels and paths of all rows, before any image is decoded."""
    labels: list[Any] = []
    paths: list[Path] = []
    count = 0
    columns = source.column, source.label_column
    with tables.open_table(table, columns, columns[0], columns[1]) as (head, rows):
        _check_column(source.column, head.columns)
        labelled = source.label_column in head.columns
        for i, row in enumerate(rows):
            labels += [row.get(source.label_column)] if labelled else []
            name = _path_in_cell(row[source.column], table, folder)
            if name is not None:
                cell = f"row {i} of {source.name}, column {source.column!r},"
                paths.append(_resolve_cell(folder, name, cell, source))
            count = i + 1
    if not count:
        raise ValueError(f"images: {source.name} has no rows")
    files = _read_cells(table, folder, source)
    if not labelled:
        return EncodedImages(count, files, None, [], paths)
    if table.kind == "csv":
        labels = _as_int_labels(labels)
    return EncodedImages(count, files, *_number_classes(labels, head, source.label_column), paths)


def _read_cells(table: tables.Table, folder: Path, source: ImageSource) -> Iterator[workers.File]:
    """Yield the name, for errors, and the bytes of the image in each row."""
    with tables.open_table(
        table, [source.column], image=source.column, max_bytes=source.max_bytes
    ) as (
        _,
        rows,
    ):
        for i, row in enumerate(rows):
            cell, where = row[source.column], f"row {i}"
            name = _path_in_cell(cell, table, folder)
            if name is None:
                yield where, cell["bytes"] or b""
            else:
                yield where, _read_file(_resolve_cell(folder, name, where, source), source)


def _path_in_cell(cell: dict[str, Any], table: tables.Table, folder: Path) -> str | None:
    """Return the path in a cell that has one and no bytes."""
    if cell["bytes"] is not None or cell["path"] is None:
        return None
    # `datasets` stores absolute paths of the files that it has downloaded
    return str(cell["path"]).removeprefix(f"{folder}/" if table.kind == tables.ARROW else "")


def _resolve_cell(folder: Path, name: str, cell: str, source: ImageSource) -> Path:
    """Return the file that a cell names, below the folder unless others are allowed."""
    if "://" in name or "\0" in name:
        raise ValueError(
            f"images: {cell} names {name!r:.200}, which is no file; nothing is downloaded"
        )
    path = Path(name)
    if not source.allow_outside and (path.is_absolute() or ".." in path.parts):
        raise ValueError(
            f"images: {cell} names {name!r}, which is no path below the folder {folder}; move the "
            "file there, or pass --allow_outside (in Python, allow_outside=True)"
        )
    _check_inside(folder, folder / path, f"{cell} names {name!r}, which", source)
    return folder / path


def _as_int_labels(texts: list[str]) -> list[Any]:
    """Turn the labels of a CSV file into integers if all of them are; an empty one into None."""
    integers = all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) for text in texts)
    return [int(text) if integers else text or None for text in texts]


def _number_classes(
    given: list[Any], head: tables.Head, column: str
) -> tuple[np.ndarray, list[str]]:
    """Return the class of each label, (n,), and the names of the classes."""
    classes = head.classes
    absent = (None,) if classes is None else (None, -1)
    for i, label in enumerate(given):
        if label in absent:
            raise ValueError(f"images: row {i} has no label in column {column!r}")
        exists = classes is None or label in range(len(classes))
        if not isinstance(label, str | int) or not exists:
            raise ValueError(f"images: row {i} of column {column!r} is no label: {label!r}")
    if classes is None and len({type(label) for label in given}) > 1:
        raise ValueError(f"images: column {column!r} holds both texts and numbers")
    kinds = sorted(set(given)) if classes is None else range(len(classes))
    index = {kind: i for i, kind in enumerate(kinds)}
    labels = np.array([index[label] for label in given], np.int64)
    return labels, [str(kind) for kind in kinds] if classes is None else classes
