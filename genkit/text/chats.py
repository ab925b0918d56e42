"""Chats: recognised among prompts, then written and encoded by the model's own template."""

from __future__ import annotations

import bisect
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genkit.arguments import check_unicode
from genkit.data.messages import Chat, check_chat
from genkit.errors import panics_are_errors
from genkit.text import kv_cache
from genkit.text.language_model import LanguageModel

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
# Texts or chats


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
    tokens = encode_messages(kept, name, language)
    if not tokens:
        raise ValueError(f"{name}: the chat template of {language.name} writes nothing")
    return History(kept, messages[first:split], text, tokens)


def encode_messages(
    messages: list[dict[str, str]],
    name: str,
    language: LanguageModel,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Encode messages by the model's template; a content that spells a control token is text.

    Args:
        name: of the chat, for messages of errors.
        add_generation_prompt: end with what the template writes before a reply.

    Raises:
        ValueError: there is no template, or it refuses them.
    """
    # what spells an added token is made text; all else is encoded as transformers does anyway
    added = language.tokenizer.added_tokens_encoder
    spelled = any(token in message["content"] for message in messages for token in added)
    options = {"sanitize_control_tokens": True} if spelled else {}
    return list(
        _apply_template(
            messages, name, language, add_generation_prompt, return_dict=False, **options
        )
    )


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
    if language.tokenizer.chat_template is None:
        raise ValueError(
            f"{name}: {language.name} has no chat template; give a text, or a model for chats"
        )
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
