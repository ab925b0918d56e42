"""PGD on the same network by genkit, torchattacks and foolbox, one after the other in one run.

    pip install --no-deps torchattacks==3.5.1 foolbox==3.3.4 eagerpy gitpython gitdb smmap
    python benchmarks/attacks.py --model runs/classifier --test test.parquet

All get the same function of pixels in [0, 1], the same batches, step size and number of steps. The
robust accuracy is the share of all images that are right after the attack, mean over rounds of
other random starts, with its standard error; genkit's leaves a row at the step that fools it, the
others take all steps with every row. Of the seconds those of the fastest round count.
"""

from __future__ import annotations

import argparse
import statistics
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
# pixels, labels, number of the round -> which are right
Engine = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a classifier")
    parser.add_argument("--test", required=True, help="test images, a parquet file")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, default=0.3)
    parser.add_argument("--step_size", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
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
    for name, (seconds, accuracies) in found.items():
        error = statistics.stdev(accuracies) / len(accuracies) ** 0.5
        print(
            f"{name:13} {seconds:7.2f} s  {seconds / own:5.2f} x  robust accuracy "
            f"{statistics.mean(accuracies):.2%} ± {error:.2%}"
        )


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

    def genkit(pixels: torch.Tensor, labels: torch.Tensor, number: int) -> torch.Tensor:
        seeds = range(number * len(pixels), (number + 1) * len(pixels))
        options = {"steps": steps, "step_size": size, "seeds": seeds}
        return ~perturbations.pgd(classifier, pixels, labels, budget, **options).fooled

    def by_torchattacks(pixels: torch.Tensor, labels: torch.Tensor, number: int) -> torch.Tensor:
        torch.manual_seed(number)
        changed = peer(pixels, labels)
        with torch.no_grad():
            return network(changed).argmax(1) == labels

    def by_foolbox(pixels: torch.Tensor, labels: torch.Tensor, number: int) -> torch.Tensor:
        torch.manual_seed(number)
        _, _, fooled = attack(bounded, pixels, labels, epsilons=budget.epsilon)
        return ~fooled

    return {"genkit": genkit, "torchattacks": by_torchattacks, "foolbox": by_foolbox}


def compare(
    engines: dict[str, Engine], pixels: torch.Tensor, labels: torch.Tensor, rounds: int
) -> dict[str, tuple[float, list[float]]]:
    """Return seconds and robust accuracies of each engine, each alone, in turn."""
    batches = list(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))
    seconds = {name: float("inf") for name in engines}
    accuracies: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            right = torch.cat([engine(*batch, number) for batch in batches])
            seconds[name] = min(seconds[name], time.perf_counter() - start)
            accuracies[name].append(right.float().mean().item())
    return {name: (seconds[name], accuracies[name]) for name in engines}


if __name__ == "__main__":
    main()
