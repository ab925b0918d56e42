"""Train every family of image models on MNIST for the same minutes: one table and one picture.

    python benchmarks/families.py --mnist mnist --extractor runs/classifier --minutes 20
    python benchmarks/families.py --mnist mnist --extractor runs/classifier --families vae flow

The folder of MNIST has the parquet files of the Hub's ylecun/mnist; the extractor is a classifier
by recipes/train_classifier.py. Figures are of --count images against all training images, those of
pixels, which take long, of 2,000 at most; coverage and precision of 2,000 against 2,000 at k = 5;
the last row is of the test images. All but the autoencoder are class-conditional. Minutes are of
training, with what else a run does not counted; seconds for a thousand images are without what is
done once, on the same machine by `genkit.sample`: diffusion and flow by 10 steps of dpm++ at
guidance 1.3, meanflow by 1 step at 1.5, in bfloat16 if that is fast. The mean flow starts from the
flow's weights, whose minutes come to its own. A family that the output folder has already is not
trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

import genkit
from genkit import machine
from genkit.data import images
from genkit.data.images import Images, proportional_labels
from genkit.hub import model_files
from genkit.metrics.features import Extractor, Features, extract, extract_cached, load_extractor
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.given_images import as_images
from genkit.metrics.images import class_shares, label_accuracy
from genkit.metrics.neighbours import manifold
from genkit.vision import image_grid, pipelines, sampling

RECIPES = Path(__file__).parent.parent / "recipes"
FAMILIES = {
    "autoencoder": "train_autoencoder --network conv",
    "vae": "train_vae --conditional",
    "gan": "train_gan --conditional --extractor {extractor}",
    "diffusion": "train_diffusion --conditional --extractor {extractor} --evaluations 4",
    "flow": "train_diffusion --objective flow --conditional --extractor {extractor} "
    "--evaluations 4",
    "meanflow": "train_diffusion --objective meanflow --conditional --extractor {extractor} "
    "--init_from {output}/flow --evaluations 4",
    "pixels": "train_pixels --conditional",
}
WAYS: dict[str, dict[str, Any]] = {  # that images are drawn in
    "diffusion": {"steps": 10, "guidance": 1.3},
    "flow": {"steps": 10, "guidance": 1.3},
    "meanflow": {"steps": 1, "guidance": 1.5},
}
FEW, COVERED, K, SHOWN = {"pixels": 2000}, 2000, 5, 20
COLUMNS = {
    "distance": ".3f",
    "coverage": ".3f",
    "precision": ".3f",
    "entropy": ".4f",
    "label accuracy": ".4f",
    "images": ",.0f",
    "parameters": ",.0f",
    "evaluations": ",.0f",
    "training s": ",.0f",
    "s per 1000": ".2f",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--count", type=int, default=10_000, help="images to judge a family by")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--output", type=Path, default=Path("runs/families"))
    arguments = parser.parse_args()
    train, test = (images.load_images(part) for part in parts(arguments.mnist))
    extractor = load_extractor(arguments.extractor)
    real = extract_cached(train, extractor)
    lines = [f"{'':12}" + "".join(f"{name:>15}" for name in COLUMNS)]
    print(lines[0], flush=True)
    strips = {}
    for family in arguments.families:
        folder = arguments.output / family
        if not model_files.is_model(folder):
            fit(family, folder, arguments)
        found = row(family, folder, arguments.count, train, real, extractor)
        lines.append(as_line(family, found))
        strips[family] = drawn(family, folder, SHOWN, spread(train, SHOWN)).images
    some = test.take(np.random.default_rng(0).permutation(len(test))[: arguments.count])
    seen = extract_cached(some, extractor)
    lines.append(as_line("test images", figures(seen, real, len(extractor.names))))
    (arguments.output / "families.txt").write_text("\n".join(lines) + "\n")
    image_grid.rows(strips, arguments.output / "families.png")
    print(f"table and samples: {arguments.output / 'families.txt'}, families.png")


def parts(folder: Path) -> list[Path]:
    return [folder / f"{part}-00000-of-00001.parquet" for part in ("train", "test")]


def fit(family: str, folder: Path, arguments: argparse.Namespace) -> None:
    recipe, *words = FAMILIES[family].format(**vars(arguments)).split()
    train, test = parts(arguments.mnist)
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), *words, "--output_dir", str(folder)]
    command += ["--images", str(train), "--val_images", str(test)]
    command += ["--max_minutes", str(arguments.minutes)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def spread(train: Images, count: int) -> np.ndarray:
    """Labels in the training images' proportions, shuffled, so that the first are of all."""
    return np.random.default_rng(0).permutation(proportional_labels(train, count))


def drawn(family: str, folder: Path, count: int, labels: np.ndarray) -> Any:
    """Sample every class from a class-conditional model."""
    label = (
        labels[:count].tolist()
        if pipelines.count_classes(sampling.load_image_model(str(folder)))
        else None
    )
    way = WAYS.get(family, {})
    if way and machine.fast_bf16():
        way = way | {"dtype": "bfloat16"}
    return genkit.sample(folder, count, label=label, seed=0, **way)


def row(
    family: str, folder: Path, count: int, train: Images, real: Features, extractor: Extractor
) -> dict[str, float]:
    """Return a model's figures; they are kept beside it, and hold for one way to take them."""
    count, kept = min(FEW.get(family, count), count), folder / "families.json"
    protocol = {"count": count, "extractor": extractor.sha256, "real": train.sha256}
    protocol |= WAYS.get(family, {})
    if kept.exists():
        before = json.loads(kept.read_text())
        if before["protocol"] == protocol:
            return before["figures"]
    found = measure(family, folder, count, train, real, extractor)
    kept.write_text(json.dumps({"protocol": protocol, "figures": found}, indent=2))
    return found


def measure(
    family: str, folder: Path, count: int, train: Images, real: Features, extractor: Extractor
) -> dict[str, float]:
    """Judge a trained model."""
    some = spread(train, 1000)
    drawn(family, folder, 64, some)  # what is done once is over
    started = time.perf_counter()
    drawn(family, folder, 1000, some)
    seconds = time.perf_counter() - started
    labels = spread(train, count)
    samples = drawn(family, folder, len(labels), labels)
    seen = extract(as_images(samples.images, None, []), extractor)
    found = figures(seen, real, len(extractor.names))
    if samples.labels is not None:
        found["label accuracy"] = label_accuracy(seen.classes, labels)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found |= {"images": count, "parameters": count_parameters(folder), "s per 1000": seconds}
    return found | {"evaluations": samples.evaluations, "training s": log[-1]["seconds"]}


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


def count_parameters(folder: Path) -> int:
    """Count those that a saved model has, but for weights that are kept beside the averaged."""
    total = 0
    for file in (*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")):
        if ".raw." not in file.name:
            with safe_open(file, "pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            total += sum(int(np.prod(shape)) for shape in shapes)
    return total


def as_line(name: str, found: dict[str, float]) -> str:
    """Print a row of the table, and return it."""
    cells = (
        f"{found[column]:>15{form}}" if column in found else f"{'':15}"
        for column, form in COLUMNS.items()
    )
    line = f"{name:12}" + "".join(cells)
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
