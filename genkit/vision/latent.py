"""The latent space of any image model: scatter, plane, truncation, interpolation, concepts.

Latents of images come from `pipelines.encode`, or from `projection.project` where there is no
encoder; random ones from `pipelines.draw_latents`. For pipelines and shapes see
genkit/vision/pipelines.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from genkit import plots
from genkit.notebook import DrawnRecord
from genkit.vision import image_grid
from genkit.vision.pipelines import (
    Decoder,
    IntLabels,
    as_int_labels,
    check_finite,
    check_latents,
    decode,
    describe_labels,
    draw_latents,
    label_to_draw,
    labels_to_draw,
    latent_to_noise,
    noise_to_latent,
)

# ---------------------------------------------------------------------------------------------
# Scatter and plane


@dataclass(frozen=True, eq=False)
class Scatter(DrawnRecord):
    """Latents in two dimensions."""

    points: torch.Tensor = field(repr=False)  # (n, 2), float64
    classes: torch.Tensor | None = field(repr=False)  # (n,), int64
    names: list[str]  # of the classes
    explained: tuple[float, float] | None  # share of the variance of each component; None: all
    latents: int  # dimensions of an image's latents

    @property
    def caption(self) -> str:
        """Number of images, and the share of the variance that is shown."""
        count = f"{len(self.points):,} images"
        if self.explained is None:
            return f"{count}, both latents"
        share = 100 * sum(self.explained)
        return f"{count}, {share:.0f} % of the variance of {self.latents:,} latents"

    def __str__(self) -> str:
        if self.classes is None:
            return self.caption
        return f"{self.caption}, {len(self.classes.unique())} classes"

    def save(self, path: str | Path) -> None:
        """Plot the points, coloured by class, into a PNG."""
        names = ["latent 0", "latent 1"]
        if self.explained is not None:
            names = [f"component {i} ({100 * e:.0f} %)" for i, e in enumerate(self.explained, 1)]
        classes = None if self.classes is None else self.classes.numpy()
        plots.latent_scatter(
            self.points.numpy(), classes, self.names, Path(path), names, self.caption
        )


def scatter(
    latents: torch.Tensor, classes: IntLabels | None = None, names: Sequence[str] = ()
) -> Scatter:
    """Project latents to two dimensions: the two latents, or the first two principal components.

    Args:
        latents: (n, …), n of 3 or more.
        classes: (n,), 0 or more; each class has a colour.
        names: of the classes; default: their numbers.

    Raises:
        ValueError: an argument is invalid.
    """
    if latents.ndim < 2 or len(latents) < 3 or latents[0].numel() < 2:
        raise ValueError(
            f"latents must be (n, …), n of 3 or more and 2 or more numbers each, got "
            f"{tuple(latents.shape)}"
        )
    check_finite("latents", latents)
    labels = None if classes is None else as_int_labels("classes", classes, len(latents))
    if labels is not None and (labels.min() < 0 or (names and labels.max() >= len(names))):
        wanted = f"0 to {len(names) - 1}" if names else "0 or more"
        raise ValueError(f"classes must be {wanted}, got {labels.min()} to {labels.max()}")
    points, explained = latents.detach().cpu().double().flatten(1), None
    if points.shape[1] > 2:
        points, explained = _principal(points)
    numbers = [] if labels is None else [str(i) for i in range(int(labels.max()) + 1)]
    return Scatter(points, labels, list(names) or numbers, explained, latents[0].numel())


def _principal(values: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """Return the first two principal components, (n, 2), and their shares of the variance."""
    from sklearn.decomposition import PCA

    if (values == values[0]).all():
        raise ValueError(f"latents must differ, got {len(values)} equal ones")
    pca = PCA(2, svd_solver="arpack", random_state=0)  # exact, and fast for many latents
    points = torch.from_numpy(pca.fit_transform(values.numpy()).copy())  # no negative strides
    first, second = pca.explained_variance_ratio_.tolist()
    return points, (first, second)


@dataclass(frozen=True, eq=False)
class Plane(DrawnRecord):
    """Images decoded over a plane of the latent space."""

    images: torch.Tensor = field(repr=False)  # (side * side, …), row by row from the top
    latents: torch.Tensor = field(repr=False)  # of each image
    quantiles: list[float]  # of the normal distribution: the coordinates along both sides
    dims: tuple[int, int]  # the latent that increases to the right, the one that increases upwards
    label: int | None = None  # the class of all; None of an unconditional model

    def __str__(self) -> str:
        side, (right, up) = len(self.quantiles), self.dims
        return (
            f"{side} x {side} images: latent {right} increases to the right, latent {up} upwards, "
            f"from {self.quantiles[0]:.2f} to {self.quantiles[-1]:.2f} standard deviations"
            f"{_class_named(self.label)}"
        )

    def save(self, path: str | Path) -> None:
        """Write the images as one PNG."""
        image_grid.grid(self.images, Path(path), len(self.quantiles))


def plane(
    pipeline: Decoder, side: int = 15, dims: tuple[int, int] = (0, 1), label: int | None = None
) -> Plane:
    """Decode a grid over two dimensions of the prior, spaced by equal shares of probability.

    Coordinates are the normal quantiles of (i + 0.5) / side (Kingma and Welling 2014, appendix A,
    https://arxiv.org/abs/1312.6114); the noise in all other dimensions is 0.

    Args:
        pipeline: with latent vectors.
        side: images along a side, two or more.
        dims: dimensions that vary to the right, and upwards.
        label: the class; default for a class-conditional model: the first.

    Raises:
        ValueError: an argument is invalid, or latents are feature maps and not vectors.
    """
    if len(pipeline.latent_shape) != 1:
        raise ValueError(
            f"pipeline: a plane needs latent vectors, got feature maps of {pipeline.latent_shape}; "
            "use `interpolate`"
        )
    if side < 2:
        raise ValueError(f"side must be 2 or more, got {side}")
    length = pipeline.latent_shape[0]
    if len(dims) != 2 or dims[0] == dims[1] or not all(0 <= d < length for d in dims):
        raise ValueError(f"dims must be two different ones of 0 to {length - 1}, got {dims}")
    quantiles = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side)
    noise = torch.zeros(side, side, length)
    noise[..., dims[0]] = quantiles.float()
    noise[..., dims[1]] = quantiles.float().flip(0)[:, None]
    latents = noise_to_latent(pipeline, noise.flatten(0, 1))
    label = label_to_draw(pipeline, label)
    images = decode(pipeline, latents, _one_label(label, side**2))
    return Plane(images, latents, quantiles.tolist(), (dims[0], dims[1]), label)


# ---------------------------------------------------------------------------------------------
# Truncation


@dataclass(frozen=True, eq=False)
class Truncation(DrawnRecord):
    """Images of the same seeds at several truncations."""

    images: torch.Tensor = field(repr=False)  # (limits, count, channels, height, width)
    limits: list[float | None]  # largest absolute values of the noise; None for no truncation
    labels: list[int] | None = None  # the class of each column

    def __str__(self) -> str:
        images = f"{self.images.shape[1]} images{_classes_named(self.labels)}"
        return f"{images} at truncations {', '.join(_limits(self.limits))}"

    def save(self, path: str | Path) -> None:
        """Write a row for each limit into a PNG."""
        image_grid.rows(dict(zip(_limits(self.limits), self.images, strict=True)), Path(path))


def truncate(
    pipeline: Decoder,
    limits: Sequence[float | None] = (0.25, 0.5, 1.0, 2.0, None),
    count: int = 8,
    seed: int = 0,
    labels: IntLabels | None = None,
) -> Truncation:
    """Sample images of the same seeds at several truncations; low ones trade variety for quality.

    Args:
        pipeline: of any family with latents.
        limits: largest absolute values of the noise, all different; None for no truncation; see
            `gan.truncate`.
        count: number of images.
        seed: image i is sampled with seed + i.
        labels: the class of each image; default for a class-conditional model: all in turn.

    Raises:
        ValueError: an argument is invalid.

    Source: Brock et al. 2019, https://arxiv.org/abs/1809.11096
    """
    if not limits or len(set(_limits(limits))) < len(limits):
        raise ValueError(f"limits must be different numbers or None, got {list(limits)}")
    latents = [draw_latents(pipeline, count, seed, limit) for limit in limits]
    classes = labels_to_draw(pipeline, labels, count)
    images = torch.stack([decode(pipeline, each, classes) for each in latents])
    return Truncation(images, list(limits), None if classes is None else classes.tolist())


def _limits(limits: Sequence[float | None]) -> list[str]:
    return ["none" if limit is None else f"{limit:g}" for limit in limits]


# ---------------------------------------------------------------------------------------------
# Interpolation


@dataclass(frozen=True, eq=False)
class Interpolation(DrawnRecord):
    """Images on a linear and on a spherical path between two latents."""

    linear: torch.Tensor = field(repr=False)  # images, (steps, …)
    spherical: torch.Tensor = field(repr=False)
    linear_latents: torch.Tensor = field(repr=False)
    spherical_latents: torch.Tensor = field(repr=False)
    angle: float  # between the noise of the ends, in radians
    label: int | None = None  # the class of all; None of an unconditional model

    def __str__(self) -> str:
        ends = f"ends {math.degrees(self.angle):.0f}° apart"
        return f"{len(self.linear)} steps, {ends}{_class_named(self.label)}"

    def save(self, path: str | Path) -> None:
        """Write both paths as rows into a PNG."""
        image_grid.rows({"linear": self.linear, "spherical": self.spherical}, Path(path))


def interpolate(
    pipeline: Decoder,
    start: torch.Tensor,
    end: torch.Tensor,
    steps: int = 8,
    label: int | None = None,
) -> Interpolation:
    """Interpolate between two latents, linearly and spherically.

    Normal vectors of many dimensions lie near a sphere. The straight line leaves it, into regions
    that are rare in training; the great circle does not (White 2016,
    https://arxiv.org/abs/1609.04468). The spherical path is that of the standard normal noise: by
    `latent_to_noise`, `slerp`, and `noise_to_latent`.

    Args:
        pipeline: of any family with latents.
        start, end: latents of one image each, (*latent_shape,).
        steps: images, both ends included; two or more.
        label: the class; default for a class-conditional model: the first.

    Raises:
        ValueError: an argument is invalid.
    """
    check_latents(pipeline, "start", start)
    check_latents(pipeline, "end", end)
    if steps < 2:
        raise ValueError(f"steps must be 2 or more, got {steps}")
    if start.numel() < 2:
        raise ValueError(f"pipeline: slerp needs latent_dim >= 2, got {start.numel()}")
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = torch.stack([start, end]).detach().cpu().float()
    linear = torch.lerp(ends[0].double(), ends[1].double(), _column(t, start.ndim)).float()
    noise = latent_to_noise(pipeline, ends)
    spherical = noise_to_latent(pipeline, slerp(noise[0], noise[1], t))
    spherical[0], spherical[-1] = ends  # bit for bit
    label = label_to_draw(pipeline, label)
    labels = _one_label(label, steps)
    images, others = (decode(pipeline, latents, labels) for latents in (linear, spherical))
    angle = _angle(*_directions(*noise))
    return Interpolation(images, others, linear, spherical, angle, label)


def slerp(start: torch.Tensor, end: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Interpolate spherically: direction and length change linearly.

    Between opposite directions every great circle is shortest; the one through the coordinate axis
    farthest from them is taken. A zero vector takes the other's direction.

    Args:
        start, end: of the same shape, two numbers or more.
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
    path = lengths * (turn.cos() * first + turn.sin() * across)
    path[t == 0], path[t == 1] = start.double().flatten(), end.double().flatten()
    return path.unflatten(1, start.shape).to(start.dtype)


def _directions(start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the directions of two vectors, flat, of length 1; a zero vector takes the other's."""
    first, last = start.double().flatten(), end.double().flatten()
    if not first.any() and not last.any():
        first = torch.ones_like(first)
    first, last = (first if first.any() else last), (last if last.any() else first)
    return first / first.norm(), last / last.norm()


def _angle(first: torch.Tensor, last: torch.Tensor) -> float:
    """Return the angle between two directions; an arccosine would be inexact near 0 and pi."""
    return 2 * math.atan2((first - last).norm().item(), (first + last).norm().item())


# ---------------------------------------------------------------------------------------------
# Concepts


def concept(latents: torch.Tensor, has_it: Sequence[bool] | torch.Tensor) -> torch.Tensor:
    """Return a concept vector: the mean of latents with an attribute less that of those without.

    `latents + strength * concept` has more of the attribute; see `shift`.

    Args:
        latents: of examples, (n, …).
        has_it: whether each has the attribute, (n,).

    Returns:
        (…).

    Raises:
        ValueError: an argument is invalid.

    Source: Larsen et al. 2016, https://arxiv.org/abs/1512.09300
    """
    check_finite("latents", latents)
    mask = torch.as_tensor(has_it, device=latents.device)
    if mask.dtype != torch.bool or mask.shape != latents.shape[:1]:
        raise ValueError(
            f"has_it must be {len(latents)} booleans, got {tuple(mask.shape)} of "
            f"{str(mask.dtype).removeprefix('torch.')}"
        )
    if mask.all() or not mask.any():
        raise ValueError(
            f"has_it needs both True and False, got {int(mask.sum())} of {len(mask)} True"
        )
    values = latents.detach().double()
    return (values[mask].mean(0) - values[~mask].mean(0)).to(latents.dtype)


@dataclass(frozen=True, eq=False)
class Shift(DrawnRecord):
    """Images moved along a direction of the latent space."""

    images: torch.Tensor = field(repr=False)  # (strengths, n, channels, height, width)
    strengths: list[float]
    labels: list[int] | None = None  # the class of each column

    def __str__(self) -> str:
        images = f"{self.images.shape[1]} images{_classes_named(self.labels)}"
        return f"{images} at strengths {', '.join(_names(self.strengths))}"

    def save(self, path: str | Path) -> None:
        """Write a row for each strength into a PNG."""
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
        pipeline: of any family with latents.
        latents: (n, *latent_shape).
        direction: (*latent_shape,).
        strengths: multiples of the direction to add, all different.
        labels: the class of each image; default for a class-conditional model: all in turn.

    Raises:
        ValueError: an argument is invalid.
    """
    check_latents(pipeline, "latents", latents, many=True)
    check_latents(pipeline, "direction", direction)
    check_finite("strengths", torch.tensor(strengths))
    if not strengths or len(set(_names(strengths))) < len(strengths):
        raise ValueError(f"strengths must be different numbers, got {list(strengths)}")
    classes = labels_to_draw(pipeline, labels, len(latents))
    scale = _column(torch.tensor(strengths), latents.ndim)
    moved = (latents.detach().cpu() + scale * direction.detach().cpu()).flatten(0, 1)
    images = decode(pipeline, moved, None if classes is None else classes.repeat(len(strengths)))
    images = images.unflatten(0, (len(strengths), -1))
    return Shift(images, list(strengths), None if classes is None else classes.tolist())


def _names(strengths: Sequence[float]) -> list[str]:
    return [f"{strength:+g}" if strength else "0" for strength in strengths]


# ---------------------------------------------------------------------------------------------
# Helpers


def _column(values: torch.Tensor, dims: int) -> torch.Tensor:
    """Add dimensions to broadcast over."""
    return values.view(-1, *[1] * dims)


def _class_named(label: int | None) -> str:
    return "" if label is None else f", class {label}"


def _classes_named(labels: list[int] | None) -> str:
    return "" if labels is None else f" of {describe_labels(labels)}"


def _one_label(label: int | None, count: int) -> torch.Tensor | None:
    return None if label is None else as_int_labels("label", [label] * count, count)
