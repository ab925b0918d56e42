"""Robust accuracy on MNIST, linf 0.3: a plain classifier, and one of 20 minutes of training.

    accelerate launch recipes/train_classifier.py --images train.parquet --val_images test.parquet \
        --output_dir runs/plain
    accelerate launch recipes/train_classifier.py --images train.parquet --val_images test.parquet \
        --adversarial pgd --max_minutes 20 --output_dir runs/robust
    git clone https://github.com/fra31/auto-attack
    python benchmarks/robustness.py --plain runs/plain --robust runs/robust --test test.parquet \
        --autoattack auto-attack

Published (Wong et al. 2020, fast training): clean 98.5 %, PGD-50 with 10 restarts 88.8 %, and
82.9 % under AutoAttack, by its authors' table.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import machine
from genkit.data import images
from genkit.data.images import Images
from genkit.vision.differentiable import load_differentiable
from genkit.vision.robustness import Robustness, find_labels, measure_robustness

EPSILON = 0.3
STEPS, STEP_SIZE, RESTARTS = 50, 0.01, 10
BATCH = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", help="folder of a classifier")
    parser.add_argument("--robust", help="folder of one of adversarial training")
    parser.add_argument("--test", required=True, help="test images, a parquet file")
    parser.add_argument("--count", type=int, help="images to attack; default: all")
    parser.add_argument("--autoattack", type=Path, help="its code, as its authors publish it")
    arguments = parser.parse_args()
    machine.use_all_cores()
    test = images.load_images(arguments.test)
    test = test if arguments.count is None else test.take(np.arange(arguments.count))
    if arguments.plain:
        show("plain, FGSM", attack(arguments.plain, test, method="fgsm"))
    if arguments.robust:
        show("robust, FGSM", attack(arguments.robust, test, method="fgsm"))
        options = {"steps": STEPS, "step_size": STEP_SIZE, "restarts": RESTARTS}
        show("robust, PGD-50-10", attack(arguments.robust, test, **options))
    if arguments.robust and arguments.autoattack:
        run_autoattack(arguments.robust, test, arguments.autoattack)


def attack(model: str, test: Images, **options: Any) -> Robustness:
    return measure_robustness(test, model=model, epsilon=EPSILON, **options)


def show(title: str, found: Robustness) -> None:
    print(f"\n{title}\n\n{found}", flush=True)


def run_autoattack(model: str, test: Images, code: Path) -> None:
    """Run the standard AutoAttack on all images, by its own code."""
    sys.path.insert(0, str(code))
    peer = importlib.import_module("autoattack")
    classifier = load_differentiable(model)
    pixels = classifier.pixels_of(test.batch(np.arange(len(test))))
    labels = find_labels(classifier, test)
    start = time.perf_counter()
    with classifier.frozen():
        adversary = peer.AutoAttack(
            classifier, norm="Linf", eps=EPSILON, version="standard", device=classifier.device
        )
        changed = adversary.run_standard_evaluation(pixels, labels, bs=BATCH)
        assert (changed - pixels).abs().max() <= EPSILON + 1e-6
        with torch.no_grad():
            scores = [classifier(part) for part in changed.split(BATCH)]
    accuracy = (torch.cat(scores).argmax(1) == labels).double().mean().item()
    minutes = (time.perf_counter() - start) / 60
    print(f"\nrobust, AutoAttack: {accuracy:.2%} of {len(test):,} images, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
