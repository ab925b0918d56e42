"""Low-rank adapters: a few weights to train beside the frozen matrices of a network.

A matrix W becomes W + 2 B A, where A has few rows, B as few columns, and B starts at zero (Hu et
al. 2021, https://arxiv.org/abs/2106.09685). peft adds them; only this module imports it, on use.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def add_adapters(network: PreTrainedModel, rank: int) -> Any:
    """Freeze a network, and add an adapter to every matrix but embeddings and output head.

    Args:
        network: a causal language model.
        rank: rows of A.

    Returns:
        The network wrapped by peft, with the call of the network.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft 0.21 uses a deprecated name of transformers 5.23
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(network, config)


def merge_adapters(network: Any) -> PreTrainedModel:
    """Return a copy of an adapted network as an ordinary one, with W + 2 B A as its matrices."""
    return copy.deepcopy(network).merge_and_unload()


def add_part_adapters(part: Any, rank: int, layers: Sequence[str]) -> None:
    """Freeze a network of a text-to-image pipeline, and add an adapter, W + B A, to some layers.

    There is no factor before B A: tools that know the weights alone read it as it was trained.

    Args:
        part: of diffusers or transformers; it is changed.
        rank: rows of A.
        layers: names of layers, or how names end.
    """
    from peft import LoraConfig

    part.requires_grad_(False)
    with warnings.catch_warnings():  # as above
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        part.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)))


def adapter_state(part: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the adapter that `add_part_adapters` has added, by name."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(part, save_embedding_layers=False)  # else it asks the Hub
    return {name: weight.detach().contiguous() for name, weight in state.items()}
