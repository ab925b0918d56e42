"""Quantised models on disk: their blocks as they are in memory, everything else in float32.

The blocks do not depend on the CPU that wrote them: see native/shapes.h.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from genkit.engine.kernels import Matrix, scales_of_blocks, shape_of_blocks
from genkit.engine.quantized import list_matrices, precision_of, replace_matrices
from genkit.engine.weights_files import build_empty, each_once
from genkit.files import make_empty
from genkit.hub.model_files import PACKED, PACKED_WEIGHTS
from genkit.hub.safe_weights import count_finite

KINDS = ("int8", "int4")


def saved_kind(config: PreTrainedConfig) -> str | None:
    """Return the kind that the settings of a saved model name; None if it is not quantised.

    Raises:
        ValueError: they name another one.
    """
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != PACKED:
        return None
    kind = settings.get("weights")
    if kind not in KINDS:
        raise ValueError(f"config.json names weights {kind!r}; {' and '.join(KINDS)} are read")
    return str(kind)


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return all tensors of a quantised model by the names that they have in its file, each once.

    Blocks have the names of the weights that they stand for.
    """
    found: dict[str, torch.Tensor] = {}
    for name, matrix in list_matrices(model).items():
        found[f"{name}.weight"] = matrix.weights
        if matrix.bias is not None:
            found[f"{name}.bias"] = matrix.bias
    return each_once(found | model.state_dict(keep_vars=True))


def write_quantized(model: PreTrainedModel, folder: Path) -> None:
    """Write a quantised model, but for its tokenizer, into an empty folder.

    Raises:
        ValueError: the model cannot be built from its settings.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = {"quant_method": PACKED, "weights": precision_of(model)}
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    file = folder / PACKED_WEIGHTS
    mode = make_empty(file)
    save_file({name: own.contiguous() for name, own in stored_tensors(model).items()}, file)
    file.chmod(mode)
    _check_written(model, folder)


def _check_written(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model that is another one when it is read."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    read = read_quantized(folder, config)
    ours, theirs = (dict(m.named_buffers()) | stored_tensors(m) for m in (model, read))
    for name, tensor in ours.items():
        if name not in theirs or not torch.equal(tensor, theirs[name]):
            raise ValueError(f"a {type(model).__name__} cannot be saved quantised: {name} differs")


def read_quantized(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Read what `write_quantized` wrote; blocks are mapped into memory, not copied.

    Args:
        config: of the folder; `saved_kind` of it is not None.

    Raises:
        ValueError: the file does not have the tensors that the settings ask for.
    """
    kind, config = saved_kind(config), copy.deepcopy(config)
    assert kind is not None
    del config.quantization_config
    file = folder / PACKED_WEIGHTS
    tensors = _Tensors(file)
    model = build_empty(config)
    replace_matrices(model, kind, tensors.matrix)
    expected = stored_tensors(model)
    tensors.check_names(expected)
    for name, tensor in expected.items():
        if tensor.dtype != torch.uint8:
            tensor.copy_(tensors.numbers(name, tensor))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


class _Tensors:
    """The tensors in a file of a quantised model, each checked before it is used."""

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.exists():
            raise ValueError(f"{file} is missing")
        with safe_open(file, "pt") as opened:
            self.found: dict[str, Any] = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118

    def matrix(self, name: str, layer: nn.Module, kind: str) -> Matrix:
        """Return the packed weights of a layer."""
        weight = layer.get_parameter("weight")
        first, second = (weight.t() if isinstance(layer, Conv1D) else weight).shape
        shape = first, second
        blocks = self._tensor(f"{name}.weight", shape_of_blocks(shape, kind), torch.uint8)
        if not scales_of_blocks(blocks, kind).isfinite().all():
            raise ValueError(f"{self.file}: scales of {name}.weight are not finite")
        return Matrix(kind, shape, blocks)

    def numbers(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape and type of another one."""
        tensor = self._tensor(name, tuple(like.shape), like.dtype)
        if count_finite(tensor) < tensor.numel():
            raise ValueError(f"{self.file}: numbers of {name} are not finite")
        return tensor

    def check_names(self, expected: dict[str, torch.Tensor]) -> None:
        """Refuse a file with other tensors than those expected."""
        for name in sorted(expected.keys() ^ self.found.keys()):
            what = "lacks" if name in expected else "has, and its settings do not ask for,"
            raise ValueError(f"{self.file} {what} {name}")

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if name not in self.found:
            raise ValueError(f"{self.file} lacks {name}")
        tensor: torch.Tensor = self.found[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{self.file}: {name} is {tensor.dtype}, {list(tensor.shape)}; its settings ask "
                f"for {dtype}, {list(shape)}"
            )
        return tensor
