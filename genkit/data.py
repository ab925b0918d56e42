"""Text as a stream of documents: from files, globs, folders, datasets, or embedded in Python.

A document is an iterator of pieces of text, so that a corpus of any size passes through in
constant memory and every byte of it, line endings included, arrives as it is.
"""

from __future__ import annotations

import codecs
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

EMBEDDED = "pydoc_data.topics"  # the prose of the Python language reference, in every Python
PIECE = 1 << 22  # bytes read at a time
TABLES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

Document = Iterator[str]


def documents(source: str, column: str = "text") -> Iterator[Document]:
    """Yield the documents of a source, each as pieces of text, in a fixed order.

    Args:
        source: a text file; a glob; a folder, searched for *.txt; a table (parquet, json, jsonl,
            csv); a dataset saved by `datasets`; the id of a Hub dataset, its training split; or
            "pydoc_data.topics", the embedded corpus.
        column: of a table or a dataset, the column that holds the text.

    Raises:
        ValueError: there is nothing there, or it is not text.
    """
    path = Path(source).expanduser()
    if source == EMBEDDED:
        yield from _embedded()
    elif path.suffix in TABLES and path.is_file():
        yield from _rows(_load(TABLES[path.suffix], data_files=str(path)), column)
    elif is_saved_dataset(path):
        yield from _rows(_load_saved(path), column)
    elif path.exists() or glob.has_magic(source):
        for file in _files(path, source):
            yield _pieces(file)
    elif source.count("/") == 1 and not source.startswith((".", "~", "/")):
        yield from _rows(_load(source), column)
    else:
        raise ValueError(
            f"text: {source!r} is no file, folder, glob or dataset; give the path of a UTF-8 "
            f"text file, or leave it out to train on {EMBEDDED}"
        )


def _embedded() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield iter([topics[name]])


def _files(path: Path, source: str) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*.txt") if p.is_file())
        what = f"text: the folder {source!r} holds no *.txt file"
    elif path.exists():
        return [path]
    else:
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        what = f"text: no file matches {source!r}"
    if not found:
        raise ValueError(f"{what}; name a text file, or a glob such as 'books/**/*.md'")
    return found


def _pieces(path: Path) -> Document:
    """Read a UTF-8 file piece by piece; no byte is changed, dropped or guessed."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while data := file.read(PIECE):
                if b"\0" in data:
                    at = position + data.index(b"\0")
                    raise ValueError(f"text: {path} is binary, not text: byte {at} is zero")
                yield decoder.decode(data)
                position += len(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path} is not UTF-8 at about byte {position + error.start} ({error.reason}); "
            f"convert it, for example by iconv -f latin1 -t utf-8 {path.name}"
        ) from None
    except OSError as error:
        raise ValueError(f"text: cannot read {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------
# Datasets


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder is a dataset, or several splits of one, saved by `datasets`."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _load_saved(path: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict) and "train" not in saved:
        raise ValueError(f"text: the dataset {str(path)!r} has no split 'train': {list(saved)}")
    return saved["train"] if isinstance(saved, DatasetDict) else saved


def _load(name: str, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, split="train", **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"text: {name!r} is no file or folder, and it cannot be loaded as a dataset: {error}"
        ) from error


def _rows(dataset: Any, column: str) -> Iterator[Document]:
    if column not in dataset.column_names:
        raise ValueError(
            f"text_column: the dataset has no column {column!r}; it has {dataset.column_names}"
        )
    for i, row in enumerate(dataset.select_columns(column)):
        if not isinstance(row[column], str):
            raise ValueError(f"text_column: row {i} of {column!r} is no text: {row[column]!r}")
        yield iter([row[column]])


# ---------------------------------------------------------------------------------------------
# Order


class Order:
    """An endless shuffled order over `count` things: every epoch a new permutation.

    It is a function of the position alone, so any process can look up any part of it, and a
    resumed run goes on where it stopped by counting.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up positions, (n,): which epoch each falls in, and which thing it is; (n,) each."""
        epochs, places = np.divmod(positions, self.count)
        things = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            things[here] = self._of(int(epoch))[places[here]]
        return epochs, things

    def _of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._permutation = epoch, rng.permutation(self.count)
        return self._permutation


class Windows:
    """Training windows of a long sequence of ids, without replacement within an epoch.

    Every epoch cuts the sequence at another random phase, so that no character is always first.

    Args:
        ids: (length,), usually memory-mapped.
        context: ids in a window.

    Raises:
        ValueError: the sequence is shorter than one window and the id after it.
    """

    def __init__(self, ids: np.ndarray, context: int, seed: int) -> None:
        if len(ids) < context + 1:
            raise ValueError(
                f"text: {len(ids)} characters are less than one window of context {context} "
                f"and its next character; use a longer text, or a context below {len(ids)}"
            )
        self.ids, self.context, self.seed = ids, context, seed
        self.order = Order(max(1, (len(ids) - context) // context), seed)

    def __len__(self) -> int:
        return self.order.count

    def batch(
        self, positions: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up windows by position in the endless order.

        Returns:
            Inputs and targets, the inputs one further: (len(positions), context) each, int64.
        """
        epochs, windows = self.order(positions)
        starts = windows * self.context + np.array([self._phase(int(e)) for e in epochs])
        rows = np.stack([self.ids[s : s + self.context + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(rows).to(device)
        return both[:, :-1], both[:, 1:]

    def _phase(self, epoch: int) -> int:
        room = len(self.ids) - len(self) * self.context
        rng = np.random.default_rng((self.seed, epoch, 1))
        return int(rng.integers(min(self.context, room)))
