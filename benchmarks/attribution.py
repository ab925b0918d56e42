"""Attributions against captum and torchcam, and against a known truth: digits in clutter.

    python benchmarks/attribution.py parity
    python benchmarks/attribution.py truth --images train.parquet --test test.parquet

The first compares maps of five architectures with random weights; it needs
`pip install --no-deps captum torchcam`. The second trains a classifier of digits in clutter, and
prints the share of each method's mass that lies in the box of the digit.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image

from genkit import console
from genkit.data.images import load_images
from genkit.metrics import attribution as measures
from genkit.metrics.features import Classifier, load_extractor
from genkit.vision import attribution
from genkit.vision.attribution import METHODS, heat
from genkit.vision.differentiable import DifferentiableClassifier

SIDE, CLASS, STEPS = 96, 5, 50
TOKENS = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 16}
TOKENS |= {"intermediate_size": 128, "image_size": SIDE}
STAGES = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}
WINDOWS = {"embed_dim": 32, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "ResNet": STAGES | {"embedding_size": 16, "layer_type": "basic"},
    "ConvNext": STAGES,
    "ViT": TOKENS,
    "Dinov2": TOKENS,
    "Swin": WINDOWS | {"patch_size": 4, "image_size": SIDE},
}

# ---------------------------------------------------------------------------------------------
# Parity


def make_classifier(kind: str) -> DifferentiableClassifier:
    """Make a classifier with random weights, three times the usual scale: its logits differ."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPES[kind], num_labels=10)
    network = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    for weights in network.parameters():
        if weights.ndim > 1 and weights.std() < 0.05:
            weights.data.mul_(3)
    processor = transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return DifferentiableClassifier(Classifier(network, processor, kind))


class Normalized(torch.nn.Module):
    """A classifier as a module from pixels to logits, as the peers take it."""

    def __init__(self, classifier: DifferentiableClassifier) -> None:
        super().__init__()
        self.classifier, self.model = classifier, classifier.model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.classifier(pixels)


def parity() -> None:
    """Print the largest difference from captum's maps, relative to the largest value."""
    from captum.attr import IntegratedGradients, Saliency

    warnings.simplefilter("ignore")  # captum's, of inputs that need gradients
    logging.disable()  # torchcam's, of the layer that it finds

    pixels = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    print(f"{'':10}{'saliency':>12}{'integrated':>12}{'complete':>12}{'grad-cam':>12}{'areas':>12}")
    for kind in SHAPES:
        classifier = make_classifier(kind)
        module, options = Normalized(classifier), attribution.Options(STEPS, "black", None, 0)
        with classifier.frozen():
            own, _, _ = attribution.saliency(classifier, pixels, CLASS, options)
            theirs = Saliency(module).attribute(pixels[None], target=CLASS)[0]
            row = [f"{_difference(own, theirs):.1e}"]
            own, _, _ = attribution.integrated_gradients(classifier, pixels, CLASS, options)
            theirs = IntegratedGradients(module).attribute(pixels[None], target=CLASS)[0]
            row.append(f"{_difference(own, theirs):.1e}")
            long = attribution.Options(300, "black", None, 0)
            _, _, error = attribution.integrated_gradients(classifier, pixels, CLASS, long)
            row.append(f"{error:.2%}")
            row += compare_with_torchcam(module, pixels)
        print(f"{kind:10}" + "".join(f"{cell:>12}" for cell in row), flush=True)


def compare_with_torchcam(module: Normalized, pixels: torch.Tensor) -> list[str]:
    """Return the differences from torchcam's Grad-CAM, of the layer that it finds, and its areas.

    Where it finds none, return that of genkit.
    """
    from torchcam.methods import GradCAM
    from torchcam.metrics import DeletionInsertionMetric

    def probabilities(images: torch.Tensor) -> torch.Tensor:
        return module(images).softmax(1)[:, CLASS]

    options = attribution.Options(STEPS, "black", None, 0)
    try:
        find = GradCAM(module, input_shape=(3, SIDE, SIDE))
        theirs = find(CLASS, module(pixels[None].clone().requires_grad_()))[0]
    except Exception:
        attribution.grad_cam(module.classifier, pixels, CLASS, options)
        return ["ours alone", ""]
    metric = DeletionInsertionMetric(find, lambda logits: logits.softmax(1))
    metric.update(pixels[None].clone().requires_grad_(), CLASS)
    # it measures the map of the probability, not of the logit
    of_softmax = find(CLASS, module(pixels[None].clone().requires_grad_()).softmax(1))[0]
    find.remove_hooks()
    theirs, of_softmax = (
        torch.nn.functional.interpolate(
            each[None], (SIDE, SIDE), mode="bilinear", align_corners=False
        )[0]
        for each in (theirs, of_softmax)
    )
    layer = find.target_names[0].removeprefix("model.")
    own, _, _ = attribution.grad_cam(
        module.classifier, pixels, CLASS, dataclasses.replace(options, layer=layer)
    )
    curves = measures.delete_and_insert(
        probabilities, pixels, of_softmax[0], torch.zeros_like(pixels)
    )
    areas = metric.summary()
    off = abs(curves.deletion_area - areas["deletion_auc"])
    off = max(off, abs(curves.insertion_area - areas["insertion_auc"]))
    return [f"{_difference(_to_unit(own), _to_unit(theirs)):.1e}", f"{off:.1e}"]


def _difference(own: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((own - theirs).abs().max() / theirs.abs().max())


def _to_unit(cam: torch.Tensor) -> torch.Tensor:
    return (cam - cam.min()) / (cam.max() - cam.min())


# ---------------------------------------------------------------------------------------------
# A known truth


def write_table(path: Path, cluttered: measures.Cluttered) -> None:
    """Write canvases as a table of images with labels."""
    levels = (255 * cluttered.pixels[:, 0]).round().byte().numpy()
    pictures = [Image.fromarray(each) for each in levels]
    labels = [str(label) for label in cluttered.labels]
    datasets.Dataset.from_dict({"image": pictures, "label": labels}).to_parquet(path)


def load_digits(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return digits, uint8 (n, height, width), and their labels."""
    images = load_images(path, channels=1)
    return images.pixels[images.rows][:, 0], images.classes(np.arange(len(images))).numpy()


def train(images: str, minutes: float, scratch: Path) -> Path:
    """Train a classifier of digits in clutter by the recipe; return its folder."""
    digits, labels = load_digits(images)
    write_table(scratch / "train.parquet", measures.clutter(digits, labels, range(20_000)))
    others = measures.clutter(digits, labels, range(1 << 20, (1 << 20) + 1000))
    write_table(scratch / "val.parquet", others)
    command = [sys.executable, "recipes/train_classifier.py", "--output_dir", scratch / "run"]
    command += ["--images", scratch / "train.parquet", "--val_images", scratch / "val.parquet"]
    subprocess.run([*map(str, command), "--max_minutes", str(minutes)], check=True)
    return scratch / "run"


def truth(images: str, test: str, count: int, minutes: float, model: str | None) -> None:
    """Print the share of each method's mass that lies in the box of the digit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = model or train(images, minutes, Path(scratch))
        extractor = load_extractor(folder)
    assert isinstance(extractor, Classifier)
    classifier = DifferentiableClassifier(extractor)
    canvases = measures.clutter(*load_digits(test), range(1 << 21, (1 << 21) + count))
    boxes = canvases.boxes
    side = canvases.pixels.shape[-1]
    area = float(np.mean((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))) / side**2
    numbers = [classifier.names.index(str(label)) for label in canvases.labels]
    with classifier.frozen(), console.quiet():
        with torch.no_grad():
            batches = canvases.pixels.split(100)
            right = torch.cat([classifier(batch).argmax(1) for batch in batches])
        accuracy = float((right == torch.tensor(numbers)).double().mean())
        print(f"{count} canvases, accuracy {accuracy:.1%}; the box has {area:.1%} of the area")
        print(f"{'method':24}{'in the box':>12}{'over area':>12}")
        for name, method in METHODS.items():
            options = attribution.Options(STEPS, "black", None, 0)
            shares = [
                measures.mass_in_box(heat(method(classifier, pixels, number, options)[0]), box)
                for pixels, number, box in zip(canvases.pixels, numbers, boxes, strict=True)
            ]
            print(f"{name:24}{np.mean(shares):12.1%}{np.mean(shares) / area:12.2f}", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["parity", "truth"])
    parser.add_argument("--images", default="digits", help="digits to train on")
    parser.add_argument("--test", default="digits", help="digits to test with")
    parser.add_argument("--count", type=int, default=500, help="canvases")
    parser.add_argument("--minutes", type=float, default=6, help="of training")
    parser.add_argument("--model", help="folder of a classifier that was trained before")
    arguments = parser.parse_args()
    if arguments.what == "parity":
        parity()
    else:
        given = (arguments.images, arguments.test, arguments.count, arguments.minutes)
        truth(*given, arguments.model)


if __name__ == "__main__":
    main()
