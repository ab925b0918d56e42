"""Pipelines of every image family: loading, encoding, decoding, and latents of noise.

A pipeline is any object that decodes (`Decoder`); some also encode (`Encoder`). Images are in
[-1, 1], (n, channels, height, width); latents are (n, *pipeline.latent_shape). Returned tensors
are on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
import torch

from genkit import console
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.engine.summary import summarize_pipeline
from genkit.hub import kinds, names, safe_weights, safety
from genkit.models import autoencoder, denoisers, diffusion, gan
from genkit.vision import pixel_lm

ROWS = 64  # images in a batch
IntLabels = Sequence[int] | np.ndarray | torch.Tensor


class Decoder(Protocol):
    """What the pipeline of every image family can do."""

    @property
    def device(self) -> torch.device:
        """Device of its networks."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""

    def noise_to_latent(self, noise: torch.Tensor) -> torch.Tensor:
        """Turn standard normal noise into latents, by an affine map or unchanged."""

    def decode(self, latents: torch.Tensor, labels: Any = None) -> torch.Tensor:
        """Return images; gradients pass."""


@runtime_checkable
class Encoder(Protocol):
    """What the pipeline of a family with an encoder can do."""

    def encode(self, images: torch.Tensor, labels: Any = None) -> torch.Tensor:
        """Return latents."""


Pipeline = (
    autoencoder.AutoencoderPipeline
    | gan.GANPipeline
    | diffusion.DenoisingPipeline
    | pixel_lm.PixelPipeline
)
RECIPES = "train_autoencoder, train_vae, train_vaegan, train_gan, train_diffusion or train_pixels"


for _family in get_args(Pipeline):  # their files travel without genkit, and cannot import it
    _family.__repr__ = summarize_pipeline


def load_pipeline(folder: str | Path, weights: str | None = None) -> Pipeline:
    """Load a saved image model of any family without running the code in its folder.

    Args:
        folder: of the model.
        weights: of a GAN, "averaged" or "raw"; default: averaged.

    Raises:
        ValueError: the folder holds no image model.
    """
    folder = Path(folder)
    kind = kinds.kind_of(folder)
    if kind not in kinds.IMAGES:
        raise ValueError(
            f"model: {names.describe(folder)!r} is {kinds.TAKEN[kind]}; give an image "
            f"model, by {RECIPES}"
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
    return denoisers.load_diffusion(folder)


def count_classes(pipeline: Any) -> int:
    """Return the number of classes; 0 for an unconditional model."""
    if isinstance(pipeline, gan.GANPipeline):
        return pipeline.generator.config.labels
    if isinstance(pipeline, autoencoder.AutoencoderPipeline):
        return pipeline.vae.config.get("labels", 0)  # AutoencoderKL is unconditional
    return pipeline.labels


def labels_to_draw(pipeline: Decoder, labels: IntLabels | None, count: int) -> torch.Tensor | None:
    """Return the class of each image to draw, (count,), int64; None for an unconditional model.

    Args:
        labels: as given; None for all classes in turn, if the model is class-conditional.
    """
    if labels is not None:
        return as_int_labels("labels", labels, count)
    classes = count_classes(pipeline)
    return torch.arange(count) % classes if classes else None


def label_to_draw(pipeline: Decoder, label: int | None) -> int | None:
    """Return the class of a picture of one: by default the first of a class-conditional model."""
    return 0 if label is None and count_classes(pipeline) else label


def describe_labels(labels: Sequence[int]) -> str:
    """Name the classes of images in a few words."""
    classes = max(labels) + 1
    if len(set(labels)) == 1:
        return f"class {labels[0]}"
    if list(labels) == [i % classes for i in range(len(labels))]:
        return f"classes 0 to {classes - 1} in turn"
    return f"classes {', '.join(map(str, labels[:8]))}{', …' if len(labels) > 8 else ''}"


def labels_of_images(
    pipeline: Decoder, images: Images | torch.Tensor, labels: IntLabels | None
) -> IntLabels | None:
    """Return labels of given images: by default their own, if the model is class-conditional."""
    if labels is None and isinstance(images, Images) and images.labels is not None:
        if not count_classes(pipeline):
            return None
        return images.classes(np.arange(len(images)))
    return labels


# ---------------------------------------------------------------------------------------------
# Noise, latents, images


def draw_latents(
    pipeline: Decoder, count: int, seed: int = 0, truncation: float | None = None
) -> torch.Tensor:
    """Sample latents, row i with seed + i: those of the pipeline's image with that seed.

    Args:
        pipeline: of any family with latents.
        count: number of rows.
        seed: of the first row.
        truncation: largest absolute value of the noise; see `gan.truncate`.

    Returns:
        (count, *latent_shape).

    Raises:
        ValueError: an argument is invalid.
    """
    if isinstance(pipeline, pixel_lm.PixelPipeline):
        raise ValueError(
            "pipeline: an autoregressive pixel model has no latents; use genkit.sample"
        )
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
    """Encode any number of images, in batches.

    Args:
        pipeline: with an encoder.
        images: to encode.
        labels: the class of each image, if the model is class-conditional; default: the images'
            own.

    Returns:
        Latents, (n, *latent_shape).

    Raises:
        ValueError: the pipeline has no encoder, or the images do not fit it.
    """
    if not isinstance(pipeline, Encoder):
        raise ValueError(
            f"pipeline: {type(pipeline).__name__} has no encoder; use `project` to find latents"
        )
    classes = check_images(pipeline, images, labels)
    latents = []
    with console.bar(None, "encoding", len(images), " images") as bar:
        for which in blocks(len(images), ROWS):
            some = None if classes is None else classes[which]
            latents.append(pipeline.encode(image_batch(images, which), some).cpu())
            bar.update(len(which))
    return torch.cat(latents)


@torch.no_grad()
def decode(
    pipeline: Decoder, latents: torch.Tensor, labels: IntLabels | None = None
) -> torch.Tensor:
    """Decode any number of latents, in batches.

    Args:
        pipeline: of any family with latents.
        latents: (n, *latent_shape).
        labels: the class of each image; default for a class-conditional model: all in turn.

    Raises:
        ValueError: an argument is invalid.
    """
    check_latents(pipeline, "latents", latents, many=True)
    classes = labels_to_draw(pipeline, labels, len(latents))
    parts = [
        pipeline.decode(latents[which], None if classes is None else classes[which]).cpu()
        for which in blocks(len(latents), ROWS)
    ]
    return torch.cat(parts)


@torch.no_grad()
def noise_to_latent(pipeline: Decoder, noise: torch.Tensor) -> torch.Tensor:
    """Turn standard normal noise into latents."""
    return pipeline.noise_to_latent(noise.to(pipeline.device)).cpu()


@torch.no_grad()
def latent_to_noise(pipeline: Decoder, latents: torch.Tensor) -> torch.Tensor:
    """Return the standard normal noise of latents: the inverse of `noise_to_latent`."""
    if torch.equal(noise_to_latent(pipeline, latents), latents):
        return latents  # the map is the identity, as for most models
    axes = torch.eye(latents[0].numel()).unflatten(1, latents.shape[1:])
    origin = noise_to_latent(pipeline, torch.zeros_like(latents[:1]))
    matrix = (noise_to_latent(pipeline, axes) - origin).flatten(1).double()
    offsets = (latents - origin).flatten(1).double()
    return torch.linalg.solve(matrix, offsets, left=False).float().view_as(latents)


# ---------------------------------------------------------------------------------------------
# Arguments


def image_batch(images: Images | torch.Tensor, which: np.ndarray) -> torch.Tensor:
    """Return some images as a float tensor."""
    return images.batch(which) if isinstance(images, Images) else images.detach()[which].float()


def check_images(
    pipeline: Decoder, images: Images | torch.Tensor, labels: IntLabels | None
) -> torch.Tensor | None:
    """Check that images and labels, by default their own, fit the model; return the labels."""
    if not len(images):
        raise ValueError("images: there are none")
    labels = labels_of_images(pipeline, images, labels)
    classes = None if labels is None else as_int_labels("labels", labels, len(images))
    different = None if classes is None else classes.unique()
    origins = torch.zeros(1 if different is None else len(different), *pipeline.latent_shape)
    with torch.no_grad():  # this refuses wrong labels
        decoded = pipeline.decode(noise_to_latent(pipeline, origins), different)
    size = images.size if isinstance(images, Images) else tuple(images.shape[1:])
    if size != tuple(decoded.shape[1:]):
        raise ValueError(
            f"images must have the model's shape {tuple(decoded.shape[1:])} (channels, height, "
            f"width), got {tuple(size)}"
        )
    if isinstance(images, torch.Tensor):
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
        check_finite("images", images)
        if images.abs().max() > 1:
            raise ValueError(f"images must be in [-1, 1], got {images.min():g} to {images.max():g}")
    return classes


def check_latents(pipeline: Decoder, name: str, latents: torch.Tensor, many: bool = False) -> None:
    """Refuse latents that are not of the pipeline's shape; `many`: with a row for each image."""
    shape = tuple(latents.shape[1:] if many else latents.shape)
    if shape != tuple(pipeline.latent_shape) or not len(latents):
        wanted = f"(n, *{pipeline.latent_shape})" if many else str(pipeline.latent_shape)
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(latents.shape)}")
    check_finite(name, latents)


def check_finite(name: str, values: torch.Tensor) -> None:
    """Refuse infinite and NaN values."""
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: {bad:,} of {values.numel():,} values are not finite")


def as_int_labels(name: str, values: IntLabels, count: int) -> torch.Tensor:
    """Return whole numbers, one for each image, as int64, (count,)."""
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise ValueError(
            f"{name} must be {count} whole numbers, got {array.shape} of {array.dtype}"
        )
    return torch.from_numpy(array.astype(np.int64))
