"""Tiny image classifiers of many architectures, with random weights."""

import functools

import torch
import transformers
from transformers import PreTrainedModel

from genkit.metrics.features import Classifier

SIDE = 64
TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
    "image_size": SIDE,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {
    "embed_dim": 16,
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 2],
    "window_size": 4,
    "patch_size": 4,
    "image_size": SIDE,
}
SHAPES: dict[str, tuple[str, dict]] = {
    "ResNet": ("ResNet", STAGES | {"embedding_size": 8, "layer_type": "basic"}),
    "ConvNext": ("ConvNext", STAGES),
    "ViT": ("ViT", TOKENS),
    "DeiT": ("DeiT", TOKENS),
    "Beit": ("Beit", TOKENS),
    "Dinov2": ("Dinov2", TOKENS),
    "Dinov2WithRegisters": ("Dinov2WithRegisters", TOKENS),
    "Swin": ("Swin", WINDOWS),
    "MobileNetV2": ("MobileNetV2", {"depth_multiplier": 0.35, "image_size": SIDE}),
}


@functools.cache
def make_model(kind: str) -> PreTrainedModel:
    """Make a network of a kind, with random weights that do not depend on what ran before."""
    name, shape = SHAPES[kind]
    config = getattr(transformers, f"{name}Config")(
        **shape, id2label={i: f"class {i}" for i in range(7)}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(transformers, f"{name}ForImageClassification")(config).eval()
        for weights in network.parameters():  # at the usual scale all logits are almost equal
            if weights.ndim > 1:
                weights.data.mul_(3 if weights.std() < 0.05 else 1)
    return network


def make_classifier(kind: str, side: int = SIDE) -> Classifier:
    """Make a classifier that scales images to squares."""
    processor = transformers.ViTImageProcessorPil(size={"height": side, "width": side})
    return Classifier(make_model(kind), processor, kind)


def make_image(seed: int = 0, channels: int = 3, side: int = SIDE) -> torch.Tensor:
    """Make a smooth random image in [-1, 1], (channels, side, side)."""
    noise = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bilinear")
    return ((smooth[0] * 255).round() / 127.5 - 1).clamp(-1, 1)
