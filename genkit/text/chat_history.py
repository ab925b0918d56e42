"""Conversations as files: a JSON list of messages, with the seed that each reply was drawn by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genkit import files

# role and content; of a reply also its seed, and whether it was stopped before its end
Entry = dict[str, Any]
KINDS: dict[str, type] = {"role": str, "content": str, "seed": int, "stopped": bool}


def read_history(path: Path, argument: str) -> list[Entry]:
    """Read a conversation.

    Args:
        path: a JSON file: a list of messages, each {"role": …, "content": …}, replies perhaps with
            "seed" and "stopped".
        argument: its name, for messages.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(files.read_regular(path))
    except OSError as error:
        raise ValueError(f"{argument}: cannot read {path} ({files.reason(error)})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} is not JSON ({files.reason(error)})") from None
    if not isinstance(found, list):
        raise ValueError(f"{argument}: {path} holds no list of messages")
    for i, entry in enumerate(found):
        _check(entry, f"{argument}: message {i} of {path}")
    return found


def _check(entry: Any, name: str) -> None:
    if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys():
        raise ValueError(f'{name} must be {{"role": …, "content": …}}, got {entry!r:.100}')
    for key, value in entry.items():
        if key not in KINDS:
            raise ValueError(f"{name} has {key!r}; it may have {', '.join(KINDS)}")
        if type(value) is not KINDS[key]:
            raise ValueError(f"{name}: {key} must be {KINDS[key].__name__}, got {value!r:.100}")


def as_json(history: list[Entry]) -> str:
    """Write a conversation as the text of its file."""
    return json.dumps(history, ensure_ascii=False, indent=2) + "\n"


def as_messages(history: list[Entry]) -> list[dict[str, str]]:
    """Return the messages alone, as `generate` takes them."""
    return [{"role": entry["role"], "content": entry["content"]} for entry in history]


def with_system(history: list[Entry], text: str) -> list[Entry]:
    """Return a conversation whose system message is `text`; without one if it is empty."""
    rest = [entry for entry in history if entry["role"] != "system"]
    return [{"role": "system", "content": text}, *rest] if text else rest


def without_reply(history: list[Entry]) -> list[Entry]:
    """Return a conversation without its last reply, to be answered again.

    Raises:
        ValueError: there is no reply.
    """
    if not history or history[-1]["role"] != "assistant":
        raise ValueError("there is no reply yet")
    return history[:-1]
