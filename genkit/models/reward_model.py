"""Reward models: stock causal networks with one number at the last token of a text."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PADDING = "<pad>"


def make_reward_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """Build the stock reward model of a causal model: its layers, and a head that is 0.

    The tokenizer gets a token for padding, unless it has one that is not its end token: the reward
    is read at the last token that is no padding, which may be the end token.

    Raises:
        ValueError: transformers has no sequence classifier of this architecture.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PADDING})
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, None  # its embedding may not be there yet
    config.problem_type = "regression"
    try:
        network = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise ValueError(
            f"init_from: transformers has no sequence classifier of {type(config).__name__}"
        ) from None
    network.base_model.load_state_dict(model.base_model.state_dict())
    if network.get_input_embeddings().num_embeddings < len(tokenizer):
        network.resize_token_embeddings(len(tokenizer))
    network.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.zeros_(network.score.weight)
    return network


def rewards(
    model: torch.nn.Module,
    padding: int,
    rows: Sequence[Sequence[int]],
    device: torch.device,
) -> torch.Tensor:
    """Return the rewards of texts, (n,).

    Args:
        model: a sequence classifier with one label.
        padding: its token for padding.
        rows: the tokens of each text.
    """
    ids = pad_sequence([torch.tensor(row) for row in rows], True, padding).to(device)
    rewards: torch.Tensor = model(input_ids=ids, use_cache=False).logits[:, 0]
    return rewards.float()
