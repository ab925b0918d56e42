"""What language models share, whatever their tokens: stock networks, loss, saved tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from genkit.hub import download, safe_weights, safety

HINT = "Give the folder or the Hub id of a causal language model in safetensors"
LOGITS = 1 << 26  # at once in an evaluation: a quarter of a gigabyte


def count_heads(width: int) -> int:
    """Return how many heads, of 64 or more and of an even size, divide a layer's width; 1 if none.

    Args:
        width: size of a layer's vectors.
    """
    fitting = (heads for heads in range(width // 64, 1, -1) if width % (2 * heads) == 0)
    return next(fitting, 1)


def make_model(
    architecture: str,
    vocab_size: int,
    context: int,
    depth: int,
    width: int,
    heads: int,
    dropout: float,
) -> PreTrainedModel:
    """Build a stock model with random weights and tied embeddings.

    Args:
        architecture: "llama" or "gpt2".
        context: tokens it is trained to see at once.
        depth: layers.
        width: size of a layer's vectors.
        heads: attention heads.
        dropout: of attention weights; for gpt2 of embeddings and residual branches, too.

    Raises:
        ValueError: the width does not divide among the heads.
    """
    if width % heads or width // heads % 2:
        raise ValueError(f"width: {width} does not divide into {heads} heads of even size")
    common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 0}
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_positions=context,
                n_embd=width,
                n_layer=depth,
                n_head=heads,
                attn_pdrop=dropout,
                embd_pdrop=dropout,
                resid_pdrop=dropout,
                **common,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            max_position_embeddings=context,
            hidden_size=width,
            intermediate_size=-(-8 * width // 3 // 32) * 32,  # as many weights as 4 x GELU
            num_hidden_layers=depth,
            num_attention_heads=heads,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            **common,
        )
    )


def loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of the next token; inputs and targets are (batch, context)."""
    logits = model(input_ids=inputs, use_cache=False).logits  # (batch, context, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.inference_mode()
def total_loss(
    model: PreTrainedModel, ids: np.ndarray, context: int, windows: range
) -> torch.Tensor:
    """Sum the loss over windows of a text that follow each other without overlap.

    Args:
        ids: the text, (length,).
        windows: which of the ceil((length - 1) / context) windows; the last may be short.

    Returns:
        Nats and tokens, (2,) float64, so that several processes can add theirs up.
    """
    total = torch.zeros(2, dtype=torch.float64)
    batch = max(1, min(64, LOGITS // (context * model.config.vocab_size)))
    for inputs, targets in _window_batches(ids, context, windows, batch):
        nats = loss(model, inputs.to(model.device), targets.to(model.device)).double().cpu()
        total += torch.tensor([nats * targets.numel(), targets.numel()])
    return total


def _window_batches(
    ids: np.ndarray, context: int, windows: range, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets, (≤ batch, context) each; a short last window comes by itself."""
    whole = min(windows.stop, (len(ids) - 1) // context)
    for first in range(windows.start, whole, batch):
        last = min(first + batch, whole)
        part = torch.from_numpy(ids[first * context : last * context + 1].astype(np.int64))
        yield part[:-1].view(-1, context), part[1:].view(-1, context)
    if whole < windows.stop:
        part = torch.from_numpy(ids[whole * context :].astype(np.int64))
        yield part[None, :-1], part[None, 1:]


def load_lm(
    name: str, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a causal language model to train: its weights in float32, and its tokenizer.

    Args:
        name: folder or Hub id.
        revision: a branch, tag or commit on the Hub.

    Raises:
        ValueError: there is no such model, or it lacks what training needs.
    """
    folder = download.fetch(name, revision, argument="init_from", hint=HINT)
    with safety.opened(folder, argument="init_from") as private:
        tokenizer = AutoTokenizer.from_pretrained(private, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            private,
            use_safetensors=True,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
        safe_weights.check_loaded(model, report)
        safe_weights.check_tokens(model, tokenizer)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(
            f"init_from: the tokenizer in {name!r} is a slow one, or has no token for the end "
            "of a text; choose another model"
        )
    return model, tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that transformers 4 and other tools know, too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"model_input_names": tokenizer.model_input_names}  # which go by class elsewhere
    path.write_text(json.dumps(config, indent=2))


def resize_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """Give a model embeddings for the tokens that its tokenizer was extended by."""
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return model
