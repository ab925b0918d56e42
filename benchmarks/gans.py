"""Train presets of train_gan.py on MNIST for the same minutes, and put them into one table.

    python benchmarks/gans.py --mnist mnist --extractor runs/classifier --minutes 20
    python benchmarks/gans.py --mnist mnist --extractor runs/classifier --runs "wgan_gp --ema 0.999"

The folder of MNIST has the parquet files of the Hub's ylecun/mnist; the extractor is a classifier
by recipes/train_classifier.py, which no GAN is trained with, though it chooses, on test images, the
evaluation whose model is published. Figures are of 10,000 images against
all training images, coverage of 2,000 against 2,000 at k = 5; the last row is of the test images.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from genkit.data import images
from genkit.data.images import Images, proportional_labels
from genkit.metrics.features import Extractor, Features, extract, extract_cached, load_extractor
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.given_images import as_images
from genkit.metrics.images import class_shares, label_accuracy
from genkit.metrics.neighbours import manifold
from genkit.models import gan
from genkit.vision.sampling import draw_samples

RECIPE = Path(__file__).parent.parent / "recipes" / "train_gan.py"
RUNS = ("modern", "modern --conditional", "dcgan")
COUNT, COVERED, K = 10_000, 2000, 5
COLUMNS = ("distance", "coverage", "precision", "entropy", "label accuracy", "thousand images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--runs", nargs="+", default=RUNS, help="presets with what is changed")
    parser.add_argument("--output", type=Path, help="folder to keep the runs in")
    arguments = parser.parse_args()
    parts = [arguments.mnist / f"{part}-00000-of-00001.parquet" for part in ("train", "test")]
    extractor = load_extractor(arguments.extractor)
    train, test = (images.load_images(part) for part in parts)
    real = extract_cached(train, extractor)
    print(f"{'':32}" + "".join(f"{name:>16}" for name in COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for i, words in enumerate(arguments.runs):
            folder = (arguments.output or Path(scratch)) / str(i)
            command = [sys.executable, str(RECIPE), "--preset", *words.split()]
            command += ["--images", str(parts[0]), "--val_images", str(parts[1])]
            command += ["--max_minutes", str(arguments.minutes), "--output_dir", str(folder)]
            if "--extractor" not in words:
                command += ["--extractor", arguments.extractor]
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            row(words, measure(folder, train, real, extractor) | shown(folder))
    row("test images", figures(extract_cached(test, extractor), real, len(extractor.names)))


def measure(folder: Path, train: Images, real: Features, extractor: Extractor) -> dict[str, float]:
    """Draw from a saved GAN, and compare with the images it was trained on."""
    pipeline = gan.load_gan(folder)
    labels = None
    if pipeline.generator.config.labels:  # shuffled, so that the first ones are of all classes
        labels = np.random.default_rng(0).permutation(proportional_labels(train, COUNT))
    drawn = draw_samples(pipeline, range(COUNT), labels)
    fake = extract(as_images(drawn, None, []), extractor)
    found = figures(fake, real, len(extractor.names))
    if labels is not None:
        found["label accuracy"] = label_accuracy(fake.classes, labels)
    return found


def figures(fake: Features, real: Features, classes: int) -> dict[str, float]:
    some = np.random.default_rng(0).permutation(len(real))[:COVERED]
    near = manifold(real.features[some], fake.features[:COVERED], K)
    shares = torch.from_numpy(class_shares(fake.classes, classes))
    return {
        "distance": frechet_distance(real.features, fake.features),
        "coverage": near.coverage,
        "precision": near.precision,
        "entropy": (torch.special.entr(shares).sum() / np.log(classes)).item(),
    }


def shown(folder: Path) -> dict[str, float]:
    """Return how many thousand real images the discriminator was shown."""
    settings = json.loads((folder / "run.json").read_text())["settings"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    rows = settings["batch_size"] * settings["critic_steps"]
    return {"thousand images": last["step"] * rows / 1000}


def row(name: str, found: dict[str, float]) -> None:
    cells = (f"{found[column]:16.4f}" if column in found else f"{'':16}" for column in COLUMNS)
    print(f"{name:32}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
