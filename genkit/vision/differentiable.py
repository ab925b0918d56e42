"""Image classifiers as functions of pixels in [0, 1], to differentiate with respect to the input.

Resizing comes before: an image becomes pixels of the model's input size. Normalisation is a part of
the function, so that a gradient, a norm and a step are those of pixels.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genkit import console
from genkit.data.pixels import decode_image, image_to_array, to_grey_or_rgb
from genkit.files import read_regular, reason
from genkit.hub import kinds
from genkit.metrics.features import Classifier, load_extractor
from genkit.seeds import is_whole

PROBE = 32  # side of the images by which the normalisation is found
SHOWN = 224  # side of the image by which the size of the input is found
LISTED = 5  # class names in a message
KINDS = (
    "a path, a PIL image, a uint8 array of the shape (height, width) or (height, width, 1 or 3), "
    "or a float tensor in [-1, 1] of the shape (1 or 3, height, width)"
)
ImageLike = str | Path | Image.Image | np.ndarray | torch.Tensor


class DifferentiableClassifier:
    """An image classifier as a function from pixels to logits.

    Args:
        classifier: as `genkit.load` returns it.

    Raises:
        ValueError: it is quantised, or its processor's normalisation cannot be undone.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.model: torch.nn.Module = classifier.model
        self.name, self.names, self.device = classifier.name, classifier.names, classifier.device
        if not all(weights.is_floating_point() for weights in self.model.parameters()):
            raise ValueError(f"model: {self.name!r} is quantised: it has no gradients")
        # pixels of any size; those of the model's own size have the same positions as without
        known = inspect.signature(self.model.forward).parameters
        positions = "interpolate_pos_encoding"
        self.options = {positions: True} if positions in known else {}
        black, white = (self._preprocess_flat(level) for level in (-1.0, 1.0))
        self.offset, self.scale = black.to(self.device), (white - black).to(self.device)
        if not (self.scale.abs() > 0).all():
            raise ValueError(f"model: the processor of {self.name!r} maps black and white alike")

    def _preprocess_flat(self, level: float) -> torch.Tensor:
        """Return the value of each channel in the input that an image of one level becomes."""
        flat = torch.full((1, self.classifier.channels, PROBE, PROBE), level)
        made = self.classifier.preprocess(flat)[0]
        return made[:, made.shape[1] // 2, made.shape[2] // 2, None, None]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the network's input: (n, 1 or C, height, width) to (n, C, height, width)."""
        return pixels * self.scale + self.offset  # grey becomes C equal channels before

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits, (n, classes), of pixels in [0, 1], (n, 1 or C, height, width)."""
        # channels last: oneDNN's convolutions take 0.7 of the time
        inputs = self.normalize(pixels).contiguous(memory_format=torch.channels_last)
        logits: torch.Tensor = self.model(pixel_values=inputs, **self.options).logits
        return logits

    def hidden_states(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return logits, and the hidden states from the first layer to the last.

        Raises:
            ValueError: the model has none.
        """
        options = {"output_hidden_states": True, **self.options}
        found = self.model(pixel_values=self.normalize(pixels), **options)
        if not found.hidden_states:
            raise ValueError(f"model: {self.name!r} returns no hidden states; give layer=")
        return found.logits, tuple(found.hidden_states)

    def with_model(self, model: torch.nn.Module) -> DifferentiableClassifier:
        """Return the same function of another model, such as one with other weights."""
        other = copy.copy(self)
        other.model = model
        return other

    def side(self) -> int:
        """Return the side of the model's own input, in pixels; the shorter one if they differ."""
        return min(self.classifier.input_size((self.classifier.channels, SHOWN, SHOWN)))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluate, without gradients of the weights; the model's state is restored afterwards."""
        modes = {module: module.training for module in self.model.modules()}
        wanted = {weights: weights.requires_grad for weights in self.model.parameters()}
        self.model.eval().requires_grad_(False)
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for weights, own in wanted.items():
                weights.requires_grad_(own)

    def pixels(self, image: ImageLike, argument: str = "image") -> torch.Tensor:
        """Return an image as pixels in [0, 1] of the model's input size, (1 or C, height, width).

        It is resized and cropped by the model's own processor. A grey image keeps one channel.

        Args:
            argument: its name, for messages.

        Raises:
            ValueError: it is no image, or not one that the model takes.
        """
        given = self.read(image, argument)
        made = self.classifier.preprocess(given[None])[0].to(self.device)
        if made.shape[1:] != given.shape[1:]:
            sizes = [f"{each.shape[2]} x {each.shape[1]}" for each in (given, made)]
            console.say(f"{argument}: resized from {sizes[0]} to {sizes[1]}, which the model takes")
        return self._denormalize(made[None], len(given))[0]

    def pixels_of(self, images: torch.Tensor) -> torch.Tensor:
        """Return images in [-1, 1], (n, 1 or C, height, width), as `pixels` does.

        Raises:
            ValueError: they have more channels than the model takes.
        """
        made = self.classifier.preprocess(images).to(self.device)
        return self._denormalize(made, images.shape[1])

    def _denormalize(self, made: torch.Tensor, channels: int) -> torch.Tensor:
        """Return pixels in [0, 1] of the network's input; grey ones keep one channel."""
        values = ((made - self.offset) / self.scale).clamp(0, 1)
        return values[:, :1] if channels == 1 else values

    def read(self, image: ImageLike, argument: str = "image") -> torch.Tensor:
        """Return an image of its own size in [-1, 1], (1 or C, height, width); grey if C is 1."""
        return read_for(image, self.classifier.channels, argument)

    def index_of(self, target: str | int, argument: str = "target") -> int:
        """Return the index of a class by its name or its number.

        Args:
            target: a name, one of the names before and after a comma in it, or a number.
            argument: its name, for messages.

        Raises:
            ValueError: there is no such class; the nearest names are listed.
        """
        count, text = len(self.names), str(target).strip().lower()
        named = [i for i, name in enumerate(self.names) if text in _spellings(name)]
        if isinstance(target, str) and named:
            return named[0]
        number = int(text) if is_whole(target) or text.lstrip("-").isdecimal() else None
        if number is not None and 0 <= number < count:
            return number
        if number is not None:
            raise ValueError(f"{argument} must be 0 to {count - 1}, got {target}")
        known = {spelling: name for name in self.names for spelling in _spellings(name)}
        near = difflib.get_close_matches(text, known, LISTED, cutoff=0.5) or list(known)[:LISTED]
        raise ValueError(
            f"{argument}: {self.name} has no class {target!r}; it has {count}, the nearest: "
            f"{', '.join(dict.fromkeys(known[own] for own in near))}"
        )


def _spellings(name: str) -> list[str]:
    """Return a class name and its synonyms, which commas separate, in lower case."""
    return [name.lower(), *(part.strip().lower() for part in name.split(","))]


def load_differentiable(
    model: str | Path | Classifier, revision: str | None = None, device: str | None = None
) -> DifferentiableClassifier:
    """Load an image classifier as a function of pixels.

    Args:
        model: folder or Hub id of an image classifier, or what `genkit.load` has returned.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such classifier, or it has no gradients.
    """
    kinds.check_loaded(model, takes="Classifier")
    if isinstance(model, str | Path):
        found = load_extractor(kinds.as_name(model), revision, device, argument="model")
    else:
        found = model
    if not isinstance(found, Classifier):
        raise ValueError(f"model must be an image classifier, got {model!r:.80}")
    return DifferentiableClassifier(found)


def read_image(image: ImageLike, argument: str = "image") -> torch.Tensor:
    """Return an image as a float tensor in [-1, 1], (1 or 3, height, width).

    Raises:
        ValueError: it is no image.
    """
    if isinstance(image, str | Path):
        try:
            data = read_regular(Path(image).expanduser())
        except OSError as error:
            raise ValueError(f"{argument}: {str(image)!r}: {reason(error)}") from None
        image = decode_image(data, str(image))
    if isinstance(image, Image.Image):
        image = to_grey_or_rgb(image, argument)
        channels = len(image.getbands())
        return torch.tensor(image_to_array(image, None, channels)).float() / 127.5 - 1
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        image = torch.tensor(planes).float() / 127.5 - 1
    return _check_tensor(image, argument)


def read_for(image: ImageLike, channels: int, argument: str = "image") -> torch.Tensor:
    """Return an image as `read_image` does; a colour image is made grey for a model of 1 channel.

    Args:
        channels: that the model takes.
    """
    given = read_image(image, argument)
    if len(given) <= channels:
        return given
    console.say(f"{argument}: made grey, as the model takes")
    weights = torch.tensor([0.299, 0.587, 0.114])  # of ITU-R BT.601, as Pillow's L
    return (given * weights[:, None, None]).sum(0, keepdim=True)


def _check_tensor(image: Any, argument: str) -> torch.Tensor:
    if not isinstance(image, torch.Tensor) or not image.is_floating_point() or image.ndim != 3:
        shape = f" of the shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise ValueError(f"{argument} must be {KINDS}, got a {type(image).__name__}{shape}")
    if len(image) not in (1, 3) or not image.numel():
        raise ValueError(f"{argument} must have 1 or 3 channels, got {tuple(image.shape)}")
    image = image.detach().float().cpu()
    if not (image.abs() <= 1 + 1e-4).all():
        raise ValueError(f"{argument} must be in [-1, 1], got {image.min():g} to {image.max():g}")
    return image.clamp(-1, 1)
