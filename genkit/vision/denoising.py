"""Look inside a diffusion model or a flow: its errors, its way from noise to an image, and back.

Images are in [-1, 1], (n, channels, height, width); so is their noise, standard normal. What is
returned lies on the CPU. Paths between noises are those of genkit/latent.py; what fills holes is in
genkit/inpainting.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from genkit import plots
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.models import diffusion, diffusion_losses
from genkit.models.diffusion import DenoisingPipeline, Network
from genkit.models.diffusion_losses import Noising
from genkit.vision import image_grid, pipelines
from genkit.vision.pipelines import ROWS, IntLabels, as_int_labels, check_latents, image_batch

COLUMNS = 12  # images side by side in a picture
LEAST = 0.01  # noise that a network sees in an image, where it has to be told from an image alone

# ---------------------------------------------------------------------------------------------
# Loss by time


@dataclass(frozen=True)
class LossByTime:
    """How much a network errs at which time, an entry an image; it has the shape of training's."""

    times: torch.Tensor
    losses: torch.Tensor
    objective: str

    @property
    def mean(self) -> float:
        """The loss over all times."""
        return self.losses.mean().item()

    def __str__(self) -> str:
        error = f"mean squared error of {self.objective}"
        return f"{error} over {len(self.times):,} times: {self.mean:.4f}"

    def save(self, path: str | Path) -> None:
        """Draw it into a PNG."""
        plots.loss_by_time(self.times.numpy(), self.losses.numpy(), self.objective, Path(path))


@torch.no_grad()
def loss_by_time(
    pipeline: DenoisingPipeline, images: Images, network: Network | None = None, seed: int = 0
) -> LossByTime:
    """Measure a diffusion model's error at times spread as in training, one for each image.

    Args:
        images: with their classes, for a model that is told.
        network: to ask in the pipeline's place, such as the same compiled.
        seed: of the noise, and of which time an image gets.

    Returns:
        In the order of times.
    """
    if images.size != pipeline.latent_shape or not len(images):
        raise ValueError(
            f"images must be of {pipeline.latent_shape}, as the model makes them, got "
            f"{len(images)} of {images.size}"
        )
    scheduler, ask = pipeline.scheduler, network or pipeline.tell
    objective = diffusion.objective_of(scheduler)
    generator = torch.Generator().manual_seed(seed)
    ranks = (torch.arange(len(images)) + 0.5) / len(images)
    way, losses = diffusion_losses.noising_at_quantiles(scheduler, ranks), []
    order = torch.randperm(len(images), generator=generator).numpy()
    for which in blocks(len(images), ROWS):
        real = images.batch(order[which], pipeline.device)
        noise = torch.randn(real.shape, generator=generator).to(pipeline.device)
        labels = images.classes(order[which], pipeline.device) if pipeline.labels else None
        part = Noising(
            *(each[which].to(pipeline.device) for each in (way.times, way.alpha, way.sigma))
        )
        told = ask(part.mix(real, noise), part.times.float(), labels).float()
        wanted = diffusion_losses.target(real, noise, part.alpha, part.sigma, objective)
        losses.append((told - wanted).square().mean((1, 2, 3)).cpu())
    return LossByTime(way.times.float(), torch.cat(losses), objective)


# ---------------------------------------------------------------------------------------------
# From noise to an image


@dataclass(frozen=True, eq=False)
class DenoisingTrajectory:
    """How an image comes out of noise."""

    mixed: torch.Tensor = field(repr=False)  # x_t, (shown, channels, height, width)
    clean: torch.Tensor = field(repr=False)  # the image that the network takes it for
    times: list[float]  # falling
    image: torch.Tensor = field(repr=False)  # what came out, (channels, height, width)

    def __str__(self) -> str:
        return f"{len(self.times)} times from {self.times[0]:.0f} to {self.times[-1]:.0f}"

    def save(self, path: str | Path) -> None:
        """Write x_t over the predicted x_0, with the times, into a PNG."""
        images = {"x_t": self.mixed, "predicted x_0": self.clean}
        image_grid.rows({**images, "time": _names(self.times)}, Path(path))


@torch.no_grad()
def denoising_trajectory(
    pipeline: DenoisingPipeline,
    seed: int = 0,
    label: int | None = None,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance: float = 1.0,
    shown: int = 8,
) -> DenoisingTrajectory:
    """Show x_t and the image that the network takes it for, as an image is drawn.

    All x_t are on the scale of training. The last prediction is what comes out, but for values
    beyond [-1, 1].

    Args:
        seed: the image is the one that the pipeline draws by it.
        label: the class, for a model that is told.
        steps, scheduler: see `diffusion.sampler`.
        guidance: see `diffusion.denoise`.
        shown: times, two or more, spread evenly over the steps; each step if those are fewer.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.

    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 15 and figure 6
    """
    _check_shown(shown)
    pipeline.check_guidance(guidance)
    known = pipeline.classes(None if label is None else as_int_labels("label", [label], 1), 1)
    drawer = diffusion.make_sampler(pipeline.scheduler, scheduler, steps)
    own = row_generators(seed, 1)
    noise, none = draw_noise(pipeline, own), pipeline.labels
    way = diffusion.denoise(pipeline.tell, drawer, noise, known, none, guidance, own)
    bar = tqdm(way, "denoising", len(drawer.timesteps), delay=2, leave=False, unit=" steps")
    seen = {step.time.item(): step for step in bar}  # of two guesses at a time, heun's better one
    last = list(seen.values())[-1]
    times = [list(seen)[i] for i in _spread(len(seen), shown).tolist()]
    mixed = torch.cat([seen[time].seen for time in times])
    told = torch.cat([seen[time].told for time in times])
    at = noising_at(pipeline, torch.tensor(times))
    objective = diffusion.objective_of(pipeline.scheduler)
    clean = diffusion_losses.predicted_image(mixed, told, at.alpha, at.sigma, objective)
    return DenoisingTrajectory(mixed.cpu(), clean.cpu(), times, last.after[0].clamp(-1, 1).cpu())


@dataclass(frozen=True, eq=False)
class NoisingTrajectory:
    """How images vanish in noise."""

    mixed: torch.Tensor = field(repr=False)  # x_t, (shown, n, channels, height, width)
    times: list[float]  # growing

    def __str__(self) -> str:
        shown, count = self.mixed.shape[:2]
        return f"{count} {_images(count)} at {shown} times to {self.times[-1]:.0f}"

    def save(self, path: str | Path) -> None:
        """Write a row an image, with the times, into a PNG."""
        named: dict[str, torch.Tensor | list[str]] = {
            str(i): self.mixed[:, i] for i in range(self.mixed.shape[1])
        }
        image_grid.rows(named | {"time": _names(self.times)}, Path(path))


def noising_trajectory(
    pipeline: DenoisingPipeline, images: Images | torch.Tensor, shown: int = 8, seed: int = 0
) -> NoisingTrajectory:
    """Add noise to images, as training does, at times spread evenly over the way.

    Args:
        images: of any number.
        shown: times, two or more, from the first to the last.
        seed: image i has the noise of seed + i, one at all times.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.
    """
    _check_shown(shown)
    real = images_as_tensor(pipeline, images)
    noise = pipelines.draw_latents(pipeline, len(real), seed)
    flow = diffusion.objective_of(pipeline.scheduler) == "flow"
    last = pipeline.scheduler.config.num_train_timesteps - (not flow)
    times = torch.linspace(0, last, shown)
    at = noising_at(pipeline, times if flow else times.round())
    rows = zip(at.times, at.alpha, at.sigma, strict=True)
    mixed = torch.stack(
        [Noising(*(each[None].cpu() for each in row)).mix(real, noise) for row in rows]
    )
    return NoisingTrajectory(mixed, at.times.tolist())


# ---------------------------------------------------------------------------------------------
# From an image to noise


@dataclass(frozen=True, eq=False)
class Inversion:
    """The noise that images come from."""

    images: torch.Tensor = field(repr=False)  # as given, (n, channels, height, width)
    noise: torch.Tensor = field(repr=False)
    reconstruction: torch.Tensor = field(repr=False)  # what is drawn from that noise
    steps: int  # each way

    @property
    def errors(self) -> torch.Tensor:
        """Mean squared difference of each reconstruction from its image, (n,)."""
        return (self.reconstruction - self.images).square().mean((1, 2, 3))

    def __str__(self) -> str:
        count, error = len(self.images), self.errors.mean().item()
        return f"{count} {_images(count)}, {self.steps} steps: mean squared error {error:.5f}"

    def save(self, path: str | Path) -> None:
        """Write images, their noise and what is drawn from it, with the errors, into a PNG."""
        named: dict[str, torch.Tensor | list[str]] = {
            "image": self.images,
            "noise": self.noise,
            "reconstruction": self.reconstruction,
            "squared error": [f"{error:.4f}" for error in self.errors.tolist()],
        }
        image_grid.rows(named, Path(path), COLUMNS)


@torch.no_grad()
def invert(
    pipeline: DenoisingPipeline,
    images: Images | torch.Tensor,
    labels: IntLabels | None = None,
    steps: int = 50,
) -> Inversion:
    """Find the noise that a sampler without chance makes images of, and draw them from it again.

    The equation of ddim, which in a flow is that of euler, is followed from the image to the noise.
    It asks the network where a step begins, the sampler where that step ends: they differ less, and
    with them the images, the more steps there are.

    Args:
        labels: the class of each image, for a model that is told.
        steps: each way; what they cost is twice as many evaluations.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.

    Source: Song et al. 2021, https://arxiv.org/abs/2010.02502, section 4.3
    """
    real = images_as_tensor(pipeline, images)
    known, way = checked_labels(pipeline, labels, len(real)), noise_levels(pipeline, steps)
    parts = []
    turns, shown = list(blocks(len(real), ROWS)), {"desc": "inverting", "unit": " steps"}
    with tqdm(total=2 * steps * len(turns), delay=2, leave=False, **shown) as bar:
        for which in turns:
            x, told = real[which].to(pipeline.device), None if known is None else known[which]
            noise = _follow(pipeline, x, told, way, range(steps + 1), bar)
            drawn = _follow(pipeline, noise, told, way, range(steps, -1, -1), bar)
            parts.append((noise.cpu(), drawn.cpu()))
    found, reconstruction = (torch.cat(part) for part in zip(*parts, strict=True))
    return Inversion(real, found, reconstruction, steps)


def _follow(
    pipeline: DenoisingPipeline,
    x: torch.Tensor,
    labels: torch.Tensor | None,
    way: Noising,
    order: Sequence[int],
    bar: Any,
) -> torch.Tensor:
    """Lead x from level to level of the way by the equation of ddim.

    diffusers' scheduler of that name goes astray where its steps do not divide those of training,
    and leaves the noise as it was where it limits the image, so that x no longer is their mixture.
    """
    for here, there in pairwise(order):
        image, noise = predict_image_and_noise(pipeline, x, labels, way, here)
        if there < here:
            image = image.clamp(-1, 1)
            noise = (x - way.alpha[here] * image) / way.sigma[here]
        x = way.alpha[there] * image + way.sigma[there] * noise
        bar.update()
    return x


# ---------------------------------------------------------------------------------------------
# Places on the way


def noising_at(pipeline: DenoisingPipeline, times: torch.Tensor) -> Noising:
    """Return where rows are at given times, (n,), also at those between the times of training."""
    scheduler, times = pipeline.scheduler, times.to(pipeline.device)
    if diffusion.objective_of(scheduler) == "flow":
        return diffusion_losses.noising_at_timesteps(scheduler, times.float())
    # samplers interpolate log(grain / signal)
    ends = [
        diffusion_losses.noising_at_timesteps(scheduler, each.long())
        for each in (times.floor(), times.ceil())
    ]
    low, high = (2 * (end.sigma / end.alpha.clamp(min=1e-6)).log() for end in ends)
    log_ratio = torch.lerp(low, high, (times - times.floor()).to(low.dtype))
    return Noising(times, (-log_ratio).sigmoid().sqrt(), log_ratio.sigmoid().sqrt())


def noise_levels(pipeline: DenoisingPipeline, steps: int) -> Noising:
    """Return places spread evenly over the way, (steps + 1,): the image's first, noise's last.

    Raises:
        ValueError: the steps cannot be made.
    """
    scheduler, steps = pipeline.scheduler, diffusion.check_steps(pipeline.scheduler, steps)
    flow = diffusion.objective_of(scheduler) == "flow"
    times = scheduler.config.num_train_timesteps * torch.arange(1, steps + 1) / steps
    way = noising_at(pipeline, times if flow else times.round() - 1)
    alpha, sigma = F.pad(way.alpha, (1, 0), value=1.0), F.pad(way.sigma, (1, 0))
    return Noising(F.pad(way.times, (1, 0)), alpha, sigma)


def predict_image_and_noise(
    pipeline: DenoisingPipeline,
    x: torch.Tensor,
    labels: torch.Tensor | None,
    way: Noising,
    level: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask the network what image and what noise x at a level of the way is made of."""
    objective = diffusion.objective_of(pipeline.scheduler)
    alpha, sigma = way.alpha[level : level + 1], way.sigma[level : level + 1]
    told = pipeline.tell(x, way.times[level].float().expand(len(x)), labels)
    image = diffusion_losses.predicted_image(x, told, alpha, sigma, objective)
    if objective == "epsilon":
        return image, told
    if objective == "v":
        return image, sigma * x + alpha * told
    if objective == "flow":
        return image, image + told
    return image, (x - alpha * image) / sigma.clamp(min=LEAST)


# ---------------------------------------------------------------------------------------------
# Arguments and small things


def images_as_tensor(pipeline: DenoisingPipeline, images: Images | torch.Tensor) -> torch.Tensor:
    """Return images as a tensor; refuse such as the model does not make.

    Raises:
        ValueError: they are not; it says why.
    """
    if isinstance(images, torch.Tensor) and not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
    real = image_batch(images, np.arange(len(images))).cpu()
    check_latents(pipeline, "images", real, many=True)  # of the images' shape
    if real.abs().max() > 1:
        raise ValueError(f"images must be in [-1, 1], got {real.min():g} to {real.max():g}")
    return real


def checked_labels(
    pipeline: DenoisingPipeline, labels: IntLabels | None, count: int
) -> torch.Tensor | None:
    """Check labels, one an image, and return them as a tensor.

    Raises:
        ValueError: they do not fit the model.
    """
    return pipeline.classes(
        None if labels is None else as_int_labels("labels", labels, count), count
    )


def row_generators(seed: int, count: int) -> list[torch.Generator]:
    """Return a source of chance for each image, so that what it draws depends on its own alone.

    Raises:
        ValueError: the seed cannot be one.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def draw_noise(pipeline: DenoisingPipeline, own: list[torch.Generator]) -> torch.Tensor:
    """Draw noise, a row a generator."""
    rows = [torch.randn(pipeline.latent_shape, generator=each) for each in own]
    return torch.stack(rows).to(pipeline.device)


def _check_shown(shown: int) -> None:
    if shown < 2:
        raise ValueError(f"shown must be 2 or more, got {shown}")


def _spread(count: int, shown: int) -> torch.Tensor:
    """Return places of 0 to count - 1, both ends included, evenly spread."""
    return torch.linspace(0, count - 1, min(count, shown)).round().long()


def _names(times: list[float]) -> list[str]:
    return [f"{time:.0f}" for time in times]


def _images(count: int) -> str:
    return "image" if count == 1 else "images"
