"""Where images come from: the embedded digits, folders, tables and datasets."""

from __future__ import annotations

import dataclasses
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
from PIL import Image

from genkit.data import tables, workers
from genkit.data.tables import is_saved_dataset
from genkit.data.text import load_hub, take_split
from genkit.files import open_regular

DIGITS = "digits"
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
SPLITS = {"train", "test", "val", "valid", "validation"}


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


def find_images(source: Source) -> tuple[str, Callable[[], Encoded]]:
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
