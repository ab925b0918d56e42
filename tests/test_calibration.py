import math
import socket

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from genkit.metrics import calibration
from genkit.metrics.calibration import (
    FLATTEST,
    SHARPEST,
    CalibrationMetric,
    bin_by_confidence,
    expected_calibration_error,
    fit_temperature,
)

# ---- calibration error

# borders of bins and their neighbours, as well as what is between them
numbers = st.floats(0, 1) | st.integers(0, 15).map(lambda i: i / 15)
judged = st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=30)


def slow_error(rows: list[tuple[float, bool]], bins: int) -> float:
    """Bin by bin, as in equations 2 and 3 of Guo et al."""
    error = 0.0
    for i in range(bins):
        low, high = i / bins, (i + 1) / bins
        inside = [row for row in rows if low < row[0] <= high or (i == 0 and row[0] == 0)]
        if inside:
            confidence = sum(row[0] for row in inside) / len(inside)
            accuracy = sum(row[1] for row in inside) / len(inside)
            error += len(inside) / len(rows) * abs(accuracy - confidence)
    return error


@given(judged, st.integers(1, 20), st.randoms())
def test_the_error_is_that_of_a_loop_whatever_the_order(rows, bins, rng):
    found = expected_calibration_error(*zip(*rows, strict=True), bins)
    assert found == pytest.approx(slow_error(rows, bins), abs=1e-12)
    assert 0 <= found <= 1
    rng.shuffle(rows)
    again = expected_calibration_error(*zip(*rows, strict=True), bins)
    assert again == pytest.approx(found, abs=1e-12)


@given(judged)
def test_bins_lose_nothing_and_one_bin_is_the_mean(rows):
    sure, right = zip(*rows, strict=True)
    counts, trust, correct = bin_by_confidence(sure, right)
    assert (counts.sum(), correct.sum()) == (len(rows), sum(right))
    assert trust.sum() == pytest.approx(sum(sure), abs=1e-12)
    whole = expected_calibration_error(sure, right, 1)
    assert whole == pytest.approx(abs(np.mean(sure) - np.mean(right)), abs=1e-12)
    # finer bins that divide the coarser ones cannot hide more
    assert expected_calibration_error(sure, right, 30) >= whole - 1e-12


@pytest.mark.parametrize(("right", "error"), [(0, 0.75), (1, 0.5), (3, 0), (4, 0.25)])
def test_a_constant_confidence_is_wrong_by_its_distance_from_accuracy(right, error):
    outcomes = ([True] * right + [False] * (4 - right)) * 5
    assert expected_calibration_error([0.75] * 20, outcomes) == error


def test_as_often_right_as_it_says_has_no_error():
    sure = np.repeat(np.arange(9) / 8, 8)
    right = np.concatenate([np.arange(8) < i for i in range(9)])
    assert expected_calibration_error(sure, right) == 0
    assert expected_calibration_error(sure, ~right) == pytest.approx(
        np.abs(1 - 2 * np.arange(9) / 8).mean()
    )


def test_drawn_as_often_right_as_it_says_has_an_error_within_the_bound():
    # mean of the error at most sqrt(bins / n) / 2; further than 0.02 above it: e⁻¹⁶ (McDiarmid)
    rng = np.random.default_rng(0)
    sure = rng.random(20_000)
    right = rng.random(20_000) < sure
    bound = math.sqrt(15 / 20_000) / 2 + 0.02
    assert expected_calibration_error(sure, right) < bound
    assert expected_calibration_error(np.sqrt(sure), right) > 0.1  # E[√u - u] = 1/6


@pytest.mark.parametrize(
    ("confidences", "right", "bins", "message"),
    [
        ([], [], 15, r"confidences must be \(n,\) with n above 0, got the shape \(0,\)"),
        ([[0.5]], [[True]], 15, r"confidences .* the shape \(1, 1\)"),
        ([0.5, 0.5], [True], 15, r"right must be \(2,\) as confidences, got \(1,\)"),
        ([0.5, 1.5], [True, True], 15, "confidences must be between 0 and 1, got 1.5"),
        ([0.5, -0.1], [True, True], 15, "confidences must be between 0 and 1, got -0.1"),
        ([math.nan], [True], 15, "confidences must be between 0 and 1, got nan"),
        ([0.5], [0.5], 15, "right must be booleans, or 0 and 1, got 0.5"),
        ([0.5], [True], 0, "bins must be 1 or more, got 0"),
    ],
)
def test_bad_confidences_are_named(confidences, right, bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(confidences, right, bins)


# ---- temperature


def mean_loss(logits: np.ndarray, targets: np.ndarray, temperature: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(torch.from_numpy(logits) / temperature, torch.from_numpy(targets))


@st.composite
def problems(draw):
    """Logits of up to 5 classes with some not allowed, and targets that are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, classes = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    logits = rng.normal(size=(rows, classes)) * draw(st.sampled_from([0.1, 1, 10]))
    targets = rng.integers(classes, size=rows)
    banned = rng.random((rows, classes)) < draw(st.sampled_from([0, 0.4]))
    banned[np.arange(rows), targets] = False
    logits[banned] = -np.inf
    return logits, targets


@given(problems())
def test_no_temperature_is_better(problem):
    found = fit_temperature(*problem)
    assert SHARPEST <= found <= FLATTEST
    best = mean_loss(*problem, torch.tensor(found))
    for other in np.geomspace(SHARPEST, FLATTEST, 41):
        assert best <= mean_loss(*problem, torch.tensor(other)) + 1e-12


@given(problems(), st.sampled_from([0.25, 0.5, 3.0, 7.1]), st.randoms())
def test_what_changes_the_temperature_and_what_does_not(problem, factor, rng):
    logits, targets = problem
    found = fit_temperature(logits, targets)
    if SHARPEST < found < FLATTEST and found != 1:  # neither beyond the range nor without effect
        expected = min(max(factor * found, SHARPEST), FLATTEST)
        assert fit_temperature(factor * logits, targets) == pytest.approx(expected, rel=1e-8)
    shifts = np.array([[rng.uniform(-9, 9)] for _ in targets])
    order = np.array(rng.sample(range(len(targets)), len(targets)))
    classes = np.array(rng.sample(range(logits.shape[1]), logits.shape[1]))
    padding = np.full((len(targets), 2), -np.inf)
    moved = np.argsort(classes)[targets]
    for variant in (
        (logits + shifts, targets),
        (logits[order], targets[order]),
        (logits[:, classes], moved),
        (np.hstack([logits, padding]), targets),
        (np.vstack([logits, logits]), np.hstack([targets, targets])),
    ):
        assert fit_temperature(*variant) == pytest.approx(found, rel=1e-6)


def drawn_problem(rows: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Targets drawn from their logits; two of six classes are not allowed in every other row."""
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(rows, 6))
    logits[::2, 4:] = -np.inf
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(1)


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_factor_of_logits_that_were_drawn_from_is_recovered(factor):
    logits, targets = drawn_problem()
    found = fit_temperature(factor * logits, targets)
    assert found == pytest.approx(factor, rel=0.03)
    assert found == pytest.approx(factor * fit_temperature(logits, targets), rel=1e-10)


def test_the_slope_of_the_loss_is_zero():
    logits, targets = drawn_problem(500)
    found = fit_temperature(3 * logits, targets)
    temperature = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    finite = np.maximum(logits, -1e9)  # autograd makes nan of 0 times infinity
    mean_loss(3 * finite, targets, temperature).backward()
    assert abs(temperature.grad.item()) < 1e-10


@pytest.mark.parametrize(("gap", "right"), [(2.0, 9), (2.0, 6), (-1.0, 4), (0.5, 7)])
def test_two_classes_in_closed_form(gap, right):
    """Of 10 rows with the same logits, `right` are of the first class: gap / T = log odds."""
    logits = np.tile([gap, 0.0, -np.inf], (10, 1))
    targets = np.array([0] * right + [1] * (10 - right))
    expected = gap / math.log(right / (10 - right))
    assert fit_temperature(logits, targets) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("logits", "targets", "expected"),
    [
        ([[5.0, 1.0], [0.0, 2.0]], [0, 1], SHARPEST),  # all right: the sharper the better
        ([[5.0, 5.0], [0.0, 2.0]], [0, 1], SHARPEST),  # even with a tie
        ([[1e6, 0.0], [0.0, -1e6]], [0, 0], SHARPEST),  # the loss is 0 at any temperature
        ([[5.0, 1.0], [0.0, 2.0]], [1, 0], FLATTEST),  # all wrong: the flatter the better
        ([[5.0, 1.0], [0.0, 2.0]], [0, 0], 2 / math.log(3)),  # see below
        ([[2.0, 0.0]] * 4, [0, 1, 0, 1], FLATTEST),  # right as often as wrong
        ([[1e-3, 0.0]] * 4, [0, 0, 0, 1], SHARPEST),  # 0.001 / log 3 is below the range
        ([[1e3, 0.0]] * 4, [0, 0, 0, 1], FLATTEST),  # 1000 / log 3 is above it
        ([[3.0, 3.0], [1.0, 1.0]], [0, 1], 1.0),  # no temperature changes anything
        ([[3.0, -math.inf]], [0], 1.0),
    ],
)
def test_the_ends_of_the_range(logits, targets, expected):
    # the fifth, with x = e^(-2 / T): 4x² / (1 + x²) = 2 / (1 + x), that is x² (2x + 1) = 1
    if expected == 2 / math.log(3):
        root = max(np.roots([2, 1, 0, -1]), key=lambda x: -abs(x.imag)).real
        expected = -2 / math.log(root)
    assert fit_temperature(logits, targets) == pytest.approx(expected, rel=1e-10)


def test_tensors_do_and_are_not_changed():
    logits, targets = drawn_problem(100)
    tensor = torch.from_numpy(logits)
    before = tensor.clone()
    found = fit_temperature(tensor, torch.from_numpy(targets))
    assert found == fit_temperature(logits, targets)
    assert torch.equal(tensor, before)
    single = fit_temperature(tensor.float(), torch.from_numpy(targets))
    assert single == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (np.zeros((0, 3)), [], r"logits must be \(n, classes\), neither 0, got .* \(0, 3\)"),
        (np.zeros(3), [0, 1, 2], r"logits .* \(3,\)"),
        (np.zeros((2, 3)), [0], r"targets must be \(2,\) as logits, got \(1,\)"),
        (np.zeros((2, 3)), [0.0, 1.0], "targets must be integers, got float64"),
        (np.zeros((2, 3)), [0, 3], r"targets\[1\] must be a class between 0 and 2, got 3"),
        (np.zeros((2, 3)), [-1, 0], r"targets\[0\] must be a class between 0 and 2, got -1"),
        ([[0.0, 1.0], [0.0, -math.inf]], [0, 1], r"targets\[1\] .* is allowed, got 1, whose"),
        ([[-math.inf, -math.inf]], [0], r"targets\[0\] must be a class that is allowed"),
        ([[0.0, 1.0], [0.0, math.nan]], [0, 0], r"logits\[1\] must be finite or -inf"),
        ([[0.0, math.inf]], [0], r"logits\[0\] must be finite or -inf"),
    ],
)
def test_bad_logits_are_named(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, targets)


# ---- evaluate, and the picture


def no_network(*address):
    raise AssertionError(f"the network was asked for {address}")


def test_the_metric_is_the_function(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    sure, right = [0.91, 0.62, 0.62, 0.1], [True, False, True, False]
    metric = CalibrationMetric(cache_dir=str(tmp_path))
    for references in (right, [int(each) for each in right], np.array(right)):
        assert metric.compute(predictions=sure, references=references, bins=5) == {
            "expected_calibration_error": expected_calibration_error(sure, right, 5),
            "bins": 5,
            "total": 4,
        }
    metric.add_batch(predictions=sure[:3], references=right[:3])
    metric.add(prediction=sure[3], reference=right[3])
    found = metric.compute()
    assert found["expected_calibration_error"] == expected_calibration_error(sure, right)
    with pytest.raises(ValueError, match=r"right must be booleans, or 0 and 1, got 0\.5"):
        metric.compute(predictions=[0.5], references=[0.5])


def test_the_picture_shows_how_often_it_is_right(tmp_path):
    """Of a bar at confidence 1, accuracy is blue and what is missing is red."""
    blue, red = [], []
    for right in range(5):
        outcomes = [True] * right + [False] * (4 - right)
        calibration.plot_reliability([1.0] * 4, outcomes, tmp_path / "picture.png")
        pixels = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
        blue.append(int((pixels[..., 2] > pixels[..., 0] + 0.15).sum()))
        red.append(int((pixels[..., 0] > pixels[..., 2] + 0.15).sum()))
    for areas in (blue, red[::-1]):  # but for the legend's own
        assert areas[4] - areas[0] > 1000
        assert np.diff(areas) == pytest.approx([(areas[4] - areas[0]) / 4] * 4, rel=0.1)
    assert [each.name for each in tmp_path.iterdir()] == ["picture.png"]


def test_no_picture_of_bad_confidences(tmp_path):
    with pytest.raises(ValueError, match=r"confidences must be between 0 and 1, got 1\.2"):
        calibration.plot_reliability([1.2], [True], tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
