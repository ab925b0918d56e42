"""How good a map of attributions is: deletion and insertion, the sanity check, a known truth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from genkit import console, machine

STEPS = 20  # parts in which an image is deleted
BATCH = 32  # inputs of the network at once
Scores = Callable[[torch.Tensor], torch.Tensor]  # (n, channels, height, width) to (n,)

# ---------------------------------------------------------------------------------------------
# Deletion and insertion


@dataclass(frozen=True)
class Curves:
    """Scores of an image while its pixels are deleted, or inserted, the strongest first."""

    fractions: np.ndarray  # (points,) of the pixels, from 0 to 1
    deletion: np.ndarray  # (points,) scores
    insertion: np.ndarray  # (points,)

    @property
    def deletion_area(self) -> float:
        """Area under the scores by deletion: less is better."""
        return float(np.trapezoid(self.deletion, self.fractions))

    @property
    def insertion_area(self) -> float:
        """Area under the scores by insertion: more is better."""
        return float(np.trapezoid(self.insertion, self.fractions))


@torch.no_grad()
def delete_and_insert(
    scores: Scores,
    pixels: torch.Tensor,
    heat: torch.Tensor,
    baseline: torch.Tensor,
    steps: int = STEPS,
) -> Curves:
    """Replace pixels by a baseline, and the baseline by pixels, the strongest first.

    Args:
        scores: of images, such as the probability of a class.
        pixels: the image, (channels, height, width).
        heat: the map, (height, width).
        baseline: what shows where pixels are missing, as `pixels`.
        steps: parts of equal size, but the last.

    Source: Petsiuk et al. 2018 (RISE), https://arxiv.org/abs/1806.07421
    """
    order = heat.flatten().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    counts = [*range(0, len(order), -(-len(order) // steps)), len(order)]
    edges = torch.tensor(counts, device=ranks.device)[:, None]
    strong = (ranks < edges).view(-1, 1, *heat.shape)  # (points, 1, height, width)
    deleted, inserted = (
        torch.cat([scores(part) for part in torch.where(mask, *images).split(BATCH)])
        for mask, images in ((strong, (baseline, pixels)), (strong, (pixels, baseline)))
    )
    fractions = np.array(counts) / len(order)
    return Curves(fractions, deleted.double().cpu().numpy(), inserted.double().cpu().numpy())


# ---------------------------------------------------------------------------------------------
# Sanity check


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return Spearman's correlation of the sizes of two maps; 0 if one is constant."""
    one, two = (_ranks(each.abs().flatten().cpu().numpy()) for each in (first, second))
    if np.ptp(one) == 0 or np.ptp(two) == 0:
        return 0.0
    return float(np.corrcoef(one, two)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, (n,); equal values have their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


def randomize_from_the_top(
    model: torch.nn.Module, seed: int = 0
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield a copy of a model as its layers get random weights, one after the other from the last.

    A map that shows what the model has learned changes with its weights (cascading randomisation).

    Yields:
        the name of the layer that was last randomised, and the copy.

    Source: Adebayo et al. 2018, https://arxiv.org/abs/1810.03292
    """
    copied = copy.deepcopy(model)
    layers = [
        (name, module)
        for name, module in copied.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    with machine.fork_random_state():
        torch.manual_seed(seed)
        for name, module in reversed(layers):
            module.reset_parameters()
            yield name, copied


def sanity_check(
    model: torch.nn.Module,
    explain: Callable[[torch.nn.Module], torch.Tensor],
    seed: int = 0,
    points: int = 5,
) -> dict[str, float]:
    """Correlate the map of a model with those of the same model, more and more randomised.

    Args:
        explain: returns the map of a model, (height, width).
        points: layers after which a map is made, evenly from the last to the first.

    Returns:
        The rank correlation by the name of the layer down to which weights are random.
    """
    own = explain(model)
    layers = [name for name, _ in randomize_from_the_top(model, seed)]
    chosen = {layers[i] for i in np.linspace(0, len(layers) - 1, points).round().astype(int)}
    found = {}
    cascade = randomize_from_the_top(model, seed)
    for name, copied in console.bar(cascade, "randomising", len(layers), " layers"):
        if name in chosen:
            found[name] = rank_correlation(own, explain(copied))
    return found


@dataclass(frozen=True)
class Quality:
    """How good one map is."""

    deletion: float  # area under the probability by deletion; less is better
    insertion: float  # by insertion; more is better
    random_deletion: float  # the same for a map of random numbers
    random_insertion: float
    sanity: dict[str, float]  # rank correlation with the map of a model random down to each layer

    def __str__(self) -> str:
        layers = ", ".join(f"{value:.2f} down to {name}" for name, value in self.sanity.items())
        return (
            f"deletion {self.deletion:.3f} (random map {self.random_deletion:.3f}, less is better)"
            f", insertion {self.insertion:.3f} ({self.random_insertion:.3f}, more is better)\n"
            f"rank correlation with maps of a randomised model: {layers}"
        )


# ---------------------------------------------------------------------------------------------
# A known truth: a digit in clutter


@dataclass(frozen=True)
class Cluttered:
    """Digits in clutter, and where they are."""

    pixels: torch.Tensor  # (n, 1, side, side), in [0, 1]
    labels: np.ndarray  # (n,)
    boxes: np.ndarray  # (n, 4): top, left, bottom, right of each digit


def clutter(
    digits: np.ndarray,
    labels: np.ndarray,
    seeds: Sequence[int],
    side: int = 84,
    pieces: int = 16,
    piece: int = 8,
) -> Cluttered:
    """Place a digit among pieces of other digits.

    Args:
        digits: uint8, (m, height, width).
        labels: (m,).
        seeds: of each canvas, which shows a digit drawn by its seed.
        side: of the canvas, in pixels.
        pieces: of other digits on it.
        piece: side of a piece, in pixels.

    Source: Mnih et al. 2014, section 4.1, https://arxiv.org/abs/1406.6247
    """
    height, width = digits.shape[1:]
    canvases = np.zeros((len(seeds), side, side), np.uint8)
    shown, boxes = np.zeros(len(seeds), np.int64), np.zeros((len(seeds), 4), np.int64)
    for i, (canvas, seed) in enumerate(zip(canvases, seeds, strict=True)):
        rng = np.random.default_rng(seed)
        shown[i] = rng.integers(len(digits))
        for other in rng.integers(len(digits), size=pieces):
            top, left = rng.integers(height - piece + 1), rng.integers(width - piece + 1)
            y, x = rng.integers(side - piece + 1, size=2)
            _paint(canvas, digits[other, top : top + piece, left : left + piece], y, x)
        y, x = rng.integers(side - height + 1), rng.integers(side - width + 1)
        canvas[y : y + height, x : x + width] = 0  # what the digit covers would be clutter
        _paint(canvas, digits[shown[i]], y, x)
        boxes[i] = y, x, y + height, x + width
    return Cluttered(torch.from_numpy(canvases)[:, None].float() / 255, labels[shown], boxes)


def _paint(canvas: np.ndarray, shape: np.ndarray, top: int, left: int) -> None:
    """Draw a shape of light pixels on a canvas."""
    part = canvas[top : top + shape.shape[0], left : left + shape.shape[1]]
    np.maximum(part, shape, out=part)


def mass_in_box(heat: torch.Tensor, box: np.ndarray) -> float:
    """Return the share of a map's positive mass that lies in a box; that of its area if all is 0.

    Args:
        heat: (height, width).
        box: top, left, bottom, right.
    """
    top, left, bottom, right = (int(side) for side in box)
    mass = heat.double().clamp(min=0)
    if not mass.any():
        mass = torch.ones_like(mass)
    return float(mass[top:bottom, left:right].sum() / mass.sum())
