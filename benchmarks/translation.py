"""Translation with a known answer: coloured MNIST, whose hue the grey digit does not determine.

    python benchmarks/translation.py data --mnist mnist --output coloured
    accelerate launch recipes/train_translation.py --images coloured/train.parquet \
        --method diffusion --max_minutes 20 --output_dir runs/diffusion
    python benchmarks/translation.py measure --data coloured --models runs/diffusion runs/l2 …
    python benchmarks/translation.py tiles --model runs/l2

Each digit has the luminance of the grey one, halved, and a hue from two modes that depend on its
class: whoever sees the luminance alone cannot know which. What a model should learn is therefore
known, and so is the histogram of its hues.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

import genkit
from genkit.models.translation import LUMA, TranslationPipeline, in_tiles, luminance
from genkit.vision import image_grid

CLASSES = 10
STEP, APART = 36.0, 150.0  # degrees from class to class, and from mode to mode
SHARES = (0.6, 0.38, 0.02)  # of the two modes, and of hues from anywhere
KAPPA = 16.0  # concentration of a mode: a standard deviation of 14.5 degrees
LIGHT = 0.5  # luminance of white pixels of MNIST, so that every hue fits in
BINS = 18
SEEDS = 2
ROWS = 250

# ---- the truth


def basis() -> np.ndarray:
    """Return two orthonormal colours without luminance, (2, 3)."""
    first = np.cross(LUMA, (1.0, 0.0, 0.0))
    second = np.cross(LUMA, first)
    return np.stack([each / np.linalg.norm(each) for each in (first, second)])


def draw_hues(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a hue for each label, in radians from -pi to pi, (n,)."""
    mode = rng.choice(3, len(labels), p=SHARES)
    centre = np.radians(STEP * labels + APART * (mode == 1))
    hues = rng.vonmises(0, KAPPA, len(labels)) + centre
    hues = np.where(mode == 2, rng.uniform(-np.pi, np.pi, len(labels)), hues)
    return (hues + np.pi) % (2 * np.pi) - np.pi


def true_histogram(label: int) -> np.ndarray:
    """Return the probability of each bin of a class's hues, (BINS,), by integration."""
    places = (np.arange(BINS * 100) + 0.5) / (BINS * 100) * 2 * np.pi - np.pi
    density = np.full_like(places, SHARES[2] / (2 * np.pi))
    for share, shift in zip(SHARES[:2], (0.0, APART), strict=True):
        away = places - np.radians(STEP * label + shift)
        density += share * np.exp(KAPPA * np.cos(away)) / (2 * np.pi * np.i0(KAPPA))
    mass = density.reshape(BINS, 100).sum(1)
    return mass / mass.sum()


def colour(grey: np.ndarray, hues: np.ndarray) -> np.ndarray:
    """Colour digits, (n, height, width) uint8, at half their luminance; (n, h, w, 3) uint8."""
    directions = np.stack([np.cos(hues), np.sin(hues)], 1) @ basis()  # (n, 3), at most 1 long
    light = LIGHT * grey[..., None] / 255
    return np.round(255 * light * (1 + directions[:, None, None])).astype(np.uint8)


def hues_of(images: torch.Tensor) -> np.ndarray:
    """Return the mean hue of each image, in [-1, 1], (n, 3, height, width); (n,) in radians."""
    chroma = (images - luminance(images)).sum((2, 3)).double().numpy() @ basis().T
    return np.arctan2(chroma[:, 1], chroma[:, 0])


# ---- data


def read_mnist(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read digits, (n, 28, 28) uint8, and their labels, (n,)."""
    table = pq.read_table(file).to_pydict()
    cells = (io.BytesIO(cell["bytes"]) for cell in table["image"])
    return np.stack([np.asarray(Image.open(cell)) for cell in cells]), np.array(table["label"])


def write_data(mnist: Path, output: Path) -> None:
    """Write train.parquet and test.parquet of coloured digits."""
    output.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", "test")):
        grey, labels = read_mnist(next(mnist.glob(f"{split}*.parquet")))
        cells = []
        for image in colour(grey, draw_hues(labels, np.random.default_rng(seed))):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png", compress_level=1)
            cells.append({"bytes": file.getvalue(), "path": None})
        pq.write_table(
            pa.table({"image": cells, "label": labels.tolist()}), output / f"{split}.parquet"
        )


if __name__ == "__main__":
    import sys

    write_data(Path(sys.argv[1]), Path(sys.argv[2]))
