r"""Compare the features of a table autoencoder with the columns themselves, and how it fills gaps.

    python benchmarks/table_features.py --output_dir runs/features
    python benchmarks/table_features.py --output_dir runs/features --tables wine --seeds 0 1 2

Tables of scikit-learn and of benchmarks/policies.py are split by seed, a fifth of the rows for
tests, and an autoencoder is trained by the recipe, without the column that is to be predicted.
Then, on rows that it has not seen:

- a logistic regression (the share of right classes), or a ridge regression (R squared), on its
  features and on standardised columns with categories as one-hot, with all labels and with 50;
- a fifth of the numbers left out: error of what `fill` puts there, in deviations of the column,
  beside IterativeImputer and, with --table_minutes, beside a table model of so many minutes, and
  how often intervals of 90 % hold the truth.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import genkit
from genkit.data.columns import Column
from genkit.tabular.reading import read_values

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import policies, tables  # noqa: E402  of this folder

Array = NDArray[np.float64]
TABLES = ("wine", "cancer", "diabetes", "digits", "policies")
LABELS = 50  # that there are, where they are few
POLICIES = 1500
STRENGTHS = {"Cs": 10.0 ** np.arange(-4, 2), "alphas": 10.0 ** np.arange(-1, 6)}


@dataclass(frozen=True)
class Part:
    """Rows, and what is to be predicted of each: a class, or a number."""

    path: Path
    labels: Array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--table_minutes", type=float, default=0.0)
    words = parser.parse_args()
    words.output_dir.mkdir(parents=True, exist_ok=True)
    for name in words.tables:
        figures = [measure(name, seed, words) for seed in words.seeds]
        print(f"\n{name}, means over seeds {' '.join(map(str, words.seeds))}")
        for key in figures[0]:
            print(f"  {key:34} {np.mean([own[key] for own in figures]):.3f}", flush=True)


def measure(name: str, seed: int, words: argparse.Namespace) -> dict[str, float]:
    """Return the figures of a table."""
    folder = words.output_dir / f"{name}-{seed}"
    train, test = split_table(name, folder, seed)
    started = time.process_time()
    given = ("--data", train.path, "--output_dir", folder, "--seed", seed)
    train_here("train_table_autoencoder", *given, "--max_steps", words.steps)
    seconds = time.process_time() - started
    model = genkit.load(folder, device="cpu")
    features = [genkit.features(part.path, model=model).values for part in (train, test)]
    columns = [Column(**own) for own in model.network.config.columns]
    values = [read_values(part.path, columns).values for part in (train, test)]
    plain = [as_inputs(columns, own, values[0]) for own in values]
    inputs = {"columns": standardized(plain), "features": standardized(features)}
    found: dict[str, float] = {"training, CPU seconds": seconds}
    for labels in (LABELS, len(train.labels)):
        some = np.random.default_rng(seed).permutation(len(train.labels))[:labels]
        for what, (learned, unseen) in inputs.items():
            own = predict(learned[some], train.labels[some], unseen, test.labels, name)
            found[f"{what}, {'all' if labels > LABELS else labels} labels"] = own
    if name != "digits":  # which has pixels that are always 0
        found |= measure_filling("autoencoder", model, columns, values, seed)
        if words.table_minutes:
            table = tables.fit(
                train.path, folder.with_name(f"{name}-table-{seed}"), seed, words.table_minutes
            )
            found |= measure_filling("table model", table, columns, values, seed)
        found["error of IterativeImputer"] = impute(columns, values, seed)
    return found


def train_here(recipe: str, *words: Any) -> None:
    """Run a recipe in this process."""
    module = importlib.import_module(f"genkit.recipes.{recipe}")
    argv = [recipe, *map(str, words), "--device", "cpu", "--quiet"]
    if not (Path(argv[argv.index("--output_dir") + 1]) / "model_index.json").exists():
        with mock.patch.object(sys, "argv", argv):
            module.main()


# ---- data


def split_table(name: str, folder: Path, seed: int) -> tuple[Part, Part]:
    """Write the rows of a table to train and to test on, without the labels."""
    if name == "policies":  # how much a value is worth, of policies that say it
        rows = [row for row in policies.make_policies(POLICIES, seed) if row[4]]
        labels = np.log([float(row[4]) for row in rows])
        names, cells = list(policies.NAMES), [row[:4] + row[5:] for row in rows]
        names.remove("value")
    else:
        load = {"cancer": "breast_cancer"}.get(name, name)
        options = {"scaled": False} if name == "diabetes" else {}
        found = getattr(datasets, f"load_{load}")(**options)
        labels, names = found.target.astype(float), list(map(str, found.feature_names))
        cells = [list(map(repr, row)) for row in found.data.tolist()]
    parts = []
    split = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed)
    for part, which in zip(("train", "test"), split, strict=True):
        path = folder.with_name(f"{folder.name}-{part}.csv")
        tables.write(path, names, [cells[i] for i in which])
        parts.append(Part(path, labels[which]))
    return parts[0], parts[1]


def as_inputs(columns: list[Column], values: Array, train: Array) -> Array:
    """Return columns for a regression: categories as one-hot, gaps as means."""
    found = []
    for column, own, learned in zip(columns, values.T, train.T, strict=True):
        if column.categories:
            found.append(own[:, None] == np.arange(len(column.categories)))
        else:
            found.append(np.where(np.isnan(own), np.nanmean(learned), own)[:, None])
    return np.concatenate(found, 1).astype(float)


def standardized(inputs: list[Any]) -> list[Array]:
    """Return inputs of training and test rows, scaled by those of all training rows."""
    scaler = StandardScaler().fit(inputs[0])
    return [scaler.transform(part) for part in inputs]


# ---- what a regression learns


def predict(train: Array, labels: Array, test: Array, truth: Array, name: str) -> float:
    """Return the share of right classes, or R squared, of a regression on test rows."""
    if name in ("diabetes", "policies"):
        ridge = RidgeCV(STRENGTHS["alphas"]).fit(train, labels)
        return float(ridge.score(test, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)  # of classes with few labels
        model = LogisticRegressionCV(Cs=STRENGTHS["Cs"], cv=3, max_iter=300).fit(train, labels)
    return float(model.score(test, truth))


# ---- gaps


def hide(columns: list[Column], test: Array, seed: int) -> NDArray[np.bool_]:
    """Choose a fifth of the numbers."""
    hidden = np.random.default_rng(seed).random(test.shape) < tables.HIDDEN
    return hidden & ~np.isnan(test) & [not column.categories for column in columns]


def measure_filling(
    who: str, model: Any, columns: list[Column], values: list[Array], seed: int
) -> dict[str, float]:
    """Return the error of what `fill` puts in gaps, and how often intervals hold the truth."""
    train, test = values
    hidden = hide(columns, test, seed)
    rows = [
        {c.name: c.format(v) for c, v in zip(columns, row, strict=True)}
        for row in np.where(hidden, np.nan, test)
    ]
    place = {column.name: j for j, column in enumerate(columns)}
    errors, inside = [], []
    for cell in genkit.fill(rows, model=model).cells:
        j = place[cell.column]
        if hidden[cell.row, j]:
            truth, column = test[cell.row, j], columns[j]
            value, low, high = (
                column.parse(each, "") for each in (cell.value, cell.low, cell.high)
            )
            errors.append((value - truth) / np.nanstd(train[:, j]))
            inside.append(low <= truth <= high)
    return {
        f"error of {who}": tables.rms(errors),
        f"in intervals of 90 % of {who}": float(np.mean(inside)),
    }


def impute(columns: list[Column], values: list[Array], seed: int) -> float:
    """Return the error of IterativeImputer on standardised columns, categories as one-hot."""
    train, test = values
    hidden = hide(columns, test, seed)
    center, scale = np.nanmean(train, 0), np.nanstd(train, 0)
    more = [(j, k) for j, c in enumerate(columns) for k in range(1, len(c.categories))]

    def coded(part: Array) -> Array:
        one_hot = [np.where(np.isnan(part[:, j]), np.nan, part[:, j] == k) for j, k in more]
        return np.column_stack([(part - center) / scale, *one_hot])

    imputer = IterativeImputer(max_iter=20, tol=1e-3, random_state=seed).fit(coded(train))
    filled = imputer.transform(coded(np.where(hidden, np.nan, test)))[:, : test.shape[1]]
    return tables.rms((filled - (test - center) / scale)[hidden])


if __name__ == "__main__":
    main()
