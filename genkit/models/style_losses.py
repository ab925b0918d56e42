"""Losses of style transfer: content, style, and total variation.

Each is one number an image, (n,), in units of its own target, so that a weight means the same at
any layer, resolution and network.
"""

from __future__ import annotations

import torch

TINY = 1e-12
DARK = 1e-3  # least standard deviation of a colour, in [0, 1]


def smooth_activations(state: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Return a softmax over channels of a hidden state, (n, channels, height, width).

    The activations of residual and mobile networks have few large peaks, which alone would decide
    a Gram matrix.

    Args:
        scale: by which the state is divided before, such as its standard deviation.

    Source: Wang, Li and Vasconcelos 2021, https://arxiv.org/abs/2104.05623
    """
    return (state / scale).softmax(1)


def gram_matrix(features: torch.Tensor) -> torch.Tensor:
    """Return products of channels, averaged over positions: (n, c, height, width) to (n, c, c).

    Source: Gatys et al. 2016, equation 3
    """
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def content_loss(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared error of features over the variance of the target's, (n,).

    Args:
        features, target: (n, channels, height, width).

    Source: Gatys et al. 2016, equation 1
    """
    spread = (target - target.mean((2, 3), keepdim=True)).square().sum((1, 2, 3))
    return (features - target).square().sum((1, 2, 3)) / (spread + TINY)


def style_loss(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared error of Gram matrices over the target's square, (n,).

    Args:
        gram: (n, channels, channels).
        target: (1 or n, channels, channels).

    Source: Gatys et al. 2016, equation 4
    """
    return (gram - target).square().sum((1, 2)) / (target.square().sum((1, 2)) + TINY)


def total_variation(pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of neighbours, (n,), of pixels, (n, c, height, width).

    Source: Johnson et al. 2016, section 3.2
    """
    across, down = pixels.diff(dim=3), pixels.diff(dim=2)
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))


def colour_features(pixels: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Return pixels in units of the style's colours, and ones: (n, c, height, width) to c + 1.

    Their Gram matrix holds mean and covariance of the colours, which a softmax over channels loses.

    Args:
        style: pixels of the style, (1, c, height, width).
    """
    mean, std = style.mean((2, 3), keepdim=True), style.std((2, 3), keepdim=True)
    units = (pixels - mean) / (std + DARK)
    return torch.cat([units, torch.ones_like(units[:, :1])], 1)
