"""PGD on the same network by genkit, torchattacks and foolbox, one after the other in one run.

    pip install --no-deps torchattacks==3.5.1 foolbox==3.3.4 eagerpy gitpython gitdb smmap
    python benchmarks/attacks.py --model runs/classifier --test test.parquet

All get the same function of pixels in [0, 1], the same batches, step size and number of steps. The
robust accuracy is the share of all images that are right after the attack; genkit's leaves a row at
the step that fools it, the others take all steps with every row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import foolbox
import numpy as np
import torch
import torchattacks

from genkit import machine
from genkit.data import images
from genkit.vision import perturbations
from genkit.vision.differentiable import DifferentiableClassifier, load_differentiable
from genkit.vision.perturbations import Budget
from genkit.vision.robustness import find_labels

BATCH = 250
Engine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # pixels, labels -> which are right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a classifier")
    parser.add_argument("--test", required=True, help="test images, a parquet file")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, default=0.3)
    parser.add_argument("--step_size", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    arguments = parser.parse_args()
    machine.use_all_cores()
    classifier = load_differentiable(arguments.model, device="cpu")
    test = images.load_images(arguments.test).take(np.arange(arguments.count))
    labels = find_labels(classifier, test)
    pixels = classifier.pixels_of(test.batch(np.arange(len(test))))
    with classifier.frozen():
        found = compare(make_engines(classifier, arguments), pixels, labels, arguments.rounds)
    own = found["genkit"][0]
    print(f"{torch.get_num_threads()} threads, {len(test):,} images, {arguments.steps} steps")
    for name, (seconds, accuracy) in found.items():
        print(f"{name:13} {seconds:7.2f} s  {seconds / own:5.2f} x  robust accuracy {accuracy:.1%}")


class Network(torch.nn.Module):
    """The classifier as the peers want it: a module from pixels in [0, 1] to logits."""

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor], inner: torch.nn.Module):
        super().__init__()
        self.logits, self.inner = logits, inner

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.logits(pixels)


def make_engines(
    classifier: DifferentiableClassifier, arguments: argparse.Namespace
) -> dict[str, Engine]:
    """Return each engine's attack, followed by its own judgement."""
    network = Network(classifier, classifier.model).eval()
    budget, steps, size = Budget(arguments.epsilon), arguments.steps, arguments.step_size
    peer = torchattacks.PGD(network, eps=budget.epsilon, alpha=size, steps=steps)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=size, steps=steps, random_start=True)
    bounded = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")

    def genkit(pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seeds = range(len(pixels))
        options = {"steps": steps, "step_size": size, "seeds": seeds}
        return ~perturbations.pgd(classifier, pixels, labels, budget, **options).fooled

    def by_torchattacks(pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        changed = peer(pixels, labels)
        with torch.no_grad():
            return network(changed).argmax(1) == labels

    def by_foolbox(pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        _, _, fooled = attack(bounded, pixels, labels, epsilons=budget.epsilon)
        return ~fooled

    return {"genkit": genkit, "torchattacks": by_torchattacks, "foolbox": by_foolbox}


def compare(
    engines: dict[str, Engine], pixels: torch.Tensor, labels: torch.Tensor, rounds: int
) -> dict[str, tuple[float, float]]:
    """Return seconds and robust accuracy of each engine, each alone, in turn."""
    batches = list(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))
    seconds = {name: float("inf") for name in engines}
    accuracy = {}
    for _ in range(rounds):
        for name, engine in engines.items():
            torch.manual_seed(0)
            start = time.perf_counter()
            right = torch.cat([engine(*batch) for batch in batches])
            seconds[name] = min(seconds[name], time.perf_counter() - start)
            accuracy[name] = right.float().mean().item()
    return {name: (seconds[name], accuracy[name]) for name in engines}


if __name__ == "__main__":
    main()
