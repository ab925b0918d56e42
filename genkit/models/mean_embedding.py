"""Mean embeddings of images by random features, of which one noisy release trains a generator.

Source: DP-MERF, Harder et al. 2021, https://arxiv.org/abs/2002.11603; random features of Rahimi and
Recht 2007. The features are drawn without looking at data, so that they cost no privacy. Here the
kernel compares strokes, by random filters, where DP-MERF's compares pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

LENGTHS = (0.35, 0.7)  # of the Gaussian kernels, of descriptions of norm 1
FILTERS, KERNEL = 16, 7  # of a description, and their side in pixels
POOLED = 4  # side of a square of pixels whose responses to a filter are added up


class RandomFeatures(torch.nn.Module):
    """Maps images to features of norm 1, whose products are a sum of Gaussian kernels.

    The kernels compare descriptions: the responses to random filters, positive and negative ones
    apart, added up over small squares of pixels, and scaled to norm 1.

    Args:
        image_size: channels, height, width.
        count: number of features, in equal parts for each of LENGTHS.
        seed: of filters and frequencies.
    """

    filters: torch.Tensor
    frequencies: torch.Tensor

    def __init__(self, image_size: Sequence[int], count: int, seed: int) -> None:
        super().__init__()
        channels, height, width = image_size
        generator = torch.Generator().manual_seed(seed)
        filters = torch.randn(FILTERS, channels, KERNEL, KERNEL, generator=generator)
        filters -= filters.mean((1, 2, 3), keepdim=True)  # a uniform area has no response
        self.register_buffer("filters", filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        size = 2 * FILTERS * math.ceil(height / POOLED) * math.ceil(width / POOLED)
        self.pairs = count // (2 * len(LENGTHS)) * len(LENGTHS)
        drawn = [
            torch.randn(size, self.pairs // len(LENGTHS), generator=generator) / length
            for length in LENGTHS
        ]
        self.register_buffer("frequencies", torch.cat(drawn, 1))

    def forward(self, images: torch.Tensor, some: torch.Tensor | None = None) -> torch.Tensor:
        """Return features of images in [-1, 1], (n, 2 pairs), each row of norm 1.

        Args:
            some: numbers of frequencies, (m,): their features alone, (n, 2 m), which are scaled as
                if they were all.
        """
        frequencies = self.frequencies if some is None else self.frequencies[:, some]
        angles = self.describe(images) @ frequencies
        return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(frequencies.shape[1])

    def describe(self, images: torch.Tensor) -> torch.Tensor:
        """Return descriptions of images, (n, d), each row of norm 1, or of 0."""
        x = F.conv2d(F.pad(images, [KERNEL // 2] * 4, value=-1.0), self.filters, stride=2)
        x = torch.cat([x.relu(), (-x).relu()], 1)
        x = F.avg_pool2d(x, POOLED // 2, ceil_mode=True).flatten(1)
        return x / x.norm(dim=1, keepdim=True).clamp(min=1e-6)

    def columns(self, some: torch.Tensor) -> torch.Tensor:
        """Return which of all features those of some frequencies are, (2 m,)."""
        return torch.cat([some, some + self.pairs])


def class_sums(features: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Add up the features of each class, (classes, count): a row adds a matrix of norm 1.

    Args:
        features: (n, count), of norm 1.
        classes: one-hot, (n, classes).
    """
    return classes.T @ features


def embedding_loss(released: torch.Tensor, own: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of an embedding of generated images from the released one.

    Its gradient is that of the whole batch's distance, so that those of processes, averaged, are
    right.

    Args:
        released: noisy class sums over the number of private images, (classes, count).
        own: class sums of this process's images over their number, with a gradient.
        mean: the mean of these over all processes, without one.
    """
    residual = mean - released
    return residual.square().sum() + 2 * (residual * (own - own.detach())).sum()
