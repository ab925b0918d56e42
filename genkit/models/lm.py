"""Language models of any tokens: shape, stock networks, loss, loading, saved tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from genkit.engine.weights_files import auto_class
from genkit.hub import download, kinds, safe_weights, safety

HINT = "Give the folder or the Hub id of a language model in safetensors"
LOGITS = 1 << 26  # computed at once in an evaluation: a quarter of a gigabyte


def choose_shape(
    depth: int, width: int | None, heads: int | None, width_per_layer: int
) -> dict[str, int]:
    """Return depth, width and heads of a model: those that are given, and others that fit them.

    Args:
        depth: layers.
        width: size of a layer's vectors; default: it grows with the depth, and fits the heads.
        heads: attention heads; default: as many as fit the width, see `count_heads`.
        width_per_layer: width for each layer of the depth.

    Raises:
        ValueError: the width that is given does not divide into heads of an even size.
    """
    multiple = 2 * (heads or 1)
    width = width or -(-depth * width_per_layer // multiple) * multiple
    heads = heads or count_heads(width)
    _check_heads(width, heads)
    return {"depth": depth, "width": width, "heads": heads}


def count_heads(width: int) -> int:
    """Return the number of attention heads, of an even size of 64 or more; 1 if none divides.

    Args:
        width: size of a layer's vectors.
    """
    fitting = (heads for heads in range(width // 64, 1, -1) if width % (2 * heads) == 0)
    return next(fitting, 1)


def _check_heads(width: int, heads: int) -> None:
    if width % heads or width // heads % 2:
        raise ValueError(
            f"width must be a multiple of {2 * heads} for {heads} heads of even size, got {width}"
        )


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
        vocab_size: number of tokens.
        context: longest sequence of tokens in training.
        depth: layers.
        width: size of a layer's vectors.
        heads: attention heads.
        dropout: of attention weights; for gpt2 also of embeddings and residual branches.

    Raises:
        ValueError: the width does not divide among the heads.
    """
    _check_heads(width, heads)
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
            # longer waves tell no two places of a short context apart
            rope_parameters={"rope_type": "default", "rope_theta": 4.0 * context},
            **common,
        )
    )


def loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the next token's mean cross-entropy, in nats; inputs and targets: (batch, context)."""
    logits = model(input_ids=inputs, use_cache=False).logits  # (batch, context, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.inference_mode()
def total_loss(
    model: PreTrainedModel, ids: np.ndarray, context: int, windows: range
) -> torch.Tensor:
    """Sum the loss over consecutive windows of a text, without overlap.

    Args:
        ids: the text, (length,).
        context: tokens of a window.
        windows: which of the ceil((length - 1) / context) windows; the last may be short.

    Returns:
        Nats and number of tokens, (2,) float64, so that processes can add theirs up.
    """
    total = torch.zeros(2, dtype=torch.float64)
    batch = max(1, min(64, LOGITS // (context * model.config.vocab_size)))
    for inputs, targets in _window_batches(ids, context, windows, batch):
        nats = loss(model, inputs.to(model.device), targets.to(model.device)).cpu().double()
        total += torch.tensor([nats * targets.numel(), targets.numel()])
    return total


def _window_batches(
    ids: np.ndarray, context: int, windows: range, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets, (≤ batch, context) each; a short last window is its own batch."""
    whole = min(windows.stop, (len(ids) - 1) // context)
    for first in range(windows.start, whole, batch):
        last = min(first + batch, whole)
        part = torch.from_numpy(ids[first * context : last * context + 1].astype(np.int64))
        yield part[:-1].view(-1, context), part[1:].view(-1, context)
    if whole < windows.stop:
        part = torch.from_numpy(ids[whole * context :].astype(np.int64))
        yield part[None, :-1], part[None, 1:]


def load_lm(
    name: str, revision: str | None = None, encoder_decoder: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a language model to train, its weights in float32, and its tokenizer.

    Args:
        name: folder or Hub id.
        revision: a branch, tag or commit on the Hub.
        encoder_decoder: it is to be a sequence-to-sequence model; default: a causal one.

    Raises:
        ValueError: there is no such model, it is of the other kind, or its tokenizer cannot be used
            for training.
    """
    folder = download.fetch(name, revision, argument="init_from", hint=HINT)
    kinds.check_kind(folder, name, kinds.TEXT, "init_from")
    with safety.opened(folder, argument="init_from") as private:
        config = AutoConfig.from_pretrained(private, trust_remote_code=False)
        if config.is_encoder_decoder != encoder_decoder:
            other = ("an encoder-decoder", "a causal model")
            found, wanted = other[::-1] if encoder_decoder else other
            raise ValueError(f"init_from: {name!r} is {found}; give {wanted}")
        tokenizer = AutoTokenizer.from_pretrained(private, trust_remote_code=False)
        model, report = auto_class(config).from_pretrained(
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
            f"init_from: the tokenizer of {name!r} is a slow one, or has no end-of-text token; "
            "choose another model"
        )
    return model, tokenizer


def make_critic(model: PreTrainedModel) -> PreTrainedModel:
    """Build the stock network of values of a causal model: its layers, and a head that is 0.

    Raises:
        ValueError: transformers has no token classifier of this architecture.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        critic = AutoModelForTokenClassification.from_config(config)
    except ValueError:
        raise ValueError(
            f"method: ppo needs a network of values, and transformers has no token classifier of "
            f"{type(config).__name__}; give --method grpo, rloo or dpo"
        ) from None
    critic.base_model.load_state_dict(model.base_model.state_dict())
    head = critic.score if hasattr(critic, "score") else critic.classifier
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return critic


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer under the class name that transformers 4 and other tools also know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"model_input_names": tokenizer.model_input_names}  # else these depend on the class
    path.write_text(json.dumps(config, indent=2))


def resize_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """Add embeddings for the tokens that were added to the tokenizer."""
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return model
