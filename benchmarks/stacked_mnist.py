"""Stacked MNIST: three digits in the channels of an image make 1,000 modes; how many are found?

    python benchmarks/stacked_mnist.py --train mnist-train.parquet --test mnist-test.parquet \\
        --classifier runs/classifier --minutes 30
    python benchmarks/stacked_mnist.py … -- --packing 2

Trains by recipes/train_gan.py, draws from the model that it published, and has a classifier of
digits read each channel. Printed beside it is what as many stacks of test images get. 128,000
images to train on and 26,000 to judge are those of Srivastava et al. 2017,
https://arxiv.org/abs/1705.07761, section 4.2, and Lin et al. 2018,
https://arxiv.org/abs/1712.04086. Their reverse KL divergence is from the modes that a model makes
to those of the data, in nats; here these are known: digits are drawn as often as the file has them.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tqdm import tqdm

from genkit.data import images
from genkit.data.images import Images
from genkit.metrics.features import Classifier, extract, load_extractor
from genkit.metrics.given_images import as_images
from genkit.models import gan
from genkit.vision import image_grid
from genkit.vision.sampling import draw_samples

RECIPE = Path(__file__).parent.parent / "recipes" / "train_gan.py"
DIGITS, CHANNELS = 10, 3
SHOWN = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="MNIST's training images, a parquet file")
    parser.add_argument("--test", required=True, help="its test images")
    parser.add_argument("--classifier", required=True, help="folder of a classifier of digits")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training")
    parser.add_argument("--images", type=int, default=128_000, help="to train on")
    parser.add_argument("--samples", type=int, default=26_000, help="to judge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="a PNG to draw some images into")
    parser.add_argument("recipe_arguments", nargs="*", help="after --, flags for the recipe")
    arguments = parser.parse_args()
    classifier = load_extractor(arguments.classifier)
    assert isinstance(classifier, Classifier), "Inception predicts no digits"
    train, test = images.load_images(arguments.train), images.load_images(arguments.test)
    with tempfile.TemporaryDirectory() as work:
        table = Path(work) / "stacked.parquet"
        write(stacked(train, arguments.images, arguments.seed), table)
        pipeline = trained(arguments, table, Path(work) / "run")
    made = draw_samples(pipeline.to(classifier.device), range(arguments.samples))
    if arguments.picture:
        image_grid.grid(made[:SHOWN], arguments.picture)
    real = torch.from_numpy(stacked(test, arguments.samples, arguments.seed + 1)) / 127.5 - 1
    print(f"{'':10}{'modes of 1,000':>16}{'reverse KL':>12}")
    for name, each, source in (("generated", made, train), ("real", real, test)):
        figures = measure(digits(each, classifier), shares(source))
        print(f"{name:10}{figures.modes:16,}{figures.divergence:12.4f}", flush=True)


# ---- data


def stacked(single: Images, count: int, seed: int) -> np.ndarray:
    """Put three grey images, drawn by chance, into the channels of one.

    Returns:
        (count, 3, height, width), uint8.
    """
    which = np.random.default_rng(seed).integers(len(single), size=(count, CHANNELS))
    return single.pixels[single.rows[which], 0]


def shares(single: Images) -> np.ndarray:
    """Return how often stacks of the images show each triple of digits, (1000,)."""
    found = single.classes(np.arange(len(single))).numpy()
    each = np.bincount(found, minlength=DIGITS) / len(found)
    return np.einsum("a,b,c->abc", each, each, each).ravel()


def write(values: np.ndarray, path: Path) -> None:
    """Write images as a table of PNG files, which every recipe reads.

    Args:
        values: (n, 3, height, width), uint8.
    """
    cells = []
    for value in tqdm(values, desc="encoding", unit=" images", leave=False):
        file = io.BytesIO()
        Image.fromarray(value.transpose(1, 2, 0)).save(file, "png", compress_level=1)
        cells.append({"bytes": file.getvalue(), "path": None})
    Dataset.from_dict({"image": cells}, Features({"image": ImageFeature()})).to_parquet(path)


# ---- model


def trained(arguments: argparse.Namespace, table: Path, folder: Path) -> gan.GANPipeline:
    """Train with the recipe, say how long, and load what it published."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    words += [str(RECIPE), "--images", str(table), "--output_dir", str(folder)]
    words += ["--seed", str(arguments.seed)]
    words += ["--max_minutes", str(arguments.minutes), *arguments.recipe_arguments]
    subprocess.run(words, check=True)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    settings = json.loads((folder / "run.json").read_text())["settings"]
    shown = last["step"] * settings["batch_size"] * settings["critic_steps"]
    print(
        f"preset {settings['preset']}: {last['step']:,} steps, {shown:,} images in "
        f"{last['seconds'] / 60:.1f} minutes"
    )
    return gan.load_gan(folder)


# ---- measure


@dataclass(frozen=True)
class Figures:
    """How much of the data's variety images have."""

    modes: int
    divergence: float  # nats


def digits(stacks: torch.Tensor, classifier: Classifier) -> np.ndarray:
    """Return what each channel shows, (n, 3).

    Args:
        stacks: in [-1, 1], (n, 3, height, width).
    """
    single = as_images(stacks.flatten(0, 1)[:, None], None, [])
    return extract(single, classifier).classes.reshape(-1, CHANNELS)


def measure(read: np.ndarray, expected: np.ndarray) -> Figures:
    """Count the modes, and compare how often each comes with how often it should.

    Args:
        read: digits, (n, 3).
        expected: parts of the data that the triples 000 to 999 have, (1000,), none of them 0.
    """
    modes = read @ DIGITS ** np.arange(CHANNELS)[::-1]
    found = np.bincount(modes, minlength=len(expected)) / len(modes)
    there = found > 0
    divergence = float((found[there] * np.log(found[there] / expected[there])).sum())
    return Figures(int(there.sum()), divergence)


if __name__ == "__main__":
    main()
