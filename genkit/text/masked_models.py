"""Masked language models: which words fit in a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

from genkit.data.tokens import encode_texts
from genkit.engine.encoder import token_limit
from genkit.text.encoders import collate, load_encoder, similar_lengths

KIND = "masked language model"


@dataclass(eq=False, repr=False)
class MaskedModel:
    """A model with a masked-language-modelling head and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    name: str

    @torch.inference_mode()
    def fill(self, pairs: Sequence[tuple[str, str]], count: int) -> list[list[str]]:
        """Predict the word between two texts.

        Args:
            pairs: what is before and after the word. They are cut on the far sides to what the
                model reads.
            count: how many tokens to predict.

        Returns:
            The likeliest tokens as texts, the likeliest first, for each pair.
        """
        mask = self.tokenizer.mask_token_id
        rows, places = zip(*(self._row(*pair) for pair in pairs), strict=True)
        found: list[list[str]] = [[] for _ in rows]
        for group in similar_lengths(self.model, rows):
            inputs = collate(self.model, [rows[i] for i in group])
            here = torch.tensor([places[i] for i in group], device=self.model.device)
            assert (inputs["input_ids"][range(len(group)), here] == mask).all(), "a mask a row"
            logits = self.model(**inputs).logits[range(len(group)), here]
            for i, ids in zip(group, logits.topk(min(count, logits.shape[1])).indices, strict=True):
                found[i] = [self.tokenizer.decode([token]).strip() for token in ids.tolist()]
        return found

    def _row(self, before: str, after: str) -> tuple[list[int], int]:
        """Return the tokens of a text with a mask in it, and the place of the mask."""
        left, right = encode_texts(self.tokenizer, [before, after])
        first, last = self._ends()
        room = token_limit(self.model, self.tokenizer) - len(first) - len(last) - 1
        kept = min(len(left), max(room // 2, room - len(right)))
        left, right = left[len(left) - kept :], right[: room - kept]
        return [*first, *left, self.tokenizer.mask_token_id, *right, *last], len(first) + kept

    def _ends(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer puts before and after a text."""
        plain, whole = (encode_texts(self.tokenizer, ["a"], ends=own)[0] for own in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[:start], whole[start + len(plain) :]


def load_masked_model(
    model: str | Path, *, device: str | None = None, argument: str = "masked_model"
) -> MaskedModel:
    """Load a masked language model in float32.

    Args:
        model: folder or Hub id, in safetensors.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        argument: the name of the model's argument, for messages.

    Raises:
        ValueError: there is no such model, it predicts no masked words, or its files are not safe.
    """
    loaded = load_encoder(
        AutoModelForMaskedLM, model, KIND, revision=None, device=device, argument=argument
    )
    if loaded[1].mask_token_id is None:
        raise ValueError(f"{argument}: the tokenizer of {loaded[2]!r} has no token for a mask")
    return MaskedModel(*loaded)
