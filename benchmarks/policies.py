r"""Make a table of insurance policies, train models of it, and show all that can be asked of them.

    python benchmarks/policies.py --output_dir runs/policies --picture columns.png

The table is made here, so that what it holds is known: eight columns with gaps, of which motor
power follows the vehicle, a car's value its power and its age, and the amount of claims, 0 for most
policies, their number. This is where the output on docs/tables.md comes from.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import genkit

ROOT = Path(__file__).parents[1]
NAMES = ("region", "vehicle", "age", "power", "value", "since", "claims", "amount")
REGIONS, VEHICLES = ("north", "east", "south", "west"), ("car", "van", "motorcycle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--picture", type=Path, help="a PNG, of each column")
    words = parser.parse_args()
    folder = words.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "policies.csv", make_policies(3000, 0))
    write(folder / "test.csv", make_policies(1000, 1))
    write(folder / "claims.csv", spoil(make_policies(500, 2)))
    for recipe, name in (("train_table", "model"), ("train_table_autoencoder", "dae")):
        if not (folder / name / "README.md").exists():
            command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), "--quiet"]
            command += ["--data", str(folder / "policies.csv"), "--output_dir", str(folder / name)]
            subprocess.run([*command, "--max_steps", str(words.steps)], check=True)
    show(folder, words.picture)


def make_policies(count: int, seed: int) -> list[list[str]]:
    """Return rows of cells."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        region = rng.choice(REGIONS, p=(0.4, 0.3, 0.2, 0.1))
        vehicle = rng.choice(VEHICLES, p=(0.8, 0.12, 0.08))
        age = int(np.clip(rng.gamma(6, 8), 18, 92))
        power = np.exp(rng.normal({"car": 4.5, "van": 4.7, "motorcycle": 3.9}[vehicle], 0.25))
        years = rng.uniform(0, 12)
        value = 180 * power * np.exp(-0.12 * years + 0.2 * rng.normal())
        since = np.datetime64("2024-01-01") - np.timedelta64(int(365 * years), "D")
        claims = min(3, rng.poisson(0.12 + 0.25 * (age < 25) + 0.1 * (region == "north")))
        amount = np.exp(rng.normal(6.5 + 0.003 * power, 0.8)) * claims
        cells = [region, vehicle, age, f"{power:.0f}", f"{value:.0f}", since, claims]
        row = [*map(str, cells), f"{amount:.0f}"]
        for column, share in ((3, 0.05), (4, 0.1)):
            row[column] = "" if rng.random() < share else row[column]
        rows.append(row)
    return rows


def spoil(rows: list[list[str]]) -> list[list[str]]:
    """Write three rows as nobody's policy is."""
    rows[100][1], rows[100][3] = "motorcycle", "310"
    rows[200][4] = "190000"
    rows[300][6], rows[300][7] = "0", "4800"
    return rows


def write(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([NAMES, *rows])


def show(folder: Path, picture: Path | None) -> None:
    """Print what each verb says."""
    model, autoencoder = (genkit.load(folder / name, device="cpu") for name in ("model", "dae"))
    test, claims = str(folder / "test.csv"), str(folder / "claims.csv")
    records: list[Any] = [
        genkit.features(claims, model=autoencoder),
        genkit.fill(claims, model=autoencoder),
        genkit.sample_table(model, 10_000, seed=0),
        genkit.sample_table(model, 5, where=["region=north", "claims=2", "age<25"], seed=0),
        genkit.fill(claims, model=model, seed=0),
        genkit.anomalies(claims, model=model, count=5),
        genkit.evaluate(model, data=test, train=str(folder / "policies.csv"), target="vehicle"),
    ]
    for record in records:
        print(f"\n{record}")
    if picture:
        records[-1].save(picture)


if __name__ == "__main__":
    main()
