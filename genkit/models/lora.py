"""Low-rank adapters: a few weights to train beside the frozen matrices of a network.

Hu et al. 2021: a matrix W becomes W + 2 B A, where A has few rows, B as few columns and B starts
at zero. peft puts them in; it is imported only here, and only when asked for.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def add_adapters(network: PreTrainedModel, rank: int) -> Any:
    """Freeze a network, and give every matrix but embeddings and output head an adapter.

    Args:
        rank: rows of A.

    Returns:
        The network wrapped by peft, which calls and trains like the network.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by a name of before
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(network, config)


def merge_adapters(network: Any) -> PreTrainedModel:
    """Copy what `add_adapters` returned as an ordinary network, W + 2 B A its matrices."""
    return copy.deepcopy(network).merge_and_unload()
