"""Chats as lists of messages, checked: their roles, their order, their contents."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from genkit.arguments import check_unicode

Message: TypeAlias = Mapping[str, str]  # {"role": one of ROLES, "content": a text}
Chat: TypeAlias = Sequence[Message]  # oldest message first
ROLES = ("system", "user", "assistant")


def check_chat(chat: Chat, name: str) -> list[dict[str, str]]:
    """Check a chat that is to be answered and return its messages.

    Args:
        name: of the chat, for messages of errors.

    Raises:
        ValueError: a message is none, or is out of order; the text names it by its index.
    """
    if not chat:
        raise ValueError(f"{name}: the chat has no message; give at least one of the user's")
    messages = check_turns(chat, name)
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"{name}[{len(messages) - 1}]: the last message must be the user's, got role "
            f"{messages[-1]['role']!r}; add one, or give the beginning of a reply as prefix"
        )
    return messages


def check_turns(chat: Chat, name: str) -> list[dict[str, str]]:
    """Check a chat, whoever has its last word, and return its messages; see `check_chat`."""
    messages = [_check_message(message, f"{name}[{i}]") for i, message in enumerate(chat)]
    first = int(bool(messages) and messages[0]["role"] == "system")
    for i, message in enumerate(messages[first:]):
        expected, role = ("user", "assistant")[i % 2], message["role"]
        if role != expected:
            raise ValueError(
                f"{name}[{first + i}]: role {role!r} is out of order, {expected!r} comes here; "
                "a system message may come first, then user and assistant take turns"
            )
    return messages


def _check_message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f'{name} must be a message {{"role": ..., "content": ...}}, got {reprlib.repr(message)}'
        )
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{name}: {key!r} is missing; a message has a role and a content")
    others = [key for key in message if key not in ("role", "content")]
    if others:
        raise ValueError(f"{name}: {others[0]!r} is not used; a message has a role and a content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{name}: role must be one of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise ValueError(
            f"{name}: content must be a text, got {reprlib.repr(content)}; "
            "images and other parts are not read"
        )
    check_unicode(f"{name}: content", content)
    return {"role": role, "content": content}
