"""How many images of a data set a classifier still gets right when they are attacked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from genkit import console, files
from genkit.arguments import explain_names
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.metrics.features import VALUES, Classifier
from genkit.metrics.given_images import Given, load_named
from genkit.notebook import TextRecord
from genkit.seeds import row_seeds
from genkit.vision import perturbations
from genkit.vision.attacks import EPSILON, STEPS, check_budget, check_count
from genkit.vision.differentiable import DifferentiableClassifier, load_differentiable
from genkit.vision.perturbations import Budget, Norm, Perturbed

Method = Literal["fgsm", "pgd"]
BATCH = 256  # images attacked at once
CHECKED = 200  # images that the checks attack, by default
SEARCH = 300  # squares that the attack without gradients tries
SLACK = 0.01  # of accuracy, by which an attack from random starts may miss another's

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Check:
    """A check against gradient masking: the first accuracy should not be above the second."""

    name: str
    accuracy: float  # under the attack that should be the stronger
    bound: float  # under the other one, or what it should leave
    passed: bool

    def __str__(self) -> str:
        mark = "ok  " if self.passed else "FAIL"
        return f"{mark}  {self.name:42} {self.accuracy:6.1%} <= {self.bound:.1%}"


@dataclass(frozen=True)
class Robustness(TextRecord):
    """Accuracy of a classifier with and without an attack, over all images."""

    clean: float  # accuracy without an attack
    robust: float  # share of all images that are right before and after it
    checks: list[Check]
    protocol: dict[str, Any]

    def __str__(self) -> str:
        protocol = self.protocol
        lines = [
            f"clean accuracy   {self.clean:7.2%}",
            f"robust accuracy  {self.robust:7.2%}  of all {protocol['images']:,} images",
        ]
        if self.checks:
            lines += ["", f"gradient masking, on {protocol['checked']} images:"]
            lines += map(str, self.checks)
        return "\n".join([*lines, "", *(f"{name}: {value}" for name, value in protocol.items())])

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        with files.written_whole(Path(path)) as scratch:
            scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def measure_robustness(
    data: str | Path | Given,
    *,
    model: str | Path | Classifier,
    method: Method = "pgd",
    epsilon: float = EPSILON,
    norm: Norm = "linf",
    steps: int | None = None,
    step_size: float | None = None,
    restarts: int | None = None,
    count: int | None = None,
    checked: int = CHECKED,
    seed: int = 0,
    revision: str | None = None,
    device: str | None = None,
    resolution: int | None = None,
    channels: int | None = None,
) -> Robustness:
    """Attack every image of a data set, and count those that stay right.

    Four checks tell whether the attack can be trusted: PGD is at least as strong as FGSM; more
    steps are not weaker; an epsilon that reaches every image leaves none right; and a search
    without gradients is not stronger. A model whose gradients are masked fails some of them.

    Args:
        data: images with labels: a path, or `Images`; the names of their classes are the model's.
        model: folder or Hub id of an image classifier, or what `genkit.load` returned.
        method: fgsm, one step along the gradient, or pgd, many from random starts.
        epsilon: largest change, in pixels of [0, 1].
        norm: by which it is measured: linf, the largest change of a pixel, or l2, the length of
            the whole.
        steps: of pgd; default: 40.
        step_size: of pgd, in pixels of [0, 1]; default: 2.5 epsilon over the steps.
        restarts: random starts of pgd; default: 1.
        count: images to attack, the first ones; default: all.
        checked: images of these that the checks attack; 0 for no checks.
        seed: image i starts from seed + i.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.
        resolution: scale and crop images that are read from files to squares of this side.
        channels: 1 for grey, 3 for colour; default: as the first image has.

    Returns:
        Both accuracies, the checks and the protocol; it prints, and `save` writes JSON.

    Raises:
        ValueError: an argument is invalid, the images have no labels, or the model lacks a class.

    Source: Carlini et al. 2019, https://arxiv.org/abs/1902.06705, for the checks
    """
    budget = check_budget(epsilon, norm)
    _check_options(method, steps=steps, step_size=step_size, restarts=restarts)
    check_count("count", count)
    if checked != 0:
        check_count("checked", checked)
    classifier = load_differentiable(model, revision, device)
    name, images = load_named(data, "data", resolution=resolution, channels=channels)
    if count is not None and count > len(images):
        raise ValueError(f"count must be at most {len(images):,}, got {count:,}")
    images = images if count is None else images.take(np.arange(count))
    labels = find_labels(classifier, images)
    rows = _Rows(classifier, images, labels, row_seeds(seed, len(images), "an image"))
    steps = 1 if method == "fgsm" else steps or STEPS["pgd"]
    options = {"steps": steps, "step_size": step_size, "restarts": restarts or 1}
    attack = _fgsm(budget) if method == "fgsm" else _pgd(budget, **options)
    with classifier.frozen():
        right = rows.are_right()
        robust = rows.stay_right(attack, np.flatnonzero(right), method)
        some = np.unique(np.linspace(0, len(images) - 1, checked).round().astype(int))
        checks = run_checks(rows, budget, some, right, max(steps, STEPS["pgd"] // 2))
    size = perturbations.REACH * budget.epsilon / steps if step_size is None else step_size
    protocol = {"data": name, "data sha256": images.sha256, "images": len(images)}
    protocol |= {"model": classifier.name, "model sha256": classifier.classifier.sha256}
    protocol |= {"method": method, "norm": norm, "epsilon": epsilon}
    if method == "pgd":
        protocol |= options | {"step_size": size, "seed": seed}
    if checks:
        protocol |= {"checked": len(some), "squares tried": SEARCH, "slack": SLACK}
    return Robustness(float(right.mean()), len(robust) / len(images), checks, protocol)


def _check_options(method: Any, **options: Any) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r:.80}")
    for name, value in options.items():
        if method != "pgd" and value is not None:
            raise ValueError(f"{name}={value!r:.80} is for pgd, not for {method}")
        if name != "step_size":
            check_count(name, value)
        elif value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value!r:.80}")


def find_labels(classifier: DifferentiableClassifier, images: Images) -> torch.Tensor:
    """Return the model's class of each image, (n,), by the names of the data's classes.

    Raises:
        ValueError: the images have no labels, or the model has no class of such a name.
    """
    classes = images.classes(np.arange(len(images)))
    found = [classifier.index_of(name, "data") for name in images.names]
    return torch.tensor(found)[classes].to(classifier.device)


# ---------------------------------------------------------------------------------------------
# Attacks on rows of a data set

Attack = Callable[[DifferentiableClassifier, torch.Tensor, torch.Tensor, list[int]], Perturbed]


def _fgsm(budget: Budget) -> Attack:
    return lambda logits, pixels, labels, seeds: perturbations.fgsm(logits, pixels, labels, budget)


def _pgd(budget: Budget, **options: Any) -> Attack:
    return lambda logits, pixels, labels, seeds: perturbations.pgd(
        logits, pixels, labels, budget, seeds=seeds, **options
    )


def _search(budget: Budget) -> Attack:
    return lambda logits, pixels, labels, seeds: perturbations.square_search(
        logits, pixels, labels, budget, steps=SEARCH, seeds=seeds
    )


@dataclass(frozen=True)
class _Rows:
    classifier: DifferentiableClassifier
    images: Images
    labels: torch.Tensor  # (n,)
    seeds: list[int]

    def pixels(self, which: np.ndarray) -> torch.Tensor:
        return self.classifier.pixels_of(self.images.batch(which))

    def batches(self, which: np.ndarray, doing: str) -> Any:
        """Yield row numbers, as many as fit into the processor's caches."""
        made = self.pixels(which[:1]) if len(which) else torch.zeros(1, 3, 1, 1)
        size = max(1, min(BATCH, VALUES // (3 * made.shape[2] * made.shape[3])))
        with console.bar(None, doing, len(which), " images") as bar:
            for block in blocks(len(which), size):
                yield which[block]
                bar.update(len(block))

    @torch.no_grad()
    def are_right(self) -> np.ndarray:
        """Return which rows are right without an attack, (n,), bool."""
        right = [
            self.classifier(self.pixels(which)).argmax(1) == self.labels[which]
            for which in self.batches(np.arange(len(self.images)), "clean")
        ]
        return torch.cat(right).cpu().numpy()

    def stay_right(self, attack: Attack, which: np.ndarray, doing: str) -> np.ndarray:
        """Return those of some rows that an attack does not fool; which were right before."""
        kept = [np.empty(0, int)]
        for rows in self.batches(which, doing):
            seeds = [self.seeds[row] for row in rows]
            found = attack(self.classifier, self.pixels(rows), self.labels[rows], seeds)
            kept.append(rows[~found.fooled.cpu().numpy()])
        return np.concatenate(kept)


def run_checks(
    rows: _Rows, budget: Budget, which: np.ndarray, right: np.ndarray, steps: int
) -> list[Check]:
    """Run the four checks against gradient masking on some rows.

    Args:
        which: their numbers; of none there are no checks.
        right: which of all rows are right without an attack.
        steps: of PGD.
    """
    if not len(which):
        return []
    start = which[right[which]]

    def accuracy(attack: Attack, doing: str) -> float:
        return len(rows.stay_right(attack, start, doing)) / len(which)

    everything = 1.0 if budget.norm == "linf" else math.sqrt(rows.pixels(which[:1]).numel())
    pgd = accuracy(_pgd(budget, steps=steps), "check: pgd")
    few = accuracy(_pgd(budget, steps=max(1, steps // 4)), "check: few steps")
    far = accuracy(_pgd(Budget(everything, budget.norm), steps=steps), "check: large epsilon")
    fgsm = accuracy(_fgsm(budget), "check: fgsm")
    search = accuracy(_search(budget), "check: without gradients")
    return [
        Check("PGD is at least as strong as FGSM", pgd, fgsm, pgd <= fgsm + SLACK),
        Check("more steps are not weaker", pgd, few, pgd <= few + SLACK),
        Check("a large epsilon leaves 0 %", far, 0.0, far <= SLACK),
        Check("no gradients are weaker than gradients", pgd, search, pgd <= search + SLACK),
    ]
