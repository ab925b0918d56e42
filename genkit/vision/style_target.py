"""What a stylized image is compared with: the style's Gram matrices on chosen hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from genkit.models import style_losses
from genkit.vision.differentiable import DifferentiableClassifier, ImageLike, read_for
from genkit.vision.hidden_maps import hidden_maps

TEMPERATURE = 2.0  # of the softmax over channels, in standard deviations of the style's state
COLOUR = 0.3  # weight of the colours beside the hidden states' mean
VARIATION = 10.0  # weight of the total variation
STYLES, CONTENT = 4, 2  # resolutions that the style is taken from; which of them has the content
LEAST = 2  # sides of the smallest map


@dataclass(frozen=True)
class StyleLosses:
    """The parts of the loss, one number an image, (n,)."""

    content: torch.Tensor
    style: torch.Tensor
    variation: torch.Tensor

    def total(self, style_weight: float) -> torch.Tensor:
        """Return the weighted sum, (n,)."""
        return self.content + style_weight * self.style + VARIATION * self.variation


class StyleTarget:
    """The style of an image, on hidden states of a classifier.

    Args:
        classifier: its weights are frozen meanwhile.
        pixels: of the style, in [0, 1], (channels, height, width).
        content_layer: index of the hidden state of the content; default: the last one of the third
            resolution.
        style_layers: indices of those of the style; default: the last one of each of the first four
            resolutions.

    Raises:
        ValueError: there is no such layer, the network does not take images of this size, or the
            style is too small for it.
    """

    def __init__(
        self,
        classifier: DifferentiableClassifier,
        pixels: torch.Tensor,
        content_layer: int | None = None,
        style_layers: Sequence[int] | None = None,
    ) -> None:
        self.classifier = classifier
        states = self._states(pixels[None], "style")
        content, styles = _default_layers(states)
        self.content_layer = _check_layer(content_layer, content, len(states), "content_layer")
        given = styles if style_layers is None else list(style_layers)
        self.style_layers = [_check_layer(i, i, len(states), "style_layers") for i in given]
        if not given:
            raise ValueError("style_layers is empty; give at least one")
        layers = {self.content_layer, *self.style_layers}
        self.check_size(states, pixels, "style")
        self.scales = {i: TEMPERATURE * (states[i].std() + style_losses.TINY) for i in layers}
        self.grams = [style_losses.gram_matrix(self._smooth(states, i)) for i in self.style_layers]
        self.pixels = pixels[None]
        self.colours = style_losses.gram_matrix(self._colours(self.pixels))

    def content(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what `losses` compares the content with, of pixels in [0, 1], (n, c, h, w).

        Raises:
            ValueError: the images are too small.
        """
        with torch.no_grad():
            states = self._states(pixels, "image")
        self.check_size(states, pixels[0], "image")
        return self._smooth(states, self.content_layer)

    def losses(self, pixels: torch.Tensor, content: torch.Tensor) -> StyleLosses:
        """Compare images, in [0, 1], (n, channels, height, width), with content and style.

        Args:
            content: as `content` returns it, of images of the same size.
        """
        states = self._states(pixels, "image")
        grams = [style_losses.gram_matrix(self._smooth(states, i)) for i in self.style_layers]
        styles = [style_losses.style_loss(*pair) for pair in zip(grams, self.grams, strict=True)]
        colours = style_losses.gram_matrix(self._colours(pixels))
        colour = style_losses.style_loss(colours, self.colours)
        return StyleLosses(
            style_losses.content_loss(self._smooth(states, self.content_layer), content),
            torch.stack(styles).mean(0) + COLOUR * colour,
            style_losses.total_variation(pixels),
        )

    def check_size(
        self, states: Sequence[torch.Tensor], pixels: torch.Tensor, argument: str
    ) -> None:
        """Refuse images whose maps have too few places to compare."""
        for i in {self.content_layer, *self.style_layers}:
            height, width = states[i].shape[2:]
            if min(height, width) < LEAST:
                raise ValueError(
                    f"{argument}: {pixels.shape[2]} x {pixels.shape[1]} pixels are too few for "
                    f"{self.classifier.name}, whose hidden state {i} has a map of {width} x "
                    f"{height}; give a larger image, or earlier layers"
                )

    def _states(self, pixels: torch.Tensor, argument: str) -> list[torch.Tensor]:
        """Return all hidden states, (n, channels, height, width) each."""
        name = self.classifier.name
        try:
            _, maps = hidden_maps(self.classifier, pixels)
        except ValueError as error:  # a transformer that does not interpolate takes one size
            size = f"{pixels.shape[3]} x {pixels.shape[2]}"
            raise ValueError(
                f"model: {name} does not take the {argument} of {size} ({error}); give a "
                "convolutional network, such as a ResNet or an EfficientNet"
            ) from error
        return [each.as_map(each.state) for each in maps]

    def _smooth(self, states: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
        return style_losses.smooth_activations(states[layer], self.scales[layer])

    def _colours(self, pixels: torch.Tensor) -> torch.Tensor:
        return style_losses.colour_features(pixels, self.pixels)


def _default_layers(states: Sequence[torch.Tensor]) -> tuple[int, list[int]]:
    """Return the hidden state of the content, and those of the style."""
    last = {state.shape[2:]: i for i, state in enumerate(states)}  # of each resolution
    styles = sorted(last.values())[:STYLES]
    return styles[min(CONTENT, len(styles) - 1)], styles


def _check_layer(given: int | None, default: int, count: int, argument: str) -> int:
    """Return the index of a hidden state, from 0."""
    index = default if given is None else given
    if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
        raise ValueError(f"{argument}: there is no hidden state {index!r}; give 0 to {count - 1}")
    return index % count


def read_pixels(image: ImageLike, channels: int, argument: str) -> torch.Tensor:
    """Return an image as pixels in [0, 1], (channels, height, width).

    Raises:
        ValueError: it is no image.
    """
    pixels = (read_for(image, channels, argument) + 1) / 2
    return pixels.expand(channels, -1, -1).contiguous()


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Return pixels whose longer side is `size`, (channels, height, width)."""
    height, width = pixels.shape[1:]
    factor = size / max(height, width)
    shape = (max(1, round(height * factor)), max(1, round(width * factor)))
    if shape == (height, width):
        return pixels
    made = F.interpolate(pixels[None], shape, mode="bicubic", antialias=True)
    return made[0].clamp(0, 1).contiguous()


def shrink(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Return pixels whose longer side is `size` at most, (channels, height, width)."""
    return resize(pixels, min(size, max(pixels.shape[1:])))
