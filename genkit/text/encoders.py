"""Encoders of texts in float32: loaded safely, run in batches, differentiated by their embeddings.

For what looks into a model from outside: attacks need exact scores and gradients, not speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from genkit import machine
from genkit.data.tokens import encode_cut
from genkit.engine.encoder import token_limit
from genkit.errors import panics_are_errors
from genkit.hub import download, kinds, model_files, safe_weights, safety

BATCH: dict[machine.Kind, int] = {"cpu": 2048, "accelerator": 1 << 15}  # tokens at once
HINT = "Give the folder or Hub id of a model with its tokenizer, in safetensors"

# ---------------------------------------------------------------------------------------------
# Loading


def load_encoder(
    auto: Any,
    model: str | Path,
    kind: str,
    *,
    revision: str | None,
    device: str | None,
    argument: str = "model",
) -> tuple[PreTrainedModel, Any, str]:
    """Load a network and its tokenizer; once, then reused.

    Args:
        auto: the class of transformers that loads it, with its head.
        model: folder or Hub id.
        kind: what the model must be, of `genkit.hub.kinds`.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        argument: the name of the model's argument, for messages.

    Returns:
        The network in float32 and evaluation mode, its tokenizer, and its name.

    Raises:
        ValueError: there is no such model, its files are not safe to load, or its tokenizer does
            not give the positions of tokens.
    """
    where = machine.find_device(device)
    name = kinds.as_name(model, argument)
    folder = download.fetch(name, revision, argument=argument, hint=HINT).resolve()
    kinds.check_kind(folder, name, kind, argument)
    return _load(auto, name, folder, model_files.last_written(folder), where, argument)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _load(
    auto: Any, name: str, folder: Path, written: int, device: torch.device, argument: str
) -> tuple[PreTrainedModel, Any, str]:
    from transformers import AutoTokenizer

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warning of a new head, which is refused below
    try:
        with safety.opened(folder, argument=argument) as private:
            tokenizer = AutoTokenizer.from_pretrained(private, trust_remote_code=False)
            model, report = auto.from_pretrained(
                private,
                use_safetensors=True,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
            safe_weights.check_loaded(model, report)
            safe_weights.check_tokens(model, tokenizer)
    finally:
        logging.set_verbosity(verbosity)
    return model.eval().to(device), tokenizer, name


def check_differentiable(model: PreTrainedModel, tokenizer: Any, name: str, argument: str) -> None:
    """Refuse a model that has no gradients in float32, or whose tokens have no positions.

    Raises:
        ValueError: it is one of these.
    """
    if not all(weights.dtype == torch.float32 for weights in model.parameters()):
        raise ValueError(
            f"{argument}: {name!r} is quantised or of lower precision: it has no gradients in "
            "float32; load it without dtype= and quantize="
        )
    if model.training:
        raise ValueError(f"{argument}: {name!r} is in training mode; call eval() on it first")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{argument}: the tokenizer of {name!r} is a slow one, which does not give the "
            "positions of tokens; give a model with a fast tokenizer"
        )


# ---------------------------------------------------------------------------------------------
# Running


@panics_are_errors()
def encode_rows(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> Any:
    """Encode texts, each cut to what the model reads; see `encode_cut`."""
    return encode_cut(tokenizer, texts, token_limit(model, tokenizer))


def collate(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return tokens as a batch of inputs, (rows, longest) each."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    padding = model.config.pad_token_id or 0
    batch = {
        "input_ids": pad_sequence(ids, True, padding),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
    }
    return {name: values.to(model.device) for name, values in batch.items()}


def similar_lengths(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield groups of rows of similar length, the longest first.

    A decoder without a token for padding reads one row at a time.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        most = BATCH[machine.kind(model.device)] // max(len(rows[order[0]]), 1)
        size = 1 if model.config.pad_token_id is None else max(most, 1)
        yield order[:size]
        order = order[size:]


# ---------------------------------------------------------------------------------------------
# Gradients


@dataclass(frozen=True)
class TokenGradients:
    """Derivatives of a score with respect to the embeddings of the tokens of a text."""

    starts: torch.Tensor  # characters of the text that each token has, (tokens,)
    ends: torch.Tensor
    embeddings: torch.Tensor  # (tokens, d)
    gradients: torch.Tensor  # (tokens, d)

    def of_word(self, start: int, end: int) -> tuple[torch.Tensor, float]:
        """Add up the tokens of a word.

        Returns:
            The sum of their gradients, (d,), and that of their products with the embeddings: to
            first order, what the word adds to the score.
        """
        inside = (self.starts < end) & (self.ends > start)
        products = (self.embeddings[inside] * self.gradients[inside]).sum()
        return self.gradients[inside].sum(0), float(products)


@torch.enable_grad()
def embedding_gradients(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    score: Callable[[Any], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate a score of a model's output with respect to its input embeddings.

    The embeddings are caught where the network makes them, so that any architecture will do.

    Args:
        inputs: of one text, (1, tokens) each.
        score: takes the model's output, returns one number.

    Returns:
        Embeddings and gradients on the CPU, (tokens, d) each.
    """
    caught: list[torch.Tensor] = []

    def catch(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    hook = model.get_input_embeddings().register_forward_hook(catch)
    try:
        found = score(model(**inputs))
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(found, caught[:1])
    return caught[0].detach()[0].float().cpu(), gradient[0].float().cpu()
