"""Sources with targets as files: what a sequence-to-sequence model learns from.

A row of a table has `source` and `target`. Of a dialogue, each speech is the source of the next.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from genkit.arguments import check_unicode
from genkit.data import table_sources, tables
from genkit.data.text import read_documents

COLUMNS = ("source", "target")
BETWEEN = re.compile(r"(?:\r?\n[ \t]*){2,}")  # speeches: empty lines
SPEAKER = re.compile(r"\A[^\n:]{1,60}:[ \t]*\r?\n")  # a first line such as "First Citizen:"


@dataclass(frozen=True)
class Example:
    """A text and what a model should make of it."""

    source: str
    target: str


def read_examples(
    source: str, table_memory: int = tables.MEMORY, argument: str = "data"
) -> list[Example]:
    """Read examples from a table.

    Args:
        source: a file (jsonl, json, csv, parquet), a dataset saved by `datasets`, or a Hub id.
        table_memory: MiB of memory of the process that reads it.
        argument: the source's, for messages.

    Raises:
        ValueError: there is no such table, or a row lacks a text; the message names it.
    """
    return table_sources.read_rows(source, table_memory, COLUMNS, make_example, argument)


def make_example(row: Any, name: str) -> Example:
    """Return the example of a row: an object with `source` and `target`.

    Args:
        name: of the row, for messages.

    Raises:
        ValueError: one of the two is missing, empty, or no text.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{name} must be an object with source and target, got {row!r:.60}")
    for column in COLUMNS:
        text = row.get(column)
        if text is None:
            raise ValueError(f"{name} has no {column!r}; a row has source and target")
        if not isinstance(text, str):
            raise ValueError(f"{name}: {column} must be a text, got {text!r:.60}")
        check_unicode(f"{name}: {column}", text)
        if not text.strip():
            raise ValueError(f"{name}: {column} is empty; leave the row out")
    return Example(row["source"], row["target"])


def read_turns(source: str, argument: str = "dialogue") -> list[Example]:
    """Read a dialogue, and return each speech with the one that follows it.

    Empty lines are between speeches. A first line that ends with a colon names the speaker, and is
    no part of the speech.

    Args:
        source: a text file, a folder of them or a dataset; see `text.read_documents`.
        argument: the source's, for messages.

    Raises:
        ValueError: there is no such text, or no document in it has two speeches.
    """
    found = []
    for document in read_documents(source):
        speeches = split_speeches("".join(document))
        found += [Example(*both) for both in itertools.pairwise(speeches)]
    if not found:
        raise ValueError(
            f"{argument}: {source!r} has no two speeches; give a text with empty lines between them"
        )
    return found


def split_speeches(text: str) -> list[str]:
    """Cut a dialogue into what is said, without the speakers' names."""
    parts = (SPEAKER.sub("", part.strip()).strip() for part in BETWEEN.split(text))
    return [part for part in parts if part]


def hold_out_end(
    items: list[Example], fraction: float, argument: str
) -> tuple[list[Example], list[Example]]:
    """Hold out the end: one pair at least, and not all.

    Args:
        fraction: part to hold out.
        argument: the name of the data, for messages.

    Raises:
        ValueError: there are fewer than two pairs.
    """
    if len(items) < 2:
        raise ValueError(f"{argument}: {len(items)} pairs are too few; give two or more")
    border = min(max(1, round((1 - fraction) * len(items))), len(items) - 1)
    return items[:border], items[border:]
