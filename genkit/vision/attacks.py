"""An image changed so that a classifier takes it for another class: the verb on one image."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image

from genkit import console, plots
from genkit.arguments import explain_names
from genkit.metrics.features import Classifier
from genkit.notebook import DrawnRecord, as_png
from genkit.seeds import is_whole, row_seeds
from genkit.vision import image_grid, patches, perturbations
from genkit.vision.differentiable import (
    DifferentiableClassifier,
    ImageLike,
    load_differentiable,
)
from genkit.vision.perturbations import Budget, Norm

Method = Literal["fgsm", "pgd", "patch"]
EPSILON = 8 / 255  # by default
STEPS = {"pgd": 40, "patch": 60}  # by default
SHARE = 0.4  # of a patch by default
PLACES = 50  # in which a patch is tried

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Attacked(DrawnRecord):
    """An image before and after an attack, and what the model makes of both.

    What stands here of the image after it is that of the PNG which `save` writes, read back.
    """

    before: torch.Tensor = field(repr=False)  # (channels, height, width), in [0, 1]
    after: torch.Tensor = field(repr=False)  # the same, of the 256 levels of image files
    predicted_before: str  # name of the most probable class
    confidence_before: float  # its probability
    predicted: str  # of the PNG, read back
    confidence: float
    target: str | None  # class to reach; None: any other
    success: bool  # whether the PNG, read back, is of the target, or of another class
    norm: str  # of the change: linf, l2, or of a patch area
    change: float  # by that norm; area: the part of the pixels
    queries: int  # forward and gradient evaluations of one image
    method: str
    settings: dict[str, Any]  # of the method
    model: str
    patch: torch.Tensor | None = field(default=None, repr=False)  # (channels, side, side)

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {_short(value)}" for name, value in self.settings.items())
        aim = "" if self.target is None else f", target {self.target}"
        result = "fooled" if self.success else "not fooled"
        return (
            f"{self.method}: {self.predicted_before} ({self.confidence_before:.1%}) → "
            f"{self.predicted} ({self.confidence:.1%}), {result}{aim}; "
            f"{self.norm} {self._change()}, {self.queries} queries; {settings}"
        )

    def _change(self) -> str:
        if self.norm == "linf":
            return f"{round(self.change * perturbations.LEVELS)}/{perturbations.LEVELS}"
        return f"{self.change:.1%}" if self.norm == "area" else f"{self.change:.3g}"

    def save(self, path: str | Path) -> None:
        """Write the changed image as PNG, which alone keeps every pixel.

        Raises:
            ValueError: the suffix is another.
        """
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"path: {str(path)!r} must end in .png, which keeps every pixel")
        image_grid.save(image_grid.to_picture(self.after), Path(path))

    def save_comparison(self, path: str | Path) -> None:
        """Write a picture: the image, the change made visible, the changed image."""
        change = self.after - self.before
        gain = max(1, int(0.5 / max(float(change.abs().max()), 1e-3)))
        panels = [each.expand(3, -1, -1) for each in (self.before, 0.5 + gain * change, self.after)]
        shown = torch.stack(panels).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        captions = [
            f"{self.predicted_before}\n{self.confidence_before:.1%}",
            f"change x {gain}\n{self.norm} {self._change()}",
            f"{self.predicted}\n{self.confidence:.1%}",
        ]
        plots.captioned(shown, captions, Path(path), columns=len(captions))

    def _repr_png_(self) -> bytes:
        return as_png(self.save_comparison)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def attack_image(
    image: ImageLike,
    *,
    model: str | Path | Classifier,
    method: Method = "pgd",
    target: str | int | None = None,
    epsilon: float | None = None,
    norm: Norm | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    share: float | None = None,
    seed: int = 0,
    revision: str | None = None,
    device: str | None = None,
) -> Attacked:
    """Change an image a little, so that a classifier takes it for another class.

    The result is of the 256 levels of image files; it is written as PNG, read back, and judged by
    the model, so that what is said of it holds for the file.

    Args:
        image: a path, a PIL image, a uint8 array, or a float tensor in [-1, 1] of the shape
            (channels, height, width). It is resized by the model's own processor; a grey one stays
            grey.
        model: folder or Hub id of an image classifier, or what `genkit.load` returned.
        method: fgsm, one step along the gradient; pgd, many, from a random start; or patch, a disc
            that works wherever it is pasted.
        target: name or number of the class to reach; default: any other than the model's own.
        epsilon: largest change of fgsm and pgd, in pixels of [0, 1]; default: 8/255.
        norm: by which it is measured: linf, the largest change of a pixel, or l2, the length of
            the whole; default: linf.
        steps: of pgd, default 40, or of the patch, default 60.
        restarts: random starts of pgd, until one succeeds; default: 1.
        share: diameter of the patch over the shorter side of the image; default: 0.4.
        seed: of random starts and places.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A record that prints, whose `save` writes the image and `save_comparison` a picture of it
        beside what it was.

    Raises:
        ValueError: an argument is invalid, or the model is none that can be differentiated.

    Source: Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572; Madry et al. 2018,
        https://arxiv.org/abs/1706.06083; Brown et al. 2017, https://arxiv.org/abs/1712.09665
    """
    options = _check_options(method, epsilon, norm, steps, restarts, share, seed)
    classifier = load_differentiable(model, revision, device)
    pixels = classifier.pixels(image)
    with classifier.frozen():
        task = _make_task(classifier, pixels, target, options)
        made = METHODS[method](task)
        found, certainty = _judge_file(classifier, made.after)
    return Attacked(
        pixels.cpu(),
        made.after.cpu(),
        classifier.names[task.own],
        task.confidence,
        classifier.names[found],
        certainty,
        None if task.goal is None else classifier.names[task.goal],
        (found == task.index) == task.targeted,
        made.norm,
        made.change,
        made.queries,
        method,
        made.settings,
        classifier.name,
        made.patch,
    )


# ---------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class _Options:
    budget: Budget
    steps: int
    restarts: int
    share: float
    seed: int


TAKES = {  # options of each method
    "fgsm": ("epsilon", "norm"),
    "pgd": ("epsilon", "norm", "steps", "restarts"),
    "patch": ("steps", "share"),
}


def _check_options(
    method: Any, epsilon: Any, norm: Any, steps: Any, restarts: Any, share: Any, seed: Any
) -> _Options:
    """Refuse options that cannot work, and choose those that were left open."""
    _check_method(method, epsilon=epsilon, norm=norm, steps=steps, restarts=restarts, share=share)
    budget = check_budget(EPSILON if epsilon is None else epsilon, norm or "linf")
    if budget.norm == "linf" and budget.epsilon * perturbations.LEVELS < 1 - 1e-6:
        raise ValueError(f"epsilon must be 1/255 or more, the levels of a PNG, got {epsilon}")
    check_count("steps", steps)
    check_count("restarts", restarts)
    _check_share(share)
    (own,) = row_seeds(seed, 1, "an image")
    return _Options(budget, steps or STEPS.get(method, 1), restarts or 1, share or SHARE, own)


def _check_method(method: Any, **options: Any) -> None:
    """Refuse a method that does not exist, and options that it does not have."""
    if method not in TAKES:
        raise ValueError(f"method must be one of {', '.join(TAKES)}, got {method!r:.80}")
    for name, value in options.items():
        if value is not None and name not in TAKES[method]:
            having = " and ".join(each for each, names in TAKES.items() if name in names)
            raise ValueError(f"{name}={value!r:.80} is for {having}, not for {method}")


def check_budget(epsilon: Any, norm: Any) -> Budget:
    """Return how far a change may go.

    Raises:
        ValueError: `epsilon` is not in (0, 1], or there is no such norm.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r:.80}")
    numeric = isinstance(epsilon, int | float) and not isinstance(epsilon, bool)
    if not numeric or not (0 < epsilon <= 1 or (norm == "l2" and 0 < epsilon < math.inf)):
        bound = "above 0 and at most 1 (8 levels are 8/255)" if norm == "linf" else "above 0"
        raise ValueError(f"epsilon must be {bound}, got {epsilon!r:.80}")
    return Budget(float(epsilon), norm)


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number, 1 or more; None is a default."""
    if value is not None and (not is_whole(value) or value < 1):
        raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r:.80}")


def _check_share(share: Any) -> None:
    most = 1 / patches.SIZES[1]
    if share is not None and not (isinstance(share, int | float) and 0 < share <= most):
        raise ValueError(f"share must be above 0 and at most {most:.2f}, got {share!r:.80}")


# ---------------------------------------------------------------------------------------------
# Methods


@dataclass(frozen=True)
class _Task:
    logits: DifferentiableClassifier
    pixels: torch.Tensor  # (channels, height, width)
    own: int  # class that the model predicts for them
    confidence: float  # its probability
    goal: int | None  # class to reach; None: any other
    options: _Options

    @property
    def targeted(self) -> bool:
        return self.goal is not None

    @property
    def index(self) -> int:
        """The class to reach, or to leave."""
        return self.own if self.goal is None else self.goal

    @property
    def label(self) -> torch.Tensor:
        return torch.tensor([self.index], device=self.pixels.device)


@dataclass(frozen=True)
class _Made:
    after: torch.Tensor  # (channels, height, width), of 256 levels
    norm: str
    change: float
    queries: int
    settings: dict[str, Any]
    patch: torch.Tensor | None = None


def _make_task(
    classifier: DifferentiableClassifier,
    pixels: torch.Tensor,
    target: str | int | None,
    options: _Options,
) -> _Task:
    """Judge the image as it is, and find the class to reach."""
    own, confidence = judge(classifier, pixels)
    goal = None if target is None else classifier.index_of(target)
    if goal == own:
        raise ValueError(f"target: {classifier.name} already says {classifier.names[own]}")
    return _Task(classifier, pixels, own, confidence, goal, options)


def _fgsm(task: _Task) -> _Made:
    found = perturbations.fgsm(
        task.logits, task.pixels[None], task.label, task.options.budget, targeted=task.targeted
    )
    return _rounded(task, found, {"epsilon": task.options.budget.epsilon})


def _pgd(task: _Task) -> _Made:
    options = task.options
    found = perturbations.pgd(
        task.logits,
        task.pixels[None],
        task.label,
        options.budget,
        steps=options.steps,
        seeds=[options.seed],
        restarts=options.restarts,
        targeted=task.targeted,
        early=False,  # rounding must not undo what just about succeeds
    )
    settings = {"epsilon": options.budget.epsilon, "steps": options.steps}
    return _rounded(task, found, settings | {"restarts": options.restarts, "seed": options.seed})


def _rounded(task: _Task, found: perturbations.Perturbed, settings: dict[str, Any]) -> _Made:
    """Round what was found to the levels of a file, within the ball."""
    before, budget = task.pixels[None], task.options.budget
    after = perturbations.to_levels(found.pixels, before, budget)
    change = perturbations.size_of(after - before, budget.norm)
    return _Made(after[0], budget.norm, float(change), int(found.queries), settings)


def _patch(task: _Task) -> _Made:
    """Make a patch for the image, and paste it where it works best."""
    options = task.options
    patch = patches.make_patch(
        task.logits,
        task.pixels[None],
        task.label,
        share=options.share,
        steps=options.steps,
        seed=options.seed,
        targeted=task.targeted,
    )
    places = torch.rand(PLACES, 4, generator=torch.Generator().manual_seed(options.seed + 1))
    scores, images = [], []
    with torch.no_grad():
        for some in places.split(patches.DRAWS):
            pasted = patches.paste(
                task.pixels.expand(len(some), -1, -1, -1), patch, some, options.share
            )
            images.append((pasted * perturbations.LEVELS).round() / perturbations.LEVELS)
            scores.append(task.logits(images[-1]))
    logits, every = torch.cat(scores), torch.cat(images)
    own = logits.softmax(1)[:, task.index]
    best = int(own.argmax() if task.targeted else own.argmin())
    fooled = int(((logits.argmax(1) == task.index) == task.targeted).sum())
    area = float((every[best] != task.pixels).any(0).float().mean())
    settings: dict[str, Any] = {"share": options.share, "steps": options.steps}
    settings |= {"seed": options.seed, "fooled at": f"{fooled} of {PLACES} places"}
    queries = 2 * patches.DRAWS * options.steps + PLACES
    return _Made(every[best], "area", area, queries, settings, patch.cpu())


METHODS: dict[Method, Callable[[_Task], _Made]] = {"fgsm": _fgsm, "pgd": _pgd, "patch": _patch}


# ---------------------------------------------------------------------------------------------
# Pictures


@torch.no_grad()
def judge(classifier: DifferentiableClassifier, pixels: torch.Tensor) -> tuple[int, float]:
    """Return the most probable class of an image, and its probability."""
    probability, index = classifier(pixels[None])[0].softmax(0).max(0)
    return int(index), float(probability)


def _judge_file(classifier: DifferentiableClassifier, pixels: torch.Tensor) -> tuple[int, float]:
    """Judge the PNG of an image; say so if the model's processor changes it."""
    with console.quiet():
        seen = classifier.pixels(read_back(pixels))
    if (seen - pixels).abs().max() > 0.5 / perturbations.LEVELS:
        console.say(
            f"the processor of {classifier.name} resizes and crops even images of its own size: "
            "the changed image is judged as it sees it"
        )
    return judge(classifier, seen)


def read_back(pixels: torch.Tensor) -> Image.Image:
    """Write an image as PNG, and read that."""
    file = io.BytesIO()
    image_grid.to_picture(pixels).save(file, "png")
    with Image.open(file) as picture:
        picture.load()
        return picture
