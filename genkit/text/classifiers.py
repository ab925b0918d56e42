"""Classifiers of texts: any model of transformers for sequence classification."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from genkit.engine.summary import summarize
from genkit.hub import kinds
from genkit.seeds import is_whole
from genkit.text.encoders import (
    TokenGradients,
    collate,
    embedding_gradients,
    encode_rows,
    load_encoder,
    similar_lengths,
)

LISTED = 5  # class names in a message


@dataclass(eq=False, repr=False)
class TextClassifier:
    """A model with a classification head and its tokenizer, loaded once and used often."""

    model: PreTrainedModel
    tokenizer: Any
    name: str

    def __repr__(self) -> str:
        return summarize("TextClassifier", self.name, [self.model], "float32")

    @property
    def names(self) -> list[str]:
        """The names of the classes."""
        return [str(self.model.config.id2label[i]) for i in range(self.model.config.num_labels)]

    @torch.inference_mode()
    def log_probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """Classify texts, each cut to what the model reads; return (texts, classes), on the CPU."""
        rows = encode_rows(self.model, self.tokenizer, texts).input_ids
        found = torch.empty(len(rows), self.model.config.num_labels)
        for group in similar_lengths(self.model, rows):
            logits = self.model(**collate(self.model, [rows[i] for i in group])).logits
            found[group] = logits.float().log_softmax(-1).cpu()
        return found

    def gradients(self, text: str, score: Callable[[torch.Tensor], torch.Tensor]) -> TokenGradients:
        """Differentiate a score of a text's log-probabilities, (classes,), by its embeddings."""
        encoded = encode_rows(self.model, self.tokenizer, [text])
        found = embedding_gradients(
            self.model,
            collate(self.model, encoded.input_ids),
            lambda output: score(output.logits[0].float().log_softmax(-1)),
        )
        starts, ends = torch.tensor(encoded.offset_mapping[0]).T
        return TokenGradients(starts, ends, *found)

    def characters_read(self, text: str) -> int:
        """Return how many characters of a text the model reads: all, unless it is too long."""
        offsets = encode_rows(self.model, self.tokenizer, [text]).offset_mapping[0]
        return max((end for _, end in offsets), default=0)

    def index_of(self, label: str | int, argument: str) -> int:
        """Return the index of a class by its name or its number.

        Args:
            argument: the label's, for messages.

        Raises:
            ValueError: there is no such class; the nearest names are listed.
        """
        names, text = [name.lower() for name in self.names], str(label).strip().lower()
        if isinstance(label, str) and text in names:
            return names.index(text)
        if is_whole(label) or (isinstance(label, str) and text.isdecimal()):
            if 0 <= int(text) < len(names):
                return int(text)
            raise ValueError(f"{argument} must be 0 to {len(names) - 1}, got {label}")
        near = difflib.get_close_matches(text, names, LISTED, cutoff=0.5) or names[:LISTED]
        raise ValueError(
            f"{argument}: {self.name} has no class {label!r}; it has {len(names)}, the nearest: "
            f"{', '.join(self.names[names.index(name)] for name in near)}"
        )


def load_text_classifier(
    model: str | Path | TextClassifier,
    *,
    revision: str | None = None,
    device: str | None = None,
) -> TextClassifier:
    """Load a classifier of texts in float32, or return one that is loaded.

    Args:
        model: folder or Hub id of a model for sequence classification, in safetensors.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such model, it does not tell classes apart, or its files are not
            safe to load; or it is loaded, and there is an option for loading it.
    """
    if isinstance(model, TextClassifier):
        kinds.refuse_loading(revision=revision, device=device)
        return model
    loaded = load_encoder(
        AutoModelForSequenceClassification,
        model,
        kinds.TEXT_CLASSIFIER,
        revision=revision,
        device=device,
    )
    classifier = TextClassifier(*loaded)
    config = classifier.model.config
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"model: {classifier.name!r} does not choose one of two or more classes "
            f"(num_labels {config.num_labels}, problem_type {config.problem_type}); give one that "
            "does"
        )
    return classifier
