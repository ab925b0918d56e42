"""How well generated images match real ones, with margins and real-vs-real baselines."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import console
from genkit.data import image_files
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.hub import download, kinds
from genkit.metrics.features import (
    Extractor,
    Features,
    extract,
    extract_cached,
    load_extractor,
)
from genkit.metrics.fidelity import frechet_distance, kernel_distance
from genkit.metrics.given_images import (
    GIVEN,
    Given,
    Labels,
    as_images,
    check_enough,
    check_size,
    load_named,
)
from genkit.metrics.images import class_shares, histogram_distance, label_accuracy
from genkit.metrics.neighbours import K, copy_rate, manifold, nearest_neighbours
from genkit.notebook import TextRecord

HALVES = 40  # half samples from which margins are estimated
SURE = 1.96  # standard errors of a margin: half of a 95 % interval
SMALL = 1 << 12  # values of the largest image whose pixels are compared, too
FEW, FEW_A_FEATURE = 2000, 10  # images; with fewer a Frechet distance is mostly bias
BLOCK = 4096  # images in a block of a search
SHOWN = 3  # classes to print, of those whose shares differ most


# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Figure:
    """A figure, its margin, and its baseline: the same figure of held-out real images."""

    value: float
    margin: float  # half of a 95 % interval, over other samples of the same size
    baseline: float


@dataclass(frozen=True)
class Protocol:
    """How the figures of an `Evaluation` were measured."""

    images: str
    images_sha256: str
    count: int
    seed: int | None  # image i is sampled with seed + i; None for given images
    weights: str | None  # such as "raw" or "EMA", if known
    sampler: str | None
    evaluations: int | None  # of the network, for an image
    data: str
    data_sha256: str
    real: int  # real images of the comparison
    held_out: int  # other real images, for the baseline
    split_seed: int  # of the split into these two
    train: str  # images among which copies are searched
    train_sha256: str
    extractor: str
    extractor_sha256: str
    features: int
    k: int  # the neighbour that gives the radius in precision, recall, density and coverage

    def __str__(self) -> str:
        calls = "1 evaluation" if self.evaluations == 1 else f"{self.evaluations} evaluations"
        sampling = [
            self.sampler,
            None if self.evaluations is None else f"{calls} an image",
            f"{self.weights} weights" if self.weights else None,
            None if self.seed is None else f"seed {self.seed}",
        ]
        return (
            f"{self.count:,} of {_name(self.images, self.images_sha256)}: "
            f"{', '.join(part for part in sampling if part)}\n"
            f"against {self.real:,} of {_name(self.data, self.data_sha256)}, split by seed "
            f"{self.split_seed}; baseline of {self.held_out:,} others\n"
            f"copies of {_name(self.train, self.train_sha256)}\n"
            f"extractor {_name(self.extractor, self.extractor_sha256)}: "
            f"{self.features:,} features, k {self.k}"
        )


def _name(name: str, sha256: str) -> str:
    return f"{name} (SHA-256 {sha256[:12]}…)"


@dataclass(frozen=True)
class Evaluation(TextRecord):
    """How well generated images match real ones, and how that was measured."""

    figures: dict[str, Figure]
    classes: dict[str, tuple[float, float]]  # share of the generated and of the real images
    nearest: list[int]  # index of the nearest training image of each, by features
    distances: list[float]  # to that image
    protocol: Protocol
    warnings: list[str]

    def __str__(self) -> str:
        lines = [f"{'':22}{'value':>10}{'± 95 %':>10}{'baseline':>10}"]
        for name, figure in self.figures.items():
            numbers = (figure.value, figure.margin, figure.baseline)
            lines.append(f"{name:22}" + "".join(f"{number:10.4f}" for number in numbers))
        off = sorted(self.classes.items(), key=lambda item: -abs(item[1][0] - item[1][1]))
        shares = [f"{name} {fake:.1%} ({real:.1%})" for name, (fake, real) in off[:SHOWN]]
        lines += ["", f"classes most off (real): {', '.join(shares)}"] if shares else []
        return "\n".join([*lines, "", str(self.protocol), *(f"! {w}" for w in self.warnings)])


# ---------------------------------------------------------------------------------------------
# The judge


class Judge:
    """Compares generated images with real ones, whose features are extracted once.

    The real images are split in two: those of the comparison, and held-out ones. The figures of as
    many held-out images as there are generated ones are the real-vs-real baseline, which a perfect
    generator would reach.

    Args:
        data: real images, or their path, see `images.load_images`; other kinds are in
            `given_images.KINDS`.
        extractor: name of an image classifier, see `load_extractor`, or what that returned.
        train: training images of the model, among which copies are searched; the data must not be
            among them. Default: the real images of the comparison.
        real_count: number of real images to use, a random subset; default: all.
        k: the neighbour that gives the radius in precision, recall, density and coverage.
        seed: of the split, and of subsets and half samples.
        device: see `load_extractor`.
        resolution, channels, skip_corrupt, allow_outside: of images that are read from files; see
            `images.load_images`.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(
        self,
        data: str | Path | Given = image_files.DIGITS,
        *,
        extractor: str | Path | Extractor,
        train: str | Path | Given | None = None,
        real_count: int | None = None,
        k: int = K,
        seed: int = 0,
        device: str | None = None,
        resolution: int | None = None,
        channels: int | None = None,
        skip_corrupt: bool = False,
        allow_outside: bool = False,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        kinds.check_loaded(extractor, "extractor", takes="Classifier")
        if isinstance(extractor, str | Path):
            download.check_exists(kinds.as_name(extractor), "extractor")
        self.k, self.seed = k, seed
        self.reading: dict[str, Any] = {"resolution": resolution, "channels": channels}
        self.reading |= {"skip_corrupt": skip_corrupt, "allow_outside": allow_outside}
        self.name, self.data = load_named(data, "data", **self.reading)
        self.real_images, self.held_out_images = self._split(real_count)
        self.extractor = (
            load_extractor(extractor, device=device)
            if isinstance(extractor, str | Path)
            else extractor
        )
        self.real, self.held_out = (
            extract_cached(part, self.extractor)
            for part in (self.real_images, self.held_out_images)
        )
        self.train_name, self.train, extracted = "the real images", self.real_images, self.real
        if train is not None:
            self.train_name, self.train = load_named(train, "train", **self.reading)
            check_size(self.train, self.data, "train")
            extracted = extract_cached(self.train, self.extractor)
        self._train_features = extracted.features
        self._unseen = self._nearest(self.held_out_images, self.held_out)
        self._check_unseen()
        self._baselines: dict[int, dict[str, float]] = {}

    def _split(self, real_count: int | None) -> tuple[Images, Images]:
        """Split so many of the real images into those of the comparison and held-out ones."""
        order = np.random.default_rng(self.seed).permutation(len(self.data))
        if real_count is not None and not 1 <= real_count <= len(order):
            raise ValueError(f"real_count must be 1 to {len(order):,}, got {real_count}")
        order = order[:real_count]
        half = len(order) - len(order) // 2
        check_enough(len(order) // 2, "data: half of the real images", self.k, parts=2)
        return self.data.take(order[:half]), self.data.take(order[half:])

    def judge(
        self,
        images: Given,
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
            images: generated ones; see `given_images.KINDS`. Those of a tensor are rounded to the
                256 levels of image files.
            labels: the class that each should show, numbered as the images' classes are, or the
                data's if the images have none. Default: the images' own labels.
            name, seed, weights, sampler, evaluations: for the protocol.

        Raises:
            ValueError: an argument is invalid.
        """
        fakes = as_images(images, labels, self.data.names or self.extractor.names)
        check_size(fakes, self.data, "images")
        check_enough(len(fakes), "images", self.k)
        extracted, baseline = extract(fakes, self.extractor), self._baseline(len(fakes))
        near = self._nearest(fakes, extracted)
        distances, which = near["features"]
        return Evaluation(
            figures=self._figures(extracted, _class_indices(fakes, self.extractor), baseline)
            | self._copies(near),
            classes=self._classes(extracted),
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
                features=extracted.features.shape[1],
                k=self.k,
            ),
            warnings=self._warnings(fakes, extracted),
        )

    def _figures(
        self, extracted: Features, wanted: np.ndarray | None, baseline: dict[str, float]
    ) -> dict[str, Figure]:
        """Compare the features of generated images with those of real ones."""
        of_all = self.real, extracted, self.extractor.names, self.k
        values, off = compute_figures(*of_all), half_sample_margins(*of_all, self.seed)
        kernel = kernel_distance(self.real.features, extracted.features, seed=self.seed)
        values["kernel distance"], off["kernel distance"] = (
            kernel.value,
            SURE * kernel.standard_error,
        )
        figures = {what: Figure(values[what], off[what], baseline[what]) for what in values}
        if wanted is not None and "label accuracy" in baseline:
            right = label_accuracy(extracted.classes, wanted)
            figures["label accuracy"] = share_figure(right, len(wanted), baseline["label accuracy"])
        return figures

    def _baseline(self, count: int) -> dict[str, float]:
        """Return the figures of as many held-out real images."""
        if count not in self._baselines:
            some = np.arange(min(count, len(self.held_out)))
            held_out = self.held_out.take(some)
            baseline = compute_figures(self.real, held_out, self.extractor.names, self.k)
            kernel = kernel_distance(self.real.features, held_out.features, seed=self.seed)
            baseline["kernel distance"] = kernel.value
            wanted = _class_indices(self.held_out_images.take(some), self.extractor)
            if wanted is not None:
                baseline["label accuracy"] = label_accuracy(held_out.classes, wanted)
            self._baselines[count] = baseline
        return self._baselines[count]

    def _nearest(
        self, images: Images, extracted: Features
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Find the nearest training image of each by features, and by pixels if they are small."""
        parts = (self._train_features[which] for which in blocks(len(self.train), BLOCK))
        found = {"features": nearest_neighbours(extracted.features, parts)}
        if math.prod(images.size) <= SMALL:
            parts = (self.train.batch(w).flatten(1) for w in blocks(len(self.train), BLOCK))
            found["pixels"] = nearest_neighbours(
                images.batch(np.arange(len(images))).flatten(1), parts
            )
        return found

    def _copies(self, near: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Figure]:
        """Measure the share of generated images that look like copies; see `copy_rate`."""
        figures = {}
        for space, (distances, _) in near.items():
            part, baseline = copy_rate(distances, self._unseen[space][0])
            figures[f"copies by {space}"] = share_figure(part, len(distances), baseline)
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

    def _classes(self, extracted: Features) -> dict[str, tuple[float, float]]:
        """Return each class's share of generated and of real images."""
        names = self.extractor.names
        if not names:
            return {}
        shares = (class_shares(each.classes, len(names)) for each in (extracted, self.real))
        pairs = zip(*(share.tolist() for share in shares), strict=True)
        return dict(zip(names, pairs, strict=True))

    def _warnings(self, fakes: Images, extracted: Features) -> list[str]:
        count, features = extracted.features.shape
        fewest, wanted = min(count, len(self.real)), max(FEW, FEW_A_FEATURE * features)
        warnings = []
        if fewest <= features:
            warnings.append(
                f"{fewest:,} images give a singular covariance of {features:,} features: the "
                "Frechet distance is mostly bias"
            )
        elif fewest < wanted:
            warnings.append(
                f"{fewest:,} images are few for {features:,} features ({wanted:,} suffice): "
                "part of the Frechet distance is bias, so compare it with its baseline, and "
                "with figures of as many images"
            )
        if len(self.held_out) < count:
            warnings.append(
                f"the baseline is of {len(self.held_out):,} real images for {count:,} generated "
                "ones: that of the Frechet distance is too high"
            )
        return warnings + self._label_warnings(fakes, count) + self._files_left_out(fakes)

    def _files_left_out(self, fakes: Images) -> list[str]:
        """Say which files of folders and tables were not used."""
        each = (fakes, self.data, self.train)
        said = [text for images in each for text in (*images.notes, *images.skipped)]
        return list(dict.fromkeys(said))

    def _label_warnings(self, fakes: Images, count: int) -> list[str]:
        """Say why the metrics of images with labels lack the label accuracy."""
        if fakes.labels is None:
            return []
        if "label accuracy" not in self._baseline(count):
            return ["no label accuracy: the data has no labels, or others than the extractor"]
        if _class_indices(fakes, self.extractor) is None:
            return ["no label accuracy: the images' classes are not the extractor's"]
        return []


# ---------------------------------------------------------------------------------------------
# Figures


def compute_figures(real: Features, fake: Features, names: list[str], k: int) -> dict[str, float]:
    """Compute the figures whose margins come from half samples."""
    figures = {"Frechet distance": frechet_distance(real.features, fake.features)}
    figures |= asdict(manifold(real.features, fake.features, k))
    if names:
        shares = (class_shares(each.classes, len(names)) for each in (real, fake))
        figures["class histogram"] = histogram_distance(*shares)
    return figures


def half_sample_margins(
    real: Features, fake: Features, names: list[str], k: int, seed: int
) -> dict[str, float]:
    """Return the margin of each figure, half of a 95 % interval.

    The figures of half samples, drawn without replacement, vary as those of new samples of full
    size do (the delete-d jackknife at d = n / 2). A bootstrap with replacement would have
    duplicates, which are at distance 0 and narrow every neighbourhood and covariance. Half samples
    have a larger Frechet distance, but all of them alike, which does not change the margin. For
    Gaussians, margins are 0.8 to 1.3 times those of new samples, and wider where real and generated
    images are alike.

    Source: Shao and Wu 1989, https://doi.org/10.1214/aos/1176347263
    """
    rng, halves = np.random.default_rng(seed), []
    for _ in console.bar(range(HALVES), "half samples"):
        some_real, some_fake = (
            each.take(rng.permutation(len(each))[: len(each) // 2]) for each in (real, fake)
        )
        halves.append(compute_figures(some_real, some_fake, names, k))
    spread = {name: np.std([each[name] for each in halves], ddof=1) for name in halves[0]}
    return {name: SURE * float(value) for name, value in spread.items()}


def share_figure(value: float, count: int, baseline: float) -> Figure:
    """Return a share of images, or of rows, as a figure, with Wilson's margin."""
    spread = value * (1 - value) / count + (SURE / (2 * count)) ** 2
    return Figure(value, SURE * math.sqrt(spread) / (1 + SURE**2 / count), baseline)


def _class_indices(images: Images, extractor: Extractor) -> np.ndarray | None:
    """Return labels as the extractor numbers its classes; None if it has other classes."""
    if images.labels is None or not set(images.names) <= set(extractor.names):
        return None
    index = np.array([extractor.names.index(name) for name in images.names])
    return index[images.labels[images.rows]]
