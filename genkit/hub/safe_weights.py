"""Weights checked: in safetensors, whole, finite, and as many as the settings beside them say."""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules import module as hooks
from transformers import PreTrainedModel

HEADER = 16 << 20  # bytes that the list of a file's tensors may have
TENSORS = 100_000  # that a file may hold
LEAST = 1 << 26  # numbers that a network may have, however small its weights
SHARD = re.compile(r"\w[\w.-]*\.safetensors")  # a file's name: no path, no pickle


@dataclass
class Contents:
    """What the weights in a folder hold, by the headers of their files."""

    tensors: int = 0
    numbers: int = 0  # of all tensors
    widest: int = 0  # the longest side of a tensor

    def add(self, shape: list[int]) -> None:
        """Count a tensor."""
        self.tensors += 1
        self.numbers += math.prod(shape)
        self.widest = max(self.widest, *shape, 0)


def check(folder: Path) -> Contents:
    """Refuse weights in a folder that are not in safetensors, or not whole.

    Raises:
        ValueError: a file is damaged, of another format, or missing; it is named.
    """
    contents = Contents()
    for file in sorted(folder.glob("*.safetensors")):
        _check_header(file)
        try:
            with safe_open(file, "np") as opened:  # compares the header with the file's size
                for name in opened.keys():  # noqa: SIM118  it is no dictionary
                    contents.add(opened.get_slice(name).get_shape())
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{file} is not in the safetensors format ({error})") from error
    for index in sorted(folder.glob("*.index*.json")):
        _check_index(index)
    return contents


def _check_header(file: Path) -> None:
    """Refuse a header that takes minutes to read."""
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= HEADER:
            raise ValueError(
                f"{file} is not in the safetensors format (a header of {length:,} bytes; at most "
                f"{HEADER:,} are read)"
            )
        tensors = opened.read(length).count(b'"data_offsets"')
    if tensors > TENSORS:
        raise ValueError(f"{file} lists {tensors:,} tensors; at most {TENSORS:,} are read")


def _check_index(index: Path) -> None:
    """Refuse a list of shards that leads out of its folder: libraries join its names unchecked."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no list of shards ({error!r:.200})") from error
    for shard in sorted(shards, key=str):
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise ValueError(f"{index} names a shard outside its folder: {shard!r:.200}")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index} names a shard that is missing: {shard!r:.200}")


def check_loaded(network: torch.nn.Module, report: Mapping[str, Any] | None = None) -> None:
    """Refuse a network with weights that its files lack, or that are not finite.

    Args:
        report: what transformers and diffusers return for `output_loading_info=True`.

    Raises:
        ValueError: the files lack some, which are random numbers now, or some are not finite.
    """
    missing = sorted(report["missing_keys"]) if report else []
    if missing:
        raise ValueError(f"its weights lack {len(missing):,} tensors, such as {missing[0]}")
    for name, tensor in network.state_dict().items():
        finite = count_finite(tensor)
        if finite < tensor.numel():
            raise ValueError(
                f"{tensor.numel() - finite:,} of the {tensor.numel():,} numbers of its weights "
                f"{name} are not finite"
            )


def check_tokens(network: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives tokens for which the network has no embeddings.

    Raises:
        ValueError: it does so for a text of one letter.
    """
    most = max(tokenizer("a").input_ids, default=0)
    count = network.get_input_embeddings().num_embeddings
    if most >= count:
        raise ValueError(f"its tokenizer gives the token {most:,}; the network has {count:,}")


def count_finite(tensor: torch.Tensor) -> int:
    """Count the numbers of a tensor that are finite, in one pass where all are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.numel()
    if tensor.itemsize == 1:  # types of 8 bits cannot be added up
        tensor = tensor.float()
    if tensor.sum(dtype=torch.float32 if tensor.itemsize == 2 else None).isfinite():
        return tensor.numel()
    return int(tensor.isfinite().sum())  # a sum of large numbers may overflow


@contextlib.contextmanager
def limited(contents: Collection[Contents]) -> Iterator[None]:
    """Refuse networks that are built in this block and are much larger than their weights.

    Args:
        contents: the weights of each component.

    Raises:
        ValueError: the networks have many times as many tensors or numbers as the weights.
    """
    held = Contents(sum(each.tensors for each in contents), sum(each.numbers for each in contents))
    tensors, numbers = 4 * held.tensors + 1000, 16 * held.numbers + LEAST
    built, thread = Contents(), threading.get_ident()

    def count(network: Any, name: str, tensor: Any) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        built.add(list(tensor.shape))
        if built.tensors > tensors or built.numbers > numbers:
            raise ValueError(
                f"the settings ask for a network of more than {built.numbers:,} numbers in "
                f"{built.tensors:,} tensors; the weights have {held.numbers:,} in "
                f"{held.tensors:,}"
            )

    with contextlib.ExitStack() as stack:
        stack.callback(hooks.register_module_parameter_registration_hook(count).remove)
        stack.callback(hooks.register_module_buffer_registration_hook(count).remove)
        yield
