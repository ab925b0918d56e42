"""Walks in the latent space of any image model: scatter, plane, paths, concepts, projection.

A pipeline is any object that decodes (`Decoder`); some encode, too (`Encoder`). Latents of images
come from `encode`, or from `project`, which every pipeline allows; all else takes latents. Images
are in [-1, 1], (n, channels, height, width); latents are (n, *pipeline.latent_shape). What is
returned lies on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from tqdm import tqdm

from genkit import mosaic, plots
from genkit.images import Images, blocks

ROWS = 64  # images that a model sees at a time
RATE = 0.1  # of projection: a step's length at first, in standard deviations of the prior
Whole = Sequence[int] | np.ndarray | torch.Tensor


class Decoder(Protocol):
    """A pipeline as every image family has it."""

    @property
    def device(self) -> torch.device:
        """Where its models are."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""

    def place(self, noise: torch.Tensor) -> torch.Tensor:
        """Turn standard normal numbers into latents, by an affine map or not at all."""

    def decode(self, latents: torch.Tensor, labels: Any = None) -> torch.Tensor:
        """Return images; gradients pass."""


@runtime_checkable
class Encoder(Protocol):
    """A pipeline that finds the latents of images by itself."""

    def encode(self, images: torch.Tensor, labels: Any = None) -> torch.Tensor:
        """Return latents."""


def encode(
    pipeline: Decoder, images: Images | torch.Tensor, labels: Whole | None = None
) -> torch.Tensor:
    """Encode any number of images, some at a time.

    Args:
        labels: the class of each image, for a model that is told.

    Returns:
        Latents, (n, *latent_shape).

    Raises:
        ValueError: the pipeline has no encoder, or the images are not such as it makes.
    """
    if not isinstance(pipeline, Encoder):
        raise ValueError(
            f"pipeline: {type(pipeline).__name__} has no encoder; `project` finds latents without"
        )
    told = _check_images(pipeline, images, labels)
    found = []
    with tqdm(total=len(images), desc="encoding", unit=" images", delay=2, leave=False) as bar:
        for which in blocks(len(images), ROWS):
            classes = None if told is None else told[which]
            found.append(pipeline.encode(_look_up(images, which), classes).cpu())
            bar.update(len(which))
    return torch.cat(found)


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
    latents: torch.Tensor, classes: Whole | None = None, names: Sequence[str] = ()
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
    _check_finite("latents", latents)
    kinds = None if classes is None else _whole("classes", classes, len(latents))
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
        mosaic.grid(self.images, Path(path), len(self.quantiles), gap=0)


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
    latents = _placed(pipeline, noise.flatten(0, 1))
    images = _decoded(pipeline, latents, _one_label(label, side**2))
    return Plane(images, latents, places.tolist(), (dims[0], dims[1]))


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
        mosaic.rows({"linear": self.linear, "spherical": self.spherical}, Path(path))


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
    _check_latents(pipeline, "start", start)
    _check_latents(pipeline, "end", end)
    if steps < 2:
        raise ValueError(f"steps must be 2 or more, got {steps}")
    if start.numel() < 2:
        raise ValueError("pipeline: of one latent; a great circle needs two or more")
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = torch.stack([start, end]).detach().cpu().float()
    straight = torch.lerp(ends[0].double(), ends[1].double(), _column(t, start.ndim)).float()
    noise = _unplaced(pipeline, ends)
    around = _placed(pipeline, slerp(noise[0], noise[1], t))
    around[0], around[-1] = ends  # to the bit
    told = _one_label(label, steps)
    images, others = (_decoded(pipeline, latents, told) for latents in (straight, around))
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
    _check_finite("latents", latents)
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
        mosaic.rows(dict(named), Path(path))


def shift(
    pipeline: Decoder,
    latents: torch.Tensor,
    direction: torch.Tensor,
    strengths: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0),
    labels: Whole | None = None,
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
    _check_latents(pipeline, "latents", latents, many=True)
    _check_latents(pipeline, "direction", direction)
    _check_finite("strengths", torch.tensor(strengths))
    if not strengths or len(set(_names(strengths))) < len(strengths):
        raise ValueError(f"strengths must be different numbers, got {list(strengths)}")
    told = None if labels is None else _whole("labels", labels, len(latents))
    scale = _column(torch.tensor(strengths), latents.ndim)
    moved = (latents.detach().cpu() + scale * direction.detach().cpu()).flatten(0, 1)
    images = _decoded(pipeline, moved, None if told is None else told.repeat(len(strengths)))
    return Shift(images.unflatten(0, (len(strengths), -1)), list(strengths))


def _names(strengths: Sequence[float]) -> list[str]:
    return [f"{strength:+g}" if strength else "0" for strength in strengths]


# ---------------------------------------------------------------------------------------------
# Projection


@dataclass(frozen=True, eq=False)
class Projection:
    """Images as near to given ones as a model comes."""

    target: torch.Tensor = field(repr=False)  # (n, channels, height, width)
    images: torch.Tensor = field(repr=False)  # what the latents decode to
    latents: torch.Tensor = field(repr=False)  # (n, *latent_shape)
    errors: torch.Tensor = field(repr=False)  # (n, starts): mean squared, the least on each way
    started: torch.Tensor = field(repr=False)  # (n, starts): before the first step
    encoded: bool  # the last start is the encoder's answer
    steps: int

    @property
    def error(self) -> torch.Tensor:
        """Mean squared difference of each image from its target, (n,); values are in [-1, 1]."""
        return self.errors.min(1).values

    def __str__(self) -> str:
        count, starts = self.errors.shape
        head = f"{count} {'image' if count == 1 else 'images'}, {starts} starts, {self.steps} steps"
        lines = [f"{head}{', the last start from the encoder' if self.encoded else ''}"]
        for i, (each, best) in enumerate(zip(self.errors, self.error, strict=True)):
            all_of_them = " ".join(f"{error:.5f}" for error in each.tolist())
            lines.append(f"{i}: mean squared error {best:.5f} (starts led to {all_of_them})")
        return "\n".join(lines[:11] + (["…"] if count > 10 else []))

    def save(self, path: str | Path) -> None:
        """Write the targets over what was found into a PNG."""
        mosaic.rows({"target": self.target, "found": self.images}, Path(path))


def project(
    pipeline: Decoder,
    images: Images | torch.Tensor,
    restarts: int = 4,
    steps: int = 200,
    pull: float = 1e-4,
    seed: int | Sequence[int] = 0,
    labels: Whole | None = None,
) -> Projection:
    """Find the latents that decode to what is nearest to each image, by gradient descent.

    Adam, its rate falling to 0 by a cosine, goes down the mean squared error from several draws of
    the prior and, where there is an encoder, from its answer; it walks where latents are standard
    normal, before `place`. The place of least error on any of the ways is taken, so the result is
    never worse than the best start. An image's result depends on its own seed and not, but for
    rounding, on the others; with more restarts it starts from the same places, and from others.

    Args:
        images: the targets.
        restarts: draws of the prior for each image.
        steps: of each descent.
        pull: of the prior on the way: what is added to the error for each squared standard
            deviation from the middle, mean over the latents.
        seed: a number, then image i has seed + i; or one number an image.
        labels: the class of each image, for a model that is told.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.

    Source: Creswell and Bharath 2018, https://arxiv.org/abs/1802.05701, with restarts
    """
    for name, value, least in (("restarts", restarts, 1), ("steps", steps, 1), ("pull", pull, 0)):
        if not value >= least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    told = _check_images(pipeline, images, labels)
    if isinstance(seed, int | np.integer):
        seed = range(seed, seed + len(images))
    seeds = _whole("seed", seed, len(images))
    if seeds.min() < 0:
        raise ValueError(f"seed must be 0 or more, got {seeds.min()}")
    encoded = isinstance(pipeline, Encoder)
    noise = torch.stack([_draws(s, restarts, pipeline.latent_shape) for s in seeds.tolist()])
    if encoded:
        answer = _unplaced(pipeline, encode(pipeline, images, told))
        noise = torch.cat([noise, answer[:, None]], 1)
    starts = noise.shape[1]
    turns = list(blocks(len(images), max(1, ROWS // starts)))
    parts = []
    shown = {"desc": "projecting", "unit": " steps", "delay": 2, "leave": False}
    with tqdm(total=len(turns) * steps, **shown) as bar:
        for which in turns:
            target = _look_up(images, which)
            classes = None if told is None else told[which].repeat_interleave(starts)
            parts.append(
                (target, *_descend(pipeline, noise[which], target, classes, steps, pull, bar))
            )
    whole = [torch.cat(part).cpu() for part in zip(*parts, strict=True)]
    target, images, latents, errors, started = whole
    return Projection(target, images, latents, errors, started, encoded, steps)


def _draws(seed: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw one after the other, so that the first are the same however many follow."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


@torch.enable_grad()
def _descend(
    pipeline: Decoder,
    starts: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor | None,
    steps: int,
    pull: float,
    bar: Any,
) -> tuple[torch.Tensor, ...]:
    """Go down from (n, starts, …) standard normal numbers towards (n, …) images.

    Returns:
        The best images and latents, (n, …); errors at the end and at the start, (n, starts).
    """
    shape = starts.shape[:2]
    noise = starts.flatten(0, 1).to(pipeline.device).requires_grad_()
    wanted = target.to(pipeline.device).repeat_interleave(shape[1], 0)
    optimizer = torch.optim.Adam([noise], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors, best, images = [], noise.detach().clone(), torch.zeros_like(wanted)
    least = torch.full((len(noise),), torch.inf, device=noise.device)
    for step in range(steps + 1):
        decoded = pipeline.decode(pipeline.place(noise), labels)
        error = (decoded - wanted).square().flatten(1).mean(1)
        errors.append(error.detach())
        better = error.detach() < least
        least[better], best[better] = error.detach()[better], noise.detach()[better]
        images[better] = decoded.detach()[better]
        if step < steps:
            cost = error + pull * noise.square().flatten(1).mean(1)
            (noise.grad,) = torch.autograd.grad(cost.sum(), noise)  # none for the weights
            optimizer.step()
            schedule.step()
            bar.update()
    ends = least.unflatten(0, shape)
    winners = torch.arange(shape[0], device=ends.device) * shape[1] + ends.argmin(1)
    latents = pipeline.place(best[winners]).detach()
    return images[winners], latents, ends, errors[0].unflatten(0, shape)


# ---------------------------------------------------------------------------------------------
# Models and arguments


@torch.no_grad()
def _placed(pipeline: Decoder, noise: torch.Tensor) -> torch.Tensor:
    return pipeline.place(noise.to(pipeline.device)).cpu()


@torch.no_grad()
def _unplaced(pipeline: Decoder, latents: torch.Tensor) -> torch.Tensor:
    """Undo `place`: return the standard normal numbers that it would turn into these latents."""
    if torch.equal(_placed(pipeline, latents), latents):
        return latents  # it does nothing, as for most models
    axes = torch.eye(latents[0].numel()).unflatten(1, latents.shape[1:])
    origin = _placed(pipeline, torch.zeros_like(latents[:1]))
    matrix = (_placed(pipeline, axes) - origin).flatten(1).double()
    offsets = (latents - origin).flatten(1).double()
    return torch.linalg.solve(matrix, offsets, left=False).float().view_as(latents)


@torch.no_grad()
def _decoded(pipeline: Decoder, latents: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Decode some at a time."""
    parts = [
        pipeline.decode(latents[which], None if labels is None else labels[which]).cpu()
        for which in blocks(len(latents), ROWS)
    ]
    return torch.cat(parts)


def _look_up(images: Images | torch.Tensor, which: np.ndarray) -> torch.Tensor:
    return images.batch(which) if isinstance(images, Images) else images.detach()[which].float()


def _column(values: torch.Tensor, dims: int) -> torch.Tensor:
    """Add dimensions to broadcast over."""
    return values.view(-1, *[1] * dims)


def _check_images(
    pipeline: Decoder, images: Images | torch.Tensor, labels: Whole | None
) -> torch.Tensor | None:
    """Check images, and return their labels as a tensor."""
    if not len(images):
        raise ValueError("images: there are none")
    told = None if labels is None else _whole("labels", labels, len(images))
    kinds = None if told is None else told.unique()
    origins = torch.zeros(1 if kinds is None else len(kinds), *pipeline.latent_shape)
    made = _decoded(pipeline, _placed(pipeline, origins), kinds)  # it refuses labels that are wrong
    size = images.size if isinstance(images, Images) else tuple(images.shape[1:])
    if size != tuple(made.shape[1:]):
        raise ValueError(
            f"images must be of {tuple(made.shape[1:])} (channels, height, width), as the model "
            f"makes them, got {tuple(size)}"
        )
    if isinstance(images, torch.Tensor):
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
        _check_finite("images", images)
        if images.abs().max() > 1:
            raise ValueError(f"images must be in [-1, 1], got {images.min():g} to {images.max():g}")
    return told


def _check_latents(pipeline: Decoder, name: str, latents: torch.Tensor, many: bool = False) -> None:
    shape = tuple(latents.shape[1:] if many else latents.shape)
    if shape != tuple(pipeline.latent_shape) or not len(latents):
        wanted = f"(n, *{pipeline.latent_shape})" if many else str(pipeline.latent_shape)
        raise ValueError(f"{name} must be of {wanted}, got {tuple(latents.shape)}")
    _check_finite(name, latents)


def _check_finite(name: str, values: torch.Tensor) -> None:
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: {bad:,} of {values.numel():,} values are not finite")


def _one_label(label: int | None, count: int) -> torch.Tensor | None:
    return None if label is None else _whole("label", [label] * count, count)


def _whole(name: str, values: Whole, count: int) -> torch.Tensor:
    """Return whole numbers, one an image, as int64."""
    found = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if found.dtype.kind not in "iu" or found.shape != (count,):
        raise ValueError(
            f"{name} must be {count} whole numbers, got {found.shape} of {found.dtype}"
        )
    return torch.from_numpy(found.astype(np.int64))
