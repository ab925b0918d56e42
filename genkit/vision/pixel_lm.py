"""Autoregressive pixels: an image is a line of tokens, and a language model writes it.

A token is the level of one channel of one pixel. The line begins with a token that stands for the
class, then goes from left to right and from top to bottom, the channels of a pixel one after the
other (van den Oord et al. 2016, https://arxiv.org/abs/1601.06759). What a stock language model
gives such a line is its exact likelihood.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.pil_utils import numpy_to_pil
from transformers import Cache, DynamicLayer, LlamaForCausalLM, PreTrainedModel

from genkit.hub import safe_weights, safety
from genkit.models import lm
from genkit.models.lm import loss as loss
from genkit.text.logits import Filters, choose

MOST_LEVELS = 256
BATCH = 64  # images drawn at once
Labels = Sequence[int] | torch.Tensor
Generators = torch.Generator | list[torch.Generator]

# ---------------------------------------------------------------------------------------------
# Images as lines of tokens


@dataclass(frozen=True)
class PixelFormat:
    """What the images of a model are; kept in its config.json.

    Raises:
        ValueError: a number is out of range.
    """

    image_size: Sequence[int]  # channels, height and width
    levels: int  # of a channel of a pixel, the tokens 0 and up; those behind begin a line
    labels: int = 0  # classes; 0 for a model that is told none
    names: Sequence[str] = ()  # of the classes

    def __post_init__(self) -> None:
        if len(self.image_size) != 3 or not all(_whole(side) > 0 for side in self.image_size):
            raise ValueError(f"image_size must be 3 numbers above 0, got {self.image_size!r}")
        if not 2 <= _whole(self.levels) <= MOST_LEVELS:
            raise ValueError(f"levels must be 2 to {MOST_LEVELS}, got {self.levels!r}")
        if _whole(self.labels) < 0 or len(self.names) != self.labels:
            raise ValueError(f"labels: {self.labels!r} classes do not have {len(self.names)} names")

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return math.prod(self.image_size)

    @property
    def vocab_size(self) -> int:
        """Levels and beginnings."""
        return self.levels + max(1, self.labels)

    def starts(self, count: int, labels: Labels | None) -> torch.Tensor:
        """Return the tokens that begin the lines of these classes, (count,).

        Raises:
            ValueError: the labels are not what such a model is told.
        """
        if not self.labels:
            if labels is not None:
                raise ValueError("labels: this model is not told classes; leave them out")
            return torch.full((count,), self.levels)
        if labels is None:
            raise ValueError(f"labels: this model is told one of {self.labels} classes an image")
        known = torch.as_tensor(labels)
        right = known.dtype in (torch.int64, torch.int32) and known.shape == (count,)
        if not right or not ((known >= 0) & (known < self.labels)).all():
            raise ValueError(f"labels must be {count} of 0 to {self.labels - 1}, got {labels}")
        return self.levels + known.long()

    def encode(self, images: torch.Tensor, labels: Labels | None = None) -> torch.Tensor:
        """Turn images into lines, each channel rounded to the nearest level.

        Args:
            images: in [-1, 1], (n, channels, height, width).
            labels: the class of each, (n,), for a model that is told.

        Returns:
            A beginning and levels, (n, 1 + length), int64.

        Raises:
            ValueError: the images are of another size or range, or the labels are wrong.
        """
        if tuple(images.shape[1:]) != tuple(self.image_size):
            raise ValueError(
                f"images must be (n, {', '.join(map(str, self.image_size))}), "
                f"got {tuple(images.shape)}"
            )
        if not len(images):
            raise ValueError("images: there are none")
        if not images.is_floating_point() or not (images.abs() <= 1).all():
            raise ValueError(
                f"images must be floats in [-1, 1], got {images.dtype} from {images.min():g} to "
                f"{images.max():g}"
            )
        starts = self.starts(len(images), labels).to(images.device)
        levels = ((images.float() + 1) / 2 * (self.levels - 1)).round().long()
        return torch.cat([starts[:, None], levels.permute(0, 2, 3, 1).flatten(1)], 1)

    def decode(self, lines: torch.Tensor) -> torch.Tensor:
        """Turn lines, (n, 1 + length), into images in [-1, 1], (n, channels, height, width)."""
        channels, height, width = self.image_size
        levels = lines[:, 1:].view(-1, height, width, channels).permute(0, 3, 1, 2)
        return (levels / (self.levels - 1) * 2 - 1).contiguous()


def _whole(value: Any) -> int:
    """Return a whole number; -1 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


# ---------------------------------------------------------------------------------------------
# Model


def make_model(
    pixels: PixelFormat, depth: int, width: int, heads: int, dropout: float = 0.0
) -> PreTrainedModel:
    """Build a stock Llama with random weights, for lines of such images.

    Args:
        depth, width, heads, dropout: see `lm.make_model`.

    Raises:
        ValueError: the width does not divide among the heads.
    """
    model = lm.make_model("llama", pixels.vocab_size, pixels.length, depth, width, heads, dropout)
    model.config.pixels = dataclasses.asdict(pixels)
    model.config.eos_token_id = None  # nothing ends a line but its length
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": pixels.length}
    beginnings = list(range(pixels.levels, pixels.vocab_size))
    model.generation_config.update(**settings, eos_token_id=None, suppress_tokens=beginnings)
    return model


@torch.inference_mode()
def bits_per_dimension(model: PreTrainedModel, lines: torch.Tensor) -> torch.Tensor:
    """Measure how unexpected images are: -log2 of their probability, over the count of levels.

    The probability is exact, and that of the rounded image: with 256 levels that of the image.

    Args:
        lines: see `Pixels.encode`, (n, 1 + length).

    Returns:
        (n,), float64.
    """
    pixels = PixelFormat(**model.config.pixels)
    batch = max(1, lm.LOGITS // (8 * pixels.length * pixels.vocab_size))
    bits = []
    for some in lines.to(model.device).split(batch):
        logits = model(input_ids=some[:, :-1], use_cache=False).logits[..., : pixels.levels]
        nats = F.cross_entropy(logits.double().mT, some[:, 1:], reduction="none")  # (n, length)
        bits.append(nats.mean(1) / math.log(2))
    return torch.cat(bits)


# ---------------------------------------------------------------------------------------------
# Drawing


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer, (n, heads, length, size), in room that is made once."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.used = length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what comes, (n, heads, new, size), and return all that is there."""
        if not self.used:
            room = (*key_states.shape[:2], self.length, key_states.shape[3])
            self.keys, self.values = key_states.new_empty(room), key_states.new_empty(room)
        new = slice(self.used, self.used + key_states.shape[2])
        self.keys[:, :, new], self.values[:, :, new], self.used = key_states, value_states, new.stop
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        """Return how many there are."""
        return self.used


@torch.inference_mode()
def draw_levels(
    model: PreTrainedModel, lines: torch.Tensor, known: int, noise: Iterator[torch.Tensor]
) -> None:
    """Draw what lines lack, in place; a level depends on its line and its noise, not on the batch.

    Args:
        lines: (n, 1 + length); a beginning and `known` levels are read.
        noise: Gumbel's for each place in turn, those that are known included, (n, levels) each.
    """
    levels, length = model.config.pixels["levels"], lines.shape[1] - 1
    cache, unread = Cache(layers=[PreallocatedLayer(length) for _ in model.model.layers]), 0
    for place, gumbel in enumerate(noise):
        if place < known:
            continue
        new, unread = lines[:, unread : place + 1], place + 1
        output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        drawn, sure = choose(output.logits[:, 0, :levels], Filters(), gumbel)
        for row in (~sure).nonzero().flatten().tolist():  # rounding could decide: read it alone
            own = model(input_ids=lines[row, None, : place + 1], use_cache=False, logits_to_keep=1)
            drawn[row] = choose(own.logits[:, 0, :levels], Filters(), gumbel[row, None])[0]
        lines[:, place + 1] = drawn


def gumbel_noise(
    generator: Generators | None, shape: tuple[int, int], count: int
) -> Iterator[torch.Tensor]:
    """Yield Gumbel noise `count` times, float32 of this shape, a row from each generator."""
    for _ in range(count):
        if isinstance(generator, list):
            drawn = torch.stack([draw_uniform(shape[1:], own).cpu() for own in generator])
        else:
            drawn = draw_uniform(shape, generator)
        yield -(-drawn.log()).log().float()


def draw_uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    """Draw numbers in [0, 1), float64."""
    device = generator.device if generator else None
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# Pipeline


class PixelPipeline:
    """Draws images, and the rest of images.

    Args:
        model: from `make_model`, or loaded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.pixels = model, PixelFormat(**model.config.pixels)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def labels(self) -> int:
        """How many classes the model is told; 0 for none."""
        return self.pixels.labels

    def to(self, device: torch.device | str) -> PixelPipeline:
        """Move the model."""
        self.model.to(device)
        return self

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators | None = None,
        labels: Labels | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            batch_size: how many.
            generator: one, or one an image, so that an image depends on its own alone.
            labels: the class of each image, for a model that is told.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].

        Raises:
            ValueError: an argument cannot work; it is named, with what it got.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        lines = torch.zeros(batch_size, 1 + self.pixels.length, dtype=torch.int64)
        lines[:, 0] = self.pixels.starts(batch_size, labels)
        images: Any = (self._written(lines, 0, generator) + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = numpy_to_pil(images)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def complete(
        self,
        images: torch.Tensor,
        labels: Labels | None,
        kept_rows: int,
        generator: Generators | None = None,
    ) -> torch.Tensor:
        """Keep the first rows of pixels of images, and draw the others.

        Args:
            images: in [-1, 1], (n, channels, height, width).
            labels: the class of each image, for a model that is told; None for one that is not.
            kept_rows: rows of pixels, from the top; 0 for none, as a call draws them.
            generator: one, or one an image, so that an image depends on its own alone.

        Returns:
            The rows that are kept, rounded to the model's levels, and those that are drawn; in
            [-1, 1], (n, channels, height, width).

        Raises:
            ValueError: an argument cannot work; it is named, with what it got.
        """
        lines = self.pixels.encode(images, labels)
        channels, height, width = self.pixels.image_size
        if not 0 <= kept_rows < height:
            raise ValueError(f"kept_rows must be 0 to {height - 1}, got {kept_rows}")
        return self._written(lines, kept_rows * width * channels, generator)

    def _written(
        self, lines: torch.Tensor, known: int, generator: Generators | None
    ) -> torch.Tensor:
        """Write the rest of lines, some at a time, and return the images."""
        if isinstance(generator, list) and len(generator) != len(lines):
            raise ValueError(
                f"generator must be one, or a list of {len(lines)} for as many images, got "
                f"{len(generator)}"
            )
        lines = lines.to(self.device)
        for first in range(0, len(lines), BATCH):
            some = lines[first : first + BATCH]
            own = generator[first : first + BATCH] if isinstance(generator, list) else generator
            noise = gumbel_noise(own, (len(some), self.pixels.levels), self.pixels.length)
            draw_levels(self.model, some, known, (each.to(self.device) for each in noise))
        return self.pixels.decode(lines)


def load_pixel_lm(folder: str | Path) -> PixelPipeline:
    """Load a model of pixels that was saved, running none of the code beside it.

    Raises:
        ValueError: there is none.
    """
    try:
        with safety.opened(folder) as private:
            _check_config(private / "config.json")
            model, report = LlamaForCausalLM.from_pretrained(
                private,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
            safe_weights.check_loaded(model, report)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no language model of pixels ({error}); give the folder "
            "of one that recipes/train_pixels.py trained"
        ) from error
    return PixelPipeline(model.eval())


def _check_config(path: Path) -> None:
    """Refuse a saved model that is none of pixels, or of others than it says."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path.name} holds no settings of a model")
    kind = config["model_type"]
    if kind != "llama" or "pixels" not in config:
        raise ValueError(f"it is a language model ({kind}) of something else than pixels")
    pixels = PixelFormat(**config["pixels"])
    tokens, context = config["vocab_size"], config["max_position_embeddings"]
    if tokens != pixels.vocab_size:
        raise ValueError(f"{pixels} has {pixels.vocab_size} tokens, but {tokens} in its weights")
    if context < pixels.length:
        raise ValueError(f"it has {pixels.length} levels an image, but reads {context}")
