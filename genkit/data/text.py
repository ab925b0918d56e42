"""Read text as a stream of documents: from files, folders, datasets, or embedded in Python.

A document is an iterator of pieces of text, so that a corpus of any size is read in constant
memory. Nothing in it is changed, line endings included.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from genkit import console
from genkit.data import tables, utf8
from genkit.data.tables import is_saved_dataset
from genkit.hub import names

EMBEDDED = "pydoc_data.topics"  # the prose of the Python language reference, in every Python

Document = Iterator[str]


def read_documents(
    source: str, column: str = "text", table_memory: int = tables.MEMORY
) -> Iterator[Document]:
    """Yield the documents of a source, each as pieces of text, in a fixed order.

    Args:
        source: a text file; a folder, searched for *.txt; a table (parquet, json, jsonl, csv); a
            dataset saved by `datasets`; the id of a Hub dataset, its training split; or
            "pydoc_data.topics", the embedded corpus. A name is never a pattern.
        column: of a table or a dataset, the column that holds the text.
        table_memory: MiB of memory of the process that reads a table; also the most bytes of its
            rows, if its files are small.

    Raises:
        ValueError: there is no such source, or it is not text.
    """
    check_source(source)
    path = names.as_path(source, "text")
    if source == EMBEDDED:
        yield from _read_embedded()
    elif (kind := tables.find_kind(path)) and path.is_file():
        yield from _read_rows(source, kind, [path], column, table_memory)
    elif is_saved_dataset(path):
        yield from _read_rows(source, tables.ARROW, _list_saved(path), column, table_memory)
    elif path.is_dir():
        for file in _list_texts(path):
            yield utf8.read_pieces(file, "text")
    elif path.exists():
        yield utf8.read_pieces(path, "text")
    else:
        files = take_split("text", source, load_hub_dataset("text", source), "train")
        yield from _read_rows(source, tables.ARROW, files, column, table_memory)


def check_source(source: str | None, argument: str = "text") -> None:
    """Refuse, before any long work, a name that no text can have; None is no name.

    Raises:
        ValueError: it is neither here nor the id of a dataset.
    """
    if source is None:
        return
    here = names.as_path(source, argument).exists()
    if source != EMBEDDED and not here and not names.is_dataset_id(source):
        raise ValueError(
            f"{argument}: {source!r} is no file, folder or dataset; give the path of a UTF-8 text "
            f"file, whose name is no pattern, or leave it out to train on {EMBEDDED}"
        )


def _read_embedded() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield iter([topics[name]])


def _list_texts(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() == ".txt" and p.is_file())
    if not found:
        raise ValueError(f"text: the folder {str(folder)!r} holds no *.txt file")
    top = folder.resolve()
    for file in found:
        if not Path(os.path.realpath(file)).is_relative_to(top):
            raise ValueError(f"text: {file} leads out of the folder {folder}; copy the file there")
    return found


def _list_saved(path: Path) -> list[Path]:
    try:
        found = tables.saved_files(path)
    except ValueError as error:
        raise ValueError(f"text: cannot load {path}: {error}") from None
    return take_split(
        "text", str(path), {split or "train": found[split] for split in found}, "train"
    )


def load_hub_dataset(what: str, name: str) -> dict[str, list[Path]]:
    """Download a Hub dataset; return its Arrow files by split.

    Args:
        what: name of the argument, for errors.

    Raises:
        ValueError: it cannot be loaded.
    """
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    if not console.shows_bars():
        disable_progress_bars()
    try:
        found = load_dataset(name)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"{what}: {name!r} is no file or folder, and it cannot be loaded as a dataset: {error}"
        ) from error
    return {
        str(split): [Path(file["filename"]) for file in rows.cache_files]
        for split, rows in found.items()
    }


def take_split(what: str, name: str, found: Mapping[str, list[Path]], split: str) -> list[Path]:
    """Return the files of a split.

    Raises:
        ValueError: there is no such split.
    """
    if split not in found:
        raise ValueError(f"{what}: the dataset {name!r} has no split {split!r}: {list(found)}")
    return found[split]


def _read_rows(
    source: str, kind: str, files: list[Path], column: str, table_memory: int
) -> Iterator[Document]:
    table = tables.hash_files(f"text: the table {source}", kind, files, table_memory)
    with tables.open_table(table, [column]) as (head, rows):
        if column not in head.columns:
            raise ValueError(
                f"text_column: the dataset has no column {column!r}; it has {head.columns}"
            )
        for i, row in enumerate(rows):
            text = row.get(column) if isinstance(row, dict) else row
            if not isinstance(text, str):
                raise ValueError(f"text_column: row {i} of {column!r} is no text: {text!r:.60}")
            yield iter([text])
