"""genkit.dream: an image in which a network sees more of what it already sees (DeepDream)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from genkit import console
from genkit.arguments import explain_names
from genkit.data.pixels import MIN_SIDE
from genkit.metrics.features import Classifier
from genkit.notebook import DrawnRecord
from genkit.seeds import check_number, row_seeds
from genkit.vision import image_grid
from genkit.vision.differentiable import (
    DifferentiableClassifier,
    ImageLike,
    load_differentiable,
)
from genkit.vision.hidden_maps import one_map

LEAST = 32  # least side of an input, in pixels, unless the model's own is smaller
AREA = 1 << 22  # pixels of the largest image
LEVELS = 2  # halvings of the gradient, the details of each of which are equally strong
TINY = 1e-20  # instead of 0, below a fraction
ROWS = 4096  # places of the image that are compared with the guide at once

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Dream(DrawnRecord):
    """An image that was changed so that a hidden state responds more."""

    image: Image.Image = field(repr=False)
    layer: str  # whose activation was raised
    before: float  # activation of the image: half the mean square, or the match with the guide
    after: float
    octaves: int
    octave_scale: float
    steps: int  # of each octave
    step_size: float
    jitter: int
    guided: bool
    seed: int  # dream(image, seed=seed, …) gives this image again
    seconds: float
    model: str

    def __str__(self) -> str:
        return (
            f"dream of {self.layer}{' with a guide' if self.guided else ''}: "
            f"{self.image.width} x {self.image.height}, {self.octaves} octaves of {self.steps} "
            f"steps, seed {self.seed}, activation {self.before:.3g} to {self.after:.3g}, "
            f"{self.seconds:.1f} s"
        )

    def save(self, path: str | Path) -> None:
        """Write the image, completely or not at all.

        Raises:
            ValueError: the suffix is not that of a supported format.
        """
        image_grid.save_as(self.image, path)


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def dream(
    image: ImageLike,
    *,
    model: str | Path | Classifier,
    layer: str | int | None = None,
    guide: ImageLike | None = None,
    octaves: int = 4,
    octave_scale: float = 1.4,
    steps: int = 10,
    step_size: float = 0.012,
    jitter: int = 32,
    size: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    device: str | None = None,
) -> Dream:
    """Change an image so that a network sees more of what it sees in it.

    Gradient ascent on half the squared norm of a hidden state, from a small image to the full size;
    details that were found are carried up. The gradient's coarse and fine parts are made equally
    strong. The image keeps its size, and a grey one stays grey. The model computes in float32 with
    frozen weights, and is left as it was.

    Args:
        image: a path, a PIL image, a uint8 array, or a float tensor in [-1, 1] of the shape
            (channels, height, width).
        model: folder or Hub id of an image classifier, or what `genkit.load` returned.
        layer: index of a hidden state or name of a module; default: the hidden state at two thirds
            of the depth. Earlier ones make patterns, later ones things.
        guide: a second image, of any size, whose features the dream takes on.
        octaves: sizes that are dreamed in, from the smallest to the full one.
        octave_scale: factor between two sizes.
        steps: in each octave; 0 gives the image back.
        step_size: mean change of a pixel in a step, where 1 is from black to white.
        jitter: largest random shift in each step, in pixels.
        size: longest side in pixels, to which a larger image is shrunk; default: its own.
        seed: of the shifts.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A record that prints, and whose `save` writes the image.

    Raises:
        ValueError: an argument is invalid, or the model is none that can be differentiated.

    Source: Mordvintsev et al. 2015, https://github.com/google/deepdream, and, for the
        pyramid of gradients, Mordvintsev's tutorial for TensorFlow,
        https://github.com/tensorflow/tensorflow (examples/tutorials/deepdream).
    """
    _check_options(octaves, octave_scale, steps, step_size, jitter, size)
    (row_seed,) = row_seeds(seed, 1, "an image")
    classifier = load_differentiable(model, revision, device)
    pixels = _read(classifier, image, size)
    sizes = octave_sizes(classifier, pixels, octaves, octave_scale)
    started = time.perf_counter()
    with classifier.frozen():
        goal = _Goal(classifier, layer, _features(classifier, layer, guide))
        before, name = _look(goal, pixels, sizes)
        options = _Options(steps, step_size, jitter, row_seed)
        dreamed = climb(goal, pixels, sizes, options)
        after, _ = _look(goal, dreamed, sizes)
    return Dream(
        image_grid.to_picture(dreamed[0]),
        name,
        before,
        after,
        octaves,
        float(octave_scale),
        steps,
        float(step_size),
        jitter,
        guide is not None,
        row_seed,
        time.perf_counter() - started,
        classifier.name,
    )


def _check_options(
    octaves: Any, octave_scale: Any, steps: Any, step_size: Any, jitter: Any, size: Any
) -> None:
    check_number("octaves", octaves, 1, 20, whole=True)
    check_number("octave_scale", octave_scale, 1.05, 4)
    check_number("steps", steps, 0, 10_000, whole=True)
    check_number("step_size", step_size, 1e-5, 1)
    check_number("jitter", jitter, 0, 4096, whole=True)
    if size is not None:
        check_number("size", size, MIN_SIDE, 8192, whole=True)


def _read(classifier: DifferentiableClassifier, image: ImageLike, size: int | None) -> torch.Tensor:
    """Return pixels in [0, 1], (1, 1 or C, height, width), at most `size` long.

    Raises:
        ValueError: it is no image, or too large.
    """
    pixels = ((classifier.read(image) + 1) / 2)[None].to(classifier.device)
    height, width = pixels.shape[2:]
    if size is not None and size < max(height, width):
        share = size / max(height, width)
        height, width = (max(1, round(side * share)) for side in (height, width))
        pixels = resize(pixels, (height, width)).clamp(0, 1)
    if height * width > AREA:
        raise ValueError(
            f"image: {width} x {height} are more than {AREA:,} pixels; give size=1024, or so"
        )
    return pixels


def octave_sizes(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, octaves: int, scale: float
) -> list[tuple[int, int]]:
    """Return height and width of each octave, the smallest first.

    Raises:
        ValueError: the first is smaller than the network needs.
    """
    height, width = pixels.shape[2:]
    factors = [scale**-i for i in reversed(range(octaves))]
    sizes = [(round(height * factor), round(width * factor)) for factor in factors]
    least = min(LEAST, classifier.side())
    fit = sum(min(size) >= least for size in sizes)
    if not fit:
        raise ValueError(
            f"image: {width} x {height} pixels; the shorter side must have {least} at least"
        )
    if fit < octaves:
        raise ValueError(
            f"octaves: the first of {octaves} has {sizes[0][1]} x {sizes[0][0]} pixels, and the "
            f"shorter side must have {least} at least; give {fit}, or a larger image"
        )
    return sizes


# ---------------------------------------------------------------------------------------------
# What is raised


@dataclass(frozen=True)
class _Goal:
    """The activation of a hidden state, as a function of pixels."""

    classifier: DifferentiableClassifier
    layer: str | int | None
    guide: torch.Tensor | None  # features of the second image, (channels, places)

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, str]:
        """Return the activation, and the name of the hidden state."""
        found = one_map(self.classifier, pixels, self.layer)
        values = found.as_map(found.state)
        if self.guide is None:
            return values.square().mean() / 2, found.layer
        rows = values[0].flatten(1).T  # (places, channels)
        with torch.no_grad():
            best = torch.cat([(some @ self.guide).argmax(1) for some in rows.split(ROWS)])
        return (rows * self.guide.T[best]).mean(), found.layer


@torch.no_grad()
def _features(
    classifier: DifferentiableClassifier, layer: str | int | None, guide: ImageLike | None
) -> torch.Tensor | None:
    """Return the features of the second image as the model sees it, (channels, places)."""
    if guide is None:
        return None
    found = one_map(classifier, classifier.pixels(guide, "guide")[None], layer)
    return found.as_map(found.state)[0].flatten(1)


@torch.no_grad()
def _look(goal: _Goal, pixels: torch.Tensor, sizes: list[tuple[int, int]]) -> tuple[float, str]:
    """Return the activation at the full size, and the layer, when the first octave works, too.

    Raises:
        ValueError: the network does not take images of these sizes.
    """
    try:
        goal(resize(pixels, sizes[0]))
        activation, layer = goal(pixels)
    except (RuntimeError, AssertionError) as error:  # timm's networks of one size assert it
        height, width = pixels.shape[2:]
        raise ValueError(
            f"image: {goal.classifier.name} takes none of {width} x {height} pixels: {error}"
        ) from error
    return float(activation), layer


# ---------------------------------------------------------------------------------------------
# The ascent


@dataclass(frozen=True)
class _Options:
    steps: int
    step_size: float
    jitter: int
    seed: int


def climb(
    goal: _Goal, pixels: torch.Tensor, sizes: list[tuple[int, int]], options: _Options
) -> torch.Tensor:
    """Dream in each octave, and carry the details that were found up to the next."""
    generator = torch.Generator().manual_seed(options.seed)
    detail = torch.zeros_like(resize(pixels, sizes[0]))
    with console.bar(None, "dreaming", len(sizes) * options.steps, " steps") as progress:
        for size in sizes:
            base = resize(pixels, size)
            dreamed = (base + resize(detail, size)).clamp(0, 1)
            for _ in range(options.steps):
                reach = options.jitter
                shift = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
                dreamed = take_step(goal, dreamed, shift, options.step_size)
                progress.update(1)
            detail = dreamed - base
    return dreamed


def take_step(
    goal: _Goal, pixels: torch.Tensor, shift: list[int], step_size: float
) -> torch.Tensor:
    """Climb once, with the image rolled, so that the network's grid lies elsewhere each time."""
    rolled = pixels.roll(shift, (2, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(goal(rolled)[0], rolled)
    gradient = equalize(gradient)
    gradient = gradient / gradient.abs().mean().clamp(min=TINY)
    changed = (rolled.detach() + step_size * gradient).clamp(0, 1)
    return changed.roll([-by for by in shift], (2, 3))


def equalize(gradient: torch.Tensor) -> torch.Tensor:
    """Make the levels of a gradient's Laplacian pyramid equally strong.

    Without it fine patterns, to which networks respond most, cover everything.
    """
    details = []
    for _ in range(LEVELS):
        height, width = gradient.shape[2:]
        coarse = resize(gradient, (-(-height // 2), -(-width // 2)))
        details.append(gradient - resize(coarse, (height, width)))
        gradient = coarse
    gradient = _to_unit(gradient)
    for detail in reversed(details):
        height, width = detail.shape[2:]
        gradient = _to_unit(detail) + resize(gradient, (height, width))
    return gradient


def _to_unit(values: torch.Tensor) -> torch.Tensor:
    return values / values.square().mean().sqrt().clamp(min=TINY)


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize images, (n, channels, height, width); those of this size stay as they are."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
