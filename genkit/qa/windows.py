"""Questions and contexts as windows of tokens that a model reads; each context tokenized once."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from genkit import console
from genkit.data.corpus import BLOCK, WORD_END
from genkit.data.tokens import encode_with_offsets
from genkit.errors import panics_are_errors

NEVER = -torch.inf  # the logit of a token that can neither start nor end an answer
# scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Tokens:
    """A text as tokens, with their positions in it; (tokens,) each."""

    ids: np.ndarray
    starts: np.ndarray  # characters of the text
    ends: np.ndarray
    first: np.ndarray  # the first token of the word that a token is in
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@panics_are_errors()
def tokenize(text: str, tokenizer: Any) -> Tokens:
    """Encode a text of any length, without what a tokenizer adds at its ends."""
    ids, offsets, words = [], [], []
    short = len(text) <= BLOCK
    bar = console.bar(None, "tokenizing", len(text), " characters", short, unit_scale=True)
    for start, block in _blocks(text):
        bar.update(len(block))
        encoding = encode_with_offsets(tokenizer, block)
        ids.append(np.array(encoding.input_ids, dtype=np.int32))
        offsets.append(np.array(encoding.offset_mapping, dtype=np.int64).reshape(-1, 2) + start)
        word_ids = [-1 - i if w is None else w for i, w in enumerate(encoding.word_ids())]
        words.append(np.array(word_ids, dtype=np.int64) + (start << 32))  # unique among blocks
    bar.close()
    starts, ends = np.concatenate(offsets).T
    begins = _word_begins(text, starts, ends, np.concatenate(words))
    return Tokens(np.concatenate(ids), starts, ends, *_word_extents(begins))


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """Cut a long text at ends of words, so that memory stays small; yield starts and blocks."""
    start = 0
    while start < len(text):
        cut = WORD_END.search(text, start + BLOCK, start + 2 * BLOCK)
        end = cut.start() if cut else start + 2 * BLOCK
        yield start, text[start:end]
        start = end


def _word_begins(text: str, starts: np.ndarray, ends: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Find the tokens that begin a word, (tokens,) bool.

    Scripts without spaces between words have one wherever a token begins with a character of its
    own: a tokenizer may take a whole sentence of them for a word.

    Args:
        starts, ends: characters of each token, (tokens,).
        words: what the tokenizer takes for words, a number each, (tokens,).
    """
    begins = np.diff(words, prepend=words[:1] - 1) != 0
    if UNSPACED.search(text):
        for i in np.flatnonzero(starts > 0):
            around = text[max(ends[i - 1] - 1, 0) : starts[i] + 1]
            if UNSPACED.search(around):
                whole = ends[i - 1] <= starts[i] < ends[i]
                mark = unicodedata.category(around[-1]).startswith("M")  # such as a vowel of Thai
                begins[i] = (begins[i] or whole) and not mark
    return begins


def _word_extents(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the first and the last token of the word that each token is in; (tokens,) all."""
    count, begins = len(begins), np.flatnonzero(begins)
    sizes = np.diff(begins, append=count)
    return np.repeat(begins, sizes), np.repeat(begins + sizes - 1, sizes)


@dataclass(frozen=True)
class Template:
    """Tokens that a tokenizer adds before, between and after a question and a context."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: tuple[list[int], int, list[int], int, list[int]]  # token types, with the two texts'
    has_null: bool  # the first token stands for no answer

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    @property
    def type_count(self) -> int:
        """The number of token types."""
        before, one, between, two, after = self.types
        return 1 + max(*before, one, *between, two, *after)


def read_template(tokenizer: Any) -> Template:
    """Encode a pair of texts to find the tokens that a tokenizer adds to them."""
    pair = tokenizer("a", "b", return_token_type_ids=True)
    whose, ids, types = pair.sequence_ids(), pair.input_ids, pair.token_type_ids
    q, c = whose.index(0), whose.index(1)
    before, between = slice(0, q), slice(q + whose.count(0), c)
    after = slice(c + whose.count(1), None)
    token_types = (types[before], types[q], types[between], types[c], types[after])
    has_null = ids[before][:1] == [tokenizer.cls_token_id]
    return Template(ids[before], ids[between], ids[after], token_types, has_null)


def takes_types(model: PreTrainedModel, around: Template) -> bool:
    """Whether a model has token types: which of the two texts a token is of."""
    return getattr(model.config, "type_vocab_size", 0) >= around.type_count


class TokenWindows:
    """Windows of contexts, each with its question: what the model is run on.

    Args:
        questions, contexts: as many questions as contexts; a repeated text is encoded once.
        max_seq_len: tokens of a window, with the question and the tokens that the tokenizer adds.
        doc_stride: tokens of context that a window shares with the next.
        limit: the most that max_seq_len can be; None: it can always be raised.
        name: names the question or the context of a row, for errors.

    Raises:
        ValueError: a question leaves no room for the context, or a context has no token.
    """

    def __init__(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        tokenizer: Any,
        max_seq_len: int,
        doc_stride: int,
        limit: int | None = None,
        name: Callable[[str, int], str] = lambda which, row: which,
    ) -> None:
        self.template, self.padding = read_template(tokenizer), tokenizer.pad_token_id or 0
        encoded = {q: tokenize(q, tokenizer).ids for q in dict.fromkeys(questions)}
        texts = {c: tokenize(c, tokenizer) for c in dict.fromkeys(contexts)}
        self.questions = [encoded[q] for q in questions]
        self.contexts = [texts[c] for c in contexts]
        windows = []
        for row, (question, context) in enumerate(zip(self.questions, self.contexts, strict=True)):
            for which, text, found in (
                ("question", questions[row], question),
                ("context", contexts[row], context),
            ):
                if not len(found):
                    raise ValueError(
                        f"{name(which, row)}: the model knows no token of {text!r:.60}"
                    )
            room = max_seq_len - len(self.template) - len(question)
            if room <= doc_stride:
                raise ValueError(
                    f"{name('question', row)}: {questions[row]!r:.60} has {len(question)} tokens; "
                    f"of a window of {max_seq_len} it leaves {max(room, 0)} for the context, which "
                    f"must be more than doc_stride={doc_stride}. Shorten it"
                    + (", lower doc_stride" if room > 0 else "")
                    + (", or raise max_seq_len" if limit is None or max_seq_len < limit else "")
                )
            windows += [(row, *window) for window in cut_windows(len(context), room, doc_stride)]
        self.row, self.first, self.last = np.array(windows).T  # (windows,); tokens of the context
        sizes = np.array([len(question) for question in self.questions])
        self.begin = sizes[self.row] + len(self.template.before) + len(self.template.between)
        self.length = self.begin + self.last - self.first + len(self.template.after)

    def __len__(self) -> int:
        return len(self.row)

    def groups(self, most: int) -> Iterator[np.ndarray]:
        """Yield groups of windows of similar length, the longest first, of `most` tokens each."""
        order = np.argsort(-self.length, kind="stable")
        position = 0
        while position < len(order):
            count = max(1, most // int(self.length[order[position]]))
            yield order[position : position + count]
            position += count

    def inputs(self, group: np.ndarray, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Collate windows into a batch for a model; (windows, longest) each."""
        longest = int(self.length[group].max())
        ids = np.full((len(group), longest), self.padding, dtype=np.int64)
        types = np.zeros_like(ids)
        for i, window in enumerate(group):
            ids[i, : self.length[window]], types[i, : self.length[window]] = self._window(window)
        mask = np.arange(longest) < self.length[group, None]
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        if takes_types(model, self.template):
            batch["token_type_ids"] = types
        return {name: torch.from_numpy(x).to(model.device) for name, x in batch.items()}

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and types of a window, (length,) each."""
        row, around = self.row[window], self.template
        question = self.questions[row]
        context = self.contexts[row].ids[self.first[window] : self.last[window]]
        ids = np.concatenate([around.before, question, around.between, context, around.after])
        before, one, between, two, after = around.types
        types = before + [one] * len(question) + between + [two] * len(context) + after
        return ids, np.array(types)

    def context_logits(self, logits: torch.Tensor, group: np.ndarray) -> torch.Tensor:
        """Select the logits of no answer, first, and of the tokens of the context.

        Args:
            logits: of all tokens of the windows, (windows, longest).

        Returns:
            (windows, 1 + the most tokens of context), NEVER beyond a window's end.
        """
        sizes = torch.from_numpy(self.last[group] - self.first[group])
        steps = torch.arange(int(sizes.max()))
        positions = torch.from_numpy(self.begin[group])[:, None] + steps
        inside = steps < sizes[:, None]
        taken = logits.float().cpu().gather(1, positions.clamp(max=logits.shape[1] - 1))
        null = logits[:, :1].float().cpu()
        if not self.template.has_null:
            null = torch.full_like(null, NEVER)
        return torch.cat([null, taken.masked_fill(~inside, NEVER)], 1)


def cut_windows(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Cut a context into windows of at most `room` tokens, each sharing `stride` with the next."""
    starts = range(0, max(tokens - stride, 1), room - stride)
    return [(start, min(start + room, tokens)) for start in starts]
