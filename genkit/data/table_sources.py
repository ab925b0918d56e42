"""Where the rows of a table are: in a file, in a saved dataset, or in a dataset on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from genkit.data import tables
from genkit.data.text import load_hub_dataset
from genkit.hub import names

T = TypeVar("T")


def find_tables(source: str, memory: int, argument: str = "data") -> dict[str, tables.Table]:
    """Find the tables of a source, by split; a file is the split "train".

    Args:
        source: a file (json, jsonl, parquet, csv), a dataset saved by `datasets`, or a Hub id.
        memory: MiB of memory of the process that will read them.
        argument: the source's, for messages.

    Raises:
        ValueError: there is no such source.
    """
    check_source(source, argument)
    path = names.as_path(source, argument)
    kind = tables.find_kind(path) if path.is_file() else None
    if kind:
        found = {"train": [path]}
    elif tables.is_saved_dataset(path):
        try:
            found = {split or "train": files for split, files in tables.saved_files(path).items()}
        except ValueError as error:
            raise ValueError(f"{argument}: cannot load {path}: {error}") from None
    else:
        found = load_hub_dataset(argument, source)
    return {
        name: tables.hash_files(f"{argument}: {source}", kind or tables.ARROW, files, memory)
        for name, files in found.items()
    }


def read_rows(
    source: str,
    memory: int,
    columns: Sequence[str],
    parse: Callable[[dict[str, Any], str], T],
    argument: str = "data",
) -> list[T]:
    """Read the rows of a table; of a dataset with splits, those of "train".

    Args:
        source, memory: see `find_tables`.
        columns: that are read, if the table has them.
        parse: makes an item of a row, which it calls by the name that it is given.
        argument: the source's, for messages.

    Raises:
        ValueError: there is no such table, it has no rows, or `parse` refuses one.
    """
    found = find_tables(source, memory, argument)
    if "train" not in found:
        raise ValueError(f"{argument}: the dataset {source!r} has no split 'train': {list(found)}")
    with tables.open_table(found["train"], columns) as (_, rows):
        items = [parse(row, f"{argument}: row {i}") for i, row in enumerate(rows)]
    if not items:
        raise ValueError(f"{argument}: {source!r} has no rows")
    return items


def check_source(source: str | None, argument: str = "data") -> None:
    """Refuse, before any long work, a name that no table can have; None is no name.

    Raises:
        ValueError: it is neither here nor the id of a dataset.
    """
    if source is None:
        return
    path = names.as_path(source, argument)
    here = (path.is_file() and tables.find_kind(path)) or tables.is_saved_dataset(path)
    if not here and not names.is_dataset_id(source):
        raise ValueError(
            f"{argument}: {source!r} is no file of rows and no dataset; give a table (.jsonl, "
            ".json, .csv, .parquet), a dataset saved by `datasets`, or one's Hub id"
        )


def read_table(
    source: str, memory: int = tables.MEMORY, argument: str = "data"
) -> tuple[list[str], list[list[Any]], str]:
    """Read all columns of a table; of a dataset with splits, those of "train".

    Args:
        source, memory, argument: see `find_tables`.

    Returns:
        The names of the columns, rows of cells, and the hash of the files.

    Raises:
        ValueError: there is no such table, or it has no rows.
    """
    found = find_tables(source, memory, argument)
    if "train" not in found:
        raise ValueError(f"{argument}: the dataset {source!r} has no split 'train': {list(found)}")
    with tables.open_table(found["train"], ()) as (head, _):
        columns = list(map(str, head.columns))
    with tables.open_table(found["train"], columns) as (_, rows):
        cells = [[row.get(name) for name in columns] for row in rows]
    if not cells:
        raise ValueError(f"{argument}: {source!r} has no rows")
    return columns, cells, found["train"].sha256
