"""genkit.attribute: which pixels of an image speak for a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from genkit import console
from genkit.arguments import explain_names
from genkit.metrics import attribution as measures
from genkit.metrics.attribution import Quality
from genkit.metrics.features import Classifier
from genkit.notebook import DrawnRecord
from genkit.seeds import is_whole, row_seeds
from genkit.vision import heat_maps, hidden_maps
from genkit.vision.differentiable import (
    DifferentiableClassifier,
    ImageLike,
    load_differentiable,
)

Method = Literal["saliency", "smooth_grad", "integrated_gradients", "grad_cam", "occlusion"]
Baseline = Literal["black", "white", "mean"]
STEPS = {"smooth_grad": 50, "integrated_gradients": 50}  # by default
NOISE = 0.15  # of SmoothGrad: standard deviation over the range of the pixels
WINDOWS = 14  # of occlusion, along the shorter side
BATCH = 16  # inputs of the network at once
LARGE = 0.01  # completeness error to warn of


@dataclass(frozen=True)
class Options:
    """Options of all methods; see `attribute`."""

    steps: int
    baseline: Baseline
    layer: str | int | None
    seed: int


Found = tuple[torch.Tensor, dict[str, Any], float | None]  # values, settings, error

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Attribution(DrawnRecord):
    """What each pixel of an image adds to a class, and how that was found."""

    values: torch.Tensor = field(repr=False)  # (channels, height, width) of the model's input
    pixels: torch.Tensor = field(repr=False)  # the image, in [0, 1], of the same size
    target: str  # name of the class
    index: int  # its number
    probability: float  # of the class, as the model sees the image
    predicted: str  # name of the most probable class
    method: str
    settings: dict[str, Any]  # of the method
    error: float | None  # of completeness, relative: integrated gradients only
    model: str
    quality: Quality | None = None  # if it was measured

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        seen = "" if self.predicted == self.target else f"; the model says {self.predicted}"
        error = "" if self.error is None else f", completeness error {self.error:.2%}"
        return (
            f"{self.method} for {self.target} ({self.probability:.1%}{seen})"
            f"{', ' if settings else ''}{settings}{error}"
            f"{'' if self.quality is None else f'{chr(10)}{self.quality}'}"
        )

    def save(self, path: str | Path) -> None:
        """Write a picture: the image, the map, and the one over the other.

        Raises:
            ValueError: the suffix is not that of a supported format.
        """
        heat_maps.save(self.pixels, heat(self.values), Path(path))


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def attribute(
    image: ImageLike,
    *,
    model: str | Path | Classifier,
    method: Method = "grad_cam",
    target: str | int | None = None,
    steps: int | None = None,
    baseline: Baseline = "black",
    layer: str | int | None = None,
    seed: int = 0,
    measure: bool = False,
    revision: str | None = None,
    device: str | None = None,
) -> Attribution:
    """Attribute the score of a class to the pixels of an image.

    Scores are logits. The model computes in float32 with frozen weights, and is left as it was.

    Args:
        image: a path, a PIL image, a uint8 array, or a float tensor in [-1, 1] of the shape
            (channels, height, width). It is resized by the model's own processor.
        model: folder or Hub id of an image classifier, or what `genkit.load` returned.
        method: saliency, the size of the gradient; smooth_grad, that of its mean over noisy copies;
            integrated_gradients, from a baseline to the image; grad_cam, the channels of a hidden
            state weighted by their gradients; or occlusion, by how much a grey square lowers the
            score.
        target: name or number of the class; default: the most probable one.
        steps: of integrated gradients, or noisy copies of smooth_grad; default: 50.
        baseline: image that integrated gradients start from and that occlusion shows: black, white,
            or mean, the mean colour.
        layer: of grad_cam: index of a hidden state or name of a module; default: the last hidden
            state that is a map with a gradient.
        seed: of the noise of smooth_grad, and of random numbers that measuring takes.
        measure: also measure how good the map is: the areas under the probability by deletion and
            by insertion, and the correlation with maps of the same model with random weights.
        revision: a branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A record that prints, and whose `save` draws the map over the image.

    Raises:
        ValueError: an argument is invalid, or the model is none that can be differentiated.

    Source: Simonyan et al. 2014, https://arxiv.org/abs/1312.6034; Smilkov et al. 2017,
        https://arxiv.org/abs/1706.03825; Sundararajan et al. 2017,
        https://arxiv.org/abs/1703.01365; Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391;
        Zeiler and Fergus 2014, https://arxiv.org/abs/1311.2901
    """
    _check_options(method, steps, baseline, layer)
    (row_seed,) = row_seeds(seed, 1, "an image")
    classifier = load_differentiable(model, revision, device)
    pixels = classifier.pixels(image)
    with classifier.frozen():
        with torch.no_grad():
            probabilities = classifier(pixels[None])[0].softmax(0)
        best = int(probabilities.argmax())
        index = best if target is None else classifier.index_of(target)
        options = Options(steps or STEPS.get(method, 0), baseline, layer, row_seed)

        def explain(of: DifferentiableClassifier) -> Found:
            return METHODS[method](of, pixels, index, options)

        values, settings, error = explain(classifier)
        quality = _measure(classifier, pixels, index, values, explain, options) if measure else None
    if error is not None and error > LARGE:
        console.say(f"completeness error {error:.1%}: give more steps than {options.steps}")
    return Attribution(
        values.detach().cpu(),
        pixels.cpu(),
        classifier.names[index],
        index,
        float(probabilities[index]),
        classifier.names[best],
        method,
        settings,
        error,
        classifier.name,
        quality,
    )


def _measure(
    classifier: DifferentiableClassifier,
    pixels: torch.Tensor,
    index: int,
    values: torch.Tensor,
    explain: Callable[[DifferentiableClassifier], Found],
    options: Options,
) -> Quality:
    """Measure how good a map is, beside a map of random numbers."""

    def probabilities(images: torch.Tensor) -> torch.Tensor:
        return classifier(images).softmax(1)[:, index]

    def heat_of(model: torch.nn.Module) -> torch.Tensor:
        return heat(explain(classifier.with_model(model))[0])

    start, generator = baseline_image(pixels, options.baseline), torch.Generator()
    noise = torch.rand(pixels.shape[1:], generator=generator.manual_seed(options.seed))
    own, other = (
        measures.delete_and_insert(probabilities, pixels, each.to(pixels.device), start)
        for each in (heat(values), noise)
    )
    with console.quiet():
        sanity = measures.sanity_check(classifier.model, heat_of, options.seed)
    return Quality(
        own.deletion_area, own.insertion_area, other.deletion_area, other.insertion_area, sanity
    )


def heat(values: torch.Tensor) -> torch.Tensor:
    """Return one value a pixel, (height, width), of attributions, (channels, height, width).

    That of one channel is as it is; those of several are the sum of their sizes.
    """
    return values[0] if len(values) == 1 else values.abs().sum(0)


def _check_options(method: Any, steps: Any, baseline: Any, layer: Any) -> None:
    """Refuse options that do not exist, or that the method does not have."""
    for name, value, known in (
        ("method", method, get_args(Method)),
        ("baseline", baseline, get_args(Baseline)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.80}")
    if steps is not None and method not in STEPS:
        raise ValueError(f"steps={steps!r} is for {' and '.join(STEPS)}, not for {method}")
    if steps is not None and (not is_whole(steps) or steps < 1):
        raise ValueError(f"steps must be a whole number, 1 or more, got {steps!r:.80}")
    if layer is not None and method != "grad_cam":
        raise ValueError(f"layer={layer!r} is for grad_cam, not for {method}")


# ---------------------------------------------------------------------------------------------
# Methods: pixels (channels, height, width) to values of the same height and width


def saliency(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, index: int, options: Options
) -> Found:
    """Return the size of the gradient of the logit."""
    return gradient(classifier, pixels[None], index)[0].abs(), {}, None


def smooth_grad(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, index: int, options: Options
) -> Found:
    """Return the size of the mean gradient over noisy copies, each with noise of its own seed."""
    spread = NOISE * float(pixels.max() - pixels.min())
    generator, total = torch.Generator().manual_seed(options.seed), torch.zeros_like(pixels)
    for count in _batches(options.steps, "smooth_grad"):
        noise = torch.randn(count, *pixels.shape, generator=generator).to(pixels.device)
        total += gradient(classifier, pixels + spread * noise, index).sum(0)
    settings = {"steps": options.steps, "noise": NOISE, "seed": options.seed}
    return (total / options.steps).abs(), settings, None


def integrated_gradients(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, index: int, options: Options
) -> Found:
    """Integrate the gradient from the baseline to the image, by Gauss-Legendre quadrature."""
    start = baseline_image(pixels, options.baseline)
    nodes, weights = np.polynomial.legendre.leggauss(options.steps)
    places = torch.tensor((nodes + 1) / 2, dtype=torch.float32, device=pixels.device)
    parts = torch.tensor(weights / 2, dtype=torch.float32, device=pixels.device)
    total, done = torch.zeros_like(pixels), 0
    for count in _batches(options.steps, "integrated gradients"):
        some = slice(done, done + count)
        inputs = start + places[some, None, None, None] * (pixels - start)
        gradients = gradient(classifier, inputs, index)
        total += (parts[some, None, None, None] * gradients).sum(0)
        done += count
    values = total * (pixels - start)
    with torch.no_grad():
        before, after = classifier(torch.stack([start, pixels]))[:, index].double()
    rise = float(after - before)
    error = abs(float(values.double().sum()) - rise) / max(abs(rise), 1e-12)
    return values, {"steps": options.steps, "baseline": options.baseline}, error


def grad_cam(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, index: int, options: Options
) -> Found:
    """Weight the channels of a hidden state by their mean gradients; only what is positive."""
    inputs = pixels[None].clone().requires_grad_()
    logits, maps = hidden_maps.hidden_maps(classifier, inputs, options.layer)
    found, gradients = hidden_maps.last_with_gradient(logits[:, index], maps)
    if found is not maps[-1]:
        console.say(f"layer: {maps[-1].layer} has a gradient of zero; {found.layer} is taken")
    weights = gradients.mean((2, 3), keepdim=True)
    cam = (weights * found.as_map(found.state)).sum(1, keepdim=True).relu().detach()
    values = F.interpolate(cam, pixels.shape[1:], mode="bilinear", align_corners=False)
    return values[0], {"layer": found.layer, "grid": "x".join(map(str, cam.shape[2:]))}, None


@torch.no_grad()
def occlusion(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, index: int, options: Options
) -> Found:
    """Return by how much squares over each pixel lower the logit, in the mean."""
    height, width = pixels.shape[1:]
    stride = max(1, min(height, width) // WINDOWS)
    side = min(2 * stride, height, width)
    tops, lefts = (_starts(whole, side, stride) for whole in (height, width))
    corners = [(top, left) for top in tops for left in lefts]
    cover = baseline_image(pixels, options.baseline)
    score = classifier(pixels[None])[0, index]
    drops, counts = torch.zeros(2, height, width, dtype=torch.float64)
    done = 0
    for count in _batches(len(corners), "occlusion"):
        some = corners[done : done + count]
        inputs = pixels.repeat(count, 1, 1, 1)
        for row, (top, left) in zip(inputs, some, strict=True):
            square = np.s_[:, top : top + side, left : left + side]
            row[square] = cover[square]
        for (top, left), own in zip(some, classifier(inputs)[:, index].tolist(), strict=True):
            drops[top : top + side, left : left + side] += float(score) - own
            counts[top : top + side, left : left + side] += 1
        done += count
    settings = {"side": side, "stride": stride, "baseline": options.baseline}
    return (drops / counts).float()[None], settings, None


METHODS: dict[Method, Callable[[DifferentiableClassifier, torch.Tensor, int, Options], Found]] = {
    "saliency": saliency,
    "smooth_grad": smooth_grad,
    "integrated_gradients": integrated_gradients,
    "grad_cam": grad_cam,
    "occlusion": occlusion,
}


def gradient(
    classifier: DifferentiableClassifier, pixels: torch.Tensor, index: int
) -> torch.Tensor:
    """Return the gradient of a logit by the pixels, (n, channels, height, width)."""
    inputs = pixels.clone().requires_grad_()
    (found,) = torch.autograd.grad(classifier(inputs)[:, index].sum(), inputs)
    return found


def baseline_image(pixels: torch.Tensor, baseline: Baseline) -> torch.Tensor:
    """Return an image of one colour, (channels, height, width): black, white or the mean."""
    if baseline == "mean":
        return pixels.mean((1, 2), keepdim=True).expand_as(pixels)
    return torch.full_like(pixels, float(baseline == "white"))


def _batches(total: int, doing: str) -> Any:
    """Yield the sizes of batches."""
    sizes = [BATCH] * (total // BATCH) + ([total % BATCH] if total % BATCH else [])
    return console.bar(sizes, doing)


def _starts(whole: int, side: int, stride: int) -> list[int]:
    """Return where squares begin along a side, the last one at its end."""
    return sorted({*range(0, whole - side, stride), whole - side})
