"""Image classifiers: stock networks, their loss, augmentation by shifts, and how they are saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    CLIPImageProcessorPil,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

STEM = 4  # the stock stem reduces each side by this factor
STAGES = 3  # at most
ROBUST = 4  # side of the smallest feature map of a robust network, at most


def make_model(
    names: Sequence[str], size: tuple[int, int, int], depth: int, width: int
) -> ResNetForImageClassification:
    """Build a ResNet of basic blocks with random weights.

    Each stage but the first halves the sides and doubles the channels, down to one pixel: a
    further stage would add nothing, and oneDNN's gradient of its convolution in bfloat16 is wrong.

    Args:
        names: of the classes.
        size: channels, height and width of the images.
        depth: blocks of each stage.
        width: channels of the first stage.

    Source: He et al. 2016, https://arxiv.org/abs/1512.03385
    """
    side, stages = -(-min(size[1:]) // STEM), 1
    while side > 1 and stages < STAGES:
        side, stages = -(-side // 2), stages + 1
    config = ResNetConfig(
        num_channels=3,  # the stock pipeline converts every image to RGB
        embedding_size=width,
        hidden_sizes=[width << stage for stage in range(stages)],
        depths=[depth] * stages,
        layer_type="basic",
        downsample_in_first_stage=False,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ResNetForImageClassification(config)


def make_robust_model(
    names: Sequence[str], size: tuple[int, int, int], depth: int, width: int
) -> RegNetForImageClassification:
    """Build a network for adversarial training: a RegNet, which has small kernels and no pooling.

    A change of every pixel adds up in the wide kernels of a ResNet's stem, and the pooling after
    it passes the largest on. With as much training a ResNet stays right on fewer attacked digits.

    Args:
        names: of the classes.
        size: channels, height and width of the images.
        depth: blocks of each stage.
        width: channels of the stem; each stage doubles them and halves the sides.

    Source: Radosavovic et al. 2020, https://arxiv.org/abs/2003.13678
    """
    side, stages = -(-min(size[1:]) // 2), 0
    while side > ROBUST or not stages:
        side, stages = -(-side // 2), stages + 1
    config = RegNetConfig(
        num_channels=3,  # the stock pipeline converts every image to RGB
        embedding_size=width,
        hidden_sizes=[width << stage for stage in range(1, stages + 1)],
        depths=[depth] * stages,
        groups_width=2 * width,
        layer_type="x",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return RegNetForImageClassification(config)


def in_colour(images: torch.Tensor) -> torch.Tensor:
    """Repeat the channel of grey images: (n, 1 or 3, height, width) to (n, 3, height, width)."""
    return images.expand(-1, 3, -1, -1)


def random_shift(images: torch.Tensor, most: int) -> torch.Tensor:
    """Shift each image by up to `most` pixels in each direction, and repeat its border.

    Draws from torch's global random state, as a step of a run does.

    Args:
        images: (n, channels, height, width).
        most: largest shift, in pixels.
    """
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * most + 1, (2, count, 1, 1)).to(device)  # the same on any device
    rows = top + torch.arange(height, device=device)[:, None]  # (n, height, 1)
    columns = left + torch.arange(width, device=device)  # (n, 1, width)
    which = torch.arange(count, device=device)[:, None, None]
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    return padded[which, :, rows, columns].permute(0, 3, 1, 2)


def loss(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Return the mean cross-entropy with smoothed labels, in nats.

    Args:
        model: returns `.logits`.
        images: in [-1, 1], (n, 1 or 3, height, width).
        labels: (n,).
        smoothing: probability that is distributed evenly over all classes.

    Source: Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567
    """
    return F.cross_entropy(predict(model, images), labels, label_smoothing=smoothing)


def predict(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return logits, (n, classes), of images in [-1, 1], (n, 1 or 3, height, width)."""
    # channels last: oneDNN's convolutions take 0.7 of the time
    inputs = in_colour(images).contiguous(memory_format=torch.channels_last)
    logits: torch.Tensor = model(inputs).logits
    return logits.float()


def save_classifier(model: PreTrainedModel, size: tuple[int, int, int], folder: Path) -> None:
    """Save the model with a stock image processor that preprocesses as genkit does.

    Args:
        model: to save.
        size: channels, height and width of the training images.
        folder: of the model.
    """
    _, height, width = size
    model.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": min(height, width)},
        crop_size={"height": height, "width": width},
        resample=1,  # Lanczos
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
