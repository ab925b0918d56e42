"""What a GPU makes of MNIST at 32 pixels in minutes, and how much of its matrix rate it uses.

    python benchmarks/diffusion_gpu.py --mnist mnist --extractor runs/classifier --minutes 4

Trains by the recipe, class-conditional, then judges 10,000 images that `genkit.sample` draws:
coverage of 2,000 training images by 2,000 at k = 5, distance from all training images. The matrix
rate is that of bfloat16 products of 8192 x 8192 x 8192, measured here; that of the training is the
network's own operations, forward and backward, over the second half of the run. Seconds are of the
whole process: reading, compiling, training, evaluations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import genkit
from genkit.data import images
from genkit.data.images import proportional_labels
from genkit.metrics.features import extract, extract_cached, load_extractor
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.given_images import as_images
from genkit.metrics.images import label_accuracy
from genkit.metrics.neighbours import manifold
from genkit.models import denoisers, diffusion, diffusion_losses

RECIPE = Path(__file__).parent.parent / "recipes" / "train_diffusion.py"
COUNT, COVERED, K, SIDE, RESOLUTION = 10_000, 2000, 5, 8192, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/diffusion_gpu"))
    arguments, words = parser.parse_known_args()  # what is left is for the recipe
    started = time.perf_counter()
    train_for(arguments, words)
    seconds = time.perf_counter() - started
    print(f"trained in {seconds:.0f} s in all", flush=True)
    share(arguments.output)
    judge(arguments)


def train_for(arguments: argparse.Namespace, words: list[str]) -> None:
    parts = [arguments.mnist / f"{part}-00000-of-00001.parquet" for part in ("train", "test")]
    command = [sys.executable, str(RECIPE), "--conditional", "--resolution", str(RESOLUTION)]
    command += ["--images", str(parts[0]), "--val_images", str(parts[1])]
    command += ["--extractor", arguments.extractor, "--max_minutes", str(arguments.minutes)]
    subprocess.run([*command, "--output_dir", str(arguments.output), *words], check=True)


def share(folder: Path) -> None:
    """Print the operations a second in training, and how much of the most it is."""
    settings = json.loads((folder / "run.json").read_text())["settings"]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    middle, last = log[len(log) // 2], log[-1]
    rate = (last["step"] - middle["step"]) / (last["seconds"] - middle["seconds"])
    batch = settings["batch_size"]
    flops = operations(denoisers.load_diffusion(folder), batch) * rate
    most = matrix_rate()
    print(
        f"{rate * batch:,.0f} images a second, {flops / 1e12:.1f} TFLOP/s, "
        f"{flops / most:.1%} of {most / 1e12:.0f}",
        flush=True,
    )


def operations(pipeline: diffusion.DenoisingPipeline, batch: int) -> float:
    """Count those of a step's loss and gradient."""
    pixels = torch.randn(1, *pipeline.latent_shape)
    place, labels = torch.full((1,), 0.5), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        diffusion_losses.loss(
            pipeline.unet, pixels, pixels, labels, 1000 * place, place, place, "epsilon"
        ).backward()
    return counter.get_total_flops() * batch


def matrix_rate() -> float:
    """Measure products of bfloat16 matrices, in operations a second."""
    device, side = ("cuda", SIDE) if torch.cuda.is_available() else ("cpu", SIDE // 8)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times = []
    for _ in range(20):
        wait()
        started = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - started)
    return 2 * side**3 / float(np.median(times))


def judge(arguments: argparse.Namespace) -> None:
    """Print how good the images are."""
    part = arguments.mnist / "train-00000-of-00001.parquet"
    train, extractor = (
        images.load_images(part, resolution=RESOLUTION),
        load_extractor(arguments.extractor),
    )
    real = extract_cached(train, extractor)
    labels = np.random.default_rng(0).permutation(proportional_labels(train, COUNT))
    drawn = genkit.sample(arguments.output, COUNT, label=labels.tolist(), seed=0, dtype="bfloat16")
    print(drawn)
    seen = extract(as_images(drawn.images, None, []), extractor)
    some = np.random.default_rng(0).permutation(len(real))
    near = manifold(real.features[some[:COVERED]], seen.features[:COVERED], K)
    perfect = manifold(real.features[some[:COVERED]], real.features[some[COVERED : 2 * COVERED]], K)
    print(
        f"coverage {near.coverage:.4f} (other training images {perfect.coverage:.4f}), precision "
        f"{near.precision:.4f}, distance {frechet_distance(real.features, seen.features):.4f}, "
        f"label accuracy {label_accuracy(seen.classes, labels):.4f}"
    )


if __name__ == "__main__":
    main()
