"""How well generated images match real ones, and what other real ones get in their place."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from genkit.data import image_files
from genkit.data.images import Images, load_images
from genkit.data.order import blocks
from genkit.metrics.features import (
    Extractor,
    Features,
    extract,
    extract_cached,
    load_extractor,
    to_uint8,
)
from genkit.metrics.fidelity import frechet_distance, kernel_distance
from genkit.metrics.images import class_shares, histogram_distance, label_accuracy
from genkit.metrics.neighbours import K, copy_rate, manifold, nearest_neighbours

GIVEN = "the images given"
HALVES = 40  # half samples that tell how sure a figure is
SURE = 1.96  # standard errors on either side of a figure: 95 %
SMALL = 1 << 12  # values of an image whose pixels are compared, too
FEW, FEW_A_FEATURE = 2000, 10  # images; with fewer a Frechet distance is mostly bias
BLOCK = 4096  # images looked up at a time
SHOWN = 3  # classes to tell, of those whose parts differ most

Labels = Sequence[int] | np.ndarray | torch.Tensor


# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Figure:
    """A figure, how sure it is, and what real images get in the place of the generated ones."""

    value: float
    margin: float  # half of a 95 % interval: what other images of the same number could change
    baseline: float


@dataclass(frozen=True)
class Protocol:
    """How the figures of an `Evaluation` were measured."""

    images: str
    images_sha256: str
    count: int
    seed: int | None  # image i is drawn with seed + i; None for images that were given
    weights: str | None  # such as "raw" or "EMA", if told
    sampler: str | None
    evaluations: int | None  # of the network, for an image
    data: str
    data_sha256: str
    real: int  # images compared with
    held_out: int  # other real images, which make the baseline
    split_seed: int  # of these two
    train: str  # among which copies are looked for
    train_sha256: str
    extractor: str
    extractor_sha256: str
    features: int
    k: int  # the neighbour that makes the radius in precision, recall, density and coverage

    def __str__(self) -> str:
        calls = "1 evaluation" if self.evaluations == 1 else f"{self.evaluations} evaluations"
        how = [
            self.sampler,
            None if self.evaluations is None else f"{calls} an image",
            f"{self.weights} weights" if self.weights else "weights not told",
            None if self.seed is None else f"seed {self.seed}",
        ]
        return (
            f"{self.count:,} of {_name(self.images, self.images_sha256)}: "
            f"{', '.join(part for part in how if part)}\n"
            f"against {self.real:,} of {_name(self.data, self.data_sha256)}, split by seed "
            f"{self.split_seed}; baseline of {self.held_out:,} others\n"
            f"copies of {_name(self.train, self.train_sha256)}\n"
            f"seen by {_name(self.extractor, self.extractor_sha256)}: {self.features:,} features, "
            f"k {self.k}"
        )


def _name(name: str, sha256: str) -> str:
    return f"{name} (SHA-256 {sha256[:12]}…)"


@dataclass(frozen=True)
class Evaluation:
    """How well generated images match real ones, and how that was measured."""

    figures: dict[str, Figure]
    classes: dict[str, tuple[float, float]]  # part of the generated and of the real images
    nearest: list[int]  # the training image nearest to each, by features
    distances: list[float]  # to it
    protocol: Protocol
    warnings: list[str]

    def __str__(self) -> str:
        lines = [f"{'':22}{'value':>10}{'± 95 %':>10}{'baseline':>10}"]
        for name, figure in self.figures.items():
            numbers = (figure.value, figure.margin, figure.baseline)
            lines.append(f"{name:22}" + "".join(f"{number:10.4f}" for number in numbers))
        off = sorted(self.classes.items(), key=lambda item: -abs(item[1][0] - item[1][1]))
        told = [f"{name} {fake:.1%} ({real:.1%})" for name, (fake, real) in off[:SHOWN]]
        lines += ["", f"classes most off (real): {', '.join(told)}"] if told else []
        return "\n".join([*lines, "", str(self.protocol), *(f"! {w}" for w in self.warnings)])


# ---------------------------------------------------------------------------------------------
# The judge


class Judge:
    """Compares generated images with real ones; looks at the real ones once.

    The real images are split in two: those compared with, and stand-ins, which are put in the place
    of the generated images, as many as there are of these. What they get is the baseline: images
    that are as good as real ones get no more.

    Args:
        data: real images, or where they are; see `images.load`.
        extractor: see `load_extractor`, or what it returned.
        train: images that a model learned from, to look for copies of; the data must not be among
            them. Those compared with unless given.
        real_count: how many real images to use, drawn by the seed; all unless given.
        k: the neighbour that makes the radius in precision, recall, density and coverage.
        seed: of the split, and of subsets and half samples.

    Raises:
        ValueError: an argument cannot work; it is named.
    """

    def __init__(
        self,
        data: str | Path | Images = image_files.DIGITS,
        *,
        extractor: str | Path | Extractor,
        train: str | Path | Images | None = None,
        real_count: int | None = None,
        k: int = K,
        seed: int = 0,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        self.k, self.seed = k, seed
        self.name, self.data = load_named(data)
        order = np.random.default_rng(seed).permutation(len(self.data))
        if real_count is not None and not 1 <= real_count <= len(order):
            raise ValueError(f"real_count must be 1 to {len(order):,}, got {real_count}")
        order = order[:real_count]
        half = len(order) - len(order) // 2
        _check_enough(len(order) // 2, "data: half of the real images", k)
        self.extractor = (
            load_extractor(extractor) if isinstance(extractor, str | Path) else extractor
        )
        self.real_images, self.held_out_images = (
            self.data.take(part) for part in (order[:half], order[half:])
        )
        self.real, self.held_out = (
            extract_cached(part, self.extractor)
            for part in (self.real_images, self.held_out_images)
        )
        self.train_name, self.train, seen = "those compared with", self.real_images, self.real
        if train is not None:
            self.train_name, self.train = load_named(train)
            _check_size(self.train, self.data, "train")
            seen = extract_cached(self.train, self.extractor)
        self._train_features = seen.features
        self._unseen = self._nearest(self.held_out_images, self.held_out)
        self._check_unseen()
        self._baselines: dict[int, dict[str, float]] = {}

    def judge(
        self,
        images: Images | torch.Tensor,
        labels: Labels | None = None,
        *,
        name: str = GIVEN,
        seed: int | None = None,
        weights: str | None = None,
        sampler: str | None = None,
        evaluations: int | None = None,
    ) -> Evaluation:
        """Compare images with the real ones.

        Args:
            images: generated ones; a tensor is in [-1, 1], (n, channels, height, width), and is
                rounded to the 256 levels that a file has.
            labels: what each should show, as the images number their classes, or as the data
                does if they have none; those that the images have unless given.
            name, seed, weights, sampler, evaluations: for the protocol.

        Raises:
            ValueError: an argument cannot work; it is named.
        """
        fakes = as_images(images, labels, self.data.names or self.extractor.names)
        _check_size(fakes, self.data, "images")
        _check_enough(len(fakes), "images", self.k)
        seen, floors = extract(fakes, self.extractor), self._floor(len(fakes))
        near = self._nearest(fakes, seen)
        distances, which = near["features"]
        return Evaluation(
            figures=self._figures(seen, _known(fakes, self.extractor), floors) | self._copies(near),
            classes=self._classes(seen),
            nearest=which.tolist(),
            distances=distances.tolist(),
            protocol=Protocol(
                images=name,
                images_sha256=fakes.sha256,
                count=len(fakes),
                seed=seed,
                weights=weights,
                sampler=sampler,
                evaluations=evaluations,
                data=self.name,
                data_sha256=self.data.sha256,
                real=len(self.real),
                held_out=min(len(fakes), len(self.held_out)),
                split_seed=self.seed,
                train=self.train_name,
                train_sha256=self.train.sha256,
                extractor=self.extractor.name,
                extractor_sha256=self.extractor.sha256,
                features=seen.features.shape[1],
                k=self.k,
            ),
            warnings=self._warnings(fakes, seen),
        )

    def _figures(
        self, seen: Features, wanted: np.ndarray | None, floors: dict[str, float]
    ) -> dict[str, Figure]:
        """Compare what is seen in generated images with what is seen in real ones."""
        of_all = self.real, seen, self.extractor.names, self.k
        values, off = compute_figures(*of_all), half_sample_margins(*of_all, self.seed)
        kernel = kernel_distance(self.real.features, seen.features, seed=self.seed)
        values["kernel distance"], off["kernel distance"] = (
            kernel.value,
            SURE * kernel.standard_error,
        )
        figures = {what: Figure(values[what], off[what], floors[what]) for what in values}
        if wanted is not None and "label accuracy" in floors:
            right = label_accuracy(seen.classes, wanted)
            figures["label accuracy"] = _part(right, len(wanted), floors["label accuracy"])
        return figures

    def _floor(self, count: int) -> dict[str, float]:
        """Say what as many real images get."""
        if count not in self._baselines:
            some = np.arange(min(count, len(self.held_out)))
            seen = self.held_out.take(some)
            baseline = compute_figures(self.real, seen, self.extractor.names, self.k)
            kernel = kernel_distance(self.real.features, seen.features, seed=self.seed)
            baseline["kernel distance"] = kernel.value
            wanted = _known(self.held_out_images.take(some), self.extractor)
            if wanted is not None:
                baseline["label accuracy"] = label_accuracy(seen.classes, wanted)
            self._baselines[count] = baseline
        return self._baselines[count]

    def _nearest(
        self, images: Images, seen: Features
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Find the nearest training image of each by features, and by pixels if they are small."""
        parts = (self._train_features[which] for which in blocks(len(self.train), BLOCK))
        found = {"features": nearest_neighbours(seen.features, parts)}
        if math.prod(images.size) <= SMALL:
            parts = (self.train.batch(w).flatten(1) for w in blocks(len(self.train), BLOCK))
            found["pixels"] = nearest_neighbours(
                images.batch(np.arange(len(images))).flatten(1), parts
            )
        return found

    def _copies(self, near: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Figure]:
        """Say which part of generated images is as near to training images as few real ones are."""
        figures = {}
        for space, (distances, _) in near.items():
            part, baseline = copy_rate(distances, self._unseen[space][0])
            figures[f"copies by {space}"] = _part(part, len(distances), baseline)
        return figures

    def _check_unseen(self) -> None:
        distances, _ = self._unseen["features"]
        # the same image in another batch has features that differ by rounding
        same = distances <= 1e-5 * torch.from_numpy(self.held_out.features).norm(dim=1)
        if same.double().mean() > 0.5:
            raise ValueError(
                f"train: {same.sum():,} of {len(same):,} of the data's images are among those of "
                "train; give data that was not trained on, or leave train out"
            )

    def _classes(self, seen: Features) -> dict[str, tuple[float, float]]:
        """Return the parts of generated and of real images that each class has."""
        names = self.extractor.names
        if not names:
            return {}
        shares = (class_shares(each.classes, len(names)) for each in (seen, self.real))
        pairs = zip(*(share.tolist() for share in shares), strict=True)
        return dict(zip(names, pairs, strict=True))

    def _warnings(self, fakes: Images, seen: Features) -> list[str]:
        count, features = seen.features.shape
        fewest, wanted = min(count, len(self.real)), max(FEW, FEW_A_FEATURE * features)
        told = []
        if fewest <= features:
            told.append(
                f"{fewest:,} images cannot fill a covariance of {features:,} features: the "
                "Frechet distance is mostly bias"
            )
        elif fewest < wanted:
            told.append(
                f"{fewest:,} images are few for {features:,} features, {wanted:,} would do: part "
                "of the Frechet distance is bias, so compare it with its baseline, and with "
                "figures of as many images"
            )
        if len(self.held_out) < count:
            told.append(
                f"the baseline is of {len(self.held_out):,} real images for {count:,} generated "
                "ones: the Frechet distance's is too high for that"
            )
        if fakes.labels is not None and "label accuracy" not in self._floor(count):
            told.append("no label accuracy: the data has no labels, or others than the extractor")
        elif fakes.labels is not None and _known(fakes, self.extractor) is None:
            told.append("no label accuracy: the images' classes are not the extractor's")
        return told


# ---------------------------------------------------------------------------------------------
# Figures


def compute_figures(real: Features, fake: Features, names: list[str], k: int) -> dict[str, float]:
    """Compute the figures whose margins half samples tell."""
    figures = {"Frechet distance": frechet_distance(real.features, fake.features)}
    figures |= asdict(manifold(real.features, fake.features, k))
    if names:
        shares = (class_shares(each.classes, len(names)) for each in (real, fake))
        figures["class histogram"] = histogram_distance(*shares)
    return figures


def half_sample_margins(
    real: Features, fake: Features, names: list[str], k: int, seed: int
) -> dict[str, float]:
    """Tell how far figures could be off by chance: half of a 95 % interval.

    From half samples drawn without replacement, whose figures spread as those of whole new samples
    do (the delete-d jackknife at d = n / 2): a bootstrap with replacement would see duplicates,
    which are no distance apart and narrow every neighbourhood and covariance. That half samples
    have a larger Frechet distance shifts all of them alike and is not in the spread. Of Gaussians
    such margins are 0.8 to 1.3 times what new draws give, and wider where real and generated are
    alike.

    Source: Shao and Wu 1989, https://doi.org/10.1214/aos/1176347263
    """
    rng, found = np.random.default_rng(seed), []
    for _ in tqdm(range(HALVES), desc="half samples", delay=2, leave=False):
        some_real, some_fake = (
            seen.take(rng.permutation(len(seen))[: len(seen) // 2]) for seen in (real, fake)
        )
        found.append(compute_figures(some_real, some_fake, names, k))
    return {name: SURE * float(np.std([each[name] for each in found], ddof=1)) for name in found[0]}


def _part(value: float, count: int, baseline: float) -> Figure:
    """Make a figure of a part of images that are counted one by one; the margin is Wilson's."""
    spread = value * (1 - value) / count + (SURE / (2 * count)) ** 2
    return Figure(value, SURE * math.sqrt(spread) / (1 + SURE**2 / count), baseline)


def _known(images: Images, extractor: Extractor) -> np.ndarray | None:
    """Look up labels as the extractor numbers them, by name; None if it does not know them."""
    if images.labels is None or not set(images.names) <= set(extractor.names):
        return None
    place = np.array([extractor.names.index(name) for name in images.names])
    return place[images.labels[images.rows]]


# ---------------------------------------------------------------------------------------------
# What may be given


def load_named(images: str | Path | Images) -> tuple[str, Images]:
    """Load images unless they are loaded, and say what to call them."""
    if isinstance(images, Images):
        return GIVEN, images
    return str(images), load_images(images)


def as_images(images: Images | torch.Tensor, labels: Labels | None, names: list[str]) -> Images:
    """Make images of a tensor, and give them labels.

    Args:
        names: of the classes that labels number, if the images have none of their own.
    """
    if isinstance(images, torch.Tensor):
        _check_tensor(images)
        pixels = to_uint8(images.detach()).cpu().numpy()
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        images = Images(pixels, None, [], np.arange(len(pixels)), digest)
    if labels is None:
        return images
    names, given = images.names or names, torch.as_tensor(labels).cpu().numpy()
    if not names:
        raise ValueError("labels: neither the images nor the data nor the extractor names classes")
    if given.shape != (len(images),) or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"labels must be {len(images):,} integers, one for each image, got {given.dtype} of "
            f"the shape {given.shape}"
        )
    beyond = np.flatnonzero((given < 0) | (given >= len(names)))
    if beyond.size:
        raise ValueError(
            f"labels[{beyond[0]}] must be one of {len(names)} classes, 0 to {len(names) - 1}, got "
            f"{given[beyond[0]]}"
        )
    every = np.zeros(len(images.pixels), np.int64)
    every[images.rows] = given
    return dataclasses.replace(images, labels=every, names=names)


def _check_tensor(images: torch.Tensor) -> None:
    if images.ndim != 4 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            "images must be floats, (n, channels, height, width), none of them 0, got "
            f"{images.dtype} of the shape {tuple(images.shape)}"
        )
    wrong = (~(images.abs() <= 1 + 1e-4)).flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"images[{wrong[0]}] must be in [-1, 1], got values from {images[wrong[0]].min():g} to "
            f"{images[wrong[0]].max():g}"
        )


def _check_size(images: Images, data: Images, name: str) -> None:
    if images.size != data.size:
        raise ValueError(
            f"{name}: they are {images.size} (channels, height, width), those of the data "
            f"{data.size}; load one as the other is, by genkit.data.images.load_images(…, "
            "resolution, channels)"
        )


def _check_enough(count: int, name: str, k: int) -> None:
    """Half samples must have a k-th neighbour."""
    if count < 2 * (k + 1):
        raise ValueError(f"{name}: {count} are too few for k = {k}; {2 * (k + 1)} are the fewest")
