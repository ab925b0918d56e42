"""A stylizer against the optimisation of Gatys et al. on held-out images: loss and speed.

    python benchmarks/style_images.py --photographs china.png flower.png --output images
    genkit train stylizer --style images/waves.png --images images/train \\
        --val_images images/held_out --extractor EFFICIENTNET --max_minutes 20
    python benchmarks/style.py --stylizer runs/stylizer --extractor EFFICIENTNET \\
        --style images/waves.png --images images/held_out

Each held-out image is painted by both, at the size that the stylizer was trained at: by L-BFGS in
100 steps from the image, at one scale, and in a single pass. The loss is content + 30 style + 10
variation on the same hidden states of the same network, of the pictures as they would be saved.
Seconds of L-BFGS are those of the steps; of the pass, the median of 20 after two that do not count.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from PIL import Image

import genkit
from genkit.vision import image_grid, style_target
from genkit.vision.differentiable import load_differentiable
from genkit.vision.style import WEIGHT
from genkit.vision.style_target import StyleTarget

PASSES, WARM = 20, 2


def main() -> None:
    """Paint by both, and print what they reach and take."""
    parser = argparse.ArgumentParser(description="A stylizer against optimisation.")
    parser.add_argument("--stylizer", required=True, help="folder of train_stylizer")
    parser.add_argument("--extractor", required=True, help="folder of the classifier")
    parser.add_argument("--style", required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of held-out images")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--count", type=int, default=10, help="images")
    parser.add_argument("--output", type=Path, default=Path("style.png"), help="picture of all")
    words = parser.parse_args()
    classifier = load_differentiable(words.extractor, device="cpu")
    stylizer = genkit.load(words.stylizer, device="cpu")
    rows: dict[str, list[torch.Tensor]] = {"image": [], "L-BFGS": [], "stylizer": []}
    figures: list[tuple[float, ...]] = []
    with classifier.frozen():
        style = style_target.shrink(style_target.read_pixels(words.style, 3, "style"), words.size)
        target = StyleTarget(classifier, style)
        print(f"{'image':20} {'loss before':>12} {'L-BFGS':>8} {'stylizer':>9} {'s':>7} {'ms':>7}")
        for path in sorted(words.images.iterdir())[: words.count]:
            pixels = style_target.resize(style_target.read_pixels(path, 3, "image"), words.size)
            image = 2 * pixels - 1
            slow = genkit.stylize(
                image, style=words.style, model=classifier.classifier, steps=words.steps, scales=1
            )
            passes = [genkit.stylize(image, model=stylizer) for _ in range(WARM + PASSES)]
            seconds = statistics.median(each.seconds for each in passes[WARM:])
            made = [pixels, read(slow.image), read(passes[-1].image)]
            losses = [measure(target, each, pixels) for each in made]
            figures.append((*losses, slow.seconds, seconds))
            for row, each in zip(rows.values(), made, strict=True):
                row.append(2 * each - 1)
            before, by_steps, by_pass = losses
            print(
                f"{path.name:20} {before:12.3f} {by_steps:8.3f} {by_pass:9.3f} "
                f"{slow.seconds:7.2f} {1000 * seconds:7.2f}"
            )
    means = [statistics.mean(column) for column in zip(*figures, strict=True)]
    print(
        f"{'mean':20} {means[0]:12.3f} {means[1]:8.3f} {means[2]:9.3f} {means[3]:7.2f} "
        f"{1000 * means[4]:7.2f}"
    )
    print(f"loss: {means[2] / means[1]:.3f} times; speed: {means[3] / means[4]:.0f} times")
    image_grid.rows({name: torch.stack(row) for name, row in rows.items()}, words.output, 5)


def read(picture: Image.Image) -> torch.Tensor:
    """Return a picture's pixels, (3, height, width)."""
    return style_target.read_pixels(picture, 3, "image")


@torch.no_grad()
def measure(target: StyleTarget, painted: torch.Tensor, pixels: torch.Tensor) -> float:
    """Return the loss of a painted image."""
    losses = target.losses(painted[None], target.content(pixels[None]))
    return losses.total(WEIGHT).item()


if __name__ == "__main__":
    main()
