"""Pictures of maps over images."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from genkit.vision import image_grid

SIDE = 224  # smallest side of a picture, in pixels: smaller images are enlarged
STRONG = 99.0  # percentile of a map's values that has the last colour
OPACITY = 0.6  # of the strongest colour over the image
GAP = 8  # pixels between the three pictures


def save(pixels: torch.Tensor, heat: torch.Tensor, path: Path) -> None:
    """Write an image, its map, and the map over the image, side by side.

    Args:
        pixels: in [0, 1], (1 or 3, height, width).
        heat: (height, width); larger is more, below 0 is shown as 0.
        path: the picture to write.

    Raises:
        ValueError: the suffix is not that of a supported format.
    """
    image = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    share = heat.clamp(min=0).numpy()
    strongest = np.percentile(share[share > 0], STRONG) if (share > 0).any() else 1.0
    share = np.clip(share / strongest, 0, 1)
    colours = matplotlib.colormaps["inferno"](share)[..., :3]
    grey = image.mean(2, keepdims=True)
    opacity = OPACITY * share[..., None] ** 0.5
    over = grey * (1 - opacity) + matplotlib.colormaps["turbo"](share)[..., :3] * opacity
    times = max(1, -(-SIDE // max(share.shape)))
    enlarged = [each.repeat(times, 0).repeat(times, 1) for each in (image, colours, over)]
    height, width, _ = enlarged[0].shape
    sheet = np.ones((height, 3 * width + 2 * GAP, 3))
    for i, each in enumerate(enlarged):
        sheet[:, i * (width + GAP) : i * (width + GAP) + width] = each
    image_grid.save_as(Image.fromarray((255 * sheet).round().astype(np.uint8)), path)
