"""Look inside a diffusion model or a flow: loss by timestep, denoising trajectory, inversion.

Images are in [-1, 1], noise is standard normal, both (n, channels, height, width). Returned tensors
are on the CPU. For interpolation of noise see genkit/vision/latent.py, for inpainting
genkit/vision/inpainting.py.
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

from genkit import console, plots
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.models import diffusion, diffusion_losses
from genkit.models.diffusion import DenoisingPipeline, Network
from genkit.models.diffusion_losses import Noising
from genkit.notebook import DrawnRecord
from genkit.vision import image_grid, pipelines
from genkit.vision.pipelines import ROWS, IntLabels, as_int_labels, check_latents, image_batch

COLUMNS = 12  # images side by side in a picture
LEAST_SIGMA = 0.01  # by which noise is divided where the network predicts the image alone

# ---------------------------------------------------------------------------------------------
# Loss by timestep


@dataclass(frozen=True)
class LossByTime(DrawnRecord):
    """The loss of a network at each timestep, one for each image, distributed as in training."""

    timesteps: torch.Tensor  # (n,), rising
    losses: torch.Tensor  # (n,)
    objective: str

    @property
    def mean(self) -> float:
        """The loss over all timesteps."""
        return self.losses.mean().item()

    def __str__(self) -> str:
        error = f"mean squared error of {self.objective}"
        return f"{error} over {len(self.timesteps):,} timesteps: {self.mean:.4f}"

    def save(self, path: str | Path) -> None:
        """Plot it into a PNG."""
        plots.loss_by_time(self.timesteps.numpy(), self.losses.numpy(), self.objective, Path(path))


@torch.no_grad()
def loss_by_time(
    pipeline: DenoisingPipeline, images: Images, network: Network | None = None, seed: int = 0
) -> LossByTime:
    """Measure a diffusion model's loss at timesteps distributed as in training, one for each image.

    Args:
        images: with their classes, if the model is class-conditional.
        network: replaces the pipeline's own, such as the same network compiled.
        seed: of the noise, and of the assignment of timesteps to images.

    Returns:
        A record, in the order of timesteps.
    """
    if images.size != pipeline.latent_shape or not len(images):
        raise ValueError(
            f"images must have the model's shape {pipeline.latent_shape}, got {len(images)} of "
            f"{images.size}"
        )
    scheduler, predict = pipeline.scheduler, network or pipeline.predict
    objective = diffusion.objective_of(scheduler)
    generator = torch.Generator().manual_seed(seed)
    quantiles = (torch.arange(len(images)) + 0.5) / len(images)
    noising, losses = diffusion_losses.noising_at_quantiles(scheduler, quantiles), []
    order = torch.randperm(len(images), generator=generator).numpy()
    for which in blocks(len(images), ROWS):
        real = images.batch(order[which], pipeline.device)
        noise = torch.randn(real.shape, generator=generator).to(pipeline.device)
        labels = images.classes(order[which], pipeline.device) if pipeline.labels else None
        part = Noising(
            *(
                each[which].to(pipeline.device)
                for each in (noising.timesteps, noising.alpha, noising.sigma)
            )
        )
        seen = diffusion.with_all_planes(part.mix(real, noise), pipeline.unet)
        prediction = predict(seen, part.timesteps.float(), labels).float()
        wanted = diffusion_losses.target(real, noise, part.alpha, part.sigma, objective)
        losses.append((prediction - wanted).square().mean((1, 2, 3)).cpu())
    return LossByTime(noising.timesteps.float(), torch.cat(losses), objective)


# ---------------------------------------------------------------------------------------------
# From noise to an image


@dataclass(frozen=True, eq=False)
class DenoisingTrajectory(DrawnRecord):
    """x_t and the predicted x_0 at timesteps of the sampling of one image."""

    mixed: torch.Tensor = field(repr=False)  # x_t, (shown, channels, height, width)
    clean: torch.Tensor = field(repr=False)  # predicted x_0, (shown, channels, height, width)
    timesteps: list[float]  # falling
    image: torch.Tensor = field(repr=False)  # the sample, (channels, height, width)
    label: int | None = None  # its class; None of an unconditional model

    def __str__(self) -> str:
        first, last = self.timesteps[0], self.timesteps[-1]
        named = "" if self.label is None else f", class {self.label}"
        return f"{len(self.timesteps)} timesteps from {first:.0f} to {last:.0f}{named}"

    def save(self, path: str | Path) -> None:
        """Write x_t over the predicted x_0, with the timesteps, into a PNG."""
        images = {"x_t": self.mixed, "predicted x_0": self.clean}
        image_grid.rows({**images, "timestep": _names(self.timesteps)}, Path(path))


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
    """Return the denoising trajectory of an image: x_t and the predicted x_0.

    All x_t are on the scale of training; latents are shown decoded. The last prediction is the
    sample, before it is clamped to [-1, 1].

    Args:
        seed: of the image, as in a call of the pipeline.
        label: the class; default for a class-conditional model: the first.
        steps, scheduler: see `diffusion.resolve_sampler`.
        guidance: see `diffusion.denoise`.
        shown: number of timesteps, two or more, spread evenly over the steps; at most all of them.

    Raises:
        ValueError: an argument is invalid.

    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, equation 15 and figure 6
    """
    _check_shown(shown)
    if pipeline.mean:
        raise ValueError("pipeline: a mean flow goes from noise to the image at once; give a flow")
    pipeline.check_guidance(guidance)
    label = pipelines.label_to_draw(pipeline, label)
    classes = pipeline.classes(None if label is None else as_int_labels("label", [label], 1), 1)
    sampler = diffusion.make_sampler(pipeline.scheduler, scheduler, steps)
    own = row_generators(seed, 1)
    noise, null_label = draw_noise(pipeline, own), pipeline.labels
    way = diffusion.denoise(pipeline.predict, sampler, noise, classes, null_label, guidance, own)
    bar = console.bar(way, "denoising", len(sampler.timesteps), " steps")
    steps_at = {step.timestep.item(): step for step in bar}  # of two at a timestep, heun's second
    last = list(steps_at.values())[-1]
    timesteps = [list(steps_at)[i] for i in _spread(len(steps_at), shown).tolist()]
    mixed = torch.cat([steps_at[t].model_input for t in timesteps])
    prediction = torch.cat([steps_at[t].prediction for t in timesteps])
    at = noising_at(pipeline, torch.tensor(timesteps))
    objective = diffusion.objective_of(pipeline.scheduler)
    clean = diffusion_losses.predicted_image(mixed, prediction, at.alpha, at.sigma, objective)
    image = pipeline.to_images(last.prev_sample)[0]
    if pipeline.vae is not None:
        mixed, clean = pipeline.to_images(mixed), pipeline.to_images(clean)
    return DenoisingTrajectory(mixed.cpu(), clean.cpu(), timesteps, image.cpu(), label)


@dataclass(frozen=True, eq=False)
class NoisingTrajectory(DrawnRecord):
    """x_t of images at timesteps of the forward process."""

    mixed: torch.Tensor = field(repr=False)  # x_t, (shown, n, channels, height, width)
    timesteps: list[float]  # rising

    def __str__(self) -> str:
        shown, count = self.mixed.shape[:2]
        return f"{count} {_images(count)} at {shown} timesteps to {self.timesteps[-1]:.0f}"

    def save(self, path: str | Path) -> None:
        """Write a row for each image, with the timesteps, into a PNG."""
        named: dict[str, torch.Tensor | list[str]] = {
            str(i): self.mixed[:, i] for i in range(self.mixed.shape[1])
        }
        image_grid.rows(named | {"timestep": _names(self.timesteps)}, Path(path))


def noising_trajectory(
    pipeline: DenoisingPipeline, images: Images | torch.Tensor, shown: int = 8, seed: int = 0
) -> NoisingTrajectory:
    """Add noise to images, as training does, at evenly spaced timesteps.

    Args:
        images: any number of them.
        shown: number of timesteps, two or more, from the first to the last.
        seed: image i has the noise of seed + i, the same at all timesteps.

    Raises:
        ValueError: an argument is invalid.
    """
    _check_shown(shown)
    real = images_as_tensor(pipeline, images)
    noise = pipelines.draw_latents(pipeline, len(real), seed)
    flow = diffusion.objective_of(pipeline.scheduler) == "flow"
    last = pipeline.scheduler.config.num_train_timesteps - (not flow)
    timesteps = torch.linspace(0, last, shown)
    at = noising_at(pipeline, timesteps if flow else timesteps.round())
    rows = zip(at.timesteps, at.alpha, at.sigma, strict=True)
    mixed = torch.stack(
        [Noising(*(each[None].cpu() for each in row)).mix(real, noise) for row in rows]
    )
    return NoisingTrajectory(mixed, at.timesteps.tolist())


# ---------------------------------------------------------------------------------------------
# From an image to noise


@dataclass(frozen=True, eq=False)
class Inversion(DrawnRecord):
    """The noise from which a deterministic sampler makes images; all are (n, …)."""

    images: torch.Tensor = field(repr=False)  # as given, (n, channels, height, width)
    noise: torch.Tensor = field(repr=False)
    reconstruction: torch.Tensor = field(repr=False)  # the samples from that noise
    steps: int  # in each direction

    @property
    def errors(self) -> torch.Tensor:
        """Mean squared error of each reconstruction, (n,)."""
        return (self.reconstruction - self.images).square().mean((1, 2, 3))

    def __str__(self) -> str:
        count, error = len(self.images), self.errors.mean().item()
        return f"{count} {_images(count)}, {self.steps} steps: mean squared error {error:.5f}"

    def save(self, path: str | Path) -> None:
        """Write images, their noise and reconstructions, with the errors, into a PNG."""
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
    """Find the noise from which a deterministic sampler makes images, and sample from it again.

    The ODE of ddim, in a flow that of euler, is solved from the image to the noise. Each step
    evaluates the network at its beginning, which is the end of the sampler's step: with more steps
    these differ less, and the reconstructions are closer to the images.

    Args:
        images: to invert.
        labels: the class of each image, if the model is class-conditional; default: the images'
            own.
        steps: in each direction; the cost is twice as many evaluations.

    Raises:
        ValueError: an argument is invalid.

    Source: Song et al. 2021, https://arxiv.org/abs/2010.02502, section 4.3
    """
    real = images_as_tensor(pipeline, images)
    classes, levels = checked_labels(pipeline, labels, images), noise_levels(pipeline, steps)
    parts = []
    turns = list(blocks(len(real), ROWS))
    with console.bar(None, "inverting", 2 * steps * len(turns), " steps") as bar:
        for which in turns:
            x, some = real[which].to(pipeline.device), None if classes is None else classes[which]
            noise = _solve(pipeline, x, some, levels, range(steps + 1), bar)
            sample = _solve(pipeline, noise, some, levels, range(steps, -1, -1), bar)
            parts.append((noise.cpu(), sample.cpu()))
    noise, reconstruction = (torch.cat(part) for part in zip(*parts, strict=True))
    return Inversion(real, noise, reconstruction, steps)


def _solve(
    pipeline: DenoisingPipeline,
    x: torch.Tensor,
    labels: torch.Tensor | None,
    levels: Noising,
    order: Sequence[int],
    bar: Any,
) -> torch.Tensor:
    """Move x from noise level to noise level by the equation of ddim.

    diffusers' DDIMScheduler is wrong where its steps do not divide those of training, and does not
    adapt the noise where it clamps the image, so that x is no longer their mixture.
    """
    for start, end in pairwise(order):
        image, noise = predict_image_and_noise(pipeline, x, labels, levels, start)
        if end < start:
            image = image.clamp(-1, 1)
            noise = (x - levels.alpha[start] * image) / levels.sigma[start]
        x = levels.alpha[end] * image + levels.sigma[end] * noise
        bar.update()
    return x


# ---------------------------------------------------------------------------------------------
# Noise levels


def noising_at(pipeline: DenoisingPipeline, timesteps: torch.Tensor) -> Noising:
    """Return alpha_t and sigma_t at timesteps, (n,), which may lie between those of training."""
    scheduler, timesteps = pipeline.scheduler, timesteps.to(pipeline.device)
    if diffusion.objective_of(scheduler) == "flow":
        return diffusion_losses.noising_at_timesteps(scheduler, timesteps.float())
    # samplers interpolate log(sigma / alpha)
    ends = [
        diffusion_losses.noising_at_timesteps(scheduler, each.long())
        for each in (timesteps.floor(), timesteps.ceil())
    ]
    low, high = (2 * (end.sigma / end.alpha.clamp(min=1e-6)).log() for end in ends)
    log_ratio = torch.lerp(low, high, (timesteps - timesteps.floor()).to(low.dtype))
    return Noising(timesteps, (-log_ratio).sigmoid().sqrt(), log_ratio.sigmoid().sqrt())


def noise_levels(pipeline: DenoisingPipeline, steps: int) -> Noising:
    """Return evenly spaced noise levels, (steps + 1,), from the image to noise.

    Raises:
        ValueError: steps is out of range.
    """
    scheduler, steps = pipeline.scheduler, diffusion.check_steps(pipeline.scheduler, steps)
    flow = diffusion.objective_of(scheduler) == "flow"
    timesteps = scheduler.config.num_train_timesteps * torch.arange(1, steps + 1) / steps
    at = noising_at(pipeline, timesteps if flow else timesteps.round() - 1)
    alpha, sigma = F.pad(at.alpha, (1, 0), value=1.0), F.pad(at.sigma, (1, 0))
    return Noising(F.pad(at.timesteps, (1, 0)), alpha, sigma)


def predict_image_and_noise(
    pipeline: DenoisingPipeline,
    x: torch.Tensor,
    labels: torch.Tensor | None,
    levels: Noising,
    level: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the image and the noise that the network predicts from x at a noise level."""
    objective = diffusion.objective_of(pipeline.scheduler)
    alpha, sigma = levels.alpha[level : level + 1], levels.sigma[level : level + 1]
    timesteps = levels.timesteps[level].float().expand(len(x))
    prediction = pipeline.predict(x, timesteps, labels)
    image = diffusion_losses.predicted_image(x, prediction, alpha, sigma, objective)
    if objective == "epsilon":
        return image, prediction
    if objective == "v":
        return image, sigma * x + alpha * prediction
    if objective == "flow":
        return image, image + prediction
    return image, (x - alpha * image) / sigma.clamp(min=LEAST_SIGMA)


# ---------------------------------------------------------------------------------------------
# Arguments and helpers


def images_as_tensor(pipeline: DenoisingPipeline, images: Images | torch.Tensor) -> torch.Tensor:
    """Return images as a tensor on the CPU, checked for shape and range.

    Raises:
        ValueError: their shape is not the model's, or their values are outside [-1, 1].
    """
    if pipeline.vae is not None:
        raise ValueError("pipeline: this model denoises latents; give one of images themselves")
    if isinstance(images, torch.Tensor) and not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
    real = image_batch(images, np.arange(len(images))).cpu()
    check_latents(pipeline, "images", real, many=True)  # of the images' shape
    if real.abs().max() > 1:
        raise ValueError(f"images must be in [-1, 1], got {real.min():g} to {real.max():g}")
    return real


def checked_labels(
    pipeline: DenoisingPipeline, labels: IntLabels | None, images: Images | torch.Tensor
) -> torch.Tensor | None:
    """Check labels, by default the images' own, and return one for each image as a tensor.

    Raises:
        ValueError: they do not fit the model.
    """
    own, count = pipelines.labels_of_images(pipeline, images, labels), len(images)
    return pipeline.classes(None if own is None else as_int_labels("labels", own, count), count)


def row_generators(seed: int, count: int) -> list[torch.Generator]:
    """Return a generator for each image, of seed + i, so that an image depends on its own alone.

    Raises:
        ValueError: the seed is below 0.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def draw_noise(pipeline: DenoisingPipeline, own: list[torch.Generator]) -> torch.Tensor:
    """Draw standard normal noise, a row from each generator."""
    rows = [torch.randn(pipeline.latent_shape, generator=each) for each in own]
    return torch.stack(rows).to(pipeline.device)


def _check_shown(shown: int) -> None:
    if shown < 2:
        raise ValueError(f"shown must be 2 or more, got {shown}")


def _spread(count: int, shown: int) -> torch.Tensor:
    """Return evenly spaced indices from 0 to count - 1, both included."""
    return torch.linspace(0, count - 1, min(count, shown)).round().long()


def _names(timesteps: list[float]) -> list[str]:
    return [f"{t:.0f}" for t in timesteps]


def _images(count: int) -> str:
    return "image" if count == 1 else "images"
