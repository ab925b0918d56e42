"""Small changes of images that a classifier gets wrong: FGSM, PGD, and a search without gradients.

Functions of a classifier as a callable from pixels in [0, 1] to logits. A change stays within
epsilon of the image, by its largest value (linf) or its length (l2), and the pixels in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Logits = Callable[[torch.Tensor], torch.Tensor]
Norm = Literal["linf", "l2"]
REACH = 2.5  # steps of PGD go this far together, in epsilons (Madry et al.)
FAST_STEP = 1.25  # of one-step training, in epsilons (Wong et al.)
TINY = 1e-12  # least length of a gradient that has a direction
LEVELS = 255  # of image files, over black
TINY_PART = 1e-6  # of float rounding that an epsilon of whole levels may have
HALVINGS = 24
LARGE, SMALL = 0.3, 0.05  # side of the squares of the search, at its start and at its end


@dataclass(frozen=True)
class Budget:
    """How far a change may go: `epsilon` in pixels of [0, 1], by the norm."""

    epsilon: float
    norm: Norm = "linf"


@dataclass(frozen=True)
class Perturbed:
    """Changed images, and what it took."""

    pixels: torch.Tensor  # (n, channels, height, width): of each row, those with the highest loss
    fooled: torch.Tensor  # (n,), bool
    queries: torch.Tensor  # (n,): forward and gradient evaluations of a row


# ---------------------------------------------------------------------------------------------
# The ball


def project(pixels: torch.Tensor, center: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Return the nearest pixels in the ball around an image, cut to [0, 1].

    Args:
        pixels: (n, channels, height, width).
        center: images in [0, 1], of the same shape. The cut brings pixels nearer to them, so that
            the result is in the ball, too.
    """
    change = pixels - center
    if budget.norm == "linf":
        change = change.clamp(-budget.epsilon, budget.epsilon)
    else:
        change = change * (budget.epsilon / length(change).clamp(min=TINY)).clamp(max=1)
    return (center + change).clamp(0, 1)


def size_of(change: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return the norm of changes, (n,), of the shape (n, channels, height, width)."""
    return (change.abs().amax((1, 2, 3), True) if norm == "linf" else length(change)).flatten()


def to_levels(pixels: torch.Tensor, center: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Round changed images to the 256 levels of image files, within the ball.

    By linf each pixel takes the nearest level that the ball has. By l2 rounding would lengthen a
    change, or leave nothing of a faint one: each row is the largest multiple of its change whose
    rounding is no longer than the change.

    Args:
        pixels: (n, channels, height, width).
        center: images of these levels, of the same shape.
    """
    before, change = (center * LEVELS).round(), (pixels - center) * LEVELS
    if budget.norm == "linf":
        most = math.floor(budget.epsilon * LEVELS * (1 + TINY_PART))
        rounded = change.round().clamp(-most, most)
        return (before + rounded).clamp(0, LEVELS) / LEVELS

    def multiple(factor: torch.Tensor) -> torch.Tensor:
        return (before + factor * change).round().clamp(0, LEVELS) - before

    low = torch.zeros_like(length(change))
    high = LEVELS / change.abs().amax((1, 2, 3), True).clamp(min=TINY)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = length(multiple(middle)) <= length(change)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return (before + multiple(low)) / LEVELS


def length(change: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of each row, (n, 1, 1, 1)."""
    return change.flatten(1).norm(dim=1)[:, None, None, None]


def steepest(gradient: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return the change of norm 1 that raises the loss most."""
    if norm == "linf":
        return gradient.sign()
    return gradient / length(gradient).clamp(min=TINY)


def random_start(
    pixels: torch.Tensor, budget: Budget, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Draw pixels uniformly from the ball, each row from its own generator, and cut to [0, 1]."""
    shape, radius = pixels.shape[1:], math.prod(pixels.shape[1:])
    if budget.norm == "linf":
        drawn = torch.stack([2 * torch.rand(shape, generator=g) - 1 for g in generators])
    else:
        normal = torch.stack([torch.randn(shape, generator=g) for g in generators])
        uniform = torch.stack([torch.rand((1, 1, 1), generator=g) for g in generators])
        drawn = normal / length(normal) * uniform ** (1 / radius)
    return project(pixels + budget.epsilon * drawn.to(pixels.device), pixels, budget)


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a generator a row, so that a row is the same alone and in a batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---------------------------------------------------------------------------------------------
# Attacks


def fgsm(
    logits: Logits,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    budget: Budget,
    *,
    targeted: bool = False,
) -> Perturbed:
    """Take one step of the length epsilon up the loss.

    Args:
        pixels: images in [0, 1], (n, channels, height, width).
        labels: classes to leave, or with `targeted` to reach, (n,).

    Source: Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572
    """
    gradient, _, _ = _evaluate(logits, pixels, labels, targeted)
    changed = pixels + budget.epsilon * steepest(gradient, budget.norm)
    changed = project(changed, pixels, budget)
    with torch.no_grad():
        fooled = _is_fooled(logits(changed), labels, targeted)
    return Perturbed(changed, fooled, torch.full_like(labels, 3))


def pgd(
    logits: Logits,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    budget: Budget,
    *,
    steps: int,
    seeds: Sequence[int],
    step_size: float | None = None,
    restarts: int = 1,
    targeted: bool = False,
    early: bool = True,
) -> Perturbed:
    """Climb the loss from random starts by projected steps.

    A row that is fooled takes part in no further restart.

    Args:
        pixels: images in [0, 1], (n, channels, height, width).
        labels: classes to leave, or with `targeted` to reach, (n,).
        seeds: of the random starts, one a row.
        step_size: in pixels of [0, 1]; default: 2.5 epsilon over the steps.
        early: a row stops at the first step that fools it, not at the end of its steps.

    Source: Madry et al. 2018, https://arxiv.org/abs/1706.06083
    """
    size = REACH * budget.epsilon / steps if step_size is None else step_size
    generators = row_generators(seeds)
    best = pixels.clone()
    highest = torch.full(labels.shape, -torch.inf, device=pixels.device)
    fooled, queries = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels)
    for _ in range(restarts):
        rows = (~fooled).nonzero().flatten()
        if not len(rows):
            break
        center, classes = pixels[rows], labels[rows]
        changed = random_start(center, budget, [generators[row] for row in rows.tolist()])
        for step in range(steps + 1):
            last = step == steps
            gradient, losses, wrong = _evaluate(logits, changed, classes, targeted, not last)
            queries[rows] += 1 if last else 2
            first = wrong & ~fooled[rows]
            better = first | (losses > highest[rows]) & (wrong | ~fooled[rows])
            best[rows[better]] = changed[better]
            highest[rows[better]] = losses[better]
            fooled[rows[wrong]] = True
            if last:
                break
            if early and wrong.any():
                rows, center, classes = rows[~wrong], center[~wrong], classes[~wrong]
                changed, gradient = changed[~wrong], gradient[~wrong]
                if not len(rows):
                    break
            changed = project(changed + size * steepest(gradient, budget.norm), center, budget)
    return Perturbed(best, fooled, queries)


@torch.no_grad()
def square_search(
    logits: Logits,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    budget: Budget,
    *,
    steps: int,
    seeds: Sequence[int],
) -> Perturbed:
    """Search without gradients: change a random square, keep it if the margin falls.

    The margin is the logit of the class over the largest other one. A row stops once fooled.

    Args:
        pixels: images in [0, 1], (n, channels, height, width).
        labels: classes to leave, (n,).
        steps: squares that are tried; they shrink.
        seeds: one a row.

    Source: Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049, simplified
    """
    channels, height, width = pixels.shape[1:]
    generators, device = row_generators(seeds), pixels.device
    stripes = torch.stack([torch.rand(channels, 1, width, generator=g) for g in generators])
    draws = torch.stack([torch.rand(steps, 2 + channels, generator=g) for g in generators])
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    reach = 2 * budget.epsilon  # from one end of the ball to the other
    start = pixels + reach * (stripes.to(device).round() - 0.5)
    best = project(start, pixels, budget)
    margins, queries = _margin(logits(best), labels), torch.ones_like(labels)
    for step in range(steps):
        rows = (margins > 0).nonzero().flatten()
        if not len(rows):
            break
        share = LARGE * (SMALL / LARGE) ** (step / steps)
        side = max(1, round(share * min(height, width)))
        drawn = draws[rows.cpu(), step].to(device)[:, :, None, None]  # (rows, 2 + channels, 1, 1)
        down = y - (drawn[:, :1] * (height - side + 1)).floor()  # (rows, 1, height, 1)
        right = x - (drawn[:, 1:2] * (width - side + 1)).floor()
        square = (down >= 0) & (down < side) & (right >= 0) & (right < side)
        changed = best[rows] + reach * square * (2 * drawn[:, 2:].round() - 1)
        changed = project(changed, pixels[rows], budget)
        found = _margin(logits(changed), labels[rows])
        better = found < margins[rows]
        best[rows[better]], margins[rows[better]] = changed[better], found[better]
        queries[rows] += 1
    return Perturbed(best, margins <= 0, queries)


def training_examples(
    logits: Logits, pixels: torch.Tensor, labels: torch.Tensor, epsilon: float, steps: int
) -> torch.Tensor:
    """Return adversarial images to train on, within epsilon of the given ones.

    One step is that of fast training: 1.25 epsilon from a random start. More are those of PGD.
    Draws from torch's global random state, as a step of a run does.

    Args:
        pixels: images in [0, 1], (n, channels, height, width).
        labels: their classes, (n,).

    Source: Wong et al. 2020, https://arxiv.org/abs/2001.03994; Madry et al. 2018,
        https://arxiv.org/abs/1706.06083
    """
    budget, size = Budget(epsilon), (FAST_STEP if steps == 1 else REACH / steps) * epsilon
    drawn = 2 * torch.rand(pixels.shape).to(pixels.device) - 1  # the same on any device
    changed = project(pixels + epsilon * drawn, pixels, budget)
    for _ in range(steps):
        gradient, _, _ = _evaluate(logits, changed, labels, False)
        changed = project(changed + size * gradient.sign(), pixels, budget)
    return changed


def _evaluate(
    logits: Logits,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    targeted: bool,
    differentiate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradient of the loss to climb, the loss of each row, and which rows are fooled.

    The loss is the cross-entropy of the class to leave, or less that of the class to reach.
    Without `differentiate` the gradient is one of zeros, which costs nothing.
    """
    inputs = pixels.detach().requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        scores = logits(inputs).float()
        losses = F.cross_entropy(scores, labels, reduction="none") * (-1 if targeted else 1)
    gradient = torch.autograd.grad(losses.sum(), inputs)[0] if differentiate else inputs
    return gradient, losses.detach(), _is_fooled(scores, labels, targeted)


def _is_fooled(scores: torch.Tensor, labels: torch.Tensor, targeted: bool) -> torch.Tensor:
    """Return which rows have left the class, or reached it; (n,), bool."""
    reached: torch.Tensor = scores.argmax(1) == labels
    return reached if targeted else ~reached


def _margin(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the logit of the class over the largest other one, (n,)."""
    own = scores.gather(1, labels[:, None])
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return (own - others.amax(1, keepdim=True)).flatten()
