"""genkit.stylize: an image painted in the style of another."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image

from genkit import console
from genkit.arguments import explain_names
from genkit.metrics.features import Classifier
from genkit.models.stylizer import SMALLEST, StylizerPipeline
from genkit.notebook import DrawnRecord
from genkit.seeds import is_whole, row_seeds
from genkit.vision import image_grid, style_target, stylizers
from genkit.vision.differentiable import (
    DifferentiableClassifier,
    ImageLike,
    load_differentiable,
)
from genkit.vision.style_target import StyleTarget

Optimizer = Literal["lbfgs", "adam"]
SIZE = 512  # of the longer side, at most, by default
WEIGHT = 30.0  # of the style, by default
RATE = 0.02  # of Adam, in [0, 1] of a pixel
OUTSIDE = 10.0  # weight of the squares by which pixels leave [0, 1]
HISTORY = 20  # steps that L-BFGS remembers
FRAME, LAST = 100, 2000  # milliseconds of an animation's frames
NOISE = "noise"

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Stylized(DrawnRecord):
    """A stylized image, and how it came to be."""

    image: Image.Image = field(repr=False)
    losses: dict[str, list[float]] = field(repr=False)  # of each step; none of a single pass
    frames: list[Image.Image] = field(repr=False)  # iterates, if they were asked for
    settings: dict[str, Any]
    seconds: float
    model: str

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        last = ", ".join(f"{name} {values[-1]:.4f}" for name, values in self.losses.items())
        size = f"{self.image.width} x {self.image.height}"
        return "; ".join(filter(None, [size, shown, last, f"{self.seconds:.1f} s"]))

    def save(self, path: str | Path) -> None:
        """Write the picture, completely or not at all.

        Raises:
            ValueError: the suffix is not that of a supported format.
        """
        image_grid.save_as(self.image, path)

    def save_animation(self, path: str | Path) -> None:
        """Write a GIF of the iterates, from the first to the last.

        Raises:
            ValueError: none were kept, or the suffix is not .gif.
        """
        if not self.frames:
            raise ValueError("animation: no iterates were kept; give frames=")
        if Path(path).suffix.lower() != ".gif":
            raise ValueError(f"animation: {str(path)!r} must end in .gif")
        first, *rest = self.frames
        times = [FRAME] * len(rest) + [LAST]
        image_grid.save(
            first, Path(path), "gif", save_all=True, append_images=rest, duration=times, loop=0
        )


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def stylize(
    image: ImageLike,
    *,
    model: str | Path | Classifier | StylizerPipeline,
    style: ImageLike | None = None,
    content_layer: int | None = None,
    style_layers: Sequence[int] | None = None,
    style_weight: float | None = None,
    steps: int | None = None,
    optimizer: Optimizer | None = None,
    scales: int | None = None,
    size: int | None = None,
    start: ImageLike | None = None,
    frames: int = 0,
    seed: int = 0,
    revision: str | None = None,
    device: str | None = None,
) -> Stylized:
    """Paint an image in the style of another.

    By an image classifier, the pixels are optimised until hidden states are like those of the
    image, and their Gram matrices like those of the style. By a stylizer, which
    recipes/train_stylizer.py trains for one style, it takes a single pass.

    Activations go through a softmax over channels, so that residual and mobile networks do, too;
    losses are in units of their targets, so that weights mean the same for all of them.

    Args:
        image: a path, a PIL image, a uint8 array, or a float tensor in [-1, 1] of the shape
            (channels, height, width).
        model: folder or Hub id of an image classifier, or of a stylizer; or
            what `genkit.load` returned.
        style: an image, as `image`; it is shrunk to the same longer side.
        content_layer: index of the hidden state of the content; default: the last one of the third
            resolution.
        style_layers: indices of the hidden states of the style; default: the last one of each of
            the first four resolutions.
        style_weight: weight of the style's loss over the content's; default: 30.
        steps: of the optimizer, at each scale; default: 100.
        optimizer: lbfgs or adam; default: lbfgs.
        scales: number of scales, from coarse to fine, each twice as large; default: 2.
        size: longer side of the result, in pixels; default: the image's own, 512 at most for a
            classifier.
        start: image to start from, such as an earlier result, or noise; default: the image.
        frames: number of iterates to keep for `save_animation`.
        seed: of the noise.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A record that prints, with the image and the losses of each step.

    Raises:
        ValueError: an argument is invalid, or the model is neither a classifier nor a stylizer.

    Source: Gatys et al. 2016, https://doi.org/10.1109/CVPR.2016.265; Johnson et al. 2016,
        https://arxiv.org/abs/1603.08155; Wang et al. 2021, https://arxiv.org/abs/2104.05623
    """
    if size is not None and (not is_whole(size) or size < SMALLEST):
        raise ValueError(f"size must be a whole number, {SMALLEST} or more, got {size!r:.80}")
    (own_seed,) = row_seeds(seed, 1, "an image")
    pipeline = stylizers.find_stylizer(model, revision, device)
    if pipeline is not None:
        _refuse(
            style=style,
            content_layer=content_layer,
            style_layers=style_layers,
            style_weight=style_weight,
            steps=steps,
            optimizer=optimizer,
            scales=scales,
            start=start,
            frames=frames or None,
        )
        return _pass_once(image, pipeline, size)
    if style is None:
        raise ValueError("style is required, unless the model is a stylizer")
    options = _options(style_weight, steps, optimizer, scales, frames)
    classifier = load_differentiable(model, revision, device)
    with classifier.frozen():
        levels = _make_levels(
            classifier, (image, style), (content_layer, style_layers), size, options.scales
        )
        first = _first_pixels(start, levels[0].pixels, own_seed)
        return _optimize(first, levels, options)


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r:.80} is for a classifier; this model is a stylizer, whose style "
                "is its own"
            )


def _pass_once(image: ImageLike, pipeline: StylizerPipeline, size: int | None) -> Stylized:
    channels = pipeline.stylizer.config.channels
    pixels = style_target.read_pixels(image, channels, "image")
    pixels = pixels if size is None else style_target.resize(pixels, size)
    started = time.perf_counter()
    (painted,) = pipeline(2 * pixels[None] - 1, output_type="pt").images
    seconds = time.perf_counter() - started
    return Stylized(image_grid.to_picture(painted), {}, [], {}, seconds, pipeline.name)


# ---------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class _Options:
    style_weight: float
    steps: int
    optimizer: Optimizer
    scales: int
    frames: int


def _options(style_weight: Any, steps: Any, optimizer: Any, scales: Any, frames: Any) -> _Options:
    """Check options, and choose those that were not given."""
    weight = WEIGHT if style_weight is None else style_weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9:
        raise ValueError(f"style_weight must be 0 or more and below 1e9, got {style_weight!r:.80}")
    counts = {"steps": (steps, 100, 1), "scales": (scales, 2, 1), "frames": (frames, 0, 0)}
    found = {}
    for name, (value, default, least) in counts.items():
        found[name] = default if value is None else value
        if not is_whole(found[name]) or found[name] < least:
            raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r:.80}")
    if optimizer not in (None, *get_args(Optimizer)):
        known = " or ".join(get_args(Optimizer))
        raise ValueError(f"optimizer must be {known}, got {optimizer!r:.80}")
    return _Options(float(weight), optimizer=optimizer or "lbfgs", **found)


# ---------------------------------------------------------------------------------------------
# Optimisation


@dataclass(frozen=True)
class _Level:
    """The images at one scale."""

    pixels: torch.Tensor  # of the content, in [0, 1], (1, channels, height, width)
    target: StyleTarget
    content: torch.Tensor  # hidden state of the content


def _make_levels(
    classifier: DifferentiableClassifier,
    images: tuple[ImageLike, ImageLike],
    layers: tuple[int | None, Sequence[int] | None],
    size: int | None,
    scales: int,
) -> list[_Level]:
    """Scale image and style, from coarse to fine; all is checked before the first step."""
    channels = classifier.classifier.channels
    pixels, style = (
        style_target.read_pixels(image, channels, name).to(classifier.device)
        for image, name in zip(images, ("image", "style"), strict=True)
    )
    side = size or min(SIZE, max(pixels.shape[1:]))
    style = style_target.shrink(style, side)
    levels = []
    for factor in (2**scale for scale in reversed(range(scales))):
        smaller = style_target.resize(style, max(1, round(max(style.shape[1:]) / factor)))
        scaled = style_target.resize(pixels, max(1, round(side / factor)))[None]
        target = StyleTarget(classifier, smaller, *layers)
        levels.append(_Level(scaled, target, target.content(scaled)))
    return levels


def _first_pixels(start: ImageLike | None, pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the pixels that the optimisation starts from, (1, channels, height, width)."""
    if start is None:
        return pixels
    if isinstance(start, str) and start == NOISE:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(pixels.shape, generator=generator).to(pixels.device)
    given = style_target.read_pixels(start, pixels.shape[1], "start")
    return _rescale(given[None].to(pixels.device), pixels.shape[2:])


def _optimize(pixels: torch.Tensor, levels: list[_Level], options: _Options) -> Stylized:
    started = time.perf_counter()
    losses: dict[str, list[float]] = {"loss": [], "content": [], "style": [], "variation": []}
    total = options.steps * len(levels)
    kept = {round((i + 1) * total / options.frames) for i in range(options.frames)}
    frames = []
    with console.bar(None, "stylizing", total, " steps") as bar:
        for level in levels:
            pixels = _rescale(pixels, level.pixels.shape[2:])
            for made, found in _descend(pixels, level, options):
                pixels = made
                for name, value in found.items():
                    losses[name].append(value)
                if len(losses["loss"]) in kept:
                    frames.append(_rescale(pixels, levels[-1].pixels.shape[2:])[0])
                bar.update()
    seconds, target = time.perf_counter() - started, levels[-1].target
    settings = {
        "content layer": target.content_layer,
        "style layers": target.style_layers,
        "style weight": options.style_weight,
        "steps": options.steps,
        "scales": options.scales,
        "optimizer": options.optimizer,
    }
    pictures = [image_grid.to_picture(frame) for frame in frames]
    return Stylized(
        image_grid.to_picture(pixels[0]),
        losses,
        pictures,
        settings,
        seconds,
        target.classifier.name,
    )


def _descend(
    pixels: torch.Tensor, level: _Level, options: _Options
) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
    """Yield the pixels after each step, and the losses before it.

    Raises:
        ValueError: the loss is no longer finite.
    """
    values = pixels.clone().requires_grad_()
    optimizer: torch.optim.Optimizer
    if options.optimizer == "adam":
        optimizer = torch.optim.Adam([values], lr=RATE)
    else:
        optimizer = torch.optim.LBFGS(
            [values], max_iter=1, history_size=HISTORY, tolerance_grad=0, tolerance_change=0
        )
    found: dict[str, float] = {}

    def closure() -> torch.Tensor:
        inside = values.clamp(0, 1)
        parts = level.target.losses(inside, level.content)
        loss = parts.total(options.style_weight)[0] + OUTSIDE * (values - inside).square().mean()
        (values.grad,) = torch.autograd.grad(loss, values)
        named = {"loss": parts.total(options.style_weight)} | vars(parts)
        found.update({name: float(part.detach()) for name, part in named.items()})
        return loss

    for _ in range(options.steps):
        optimizer.step(closure)
        if not math.isfinite(found["loss"]):
            raise ValueError(
                f"style_weight: the loss is {found['loss']} with {options.style_weight:g}; give "
                'less, or optimizer="adam"'
            )
        yield values.detach().clamp(0, 1), dict(found)


def _rescale(pixels: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return pixels of a height and width, (1, channels, height, width)."""
    if pixels.shape[2:] == tuple(shape):
        return pixels
    return F.interpolate(pixels, tuple(shape), mode="bicubic", antialias=True).clamp(0, 1)
