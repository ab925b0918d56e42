"""genkit.visualize: images that units of a network respond to most (feature visualisation)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from genkit import console
from genkit.arguments import explain_names
from genkit.metrics.features import Classifier
from genkit.notebook import DrawnRecord
from genkit.seeds import check_number, is_whole, row_seeds
from genkit.vision import image_grid
from genkit.vision.differentiable import DifferentiableClassifier, load_differentiable
from genkit.vision.dreams import LEAST
from genkit.vision.hidden_maps import one_map

LARGEST = 1024  # side of an image, in pixels
LAYERS, UNITS = 4, 6  # of the sheet that is drawn by default
RATE = 0.05  # learning rate of Adam
SPREAD = 0.01  # standard deviation of the first spectrum
CONTRAST = 5  # that the image is divided by before the sigmoid
DECAY = 1.3  # power of the frequency by which the amplitude falls: 1 in photographs
# in each step, at most: shift as a share of the side, change of the scale, and degrees
SHIFT, ZOOM, TURN = 1 / 8, 0.2, 15.0
# red, green and blue of independent colours: square root of the covariance of ImageNet's pixels
COLOURS = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])

Shape = tuple[int, int]  # channels and side

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Unit:
    """One unit, and the image that it responds to."""

    name: str  # "daisy", or "hidden state 5 of 16, channel 17"
    caption: str  # the same, short
    image: Image.Image = field(repr=False)
    before: float  # mean activation of the channel, or logit of the class, for the first image
    after: float
    seed: int

    def __str__(self) -> str:
        return f"{self.name}: {self.before:.3g} to {self.after:.3g}, seed {self.seed}"


@dataclass(frozen=True)
class Visualization(DrawnRecord):
    """Images that units respond to, and how they were found."""

    units: list[Unit]
    columns: int  # of the picture
    size: int
    steps: int
    seconds: float
    model: str

    def __str__(self) -> str:
        end = f"{self.size} x {self.size}, {self.steps} steps, {self.seconds:.1f} s"
        return "\n".join([*map(str, self.units), end])

    def save(self, path: str | Path) -> None:
        """Write a picture of the images with captions; small images are enlarged.

        Raises:
            ValueError: the suffix is not that of a supported format.
        """
        images = [unit.image for unit in self.units]
        captions = [unit.caption for unit in self.units]
        image_grid.save_as(image_grid.captioned(images, captions, self.columns), path)


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def visualize(
    model: str | Path | Classifier,
    *,
    unit: int | Sequence[int] | None = None,
    target: str | int | Sequence[str | int] | None = None,
    layer: str | int | Sequence[str | int] | None = None,
    grey: bool = False,
    size: int | None = None,
    steps: int = 128,
    seed: int | Sequence[int] = 0,
    revision: str | None = None,
    device: str | None = None,
) -> Visualization:
    """Draw images that channels of a layer, or classes, respond to most.

    An image is its Fourier spectrum in independent colours, climbed by Adam; in each step it is
    shifted, scaled and turned a little, so that what remains is seen from everywhere. Without
    `unit` and `target` the picture has six channels of each of four layers. Units are drawn one by
    one, so that each depends on its own seed alone. The model computes in float32 with frozen
    weights, and is left as it was.

    Args:
        model: folder or Hub id of an image classifier, or what `genkit.load` returned.
        unit: channel of the layer, or several; default: six, evenly spread.
        target: name or number of a class, or several, instead of channels.
        layer: index of a hidden state or name of a module, or several; default: the hidden state at
            two thirds of the depth, or without a unit four, evenly spread.
        grey: draw grey images, for a network that was trained on grey ones in three channels.
        size: side of the images, in pixels; default: that of the model's input.
        steps: of each image.
        seed: one number, then image i has seed + i; or one for each.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A record that prints, and whose `save` writes a sheet of the images.

    Raises:
        ValueError: an argument is invalid, or the model is none that can be differentiated.

    Source: Olah et al. 2017, https://distill.pub/2017/feature-visualization; colours and settings
        of https://github.com/tensorflow/lucid
    """
    if target is not None and not (unit is None and layer is None):
        raise ValueError("target is a class: leave unit and layer out")
    check_number("steps", steps, 1, 100_000, whole=True)
    if size is not None:
        check_number("size", size, 1, LARGEST, whole=True)
    classifier = load_differentiable(model, revision, device)
    least = min(LEAST, classifier.side())
    if size is not None and size < least:
        raise ValueError(f"size must be {least} or more for {classifier.name}, got {size}")
    shape = (1 if grey else classifier.classifier.channels, size or classifier.side())
    started = time.perf_counter()
    with classifier.frozen():
        goals, columns = _find_goals(classifier, shape, unit, target, layer)
        seeds = row_seeds(seed, len(goals), "a unit")
        rows = zip(goals, seeds, strict=True)
        units = [
            _draw(classifier, goal, shape, steps, own)
            for goal, own in console.bar(rows, "drawing", len(goals), " units")
        ]
    seconds = time.perf_counter() - started
    return Visualization(units, columns, shape[1], steps, seconds, classifier.name)


def _find_goals(
    classifier: DifferentiableClassifier, shape: Shape, unit: Any, target: Any, layer: Any
) -> tuple[list[_Goal], int]:
    """Return what is drawn, and how many images stand in a row of the picture."""
    if target is not None:
        goals = _class_goals(classifier, _as_list("target", target))
        return goals, math.ceil(math.sqrt(len(goals)))
    channels, side = shape
    pixels = torch.full((1, channels, side, side), 0.5, device=classifier.device)
    layers = [layer] if layer is None else _as_list("layer", layer)
    if unit is None and layer is None:
        layers = _spread_layers(classifier, pixels)
    units = None if unit is None else _as_list("unit", unit)
    rows = [_channel_goals(classifier, pixels, own, units) for own in layers]
    goals = [goal for row in rows for goal in row]
    return goals, len(rows[0]) if len(rows) > 1 else math.ceil(math.sqrt(len(goals)))


# ---------------------------------------------------------------------------------------------
# What is raised


@dataclass(frozen=True)
class _Goal:
    """The logit of a class, or the mean activation of a channel."""

    number: int
    name: str
    caption: str
    of_class: bool = False
    layer: str | int | None = None

    def score(self, classifier: DifferentiableClassifier, pixels: torch.Tensor) -> torch.Tensor:
        """Return the score of one image."""
        if self.of_class:
            return classifier(pixels)[0, self.number]
        found = one_map(classifier, pixels, self.layer)
        return found.as_map(found.state)[0, self.number].mean()


def _class_goals(classifier: DifferentiableClassifier, targets: list[Any]) -> list[_Goal]:
    indices = [classifier.index_of(target) for target in targets]
    names = [classifier.names[i] for i in indices]
    return [
        _Goal(i, name, name.split(",")[0], of_class=True)
        for i, name in zip(indices, names, strict=True)
    ]


def _channel_goals(
    classifier: DifferentiableClassifier,
    pixels: torch.Tensor,
    layer: str | int | None,
    units: list[Any] | None,
) -> list[_Goal]:
    """Return the goals of one layer; without units of some channels, evenly spread."""
    with torch.no_grad():
        found = one_map(classifier, pixels, layer)
    count = found.as_map(found.state).shape[1]
    numbers = [i * count // UNITS for i in range(UNITS)] if units is None else units
    for number in numbers:
        if not is_whole(number) or not 0 <= number < count:
            raise ValueError(f"unit must be 0 to {count - 1} in {found.layer}, got {number!r:.80}")
    state = found.layer.removeprefix("hidden state ").split(" of ")[0]
    short = f"layer {state}" if state.isdecimal() else state.split(".")[-1]
    return [
        _Goal(int(i), f"{found.layer}, channel {i}", f"{short}: {i}", layer=layer)
        for i in dict.fromkeys(numbers)
    ]


def _spread_layers(classifier: DifferentiableClassifier, pixels: torch.Tensor) -> list[int]:
    """Return the indices of some hidden states, evenly spread, with the last one."""
    with torch.no_grad():
        last = len(classifier.hidden_states(pixels)[1]) - 1
    return sorted({round(last * (i + 1) / LAYERS) for i in range(LAYERS)})


def _as_list(name: str, value: Any) -> list[Any]:
    listed = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if not listed:
        raise ValueError(f"{name} is an empty list; give at least one")
    return listed


# ---------------------------------------------------------------------------------------------
# The ascent


def _draw(
    classifier: DifferentiableClassifier, goal: _Goal, shape: Shape, steps: int, seed: int
) -> Unit:
    """Climb from a spectrum of noise."""
    generator, (channels, side) = torch.Generator().manual_seed(seed), shape
    noise = torch.randn(1, channels, side, side // 2 + 1, 2, generator=generator)
    spectrum = (SPREAD * noise).to(classifier.device).requires_grad_()
    optimizer = torch.optim.Adam([spectrum], RATE)
    with torch.no_grad():
        before = float(goal.score(classifier, to_pixels(spectrum, side)))
    for _ in range(steps):
        pixels = transform(to_pixels(spectrum, side), generator)
        (spectrum.grad,) = torch.autograd.grad(-goal.score(classifier, pixels), spectrum)
        optimizer.step()
    with torch.no_grad():
        pixels = to_pixels(spectrum, side)
        after = float(goal.score(classifier, pixels))
    return Unit(goal.name, goal.caption, image_grid.to_picture(pixels[0]), before, after, seed)


def to_pixels(spectrum: torch.Tensor, side: int) -> torch.Tensor:
    """Return an image in (0, 1), (n, channels, side, side), from its spectrum.

    Args:
        spectrum: real and imaginary parts, (n, channels, side, side // 2 + 1, 2), to be
            divided by a power of the frequency, as the amplitudes of photographs fall.
        side: of the image.
    """
    rows, columns = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp(min=1 / side)
    scaled = torch.view_as_complex(spectrum) / frequency.to(spectrum.device) ** DECAY
    values = torch.fft.irfft2(scaled, s=(side, side), norm="ortho") / CONTRAST
    if spectrum.shape[1] == 3:
        mixing = (COLOURS / COLOURS.norm(dim=0).max()).to(values.device)
        values = torch.einsum("dc,nchw->ndhw", mixing, values)
    return values.sigmoid()


def transform(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, scale and turn images, (n, channels, height, width), a little."""
    turn, zoom, right, down = (2 * torch.rand(4, generator=generator) - 1).tolist()
    angle, scale = math.radians(TURN * turn), 1 + ZOOM * zoom
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    rows = [[cosine, -sine, 2 * SHIFT * right], [sine, cosine, 2 * SHIFT * down]]
    matrix = torch.tensor([rows], device=pixels.device).expand(len(pixels), -1, -1)
    places = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, places, padding_mode="reflection", align_corners=False)
