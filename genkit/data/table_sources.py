"""Where the rows of a table are: in a file, in a saved dataset, or in a dataset on the Hub."""

from __future__ import annotations

from genkit.data import tables
from genkit.data.text import load_hub_dataset
from genkit.hub import names


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
            ".json, .parquet), a dataset saved by `datasets`, or one's Hub id"
        )
