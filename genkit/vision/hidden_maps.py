"""Hidden states of image classifiers as maps over the image, whatever the architecture.

Tensors are chosen, not layers by name: what `output_hidden_states` returns, of which a map is taken
whose gradient is not zero. A module can be named instead.
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from genkit.vision.differentiable import DifferentiableClassifier

SPECIAL = (0, 1, 2)  # tokens before the patches: none, a class token, and a distillation token
DEPTH = 2 / 3  # of the hidden state that responds to parts of things
STAGES = 6  # of a hierarchical network, each of which halves the sides


@dataclass(frozen=True)
class HiddenMap:
    """A hidden state as a map, and where it comes from."""

    state: torch.Tensor  # as the network computes it, on the path to the logits
    size: tuple[int, int]  # height and width of its grid
    layer: str  # its name, for records: "hidden state 3 of 4", or that of a module

    def as_map(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of the state's shape as (n, channels, height, width), patches only."""
        if values.ndim == 4:
            return values
        height, width = self.size
        patches = values[:, values.shape[1] - height * width :]
        return patches.transpose(1, 2).unflatten(2, (height, width))


def hidden_maps(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, layer: str | int | None = None
) -> tuple[torch.Tensor, list[HiddenMap]]:
    """Return logits, (n, classes), and the hidden states as maps, the first layer first.

    Args:
        pixels: in [0, 1], (n, channels, height, width).
        layer: index of one hidden state, or the name of one module; default: all hidden states
            that are maps.

    Raises:
        ValueError: there is no such layer, or its output is no map.
    """
    if isinstance(layer, str) and not layer.lstrip("-").isdecimal():
        logits, state = _module_output(classifier, pixels, layer)
        return logits, [_as_hidden_map(classifier, state, pixels, layer)]
    logits, states = classifier.hidden_states(pixels)
    if layer is not None:
        index = int(layer)
        if not -len(states) <= index < len(states):
            raise ValueError(f"layer must be 0 to {len(states) - 1}, or a module, got {layer}")
        name = _name(index % len(states), len(states))
        return logits, [_as_hidden_map(classifier, states[index], pixels, name)]
    grids = [(i, _grid(classifier.model.config, state, pixels)) for i, state in enumerate(states)]
    maps = [HiddenMap(states[i], grid, _name(i, len(states))) for i, grid in grids if grid]
    if not maps:
        raise ValueError(f"layer: no hidden state of {classifier.name} is a map; name a module")
    return logits, maps


def one_map(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, layer: str | int | None = None
) -> HiddenMap:
    """Return one hidden state as a map; default: at two thirds of the depth.

    States before it respond to lines and textures, those behind it to whole scenes.

    Args:
        pixels: in [0, 1], (n, channels, height, width).
        layer: index of a hidden state, or the name of a module.

    Raises:
        ValueError: there is no such layer, or its output is no map.
    """
    _, maps = hidden_maps(classifier, pixels, layer)
    return maps[round(DEPTH * (len(maps) - 1))]


def last_with_gradient(
    scores: torch.Tensor, maps: list[HiddenMap]
) -> tuple[HiddenMap, torch.Tensor]:
    """Return the last map whose patches have a gradient, and the gradient as a map.

    The head of a ViT reads the class token alone: the last layer's patches have a gradient of
    exactly zero, and those of the layer before are taken.

    Args:
        scores: to differentiate, (n,).

    Raises:
        ValueError: none of them has one.
    """
    states = [each.state for each in maps]
    found = torch.autograd.grad(scores.sum(), states, retain_graph=True, allow_unused=True)
    for each, gradient in reversed(list(zip(maps, found, strict=True))):
        if gradient is not None and each.as_map(gradient).abs().max() > 0:
            return each, each.as_map(gradient)
    raise ValueError(f"layer: {', '.join(each.layer for each in maps)} has a gradient of zero")


def _name(index: int, count: int) -> str:
    return f"hidden state {index} of {count - 1}"


def _as_hidden_map(
    classifier: DifferentiableClassifier, state: torch.Tensor, pixels: torch.Tensor, layer: str
) -> HiddenMap:
    grid = _grid(classifier.model.config, state, pixels)
    if grid is None:
        raise ValueError(
            f"layer: the output of {layer}, {tuple(state.shape)}, is no map over the image"
        )
    return HiddenMap(state, grid, layer)


def _grid(config: Any, state: torch.Tensor, pixels: torch.Tensor) -> tuple[int, int] | None:
    """Return height and width of a state's grid; None if it is not a map.

    Tokens are as many as the patches of the pixels, at a stage of the network, and some special
    ones before them.
    """
    if state.ndim == 4:
        return state.shape[2], state.shape[3]
    patch = getattr(config, "patch_size", None)
    if state.ndim != 3 or not patch:
        return None
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
    special = {*SPECIAL, 1 + getattr(config, "num_register_tokens", 0)}
    for stage, up in itertools.product(range(STAGES), (False, True)):
        steps = [side << stage for side in sides]
        height, width = (
            -(-side // step) if up else side // step
            for side, step in zip(pixels.shape[2:], steps, strict=True)
        )
        if height * width and state.shape[1] - height * width in special:
            return height, width
    return None


def _module_output(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and the output of a module."""
    modules = dict(classifier.model.named_modules())
    if not name or name not in modules:
        near = difflib.get_close_matches(name, modules, cutoff=0.3)
        raise ValueError(
            f"layer: {classifier.name} has no module {name!r}; the nearest: {', '.join(near)}"
        )
    outputs: list[Any] = []
    hook = modules[name].register_forward_hook(lambda _module, _inputs, own: outputs.append(own))
    try:
        logits = classifier(pixels)
    finally:
        hook.remove()
    output = outputs[-1] if outputs else None
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"layer: the module {name!r} of {classifier.name} returns no tensor")
    return logits, output
