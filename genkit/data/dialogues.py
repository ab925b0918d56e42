"""Prompts with answers as files: demonstrations, pairs of which one is preferred, and prompts.

A prompt is a text, or a chat that waits for its answer. Rows are as on the Hub: `messages`, or
`prompt` and `completion`; `prompt`, `chosen` and `rejected`, or without `prompt` two chats that
begin alike; `prompt`. Files of prompts may also be plain text, a prompt a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from genkit.arguments import check_unicode
from genkit.data import table_sources, tables, utf8
from genkit.data.messages import check_chat, check_turns
from genkit.hub import names

Messages = list[dict[str, str]]
Prompt = str | Messages
T = TypeVar("T")
COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "margin")


@dataclass(frozen=True)
class Demonstration:
    """A prompt and what a good model answers; in a chat also the answers before."""

    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, of which people prefer one."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0  # by how much


# ---------------------------------------------------------------------------------------------
# Reading


def read_demonstrations(source: str, table_memory: int = tables.MEMORY) -> list[Demonstration]:
    """Read demonstrations from a table.

    Args:
        source: a file (jsonl, json, parquet), a dataset saved by `datasets`, or a Hub id.
        table_memory: MiB of memory of the process that reads it.

    Raises:
        ValueError: there is no such table, or a row is no demonstration; the message names it.
    """
    return _read(source, table_memory, _demonstration)


def read_pairs(source: str, table_memory: int = tables.MEMORY) -> list[Pair]:
    """Read pairs of answers from a table; see `read_demonstrations`."""
    return _read(source, table_memory, _pair)


def read_prompts(source: str, table_memory: int = tables.MEMORY) -> list[Prompt]:
    """Read prompts from a text file, one a line, or from a table; see `read_demonstrations`.

    An empty line is none. A prompt that stands several times is one prompt.
    """
    path = names.as_path(source, "prompts")
    if path.is_file() and not tables.find_kind(path):
        lines = "".join(utf8.read_pieces(path, "prompts")).splitlines()
        found: list[Prompt] = [line for line in lines if line.strip()]
    else:
        found = _read(source, table_memory, _prompt_alone, "prompts")
    if not found:
        raise ValueError(f"prompts: {source!r} has no prompt; give one a line, or a table")
    if len({isinstance(prompt, str) for prompt in found}) > 1:
        raise ValueError(f"prompts: {source!r} has texts and chats; give all of one kind")
    return list({json.dumps(prompt): prompt for prompt in found}.values())


def split(items: Sequence[T], fraction: float, argument: str) -> tuple[list[T], list[T]]:
    """Hold out every n-th item, one at least, so that both parts are alike.

    Args:
        fraction: part to hold out.
        argument: the name of the data, for messages.

    Raises:
        ValueError: there are fewer than two items.
    """
    if len(items) < 2:
        raise ValueError(f"{argument}: {len(items)} rows are too few; give two or more")
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    held = set(np.linspace(0, len(items) - 1, count).round().astype(int).tolist())
    return (
        [item for i, item in enumerate(items) if i not in held],
        [item for i, item in enumerate(items) if i in held],
    )


def content_hash(items: Iterable[Any]) -> str:
    """SHA-256 of prompts, demonstrations or pairs, in their order."""
    digest = hashlib.sha256()
    for item in items:
        plain = vars(item) if isinstance(item, Demonstration | Pair) else item
        digest.update(json.dumps(plain).encode() + b"\n")
    return digest.hexdigest()


def _read(
    source: str,
    memory: int,
    parse: Callable[[dict[str, Any], str], T],
    argument: str = "data",
) -> list[T]:
    return table_sources.read_rows(source, memory, COLUMNS, parse, argument)


# ---------------------------------------------------------------------------------------------
# One row; `name` is its name in messages


def _demonstration(row: Any, name: str) -> Demonstration:
    cells = _cells(row, name)
    if "messages" in cells:
        messages = check_turns(_messages(cells["messages"], name), f"{name}: messages")
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{name}: the last of messages must be the assistant's answer")
        check_chat(messages[:-1], f"{name}: messages")
        return Demonstration(messages[:-1], _filled(messages[-1]["content"], f"{name}: messages"))
    _need(cells, ("prompt", "completion"), name, "messages, or prompt and completion")
    prompt = _prompt(cells["prompt"], f"{name}: prompt")
    return Demonstration(prompt, _answer(cells["completion"], prompt, f"{name}: completion"))


def _pair(row: Any, name: str) -> Pair:
    cells = _cells(row, name)
    _need(cells, ("chosen", "rejected"), name, "chosen and rejected, with prompt or as chats")
    if "prompt" not in cells:
        cells |= _shared_prompt(cells, name)
    prompt = _prompt(cells["prompt"], f"{name}: prompt")
    chosen, rejected = (_answer(cells[k], prompt, f"{name}: {k}") for k in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError(f"{name}: chosen and rejected are equal ({chosen!r:.60}); leave it out")
    margin = cells.get("margin", 0.0)
    if not isinstance(margin, int | float) or not np.isfinite(margin):
        raise ValueError(f"{name}: margin must be a finite number, got {margin!r:.60}")
    return Pair(prompt, chosen, rejected, float(margin))


def _prompt_alone(row: Any, name: str) -> Prompt:
    cells = _cells(row, name)
    if "prompt" not in cells and "messages" in cells:
        cells["prompt"] = cells["messages"]
    _need(cells, ("prompt",), name, "prompt, or messages")
    return _prompt(cells["prompt"], f"{name}: prompt")


def _cells(row: Any, name: str) -> dict[str, Any]:
    """Return what a row holds, without the empty cells of a table."""
    if not isinstance(row, dict):
        raise ValueError(f"{name} must be an object with named fields, got {row!r:.60}")
    return {key: value for key, value in row.items() if value is not None}


def _need(cells: dict[str, Any], keys: Sequence[str], name: str, what: str) -> None:
    missing = [key for key in keys if key not in cells]
    if missing:
        raise ValueError(f"{name} has no {missing[0]!r}; a row has {what}")


def _shared_prompt(cells: dict[str, Any], name: str) -> dict[str, Any]:
    """Take the prompt out of two chats that begin alike."""
    chosen, rejected = (_messages(cells[key], f"{name}: {key}") for key in ("chosen", "rejected"))
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        raise ValueError(
            f"{name}: without a prompt, chosen and rejected must be chats that differ in their "
            "last message alone"
        )
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _messages(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of messages, got {value!r:.60}")
    return value


def _prompt(value: Any, name: str) -> Prompt:
    if isinstance(value, str):
        check_unicode(name, value)
        return value
    return check_chat(_messages(value, name), name)


def _answer(value: Any, prompt: Prompt, name: str) -> str:
    """Return the text of an answer: as it is, or the only message of the assistant."""
    if isinstance(value, list):
        history = [] if isinstance(prompt, str) else prompt
        if not history or len(value) != 1:
            raise ValueError(
                f"{name} must be a text, or after a chat one message of the assistant, got "
                f"{value!r:.60}"
            )
        value = check_turns([*history, *value], name)[-1]["content"]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r:.60}")
    return _filled(value, name)


def _filled(text: str, name: str) -> str:
    check_unicode(name, text)
    if not text.strip():
        raise ValueError(f"{name}: the answer is empty; leave the row out")
    return text
