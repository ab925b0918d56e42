"""Mean embeddings of images by random features, of which one noisy release trains a generator.

Source: DP-MERF, Harder et al. 2021, https://arxiv.org/abs/2002.11603; random features of Rahimi and
Recht 2007. The features are drawn without looking at data, so that they cost no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

LENGTHS = (0.35, 0.7)  # of the kernels, in units of the square root of the number of pixels


class RandomFeatures(torch.nn.Module):
    """Maps images to features of norm 1, whose products are a sum of Gaussian kernels of pixels.

    Args:
        image_size: channels, height, width.
        count: number of features, in equal parts for each of LENGTHS.
        seed: of the frequencies.
    """

    def __init__(self, image_size: Sequence[int], count: int, seed: int) -> None:
        super().__init__()
        pixels, half = math.prod(image_size), count // (2 * len(LENGTHS))
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            torch.randn(pixels, half, generator=generator) / (length * math.sqrt(pixels))
            for length in LENGTHS
        ]
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.cat(drawn, 1))
        self.count = 2 * half * len(LENGTHS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features, (n, count), each row of norm 1; images are in [-1, 1]."""
        angles = images.flatten(1) @ self.frequencies
        return math.sqrt(2 / self.count) * torch.cat([angles.cos(), angles.sin()], 1)


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
