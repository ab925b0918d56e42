import math
import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from genkit.metrics import neighbours
from genkit.metrics.fidelity import FidelityMetric, frechet_distance, kernel_distance
from genkit.metrics.images import (
    ClassMetric,
    ReconstructionMetric,
    class_shares,
    histogram_distance,
    label_accuracy,
    reconstruction_error,
)
from genkit.metrics.neighbours import ManifoldMetric, copy_rate, manifold, nearest_neighbours


class Identity(torch.nn.Module):
    """The extractor of references: features as they are."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def drawn(seed: int, count: int, features: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated features, no two of the same scale."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features)) / math.sqrt(features)
    return torch.from_numpy(rng.normal(size=(count, features)) @ mixing + shift)


def with_moments(seed: int, count: int, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Features whose mean is exactly this, and whose covariance is exactly root @ root.T."""
    values = np.random.default_rng(seed).normal(size=(count, len(mean)))
    values -= values.mean(0)
    values = values @ np.linalg.inv(np.linalg.cholesky(np.cov(values.T))).T
    return values @ root.T + mean


# ---- Frechet distance


@pytest.mark.parametrize(
    ("real", "fake", "features"), [(300, 200, 16), (500, 500, 64), (90, 70, 3)]
)
def test_frechet_is_that_of_torchmetrics(real, fake, features):
    a, b = drawn(1, real, features), drawn(2, fake, features, shift=0.3)
    reference = FrechetInceptionDistance(Identity(features)).set_dtype(torch.float64)
    reference.update(a, real=True)
    reference.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(reference.compute().item(), rel=1e-6)
    assert frechet_distance(a.float(), b.float().numpy()) == pytest.approx(
        reference.compute().item(), rel=1e-3
    )


def test_frechet_in_closed_form():
    """Of commuting covariances |m|² + Σ (√a - √b)²; of any in two dimensions by the determinant."""
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0])
    mean = np.array([1.0, -2.0, 0.5])
    real = with_moments(1, 50, np.zeros(3), np.diag(np.sqrt(a)))
    fake = with_moments(2, 40, mean, np.diag(np.sqrt(b)))
    expected = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-10)

    roots = np.array([[2.0, 0.0], [1.0, 0.5]]), np.array([[0.3, 0.0], [-2.0, 1.0]])
    s, t = (root @ root.T for root in roots)
    trace = math.sqrt(np.trace(s @ t) + 2 * math.sqrt(np.linalg.det(s @ t)))
    real, fake = (with_moments(i, 30, np.zeros(2), root) for i, root in enumerate(roots))
    expected = np.trace(s + t) - 2 * trace
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("real", "fake"), [(5, 9), (9, 40), (40, 5), (2, 2)])
def test_frechet_of_fewer_images_than_features(real, fake):
    """Singular covariances, by the eigenvalues of their product."""
    a, b = drawn(1, real, 20).numpy(), drawn(2, fake, 20, shift=1.0).numpy()
    product = np.cov(a.T) @ np.cov(b.T)
    between = np.sqrt(np.clip(np.linalg.eigvals(product).real, 0, None)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum()
    expected += b.var(0, ddof=1).sum() - 2 * between
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 1000))
def test_what_changes_frechet_and_what_does_not(real, fake, features, seed):
    a, b = drawn(seed, real, features), drawn(seed + 1, fake, features, shift=0.5)
    distance = frechet_distance(a, b)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9, abs=1e-9)
    rotation = torch.linalg.qr(drawn(seed + 2, features, features) + torch.eye(features)).Q
    moved = frechet_distance(3 * a @ rotation + 7, 3 * b @ rotation + 7)
    assert moved == pytest.approx(9 * distance, rel=1e-8, abs=1e-8)


# ---- kernel distance


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_kernel_is_that_of_torchmetrics():
    a, b = drawn(1, 400, 16), drawn(2, 400, 16, shift=0.3)
    reference = KernelInceptionDistance(Identity(16), subsets=2, subset_size=400)
    reference.update(a, real=True)
    reference.update(b, real=False)
    whole = reference.compute()[0].item()  # every subset is the whole
    assert kernel_distance(a, b, subset_size=399).value == pytest.approx(whole, rel=1e-3)
    halves = kernel_distance(a, b, subset_size=200, subsets=400)
    assert abs(halves.value - whole) < 4 * halves.standard_error / math.sqrt(400)


def test_kernel_of_a_loop():
    """Leaving out one of three: the mean over all nine pairs of subsets, by the published sum."""
    a, b = drawn(1, 4, 2).tolist(), drawn(2, 4, 2, shift=1.0).tolist()

    def k(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 2 + 1) ** 3

    values = []
    for i in range(4):
        for j in range(4):
            x, y = a[:i] + a[i + 1 :], b[:j] + b[j + 1 :]
            within = sum(
                k(s[p], s[q]) for s in (x, y) for p in range(3) for q in range(3) if p != q
            )
            values.append(within / 6 - 2 * sum(k(p, q) for p in x for q in y) / 9)
    found = kernel_distance(a, b, subsets=3000, subset_size=3)
    error = np.std(values) / math.sqrt(3000)
    assert abs(found.value - np.mean(values)) < 4 * error
    assert found.standard_error == pytest.approx(np.std(values) / math.sqrt(1 / 3), rel=0.05)


def test_the_standard_error_of_the_kernel_is_honest():
    """It is the spread over new draws, however many subsets; and the estimate is without bias."""
    real, fake = (
        torch.from_numpy(np.random.default_rng(i).normal(size=(60, 120, 4))) for i in (1, 2)
    )
    found = [kernel_distance(a, b + 0.7, subsets=50) for a, b in zip(real, fake, strict=True)]
    spread = np.std([each.value for each in found], ddof=1)
    told = np.mean([each.standard_error for each in found])
    assert 0.75 < told / spread < 1.35
    many = kernel_distance(real[0], fake[0] + 0.7, subsets=800).standard_error
    assert many == pytest.approx(found[0].standard_error, rel=0.3)
    same = [kernel_distance(a, b, subsets=20).value for a, b in zip(real, fake, strict=True)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(len(same))
    assert min(same) < 0 < max(same)


def test_the_seed_alone_decides_the_subsets():
    a, b = drawn(1, 50, 4), drawn(2, 60, 4)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = kernel_distance(a, b, seed=3)
    assert found == kernel_distance(a, b, seed=3) != kernel_distance(a, b, seed=4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


# ---- neighbours


def slow_manifold(real, fake, k):
    """Equations of Kynkaanniemi et al. and Naeem et al., point by point."""

    def distance(x, y):
        return sum((p - q) ** 2 for p, q in zip(x, y, strict=True))

    def radii(points):
        return [
            sorted(distance(x, y) for j, y in enumerate(points) if i != j)[k - 1]
            for i, x in enumerate(points)
        ]

    around = [
        [distance(r, f) <= radius for f in fake]
        for r, radius in zip(real, radii(real), strict=True)
    ]
    reach = [
        [distance(r, f) <= radius for r in real]
        for f, radius in zip(fake, radii(fake), strict=True)
    ]
    return {
        "precision": np.mean(np.any(around, 0)),
        "recall": np.mean(np.any(reach, 0)),
        "density": np.sum(around) / (k * len(fake)),
        "coverage": np.mean(np.any(around, 1)),
    }


points = st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=4, max_size=12)


@settings(max_examples=60, deadline=None)
@given(points, points, st.integers(1, 3), st.sampled_from([0.0, 0.1, 1e3]))
def test_manifold_is_that_of_a_loop(real, fake, k, shift):
    """On a grid, where many are at the same distance and some at none; also off the origin."""
    found = vars(manifold(np.array(real) / 7 + shift, np.array(fake) / 7 + shift, k))
    assert found == pytest.approx(slow_manifold(real, fake, k), abs=1e-12)


def test_manifold_of_many_features_and_in_blocks(monkeypatch):
    real, fake = drawn(1, 61, 7), drawn(2, 47, 7, shift=0.2)
    whole = manifold(real, fake, 5)
    assert vars(whole) == pytest.approx(slow_manifold(real.tolist(), fake.tolist(), 5), abs=1e-12)
    assert 0 < whole.recall < 1 > whole.precision > 0
    monkeypatch.setattr(neighbours, "AT_ONCE", 100)
    assert manifold(real, fake, 5) == whole


@pytest.mark.parametrize("k", [1, 5])
def test_manifold_of_the_same_and_of_strangers(k):
    real = drawn(1, 40, 6)
    same = vars(manifold(real, real.flip(0), k))
    assert same == {"precision": 1, "recall": 1, "density": pytest.approx(1 + 1 / k), "coverage": 1}
    assert set(vars(manifold(real, real + 1e3, k)).values()) == {0.0}


def test_a_dropped_mode_costs_recall_and_coverage_alone():
    real, fake = drawn(1, 400, 3), drawn(1, 400, 3) + 1e-3
    real[200:] += 50
    found = manifold(real, fake[:200])
    assert (found.precision, found.recall, found.coverage) == (1, 0.5, 0.5)
    spread = manifold(real, torch.cat([fake[:200], fake[200:] + 25]))  # half is nowhere
    assert (spread.precision, spread.coverage) == (0.5, 0.5)


def test_the_nearest_are_found_across_blocks():
    fakes, train = drawn(1, 30, 5), drawn(1, 200, 5, shift=0.1)
    fakes[7] = train[130]
    distances, which = nearest_neighbours(fakes, train.split(33))
    slow = [min((math.dist(f, t), j) for j, t in enumerate(train.tolist())) for f in fakes.tolist()]
    assert which.tolist() == [j for _, j in slow]
    assert distances.tolist() == pytest.approx([d for d, _ in slow], rel=1e-12)
    assert (distances[7], which[7]) == (0, 130)


def test_planted_copies_are_counted():
    train, unseen, fake = (drawn(7, 3000, 4)[i::3] for i in range(3))
    fake = fake[:500].clone()
    usual, baseline = copy_rate(
        nearest_neighbours(fake, [train])[0], nearest_neighbours(unseen, [train])[0]
    )
    assert baseline == pytest.approx(0.01, abs=0.002)
    assert usual < 0.03
    fake[:50] = train[100:150] + 1e-6
    assert (
        copy_rate(nearest_neighbours(fake, [train])[0], nearest_neighbours(unseen, [train])[0])[0]
        >= 0.1
    )
    # if real images have duplicates, too, then so may generated ones
    assert copy_rate([0.0, 0.0, 1.0, 2.0], [0.0] * 5 + [1.0] * 5) == (0.5, 0.5)


# ---- classes and reconstruction


def test_classes_are_counted():
    shares = class_shares([0, 2, 2, 0, 2], 4)
    assert shares.tolist() == [0.4, 0, 0.6, 0]
    assert histogram_distance(shares, shares) == 0
    assert histogram_distance(shares, [0, 0.5, 0, 0.5]) == 1
    assert histogram_distance(shares, [0.5, 0, 0.5, 0]) == pytest.approx(0.1)
    assert label_accuracy([1, 2, 3, 3], torch.tensor([1, 2, 0, 3])) == 0.75


def test_the_error_of_each_image():
    images = drawn(1, 6, 8).view(6, 2, 2, 2)
    off = images + torch.arange(6.0).view(6, 1, 1, 1)
    assert reconstruction_error(images, off).tolist() == pytest.approx([0, 1, 4, 9, 16, 25])


# ---- evaluate


def no_network(*address):
    raise AssertionError(f"the network was asked for {address}")


def test_the_metrics_are_the_functions(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    real, fake = drawn(1, 40, 6), drawn(2, 30, 6, shift=0.2)
    metric = FidelityMetric(cache_dir=str(tmp_path))
    found = metric.compute(predictions=fake.tolist(), real=real, seed=5)
    kernel = kernel_distance(real, fake, seed=5)
    assert found == {
        "frechet_distance": frechet_distance(real, fake),
        "kernel_distance": kernel.value,
        "kernel_distance_standard_error": kernel.standard_error,
    }
    metric = ManifoldMetric(cache_dir=str(tmp_path))
    metric.add_batch(predictions=fake[:20].numpy())
    metric.add_batch(predictions=fake[20:].numpy())
    assert metric.compute(real=real, k=3) == vars(manifold(real, fake, 3))
    metric = ClassMetric(cache_dir=str(tmp_path))
    assert metric.compute(predictions=[0, 1, 1, 5], references=[0, 1, 2, 2]) == {
        "label_accuracy": 0.5,
        "histogram_distance": 0.5,
    }
    metric = ReconstructionMetric(cache_dir=str(tmp_path))
    images = real.float()
    assert metric.compute(predictions=images + 0.5, references=images) == {
        "reconstruction_error": pytest.approx(0.25),
        "total": 40,
    }


# ---- what cannot work

GOOD = [[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [1.0, 3.0], [0.0, 4.0], [5.0, 2.0]]


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, manifold])
@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ([], r"fake must be \(n, d\) with n \d or more, got the shape \(0,\)"),
        (GOOD[:1], r"fake must be .* got the shape \(1, 2\)"),
        ([[], [], [], [], [], []], r"fake must be .* got the shape \(6, 0\)"),
        ([1.0, 2.0, 3.0], r"fake must be .* got the shape \(3,\)"),
        ([*GOOD, [1.0, math.nan]], r"fake\[6\] must be finite"),
        ([[math.inf, 1.0], *GOOD], r"fake\[0\] must be finite"),
        ([[1.0]] * 6, "fake must have as many features as real, 2, got 1"),
    ],
)
def test_bad_features_are_named(measure, fake, message):
    with pytest.raises(ValueError, match=message):
        measure(GOOD, fake)
    if "many" not in message:
        with pytest.raises(ValueError, match=message.replace("fake", "real")):
            measure(fake, GOOD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(GOOD, GOOD, subset_size=6), "subset_size must be 2 .* below 6"),
        (lambda: kernel_distance(GOOD, GOOD, subset_size=1), "subset_size .* got 1"),
        (lambda: kernel_distance(GOOD, GOOD, subsets=1), "subsets must be 2 or more, got 1"),
        (lambda: manifold(GOOD, GOOD, k=0), "k must be 1 or more, got 0"),
        (lambda: manifold(GOOD, GOOD, k=6), r"real must be \(n, d\) with n 7 or more"),
        (lambda: class_shares([], 3), r"classes must be \(n,\) with n above 0"),
        (lambda: class_shares([0, 3], 3), r"classes\[1\] must be between 0 and 2, got 3"),
        (lambda: class_shares([0.0, 1.0], 3), "classes must be integers, got float64"),
        (lambda: label_accuracy([0, 1], [0]), r"labels must be \(2,\) as classes, got \(1,\)"),
        (lambda: reconstruction_error(torch.ones(2, 3), torch.ones(3, 2)), "rebuilt must be"),
        (lambda: reconstruction_error(torch.ones(0, 3), torch.ones(0, 3)), "rebuilt must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
