"""Language models built without numbers in their weights, which are read straight from a file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)

PLAIN = ("llama", "gpt2")  # whose tensors transformers takes as they are
FILES = ("model.safetensors", "generation_config.json")


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM | AutoModelForSeq2SeqLM]:
    """Return the class of transformers that loads a language model of these settings."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_empty(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a language model, its parameters not initialised, its buffers ready."""
    with initialization.no_init_weights():
        model = auto_class(config).from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def each_once(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by name, those that have several under the first one."""
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: state[name].detach() for name in sorted(first.values())}


def read_plain(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel | None:
    """Read a model whose file has the very tensors of its class; return None for any other.

    `from_pretrained` reads the same, but first prepares how names of all architectures change,
    which takes longer than all the rest.
    """
    if config.model_type not in PLAIN or not all((folder / name).exists() for name in FILES):
        return None
    model = build_empty(config, dtype)
    expected = each_once(model.state_dict(keep_vars=True))
    found = load_file(folder / FILES[0])
    shapes = ({name: own.shape for name, own in state.items()} for state in (expected, found))
    if next(shapes) != next(shapes):
        return None
    state = {name: tensor.to(dtype) for name, tensor in found.items()}
    model.load_state_dict(state, strict=False, assign=True)  # others share these
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
