r"""Compare table models with independent columns, a Gaussian copula, and scikit-learn.

    python benchmarks/tables.py --output_dir runs/tables
    python benchmarks/tables.py --output_dir runs/tables --tables wine --seeds 0 1 2

Wine, breast cancer and diabetes of scikit-learn are split by seed, a fifth for tests, and a model
is trained by the recipe. Then, on rows that no model has seen:

- log-likelihood in nats a row, beside that of independent columns and of Gaussian copulas: of
  kernel density estimates, correlations shrunk or not, whichever is better on the test itself;
- the accuracy of a forest that learns from synthetic rows, beside one that learns from real ones;
- a fifth of the numbers left out: error of what `fill` puts there, in deviations of the column,
  beside IterativeImputer, and how often intervals of 90 % hold the truth;
- anomalies: malignant tumours among benign ones, and breaks in a series, beside IsolationForest.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import gaussian_kde, multivariate_normal, norm
from sklearn import datasets
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.ensemble import IsolationForest
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import genkit
from genkit.metrics import tabular
from genkit.tabular.model import TableModel
from genkit.tabular.reading import as_windows, read_values

ROOT = Path(__file__).parents[1]
Array = NDArray[np.float64]
TABLES = ("wine", "cancer", "diabetes")
HIDDEN = 0.2  # of the numbers of test rows
SERIES, WINDOW, BREAK = 4000, 12, 24  # rows, rows of a window, rows of a break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", default=[*TABLES, "series"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1.5)
    words = parser.parse_args()
    words.output_dir.mkdir(parents=True, exist_ok=True)
    for name in words.tables:
        for seed in words.seeds:
            folder = words.output_dir / f"{name}-{seed}"
            if name == "series":
                measure_series(folder, seed, words.minutes)
                continue
            train, test = split_table(name, folder, seed)
            model = fit(train, folder, seed, words.minutes)
            print(f"\n{name}, seed {seed}")
            measure_likelihood(model, train, test)
            measure_classifier(name, model, train, test, seed)
            measure_filling(model, train, test, seed)
            if name == "cancer":
                measure_tumours(folder, seed, words.minutes)


# ---- data and models


def split_table(name: str, folder: Path, seed: int) -> tuple[Path, Path]:
    """Write the rows of a table to train and to test on."""
    if name == "diabetes":
        found = datasets.load_diabetes(scaled=False)
        targets = found.target.astype(int).tolist()
    else:
        found = datasets.load_wine() if name == "wine" else datasets.load_breast_cancer()
        targets = [str(found.target_names[i]) for i in found.target]
    rows = [
        [*map(repr, row), target] for row, target in zip(found.data.tolist(), targets, strict=False)
    ]
    parts = train_test_split(rows, test_size=0.2, random_state=seed)
    paths = [folder.with_name(f"{folder.name}-{part}.csv") for part in ("train", "test")]
    for path, part in zip(paths, parts, strict=True):
        write(path, [*map(str, found.feature_names), "target"], part)
    return paths[0], paths[1]


def write(path: Path, names: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def fit(train: Path, folder: Path, seed: int, minutes: float, *words: str) -> TableModel:
    """Train by the recipe."""
    if not (folder / "table.json").exists():
        recipe = [sys.executable, str(ROOT / "recipes" / "train_table.py"), "--data", str(train)]
        recipe += ["--output_dir", str(folder), "--seed", str(seed), "--quiet"]
        recipe += ["--max_minutes", str(minutes), "--device", "cpu", *words]
        subprocess.run(recipe, check=True)
    model: TableModel = genkit.load(folder, device="cpu")
    return model


# ---- likelihood


class Copula:
    """A Gaussian copula of kernel density estimates; categories are intervals of a normal."""

    def __init__(self, model: TableModel, values: Array) -> None:
        self.sizes = [len(column.categories) for column in model.columns]
        self.values = values
        pairs = list(zip(self.sizes, values.T, strict=True))
        self.kernels: list[Any] = [None if size else gaussian_kde(own) for size, own in pairs]
        self.shares: list[Any] = [
            np.bincount(own.astype(int), minlength=size) + 0.5 if size else None
            for size, own in pairs
        ]
        scores = self.scores(values)
        plain: Array = np.asarray(np.corrcoef(scores.T))
        shrunk = ledoit_wolf_shrinkage(scores / scores.std(0))
        self.correlations = [plain, (1 - shrunk) * plain + shrunk * np.eye(scores.shape[1])]

    def scores(self, values: Array) -> Array:
        found = np.empty(values.shape)
        for j, own in enumerate(values.T):
            if self.sizes[j]:
                low, high = self.intervals(j, own)
                found[:, j] = ndtri((ndtr(low) + ndtr(high)) / 2)
            else:
                width = math.sqrt(self.kernels[j].covariance[0, 0])
                levels = ndtr((own[:, None] - self.values[:, j]) / width).mean(1)
                found[:, j] = ndtri(np.clip(levels, 1e-9, 1 - 1e-9))
        return found

    def intervals(self, j: int, own: Array) -> tuple[Array, Array]:
        levels = np.concatenate([[0], np.cumsum(self.shares[j]) / self.shares[j].sum()])
        return ndtri(levels[own.astype(int)]), ndtri(np.minimum(levels[own.astype(int) + 1], 1))

    def independent(self, values: Array) -> Array:
        """Return the log density of each row with independent columns."""
        total = np.zeros(len(values))
        for j, own in enumerate(values.T):
            if self.sizes[j]:
                total += np.log(self.shares[j] / self.shares[j].sum())[own.astype(int)]
            else:
                total += np.log(np.maximum(self.kernels[j](own), 1e-300))
        return total

    def log_density(self, values: Array, correlations: Array) -> Array:
        """Return the log density of each row."""
        scores = self.scores(values)
        numbers = [j for j, size in enumerate(self.sizes) if not size]
        total = np.zeros(len(values))
        for j in numbers:
            total += np.log(np.maximum(self.kernels[j](values[:, j]), 1e-300))
        some = correlations[np.ix_(numbers, numbers)]
        normal = multivariate_normal(np.zeros(len(numbers)), some, allow_singular=True)
        total += normal.logpdf(scores[:, numbers]) - norm.logpdf(scores[:, numbers]).sum(1)
        known = list(numbers)
        for j, size in enumerate(self.sizes):
            if size:  # the probability of its interval, given all before it
                across = correlations[known, j]
                weights = np.linalg.solve(correlations[np.ix_(known, known)], across)
                scale = math.sqrt(max(1e-9, 1 - float(weights @ across)))
                mean = scores[:, known] @ weights
                low, high = ((end - mean) / scale for end in self.intervals(j, values[:, j]))
                total += np.log(np.maximum(ndtr(high) - ndtr(low), 1e-12))
                known.append(j)
        return total


def measure_likelihood(model: TableModel, train: Path, test: Path) -> None:
    learned, unseen = (read_values(str(path), model.columns).values for path in (train, test))
    copula = Copula(model, learned)
    of_copulas = [copula.log_density(unseen, each).mean() for each in copula.correlations]
    start = np.tile(model.table.orders[0], (len(unseen), 1))
    gaussian = gaussian_alone(model).log_densities(unseen, start).sum(1).mean()
    print(
        f"  log-likelihood: independent columns {copula.independent(unseen).mean():.2f}, copula "
        f"{max(of_copulas):.2f}, the model without its decoder {gaussian:.2f}, the model "
        f"{model.log_density(unseen).mean():.2f}"
    )


def gaussian_alone(model: TableModel) -> TableModel:
    """Return the model with a decoder that says nothing."""
    import copy
    import dataclasses

    silent = copy.deepcopy(model.model)
    silent.lm_head.weight.data.zero_()
    return dataclasses.replace(model, model=silent)


# ---- what a classifier learns


def measure_classifier(name: str, model: TableModel, train: Path, test: Path, seed: int) -> None:
    learned, unseen = (read_values(str(path), model.columns).values for path in (train, test))
    started = time.process_time()
    drawn = genkit.sample_table(model, 10_000, seed=seed).values
    seconds = time.process_time() - started
    columns, target = list(model.columns), len(model.columns) - 1
    if name == "diabetes":  # above the median, or not
        middle = np.median(learned[:, target])
        columns[target] = genkit.data.columns.Column("target", "category", ["low", "high"])
        for part in (learned, unseen, drawn):
            part[:, target] = part[:, target] > middle
    real = [tabular.taught_accuracy(columns, target, learned, unseen, k) for k in range(3)]
    copies = [drawn[k * 3000 : (k + 1) * 3000] for k in range(3)]
    made = [tabular.taught_accuracy(columns, target, c, unseen, k) for k, c in enumerate(copies)]
    print(
        f"  accuracy of a forest: real rows {np.mean(real):.3f}, synthetic {np.mean(made):.3f}; "
        f"10,000 rows in {seconds:.1f} CPU seconds"
    )


# ---- gaps


def measure_filling(model: TableModel, train: Path, test: Path, seed: int) -> None:
    learned, unseen = (read_values(str(path), model.columns).values for path in (train, test))
    numbers = [j for j, column in enumerate(model.columns) if not column.categories]
    hidden = np.random.default_rng(seed).random(unseen.shape) < HIDDEN
    hidden[:, [j for j in range(unseen.shape[1]) if j not in numbers]] = False
    given = np.where(hidden, np.nan, unseen)
    rows: list[dict[str, Any]] = [
        {c.name: c.format(v) for c, v in zip(model.columns, row, strict=True)} for row in given
    ]
    filled = genkit.fill(rows, model=model, seed=seed)
    names = {column.name: j for j, column in enumerate(model.columns)}
    center, scale, errors, inside = learned.mean(0), learned.std(0), [], []
    for cell in filled.cells:
        j = names[cell.column]
        truth, ends = unseen[cell.row, j], (float(cell.low or 0), float(cell.high or 0))
        errors.append((float(cell.value) - truth) / scale[j])
        inside.append(ends[0] <= truth <= ends[1])
    imputer = IterativeImputer(max_iter=50, tol=1e-3, random_state=seed)
    imputer.fit(coded(model, (learned - center) / scale, learned))
    put = imputer.transform(coded(model, (given - center) / scale, given))
    other = put[:, : len(names)] - (unseen - center) / scale
    print(
        f"  gaps: error of fill {rms(errors):.3f}, of IterativeImputer {rms(other[hidden]):.3f}; "
        f"intervals hold {np.mean(inside):.1%}"
    )


def coded(model: TableModel, scaled: Array, values: Array) -> Array:
    """Return scaled rows with one more column for each category, for a linear imputer."""
    more = [
        values[:, j, None] == np.arange(1, len(column.categories))
        for j, column in enumerate(model.columns)
        if column.categories
    ]
    return np.concatenate([scaled, *more], 1)


def rms(errors: Any) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


# ---- anomalies


def measure_tumours(folder: Path, seed: int, minutes: float) -> None:
    """Train on benign tumours; find malignant ones among others."""
    found = datasets.load_breast_cancer()
    benign, malignant = found.data[found.target == 1], found.data[found.target == 0]
    train, test = train_test_split(benign, test_size=0.2, random_state=seed)
    path = folder.with_name(f"{folder.name}-benign.csv")
    write(path, [*map(str, found.feature_names)], train.tolist())
    model = fit(path, folder.with_name(f"{folder.name}-benign"), seed, minutes)
    values, truth = np.concatenate([test, malignant]), [0] * len(test) + [1] * len(malignant)
    report("tumours", model, train, values, np.array(truth), seed)


def report(
    what: str, model: TableModel, train: Array, values: Array, truth: Array, seed: int
) -> None:
    forest = IsolationForest(n_estimators=500, random_state=seed).fit(train)
    ours = roc_auc_score(truth, -model.log_density(values))
    theirs = roc_auc_score(truth, -forest.score_samples(values))
    print(f"  {what}: area under the curve {ours:.4f}, of IsolationForest {theirs:.4f}")


def measure_series(folder: Path, seed: int, minutes: float) -> None:
    """Train on a series of two sensors; find windows with a break."""
    rng = np.random.default_rng(seed)
    clean, _ = make_series(rng, breaks=0)
    broken, marks = make_series(rng, breaks=20)
    path = folder.with_name(f"{folder.name}.csv")
    write(path, ["load", "heat"], np.round(clean, 3).tolist())
    model = fit(path, folder, seed, minutes, "--window", str(WINDOW))
    print(f"\nseries, seed {seed}")
    windows = as_windows(np.round(broken, 3), WINDOW)
    truth = as_windows(marks[:, None], WINDOW).max(1)
    report("windows with a break", model, as_windows(clean, WINDOW), windows, truth, seed)


def make_series(rng: np.random.Generator, breaks: int) -> tuple[Array, Array]:
    """Return a daily load and the heat that follows it, and which rows are broken.

    A break is a stretch in which heat no longer follows, load stands still, or a wave is reversed.
    """
    hours = np.arange(SERIES)
    noise = rng.normal(size=(SERIES, 2))
    for i in range(1, SERIES):
        noise[i] = 0.7 * noise[i - 1] + 0.5 * noise[i]
    load = 10 + 3 * np.sin(2 * np.pi * hours / 24) + 0.6 * noise[:, 0]
    heat = 0.5 * np.roll(load, 2) + 0.3 * noise[:, 1]
    marks = np.zeros(SERIES)
    for k, start in enumerate(rng.choice(SERIES // BREAK - 2, breaks, replace=False) * BREAK + 3):
        part = slice(start, start + BREAK // 2)
        marks[part] = 1
        if k % 3 == 0:
            heat[part] = 5 + 1.5 * rng.normal(size=BREAK // 2)
        elif k % 3 == 1:
            load[part] = load[start]
        else:
            load[part] = 20 - load[part]
    return np.stack([load, heat], 1), marks


if __name__ == "__main__":
    main()
