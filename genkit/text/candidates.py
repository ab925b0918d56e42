"""Words to try in place of a word: by gradient, by a masked language model, by typing errors."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from genkit.data.tokens import encode_texts
from genkit.text.edits import Case, Draft, case_of, has_letters, in_case, script_of, split_words
from genkit.text.encoders import TokenGradients
from genkit.text.masked_models import MaskedModel

COUNT = 20  # candidates of a word
AHEAD = 8  # words whose candidates the masked model finds at once
SPARE = 3  # tokens that it predicts for each candidate: some are no words

# ---------------------------------------------------------------------------------------------
# By gradient


def words_by_gradient(
    draft: Draft, position: int, gradients: TokenGradients, vocabulary: Vocabulary
) -> list[tuple[float, str]]:
    """Rank words by how much they would raise a score in place of one, to first order.

    Candidates are whole words of the model's vocabulary, in the script and the case of the word,
    that begin a word where it does. A word of several tokens is replaced by one.

    Returns:
        Estimated gains of the score, and words, the best first.

    Source: HotFlip, Ebrahimi et al. 2018, https://arxiv.org/abs/1712.06751
    """
    word, (start, end) = draft.words[position], draft.span(position)
    gradient, own = gradients.of_word(start, end)
    spaced = draft.gaps[position].endswith(" ")
    words, vectors = vocabulary.whole_words(spaced, case_of(word), script_of(word))
    gains = vectors @ gradient - own
    best = gains.topk(min(COUNT + 1, len(words))).indices.tolist()  # one may be the word itself
    ranked = [(float(gains[i]), words[i]) for i in best if words[i] != word]
    return ranked[:COUNT]


class Vocabulary:
    """The whole words of a tokenizer's vocabulary, and their vectors in a model."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.embeddings, self.device = model.get_input_embeddings(), model.device
        self.tokenizer = tokenizer
        self.whole_words = functools.cache(self._whole_words)

    @torch.inference_mode()
    def _whole_words(self, spaced: bool, case: Case, script: str) -> tuple[list[str], torch.Tensor]:
        """Return words of one token, and their vectors, (words, d).

        Args:
            spaced: after a space, or at the start of a text or after a sign.
            case, script: of the words.
        """
        found = _single_tokens(self.tokenizer, "a " if spaced else "(", case, script)
        ids = torch.tensor([*found.values()], dtype=torch.int64, device=self.device)
        return [*found], self.embeddings(ids).float().cpu()

    @torch.inference_mode()
    def nearest_words(self, word: str, count: int) -> list[str]:
        """Return the words whose vectors are most similar to a word's, the most similar first.

        For a word with a capital letter, those are names where there are any: words that the
        vocabulary does not have in lower case.
        """
        case, script = case_of(word), script_of(word)
        words, vectors = self.whole_words(True, case, script)
        ids = torch.tensor(encode_texts(self.tokenizer, [f" {word}"])[0], dtype=torch.int64)
        own = self.embeddings(ids.to(self.device)).float().cpu().mean(0)
        order = torch.cosine_similarity(vectors, own[None]).argsort(descending=True).tolist()
        ranked = [words[i] for i in order if words[i].lower() != word.lower()]
        if case != "lower":
            common = {*self.whole_words(True, "lower", script)[0]}
            ranked = [each for each in ranked if each.lower() not in common] or ranked
        return ranked[:count]


@functools.lru_cache(maxsize=16)
def _letter_words(tokenizer: Any, script: str) -> list[str]:
    """List the tokens that are a word of letters, of two or more where letters have cases."""
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    words = (piece.strip() for piece in pieces)
    return [word for word in words if is_word(word) and script_of(word) == script]


def is_word(text: str) -> bool:
    """Whether a text is one word of letters, of two or more where letters have cases."""
    if not text or any(unicodedata.category(character)[0] not in "LM" for character in text):
        return False
    return split_words(text).words == (text,) and (len(text) > 1 or text.lower() == text.upper())


@functools.lru_cache(maxsize=64)
def _single_tokens(tokenizer: Any, before: str, case: Case, script: str) -> dict[str, int]:
    """Return the words that are one token, and no unknown one, after a text; with their tokens."""
    words = [*dict.fromkeys(in_case(word, case) for word in _letter_words(tokenizer, script))]
    around = encode_texts(tokenizer, [before.strip()])[0]
    encoded = encode_texts(tokenizer, [before + word for word in words])
    count, unknown = len(around), tokenizer.unk_token_id
    return {
        word: ids[-1]
        for word, ids in zip(words, encoded, strict=True)
        if len(ids) == count + 1 and ids[:count] == around and ids[-1] != unknown
    }


# ---------------------------------------------------------------------------------------------
# By a masked language model


def words_by_masked_model(
    draft: Draft, positions: Sequence[int], masked: MaskedModel
) -> Iterator[tuple[int, str]]:
    """Yield positions, each with the words that a masked language model finds likely there.

    Source: BAE-R, Garg and Ramakrishnan 2020, https://arxiv.org/abs/2004.01970
    """
    for first in range(0, len(positions), AHEAD):
        several = positions[first : first + AHEAD]
        spans = [draft.span(position) for position in several]
        text = draft.text
        pairs = [(text[:start].rstrip(), text[end:]) for start, end in spans]
        filled = masked.fill(pairs, SPARE * COUNT)
        for position, words in zip(several, filled, strict=True):
            word = draft.words[position]
            script, case = script_of(word), case_of(word)
            like = (each for each in words if is_word(each) and script_of(each) == script)
            forms = (in_case(each, case) for each in like)
            new = [form for form in dict.fromkeys(forms) if form != word]
            yield from ((position, form) for form in new[:COUNT])


# ---------------------------------------------------------------------------------------------
# By characters


def typing_errors(draft: Draft, position: int, seed: int) -> list[str]:
    """Draw typing errors in a word: letters swapped, left out, added, or mistaken.

    New letters are letters of the text in the script of the word. A letter keeps its accents.

    Args:
        seed: with the position, it determines the errors.

    Source: DeepWordBug, Gao et al. 2018, https://arxiv.org/abs/1801.04354
    """
    draws = np.random.default_rng([seed, position])
    word = draft.words[position]
    letters = _letters(word)
    script = script_of(word)
    lower = {character for own in draft.words for character in own.lower() if character.isalpha()}
    alphabet = sorted(character for character in lower if script_of(character) == script)
    errors = [*_swaps(letters), *_deletions(letters), *_additions(letters, alphabet, draws)]
    new = [each for each in dict.fromkeys(errors) if each != word and has_letters(each)]
    return [new[i] for i in draws.permutation(len(new))[:COUNT]]


def _letters(word: str) -> list[str]:
    """Cut a word into characters, each with the marks on it."""
    letters: list[str] = []
    for character in word:
        if letters and unicodedata.category(character)[0] == "M":
            letters[-1] += character
        else:
            letters.append(character)
    return letters


def _swaps(letters: list[str]) -> Iterator[str]:
    for i in range(len(letters) - 1):
        yield "".join([*letters[:i], letters[i + 1], letters[i], *letters[i + 2 :]])


def _deletions(letters: list[str]) -> Iterator[str]:
    for i in range(len(letters)):
        yield "".join(letters[:i] + letters[i + 1 :])


def _additions(letters: list[str], alphabet: list[str], draws: Any) -> Iterator[str]:
    """Yield a word with a letter more, and with another letter, at each place."""
    for i in range(len(letters) + 1):
        yield "".join([*letters[:i], str(draws.choice(alphabet)), *letters[i:]])
    for i in range(len(letters)):
        yield "".join([*letters[:i], str(draws.choice(alphabet)), *letters[i + 1 :]])
