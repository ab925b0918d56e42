"""Chats: messages checked, and written and encoded by the model's own template."""

from __future__ import annotations

import bisect
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from genkit.arguments import check_unicode
from genkit.errors import panics_are_errors
from genkit.text import kv_cache
from genkit.text.language_model import LanguageModel

Message: TypeAlias = Mapping[str, str]  # {"role": one of ROLES, "content": a text}
Chat: TypeAlias = Sequence[Message]  # oldest message first
ROLES = ("system", "user", "assistant")
PROBE = "genkitwritesthis"  # a content that stands nowhere else


@dataclass(frozen=True)
class History:
    """A chat up to the reply, as the model reads it."""

    messages: list[dict[str, str]]
    dropped: list[dict[str, str]]  # the oldest turns, which did not fit
    text: str  # as the template writes it
    tokens: list[int]

    def answered(self, text: str) -> list[dict[str, str]]:
        """Return the messages with a reply."""
        return [*self.messages, {"role": "assistant", "content": text}]


# ---------------------------------------------------------------------------------------------
# Messages


def split_prompts(
    prompt: str | Chat | Iterable[str] | Iterable[Chat],
) -> tuple[list[str], dict[str, list[dict[str, str]]]]:
    """Tell texts from chats: return the texts, or the chats, checked, by their names in errors.

    Raises:
        ValueError: there is nothing, or texts and messages side by side; or see `check_chat`.
    """
    if isinstance(prompt, str):
        check_unicode("prompt", prompt)
        return [prompt], {}
    if isinstance(prompt, Mapping):
        raise ValueError(f"prompt: {reprlib.repr(prompt)} is one message; give a list of messages")
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
        raise ValueError(f"prompt must be a text, a list of texts or a chat, got {prompt!r:.80}")
    parts: list[Any] = list(prompt)
    if not parts:
        raise ValueError("prompt: [] is empty; give at least one text or message")
    if isinstance(parts[0], Mapping):
        return [], {"prompt": check_chat(parts, "prompt")}
    if isinstance(parts[0], str):
        for i, part in enumerate(parts):
            check_unicode(f"prompt[{i}]", part)
        return parts, {}
    for i, part in enumerate(parts):
        if isinstance(part, str) or not isinstance(part, Sequence):
            raise ValueError(
                f"prompt[{i}] must be a chat, a list of messages, as those beside it, "
                f"got {reprlib.repr(part)}"
            )
    names = [f"prompt[{i}]" for i in range(len(parts))]
    return [], {name: check_chat(chat, name) for name, chat in zip(names, parts, strict=True)}


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


# ---------------------------------------------------------------------------------------------
# The template


def read_chat(
    messages: list[dict[str, str]],
    name: str,
    language: LanguageModel,
    overflow: Literal["error", "drop_oldest"] = "error",
    max_new_tokens: int = 0,
) -> History:
    """Write and encode a chat by the model's template, up to where the reply begins.

    Control tokens come from the template alone: a content that spells one is text.

    Args:
        messages: checked by `check_chat`.
        name: of the chat, for messages of errors.
        overflow: what to do if chat and reply do not fit into the model's context: "error", or
            "drop_oldest" leaves out the oldest turns, each with its reply, but no system message.
        max_new_tokens: tokens of the longest reply.

    Raises:
        ValueError: the model has no template, or one that refuses the chat or leaves out its
            system message; or the chat is too long.
    """
    if language.tokenizer.chat_template is None:
        raise ValueError(
            f"{name}: {language.name} has no chat template; give a text, or a model for chats"
        )
    history = _write(messages, 0, name, language)
    if messages[0]["role"] == "system":
        _check_system(history, name, language)
    context = kv_cache.context_length(language.model)
    room = context - (0 if language.model.config.is_encoder_decoder else max_new_tokens)
    if len(history.tokens) > room and overflow == "drop_oldest":
        turns = sum(message["role"] == "assistant" for message in messages)  # but for the last
        count = bisect.bisect_left(
            range(turns),
            True,
            key=lambda n: len(_write(messages, n, name, language).tokens) <= room,
        )
        history = _write(messages, count, name, language)
    if len(history.tokens) > room:
        what = "the last turn alone is" if overflow == "drop_oldest" else "the chat is"
        reply = f"; with max_new_tokens={max_new_tokens} that is" if max_new_tokens else ","
        advice = ", lower max_new_tokens" if max_new_tokens else ""
        if max_new_tokens and overflow == "error":
            advice += ", or pass overflow='drop_oldest'"
        raise ValueError(
            f"{name}: {what} {len(history.tokens)} tokens{reply} more than the model's context of "
            f"{context}; shorten it{advice}"
        )
    return history


def _write(
    messages: list[dict[str, str]], dropped: int, name: str, language: LanguageModel
) -> History:
    """Write and encode a chat without its first so many turns."""
    first = int(messages[0]["role"] == "system")
    split = first + 2 * dropped
    kept = messages[:first] + messages[split:]
    text = _apply_template(kept, name, language, tokenize=False)
    # what spells an added token is made text; all else is encoded as transformers does anyway
    added = language.tokenizer.added_tokens_encoder
    spelled = any(token in message["content"] for message in kept for token in added)
    options = {"sanitize_control_tokens": True} if spelled else {}
    tokens = _apply_template(kept, name, language, return_dict=False, **options)
    if not tokens:
        raise ValueError(f"{name}: the chat template of {language.name} writes nothing")
    return History(kept, messages[first:split], text, list(tokens))


def _check_system(history: History, name: str, language: LanguageModel) -> None:
    """Refuse a system message that the template leaves out."""
    system, *others = history.messages
    changed = [{**system, "content": f"{system['content']} {PROBE}"}, *others]
    if _apply_template(changed, name, language, tokenize=False) == history.text:
        raise ValueError(
            f"{name}[0]: the chat template of {language.name} leaves out system messages; "
            "put the text into the first message of the user"
        )


@panics_are_errors()
def _apply_template(
    messages: list[dict[str, str]],
    name: str,
    language: LanguageModel,
    add_generation_prompt: bool = True,
    **options: Any,
) -> Any:
    """Run the template in the sandbox of transformers."""
    try:
        return language.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # a template is the model's own program: it may raise anything
        reason = " ".join(str(error).split())
        if options.get("sanitize_control_tokens") and reason.startswith("Can't sanitize"):
            raise ValueError(
                f"{name}: a content spells a control token, and the tokenizer of {language.name} "
                f"cannot read it as text ({reason}); leave it out"
            ) from error
        raise ValueError(
            f"{name} cannot be written by the chat template of {language.name}: {reason}"
        ) from error


def end_of_turn(language: LanguageModel) -> frozenset[int]:
    """Return the tokens that end a reply, besides those of the generation settings.

    These are the tokenizer's end token, and the added token that the template writes right after a
    reply that is followed by another message.
    """
    tokenizer = language.tokenizer
    contents = zip(("user", "assistant", "user"), ("a", PROBE, "a"), strict=True)
    probe = [{"role": role, "content": content} for role, content in contents]
    try:
        text = _apply_template(probe, "prompt", language, False, tokenize=False)
    except ValueError:
        text = ""  # a template that wants more than these
    after = text.partition(PROBE)[2].lstrip()
    added = tokenizer.added_tokens_encoder
    written = max((token for token in added if after.startswith(token)), key=len, default=None)
    ends = (tokenizer.eos_token_id, added.get(written))
    return frozenset(language.possible([token for token in ends if token is not None]))
