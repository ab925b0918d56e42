"""Saved image models of every family, and what is done with all of them alike.

A pipeline is any object that decodes (`Decoder`); some encode, too (`Encoder`). Images are in
[-1, 1], (n, channels, height, width); latents are (n, *pipeline.latent_shape). What is returned
lies on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from tqdm import tqdm

from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.hub import kinds, safe_weights, safety
from genkit.models import autoencoder, diffusion, gan
from genkit.vision import pixel_lm

ROWS = 64  # images that a model sees at a time
IntLabels = Sequence[int] | np.ndarray | torch.Tensor


class Decoder(Protocol):
    """A pipeline as every image family has it."""

    @property
    def device(self) -> torch.device:
        """Where its models are."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""

    def noise_to_latent(self, noise: torch.Tensor) -> torch.Tensor:
        """Turn standard normal numbers into latents, by an affine map or not at all."""

    def decode(self, latents: torch.Tensor, labels: Any = None) -> torch.Tensor:
        """Return images; gradients pass."""


@runtime_checkable
class Encoder(Protocol):
    """A pipeline that finds the latents of images by itself."""

    def encode(self, images: torch.Tensor, labels: Any = None) -> torch.Tensor:
        """Return latents."""


Pipeline = (
    autoencoder.AutoencoderPipeline
    | gan.GANPipeline
    | diffusion.DenoisingPipeline
    | pixel_lm.PixelPipeline
)
RECIPES = (
    "train_autoencoder.py, train_vae.py, train_vaegan.py, train_gan.py, train_diffusion.py and "
    "train_pixels.py"
)


def load_pipeline(folder: str | Path, weights: str | None = None) -> Pipeline:
    """Load a saved image model of any family, running none of the code beside it.

    Args:
        folder: of the model.
        weights: of a generative adversarial network, "averaged" or "raw"; averaged unless given.

    Raises:
        ValueError: there is none.
    """
    kind = kinds.kind_of(Path(folder))
    if kind not in kinds.IMAGES:
        raise ValueError(
            f"model: {str(folder)!r} holds a model of the kind {kind}; image models of the recipes "
            f"{RECIPES} are known"
        )
    if kind == kinds.PIXELS:
        return pixel_lm.load_pixel_lm(folder)
    with safety.opened(folder) as private:
        pipeline = _load(kind, private, weights or "averaged")
        for part in vars(pipeline).values():
            if isinstance(part, torch.nn.Module):
                safe_weights.check_loaded(part)
    return pipeline


def _load(kind: str, folder: Path, weights: str) -> Pipeline:
    if kind == kinds.AUTOENCODER:
        return autoencoder.load_autoencoder(folder)
    if kind == kinds.GAN:
        return gan.load_gan(folder, weights)
    return diffusion.load_diffusion(folder)


def count_classes(pipeline: Pipeline) -> int:
    """Return how many classes a model is told; 0 for none."""
    if isinstance(pipeline, gan.GANPipeline):
        return pipeline.generator.config.labels
    if isinstance(pipeline, autoencoder.AutoencoderPipeline):
        return pipeline.vae.config.get("labels", 0)  # AutoencoderKL is told none
    return pipeline.labels


# ---------------------------------------------------------------------------------------------
# From noise to latents to images, and back


def draw_latents(
    pipeline: Decoder, count: int, seed: int = 0, truncation: float | None = None
) -> torch.Tensor:
    """Draw latents, row i with seed + i: those of the image that the pipeline draws by this seed.

    Args:
        truncation: the largest size of the normal numbers behind them; see `gan.truncate`.

    Returns:
        (count, *latent_shape).

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.
    """
    if isinstance(pipeline, pixel_lm.PixelPipeline):
        raise ValueError("pipeline: a model of pixels has no latents; genkit.sample draws from it")
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    own = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    noise = torch.stack([torch.randn(pipeline.latent_shape, generator=each) for each in own])
    return noise_to_latent(
        pipeline, noise if truncation is None else gan.truncate(noise, truncation)
    )


def encode(
    pipeline: Decoder, images: Images | torch.Tensor, labels: IntLabels | None = None
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
    told = check_images(pipeline, images, labels)
    found = []
    with tqdm(total=len(images), desc="encoding", unit=" images", delay=2, leave=False) as bar:
        for which in blocks(len(images), ROWS):
            classes = None if told is None else told[which]
            found.append(pipeline.encode(image_batch(images, which), classes).cpu())
            bar.update(len(which))
    return torch.cat(found)


@torch.no_grad()
def decode(
    pipeline: Decoder, latents: torch.Tensor, labels: IntLabels | None = None
) -> torch.Tensor:
    """Decode any number of latents, some at a time.

    Args:
        latents: (n, *latent_shape).
        labels: the class of each, for a model that is told.

    Raises:
        ValueError: an argument cannot work; it is named, with what it got.
    """
    check_latents(pipeline, "latents", latents, many=True)
    told = None if labels is None else as_int_labels("labels", labels, len(latents))
    parts = [
        pipeline.decode(latents[which], None if told is None else told[which]).cpu()
        for which in blocks(len(latents), ROWS)
    ]
    return torch.cat(parts)


@torch.no_grad()
def noise_to_latent(pipeline: Decoder, noise: torch.Tensor) -> torch.Tensor:
    """Turn standard normal numbers into latents."""
    return pipeline.noise_to_latent(noise.to(pipeline.device)).cpu()


@torch.no_grad()
def latent_to_noise(pipeline: Decoder, latents: torch.Tensor) -> torch.Tensor:
    """Undo `place`: return the standard normal numbers that it would turn into these latents."""
    if torch.equal(noise_to_latent(pipeline, latents), latents):
        return latents  # it does nothing, as for most models
    axes = torch.eye(latents[0].numel()).unflatten(1, latents.shape[1:])
    origin = noise_to_latent(pipeline, torch.zeros_like(latents[:1]))
    matrix = (noise_to_latent(pipeline, axes) - origin).flatten(1).double()
    offsets = (latents - origin).flatten(1).double()
    return torch.linalg.solve(matrix, offsets, left=False).float().view_as(latents)


# ---------------------------------------------------------------------------------------------
# Arguments


def image_batch(images: Images | torch.Tensor, which: np.ndarray) -> torch.Tensor:
    """Return some images as a tensor."""
    return images.batch(which) if isinstance(images, Images) else images.detach()[which].float()


def check_images(
    pipeline: Decoder, images: Images | torch.Tensor, labels: IntLabels | None
) -> torch.Tensor | None:
    """Check images, and return their labels as a tensor."""
    if not len(images):
        raise ValueError("images: there are none")
    told = None if labels is None else as_int_labels("labels", labels, len(images))
    kinds = None if told is None else told.unique()
    origins = torch.zeros(1 if kinds is None else len(kinds), *pipeline.latent_shape)
    made = decode(
        pipeline, noise_to_latent(pipeline, origins), kinds
    )  # it refuses labels that are wrong
    size = images.size if isinstance(images, Images) else tuple(images.shape[1:])
    if size != tuple(made.shape[1:]):
        raise ValueError(
            f"images must be of {tuple(made.shape[1:])} (channels, height, width), as the model "
            f"makes them, got {tuple(size)}"
        )
    if isinstance(images, torch.Tensor):
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
        check_finite("images", images)
        if images.abs().max() > 1:
            raise ValueError(f"images must be in [-1, 1], got {images.min():g} to {images.max():g}")
    return told


def check_latents(pipeline: Decoder, name: str, latents: torch.Tensor, many: bool = False) -> None:
    """Refuse latents of another shape than the pipeline's; `many` have a row each."""
    shape = tuple(latents.shape[1:] if many else latents.shape)
    if shape != tuple(pipeline.latent_shape) or not len(latents):
        wanted = f"(n, *{pipeline.latent_shape})" if many else str(pipeline.latent_shape)
        raise ValueError(f"{name} must be of {wanted}, got {tuple(latents.shape)}")
    check_finite(name, latents)


def check_finite(name: str, values: torch.Tensor) -> None:
    """Refuse values that are infinite or not numbers."""
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: {bad:,} of {values.numel():,} values are not finite")


def as_int_labels(name: str, values: IntLabels, count: int) -> torch.Tensor:
    """Return whole numbers, one an image, as int64."""
    found = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if found.dtype.kind not in "iu" or found.shape != (count,):
        raise ValueError(
            f"{name} must be {count} whole numbers, got {found.shape} of {found.dtype}"
        )
    return torch.from_numpy(found.astype(np.int64))
