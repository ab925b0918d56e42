"""Latents of images: encoded once into a memory map, as images are decoded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genkit import console
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.files import cache_folder, written_whole

VERSION = 1  # of the cache
ROWS, PIXELS = 64, 1 << 18  # the most images, and pixels of images, that are encoded at once

Encode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Latents(Images):
    """Latents of images, float32: the rows of a memory map, or some of them."""

    scale: float = 1.0  # by which they are multiplied

    def batch(self, which: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """Look up latents: float32, (len(which), channels, height, width)."""
        return torch.from_numpy(self.pixels[self.rows[which]]).to(device).mul_(self.scale)

    def deviation(self) -> float:
        """Return the standard deviation of all values about their mean."""
        total, squares = 0.0, 0.0
        for which in blocks(len(self), ROWS * ROWS):
            values = self.batch(which).double()
            total, squares = total + values.sum().item(), squares + values.square().sum().item()
        count = len(self) * math.prod(self.size)
        return math.sqrt(max(0.0, squares / count - (total / count) ** 2))


def encode_images(images: Images, encode: Encode, identity: str) -> Latents:
    """Encode images, or load their latents from the cache.

    Args:
        encode: takes images in [-1, 1], (n, channels, height, width).
        identity: of the encoder, such as the hash of its weights.

    Returns:
        Latents with the classes of the images.

    Raises:
        ValueError: latents are not finite.
    """
    key = hashlib.sha256(json.dumps([VERSION, images.sha256, identity]).encode()).hexdigest()
    path = cache_folder() / f"{key}.latents"
    if not path.exists():
        _write(images, encode, path)
    shape = len(images), *encode(images.batch(np.arange(1))).shape[1:]
    labels = None if images.labels is None else images.labels[images.rows]
    values = np.memmap(path, np.float32, "r", shape=shape)
    return Latents(values, labels, images.names, np.arange(len(images)), images.sha256)


def _write(images: Images, encode: Encode, path: Path) -> None:
    """Write the latents of all images into one file."""
    with (
        written_whole(path, shared=True) as scratch,
        scratch.open("wb") as file,
        console.bar(None, "encoding", len(images), " images") as bar,
    ):
        rows = max(1, min(ROWS, PIXELS // math.prod(images.size[1:])))
        for which in blocks(len(images), rows):
            latents = encode(images.batch(which)).float().cpu()
            if not latents.isfinite().all():
                raise ValueError("latent: this autoencoder's latents are not finite; give another")
            file.write(latents.numpy().tobytes())
            bar.update(len(which))
