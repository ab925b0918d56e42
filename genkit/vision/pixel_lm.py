"""Autoregressive pixel models: a language model predicts an image as a sequence of tokens.

A token is the level of one channel of one pixel. The sequence begins with a token for the class,
and has the pixels in raster order, the channels of a pixel one after the other (van den Oord et al.
2016, https://arxiv.org/abs/1601.06759). A stock language model gives its exact likelihood.
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

from genkit import machine
from genkit.engine.decoder import cache_argument
from genkit.hub import safe_weights, safety
from genkit.models import lm
from genkit.text.logits import Filters, choose

MOST_LEVELS = 256
BATCH = 64  # images sampled at once
Labels = Sequence[int] | torch.Tensor
Generators = torch.Generator | list[torch.Generator]

# ---------------------------------------------------------------------------------------------
# Images as sequences of tokens


@dataclass(frozen=True)
class PixelFormat:
    """The images of a model: their size, levels and classes; saved in its config.json.

    Raises:
        ValueError: a number is out of range.
    """

    image_size: Sequence[int]  # channels, height and width
    levels: int  # of a channel; tokens 0 to levels - 1, those after them begin a sequence
    labels: int = 0  # number of classes; 0 for an unconditional model
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
        """Levels and start tokens."""
        return self.levels + max(1, self.labels)

    def starts(self, count: int, labels: Labels | None) -> torch.Tensor:
        """Return the start tokens of classes, (count,).

        Raises:
            ValueError: the labels do not fit the model.
        """
        if not self.labels:
            if labels is not None:
                raise ValueError("labels: this model is unconditional; leave them out")
            return torch.full((count,), self.levels)
        if labels is None:
            kind = f"class-conditional ({self.labels} classes)"
            raise ValueError(f"labels are required: this model is {kind}")
        classes = torch.as_tensor(labels)
        fits = classes.dtype in (torch.int64, torch.int32) and classes.shape == (count,)
        if not fits or not ((classes >= 0) & (classes < self.labels)).all():
            raise ValueError(f"labels must be {count} of 0 to {self.labels - 1}, got {labels}")
        return self.levels + classes.long()

    def encode(self, images: torch.Tensor, labels: Labels | None = None) -> torch.Tensor:
        """Turn images into sequences of tokens, each channel rounded to the nearest level.

        Args:
            images: in [-1, 1], (n, channels, height, width).
            labels: the class of each image, (n,), if the model is class-conditional.

        Returns:
            A start token and levels, (n, 1 + length), int64.

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

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Turn tokens, (n, 1 + length), into images in [-1, 1], (n, channels, height, width)."""
        channels, height, width = self.image_size
        levels = tokens[:, 1:].view(-1, height, width, channels).permute(0, 3, 1, 2)
        return (levels / (self.levels - 1) * 2 - 1).contiguous()


def _whole(value: Any) -> int:
    """Return a whole number; -1 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


# ---------------------------------------------------------------------------------------------
# Model


def make_model(
    pixels: PixelFormat, depth: int, width: int, heads: int, dropout: float = 0.0
) -> PreTrainedModel:
    """Build a stock Llama with random weights, for images of this format.

    Args:
        pixels: format of the images.
        depth, width, heads, dropout: see `lm.make_model`.

    Raises:
        ValueError: the width does not divide among the heads.
    """
    model = lm.make_model("llama", pixels.vocab_size, pixels.length, depth, width, heads, dropout)
    model.config.pixels = dataclasses.asdict(pixels)
    model.config.eos_token_id = None  # a sequence ends by its length alone
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": pixels.length}
    starts = list(range(pixels.levels, pixels.vocab_size))
    model.generation_config.update(**settings, eos_token_id=None, suppress_tokens=starts)
    return model


@torch.inference_mode()
def bits_per_dimension(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of images, in bits for each channel of a pixel.

    It is exact, for images rounded to the model's levels; 256 levels need no rounding.

    Args:
        model: by `make_model`, or loaded.
        tokens: see `PixelFormat.encode`, (n, 1 + length).

    Returns:
        (n,), float64.
    """
    pixels = PixelFormat(**model.config.pixels)
    batch = max(1, lm.LOGITS // (8 * pixels.length * pixels.vocab_size))
    bits = []
    for some in tokens.to(model.device).split(batch):
        logits = model(input_ids=some[:, :-1], use_cache=False).logits[..., : pixels.levels]
        logits = machine.to_float64(logits)
        targets = some[:, 1:].to(logits.device)
        nats = F.cross_entropy(logits.mT, targets, reduction="none")  # (n, length)
        bits.append(nats.mean(1) / math.log(2))
    return torch.cat(bits)


# ---------------------------------------------------------------------------------------------
# Sampling


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer, (n, heads, length, size), in memory that is allocated once."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.used = length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, (n, heads, new, size), and return all that are stored."""
        if not self.used:
            shape = (*key_states.shape[:2], self.length, key_states.shape[3])
            self.keys, self.values = key_states.new_empty(shape), key_states.new_empty(shape)
        new = slice(self.used, self.used + key_states.shape[2])
        self.keys[:, :, new], self.values[:, :, new], self.used = key_states, value_states, new.stop
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        """Return the number of tokens that are stored."""
        return self.used


@torch.inference_mode()
def draw_levels(
    model: PreTrainedModel, tokens: torch.Tensor, given: int, noise: Iterator[torch.Tensor]
) -> None:
    """Sample the missing levels, in place; a level depends on its own sequence and noise alone.

    Args:
        model: by `make_model`, or loaded.
        tokens: (n, 1 + length), of which a start token and `given` levels are input.
        given: number of levels that are not sampled.
        noise: Gumbel noise for each level in turn, the given ones included, (n, levels) each.
    """
    levels, length = model.config.pixels["levels"], tokens.shape[1] - 1
    argument = cache_argument(model)
    cache, cached = Cache(layers=[PreallocatedLayer(length) for _ in model.model.layers]), 0
    for i, gumbel in enumerate(noise):
        if i < given:
            continue
        new, cached = tokens[:, cached : i + 1], i + 1
        kept: dict[str, Any] = {argument: cache, "use_cache": True}
        output = model(input_ids=new, logits_to_keep=1, **kept)
        sample, sure = choose(output.logits[:, 0, :levels], Filters(), gumbel)
        for row in (~sure).nonzero().flatten().tolist():  # rounding could decide: compute it alone
            own = model(input_ids=tokens[row, None, : i + 1], use_cache=False, logits_to_keep=1)
            sample[row] = choose(own.logits[:, 0, :levels], Filters(), gumbel[row, None])[0]
        tokens[:, i + 1] = sample


def gumbel_noise(
    generator: Generators | None, shape: tuple[int, int], count: int
) -> Iterator[torch.Tensor]:
    """Yield Gumbel noise of this shape `count` times, float32; each generator draws a row."""
    for _ in range(count):
        if isinstance(generator, list):
            u = torch.stack([draw_uniform(shape[1:], own).cpu() for own in generator])
        else:
            u = draw_uniform(shape, generator)
        yield -(-u.log()).log().float()


def draw_uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    """Draw uniform random numbers in [0, 1), float64."""
    device = generator.device if generator else None
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# Pipeline


class PixelPipeline:
    """Samples images, and completes them.

    Args:
        model: by `make_model`, or loaded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.pixels = model, PixelFormat(**model.config.pixels)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def labels(self) -> int:
        """Number of classes; 0 for an unconditional model."""
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
        """Sample images.

        Args:
            batch_size: number of images.
            generator: one, or one for each image, which then depends on its own alone.
            labels: the class of each image, if the model is class-conditional.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].

        Raises:
            ValueError: an argument is invalid.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        tokens = torch.zeros(batch_size, 1 + self.pixels.length, dtype=torch.int64)
        tokens[:, 0] = self.pixels.starts(batch_size, labels)
        images: Any = (self._sample(tokens, 0, generator) + 1) / 2
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
        """Keep the first rows of pixels of images, and sample the others.

        Args:
            images: in [-1, 1], (n, channels, height, width).
            labels: the class of each image; None for an unconditional model.
            kept_rows: rows of pixels, from the top; 0 for none.
            generator: one, or one for each image, which then depends on its own alone.

        Returns:
            Images in [-1, 1], (n, channels, height, width); the kept rows are rounded to the
            model's levels.

        Raises:
            ValueError: an argument is invalid.
        """
        tokens = self.pixels.encode(images, labels)
        channels, height, width = self.pixels.image_size
        if not 0 <= kept_rows < height:
            raise ValueError(f"kept_rows must be 0 to {height - 1}, got {kept_rows}")
        return self._sample(tokens, kept_rows * width * channels, generator)

    def _sample(
        self, tokens: torch.Tensor, given: int, generator: Generators | None
    ) -> torch.Tensor:
        """Sample all but the given levels, in batches, and return the images."""
        count = len(tokens)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator must be one or a list of {count}, got {len(generator)}")
        tokens = tokens.to(self.device)
        for first in range(0, count, BATCH):
            some = tokens[first : first + BATCH]
            own = generator[first : first + BATCH] if isinstance(generator, list) else generator
            noise = gumbel_noise(own, (len(some), self.pixels.levels), self.pixels.length)
            draw_levels(self.model, some, given, (each.to(self.device) for each in noise))
        return self.pixels.decode(tokens)


def load_pixel_lm(folder: str | Path) -> PixelPipeline:
    """Load a saved pixel model without running the code in its folder.

    Raises:
        ValueError: the folder holds no pixel model.
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
            f"model: {str(folder)!r} holds no pixel model ({error}); give the output folder of "
            "train_pixels"
        ) from error
    return PixelPipeline(model.eval())


def _check_config(path: Path) -> None:
    """Refuse a saved model that is not a pixel model, or whose sizes contradict each other."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path.name} holds no settings of a model")
    kind = config["model_type"]
    if kind != "llama" or "pixels" not in config:
        raise ValueError(f"its model_type is {kind}, and it has no pixel format")
    pixels = PixelFormat(**config["pixels"])
    tokens, context = config["vocab_size"], config["max_position_embeddings"]
    if tokens != pixels.vocab_size:
        raise ValueError(f"vocab_size is {tokens}, but {pixels} needs {pixels.vocab_size}")
    if context < pixels.length:
        raise ValueError(f"max_position_embeddings is {context}, but images need {pixels.length}")
