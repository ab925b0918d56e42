"""Walks in the latent space of any image model: scatter, plane, truncation, paths, concepts.

Latents of images come from `encode`, or from `project`, which every pipeline allows, others from
`draw`; all else takes latents. For what a pipeline is, and for shapes, see genkit/pipelines.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from genkit import plots
from genkit.vision import image_grid
from genkit.vision.pipelines import (
    Decoder,
    IntLabels,
    as_int_labels,
    check_finite,
    check_latents,
    decode,
    draw_latents,
    latent_to_noise,
    noise_to_latent,
)

# ---------------------------------------------------------------------------------------------
# Where latents lie


@dataclass(frozen=True, eq=False)
class Scatter:
    """Latents in two dimensions."""

    points: torch.Tensor = field(repr=False)  # (n, 2), float64
    classes: torch.Tensor | None = field(repr=False)  # (n,), int64
    names: list[str]  # of the classes
    explained: tuple[float, float] | None  # share of the variance along each; None: it is all there
    latents: int  # of an image

    @property
    def caption(self) -> str:
        """How many latents, and how much of their variance is seen."""
        count = f"{len(self.points):,} images"
        if self.explained is None:
            return f"{count}, both latents"
        share = 100 * sum(self.explained)
        return f"{count}, {share:.0f} % of the variance of {self.latents:,} latents"

    def __str__(self) -> str:
        kinds = "" if self.classes is None else f", {len(self.classes.unique())} classes"
        return self.caption + kinds

    def save(self, path: str | Path) -> None:
        """Draw the points, coloured by class, into a PNG."""
        names = ["latent 0", "latent 1"]
        if self.explained is not None:
            names = [f"component {i} ({100 * e:.0f} %)" for i, e in enumerate(self.explained, 1)]
        kinds = None if self.classes is None else self.classes.numpy()
        plots.latent_scatter(
            self.points.numpy(), kinds, self.names, Path(path), names, self.caption
        )


def scatter(
    latents: torch.Tensor, classes: IntLabels | None = None, names: Sequence[str] = ()
) -> Scatter:
    """Lay latents out in a plane: the two that there are, or the first two principal components.

    Args:
        latents: (n, …), three or more.
        classes: of each, 0 and up: a colour each.
        names: of the classes; their numbers unless given.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.
    """
    if latents.ndim < 2 or len(latents) < 3 or latents[0].numel() < 2:
        raise ValueError(
            f"latents must be three or more of two or more numbers, got {tuple(latents.shape)}"
        )
    check_finite("latents", latents)
    kinds = None if classes is None else as_int_labels("classes", classes, len(latents))
    if kinds is not None and (kinds.min() < 0 or (names and kinds.max() >= len(names))):
        most = len(names) - 1 if names else "any number"
        raise ValueError(f"classes must be 0 to {most}, got {kinds.min()} to {kinds.max()}")
    points, explained = latents.detach().cpu().double().flatten(1), None
    if points.shape[1] > 2:
        points, explained = _principal(points)
    numbers = [] if kinds is None else [str(i) for i in range(int(kinds.max()) + 1)]
    return Scatter(points, kinds, list(names) or numbers, explained, latents[0].numel())


def _principal(values: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """Return the first two principal components, (n, 2), and their shares of the variance."""
    from sklearn.decomposition import PCA

    if (values == values[0]).all():
        raise ValueError("latents: they are all the same")
    found = PCA(2, svd_solver="arpack", random_state=0)  # exact, and fast for many latents
    points = torch.from_numpy(found.fit_transform(values.numpy()).copy())  # no negative strides
    first, second = found.explained_variance_ratio_.tolist()
    return points, (first, second)


@dataclass(frozen=True, eq=False)
class Plane:
    """What is decoded over a plane of the latent space."""

    images: torch.Tensor = field(repr=False)  # (side * side, …), row by row from the top
    latents: torch.Tensor = field(repr=False)  # of each image
    quantiles: list[float]  # of the normal distribution: where images lie along both sides
    dims: tuple[int, int]  # the latent that grows to the right, the one that grows upwards

    def __str__(self) -> str:
        side, (right, up) = len(self.quantiles), self.dims
        return (
            f"{side} x {side} images: latent {right} grows to the right and latent {up} upwards, "
            f"from {self.quantiles[0]:.2f} to {self.quantiles[-1]:.2f} standard deviations"
        )

    def save(self, path: str | Path) -> None:
        """Write the images as one seamless PNG."""
        image_grid.grid(self.images, Path(path), len(self.quantiles), gap=0)


def plane(
    pipeline: Decoder, side: int = 15, dims: tuple[int, int] = (0, 1), label: int | None = None
) -> Plane:
    """Decode a square of latents: equal shares of the prior's probability along two dimensions.

    Places along a side are the normal quantiles of (i + 0.5) / side (Kingma and Welling 2014,
    appendix A, https://arxiv.org/abs/1312.6114); all other numbers are 0. They are `place`d.

    Args:
        side: images along a side, two or more.
        dims: which numbers vary: to the right, and upwards.
        label: the class, for a model that is told.

    Raises:
        ValueError: an argument cannot work, or latents are feature maps and not a vector.
    """
    if len(pipeline.latent_shape) != 1:
        raise ValueError(
            f"pipeline: its latents are feature maps of {pipeline.latent_shape}, which two numbers "
            "do not span; `interpolate` walks among them"
        )
    if side < 2:
        raise ValueError(f"side must be 2 or more, got {side}")
    length = pipeline.latent_shape[0]
    if len(dims) != 2 or dims[0] == dims[1] or not all(0 <= d < length for d in dims):
        raise ValueError(f"dims must be two different ones of 0 to {length - 1}, got {dims}")
    places = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side)
    noise = torch.zeros(side, side, length)
    noise[..., dims[0]] = places.float()
    noise[..., dims[1]] = places.float().flip(0)[:, None]
    latents = noise_to_latent(pipeline, noise.flatten(0, 1))
    images = decode(pipeline, latents, _one_label(label, side**2))
    return Plane(images, latents, places.tolist(), (dims[0], dims[1]))


# ---------------------------------------------------------------------------------------------
# Truncation


@dataclass(frozen=True, eq=False)
class Truncation:
    """The same draws, from less and less cut-off normal distributions."""

    images: torch.Tensor = field(repr=False)  # (limits, count, channels, height, width)
    limits: list[float | None]  # of the size of the numbers drawn; None for none

    def __str__(self) -> str:
        return f"{self.images.shape[1]} images at truncations {', '.join(_limits(self.limits))}"

    def save(self, path: str | Path) -> None:
        """Write a row a limit into a PNG."""
        image_grid.rows(dict(zip(_limits(self.limits), self.images, strict=True)), Path(path))


def truncate(
    pipeline: Decoder,
    limits: Sequence[float | None] = (0.25, 0.5, 1.0, 2.0, None),
    count: int = 8,
    seed: int = 0,
    labels: IntLabels | None = None,
) -> Truncation:
    """Draw images of the same seeds at several truncations: alike and good to varied and odd.

    Args:
        limits: the largest size that a number behind the latents can have, all different; None for
            no limit; see `gan.truncate`.
        count: images.
        seed: image i is drawn with seed + i.
        labels: the class of each, for a model that is told.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.

    Source: Brock et al. 2019, https://arxiv.org/abs/1809.11096
    """
    if not limits or len(set(_limits(limits))) < len(limits):
        raise ValueError(f"limits must be different numbers or None, got {list(limits)}")
    images = [
        decode(pipeline, draw_latents(pipeline, count, seed, limit), labels) for limit in limits
    ]
    return Truncation(torch.stack(images), list(limits))


def _limits(limits: Sequence[float | None]) -> list[str]:
    return ["none" if limit is None else f"{limit:g}" for limit in limits]


# ---------------------------------------------------------------------------------------------
# Paths


@dataclass(frozen=True, eq=False)
class Interpolation:
    """Images on two ways from one place to another."""

    linear: torch.Tensor = field(repr=False)  # images, (steps, …)
    spherical: torch.Tensor = field(repr=False)
    linear_latents: torch.Tensor = field(repr=False)
    spherical_latents: torch.Tensor = field(repr=False)
    angle: float  # between the ends, in radians, where latents are standard normal

    def __str__(self) -> str:
        return f"{len(self.linear)} steps, ends {math.degrees(self.angle):.0f}° apart"

    def save(self, path: str | Path) -> None:
        """Write both ways as rows into a PNG."""
        image_grid.rows({"linear": self.linear, "spherical": self.spherical}, Path(path))


def interpolate(
    pipeline: Decoder,
    start: torch.Tensor,
    end: torch.Tensor,
    steps: int = 8,
    label: int | None = None,
) -> Interpolation:
    """Walk between two latents, on the straight line and on the great circle.

    Normal vectors of many dimensions lie near a sphere. The straight line leaves it, for places of
    which a model has learnt little; the great circle does not (White 2016,
    https://arxiv.org/abs/1609.04468). That sphere is where numbers are standard normal, before
    `place`: if it moves and stretches them, latents are taken back, led around, and placed.

    Args:
        start, end: latents of one image each; (…) as `latent_shape` says.
        steps: images, both ends included; two or more.
        label: the class, for a model that is told.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.
    """
    check_latents(pipeline, "start", start)
    check_latents(pipeline, "end", end)
    if steps < 2:
        raise ValueError(f"steps must be 2 or more, got {steps}")
    if start.numel() < 2:
        raise ValueError("pipeline: of one latent; a great circle needs two or more")
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = torch.stack([start, end]).detach().cpu().float()
    straight = torch.lerp(ends[0].double(), ends[1].double(), _column(t, start.ndim)).float()
    noise = latent_to_noise(pipeline, ends)
    around = noise_to_latent(pipeline, slerp(noise[0], noise[1], t))
    around[0], around[-1] = ends  # to the bit
    told = _one_label(label, steps)
    images, others = (decode(pipeline, latents, told) for latents in (straight, around))
    return Interpolation(images, others, straight, around, _angle(*_directions(*noise)))


def slerp(start: torch.Tensor, end: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Interpolate spherically: the direction turns evenly, the length changes evenly.

    Vectors of one length stay at that length. Of opposite directions no great circle is the
    shortest: the one through the axis that is farthest from them is taken. A vector of zeros has no
    direction, and takes the other's.

    Args:
        start, end: of one shape, two numbers or more.
        t: (steps,), from 0 to 1.

    Returns:
        (steps, …).

    Source: Shoemake 1985, "Animating rotation with quaternion curves"
    """
    first, last = _directions(start, end)
    angle = _angle(first, last)
    across = last - (first @ last) * first
    if across.norm() < 1e-12:
        across = torch.zeros_like(first)
        across[first.abs().argmin()] = 1
        across -= (first @ across) * first
    across /= across.norm()
    turn = t.double()[:, None] * angle
    lengths = torch.lerp(start.double().norm(), end.double().norm(), t.double())[:, None]
    found = lengths * (turn.cos() * first + turn.sin() * across)
    found[t == 0], found[t == 1] = start.double().flatten(), end.double().flatten()
    return found.unflatten(1, start.shape).to(start.dtype)


def _directions(start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two vectors at length 1, flat; one of zeros as the other."""
    first, last = start.double().flatten(), end.double().flatten()
    if not first.any() and not last.any():
        first = torch.ones_like(first)
    first, last = (first if first.any() else last), (last if last.any() else first)
    return first / first.norm(), last / last.norm()


def _angle(first: torch.Tensor, last: torch.Tensor) -> float:
    """Tell the angle between two directions; near 0 and pi an arccosine would be inexact."""
    return 2 * math.atan2((first - last).norm().item(), (first + last).norm().item())


# ---------------------------------------------------------------------------------------------
# Concepts


def concept(latents: torch.Tensor, has_it: Sequence[bool] | torch.Tensor) -> torch.Tensor:
    """Find the direction of a concept: the mean of latents that have it less that of the others.

    `latents + strength * concept` has more of it; `shift` shows that.

    Args:
        latents: of examples, (n, …).
        has_it: (n,), whether each is an example of the concept or of its absence.

    Returns:
        (…).

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.

    Source: Larsen et al. 2016, https://arxiv.org/abs/1512.09300
    """
    check_finite("latents", latents)
    mask = torch.as_tensor(has_it, device=latents.device)
    if mask.dtype != torch.bool or mask.shape != latents.shape[:1]:
        raise ValueError(
            f"has_it must be {len(latents)} of True and False, got {tuple(mask.shape)} of "
            f"{str(mask.dtype).removeprefix('torch.')}"
        )
    if mask.all() or not mask.any():
        raise ValueError(f"has_it: {int(mask.sum())} of {len(mask)}; a concept needs both kinds")
    values = latents.detach().double()
    return (values[mask].mean(0) - values[~mask].mean(0)).to(latents.dtype)


@dataclass(frozen=True, eq=False)
class Shift:
    """Images moved along a direction of the latent space."""

    images: torch.Tensor = field(repr=False)  # (strengths, n, channels, height, width)
    strengths: list[float]

    def __str__(self) -> str:
        return f"{self.images.shape[1]} images at strengths {', '.join(_names(self.strengths))}"

    def save(self, path: str | Path) -> None:
        """Write a row a strength into a PNG."""
        named = zip(_names(self.strengths), self.images, strict=True)
        image_grid.rows(dict(named), Path(path))


def shift(
    pipeline: Decoder,
    latents: torch.Tensor,
    direction: torch.Tensor,
    strengths: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0),
    labels: IntLabels | None = None,
) -> Shift:
    """Decode latents moved along a direction, such as a concept.

    Args:
        latents: (n, *latent_shape).
        direction: (*latent_shape,).
        strengths: multiples of the direction to add, all different.
        labels: the class of each, for a model that is told.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.
    """
    check_latents(pipeline, "latents", latents, many=True)
    check_latents(pipeline, "direction", direction)
    check_finite("strengths", torch.tensor(strengths))
    if not strengths or len(set(_names(strengths))) < len(strengths):
        raise ValueError(f"strengths must be different numbers, got {list(strengths)}")
    told = None if labels is None else as_int_labels("labels", labels, len(latents))
    scale = _column(torch.tensor(strengths), latents.ndim)
    moved = (latents.detach().cpu() + scale * direction.detach().cpu()).flatten(0, 1)
    images = decode(pipeline, moved, None if told is None else told.repeat(len(strengths)))
    return Shift(images.unflatten(0, (len(strengths), -1)), list(strengths))


def _names(strengths: Sequence[float]) -> list[str]:
    return [f"{strength:+g}" if strength else "0" for strength in strengths]


# ---------------------------------------------------------------------------------------------
# Small things


def _column(values: torch.Tensor, dims: int) -> torch.Tensor:
    """Add dimensions to broadcast over."""
    return values.view(-1, *[1] * dims)


def _one_label(label: int | None, count: int) -> torch.Tensor | None:
    return None if label is None else as_int_labels("label", [label] * count, count)
