"""Prompts with answers as tokens, of which the answers are marked: what a model learns from.

An answer ends with the token that ends a reply, so that a model learns to end. Prompts are read as
`generate` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from genkit.data.dialogues import Messages, Prompt
from genkit.data.tokens import encode_text
from genkit.text import chats, kv_cache
from genkit.text.language_model import LanguageModel
from genkit.text.task import encode_prompt

# for a tokenizer without a template; contents are trimmed, so that no token spans a border
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Row:
    """A prompt and what follows, as tokens."""

    ids: list[int]
    answers: list[bool]  # which of the tokens are of answers

    @property
    def count(self) -> int:
        """The number of tokens of answers."""
        return sum(self.answers)


def add_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a tokenizer a simple chat template, unless it has one."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
        tokenizer.split_special_tokens = False  # the template writes the end token


def encode_prompt_of(prompt: Prompt, language: LanguageModel, name: str) -> list[int]:
    """Encode a prompt, a text or a chat, up to where the answer begins.

    Args:
        name: of the prompt, for messages.

    Raises:
        ValueError: it is empty, or too long; or the model has no template for chats.
    """
    if isinstance(prompt, str):
        return encode_prompt(prompt, language, parse_special=False, name=name)
    return chats.read_chat(prompt, name, language).tokens


def encode_dialogue(prompt: Prompt, answer: str, language: LanguageModel, name: str) -> Row:
    """Encode a prompt and its answer; of a chat, all that the assistant says is an answer.

    Args:
        name: of the row, for messages.

    Raises:
        ValueError: prompt and answer are longer than the model's context, the prompt cannot be
            encoded, or the chat template writes an answer otherwise when it is the last one.
    """
    row = (
        _encode_text(prompt, answer, language, name)
        if isinstance(prompt, str)
        else _encode_chat([*prompt, {"role": "assistant", "content": answer}], language, name)
    )
    context = kv_cache.context_length(language.model)
    if len(row.ids) > context:
        raise ValueError(
            f"{name}: prompt and answer are {len(row.ids)} tokens, more than the model's context "
            f"of {context}; shorten them, or leave the row out"
        )
    return row


def encode_whole(prompt: Prompt, answer: str, language: LanguageModel, name: str) -> list[int]:
    """Encode a prompt and its answer as one text, as a reward model reads them.

    Args:
        language: the reward model and its tokenizer.
        name: of what is encoded, for messages.

    Raises:
        ValueError: there is no chat template, or it refuses them.
    """
    if isinstance(prompt, str):
        return encode_text(language.tokenizer, prompt + answer, ends=True)
    messages = [*prompt, {"role": "assistant", "content": answer}]
    return chats.encode_messages(messages, name, language, add_generation_prompt=False)


def _encode_text(prompt: str, answer: str, language: LanguageModel, name: str) -> Row:
    before = encode_prompt_of(prompt, language, f"{name}: prompt")
    after = [*encode_text(language.tokenizer, answer), language.tokenizer.eos_token_id]
    return Row(before + after, [False] * len(before) + [True] * len(after))


def _encode_chat(messages: Messages, language: LanguageModel, name: str) -> Row:
    """Encode a chat whose last message is an answer."""
    ends = chats.end_of_turn(language)
    ids: list[int] = []
    answers: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chats.read_chat(messages[:i], name, language).tokens
        whole = chats.encode_messages(messages[: i + 1], name, language, False)
        after = whole[len(before) :]
        end = next((n for n, token in enumerate(after) if token in ends), None)
        if whole[: len(before)] != before or before[: len(ids)] != ids or end is None:
            raise ValueError(
                f"{name}: the chat template of {language.name} writes an answer otherwise when "
                "others follow, or does not end it; give prompts and completions as texts"
            )
        answers += [False] * (len(before) - len(ids)) + [True] * (end + 1)
        ids = before + after[: end + 1]
    return Row(ids, answers)
