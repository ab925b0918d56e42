"""Audit the private step with a canary, and measure what private generators are good for.

    python benchmarks/privacy.py audit
    python benchmarks/privacy.py quality --mnist mnist --epsilon 1 10 --method gan merf

The audit makes many small runs, half of them with a canary: one row whose gradient is as long as a
row's may be, while all others have none. Whoever knows all but that, and sees each noisy gradient,
guesses by the likelihood ratio whether the canary was there. The rates of both kinds of errors give
a lower bound of ε with 95 % confidence (Clopper and Pearson), which must be below the claim, and
above it where the step is deliberately broken. At a large δ few runs tell much.

The quality is the accuracy, on MNIST's test images, of a classifier that was trained on 60,000
generated images. The folder of MNIST has the parquet files of the Hub's ylecun/mnist.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from genkit.metrics.features import load_extractor
from genkit.metrics.judge import Judge
from genkit.models import gan, private
from genkit.training import accounting
from genkit.vision.evaluation import evaluate
from genkit.vision.sampling import draw_samples

RECIPE = Path(__file__).parent.parent / "recipes" / "train_private.py"
ROWS, RATE, STEPS, DELTA, CLAIM = 60, 0.1, 40, 0.1, 0.5  # of a run of the audit
SIZE = 8  # parameters of its model
BROKEN = ("no clipping", "shuffling", "half the noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("audit", "quality"))
    parser.add_argument("--runs", type=int, default=1000, help="of the audit, for each kind")
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--method", nargs="+", default=["gan", "merf"])
    parser.add_argument("--extractor", help="classifier for distance and coverage; default: none")
    parser.add_argument("--words", default="", help="further settings of the recipe")
    parser.add_argument("--output", type=Path, help="folder to keep the runs in")
    arguments = parser.parse_args()
    if arguments.part == "audit":
        audit(arguments.runs)
    else:
        quality(arguments)


# ---- audit


def audit(runs: int) -> None:
    """Print the lower bounds of ε of the step as it is, and of broken ones."""
    name = accounting.default_accountant()
    noise = accounting.find_noise(name, CLAIM, RATE, STEPS, DELTA)
    print(
        f"claimed: ε = {CLAIM:g} at δ = {DELTA:g} by {name}: {STEPS} steps, q = {RATE:g}, "
        f"noise {noise:.3f}; {runs} runs of each step"
    )
    for kind in ("as it is", *BROKEN):
        bound = lower_bound(collect(kind, noise, runs // 2))
        print(f"{kind:16} ε is at least {bound:.3f}", flush=True)


def collect(kind: str, noise: float, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the statistic of runs without the canary and of runs with it, (runs,) each.

    Keys follow from a seed, so that an audit can be repeated; those of a real run are secret.
    """
    keys = np.random.default_rng(0)
    without, with_it = (
        np.array([one_run(kind, noise, canary, keys.bytes(32)) for _ in range(runs)])
        for canary in (False, True)
    )
    return without, with_it


def one_run(kind: str, noise: float, canary: bool, key: bytes) -> float:
    """Make the steps of a run; return the log-likelihood ratio of what they show.

    The loss of a row is its product with the weights, whose gradient is the row itself.
    """
    data = torch.zeros(ROWS, SIZE, dtype=torch.float64)
    data[0, 0] = 10.0 if canary else 0.0  # which is clipped to 1
    weights = {"weight": torch.zeros(SIZE, dtype=torch.float64)}
    limit = 1e9 if kind == "no clipping" else 1.0
    true_noise = noise / 2 if kind == "half the noise" else noise
    ratio = 0.0  # log of the probability with the canary over that without it
    for step in range(STEPS):
        drawn = draw(kind, key, step)
        total, _ = private.clipped_sum(row_loss, weights, (data[drawn],), limit)
        normal = private.normals(key, "noise", step, SIZE)
        seen = private.noisy_mean(total, normal, true_noise, 1.0, RATE * ROWS) * RATE * ROWS
        if kind == "shuffling":  # the order follows from the public seed of the run
            ratio += (2 * seen[0].item() - 1) / (2 * noise**2) if 0 in drawn else 0.0
        else:
            shift = (2 * seen[0].item() - 1) / (2 * true_noise**2)
            ratio += np.logaddexp(np.log1p(-RATE), np.log(RATE) + shift)
    return float(ratio)


def row_loss(weights: private.Parameters, row: torch.Tensor) -> torch.Tensor:
    return weights["weight"] @ row


def draw(kind: str, key: bytes, step: int) -> np.ndarray:
    """Return the rows of a step: by Poisson sampling, or of a shuffled epoch with a public seed."""
    if kind != "shuffling":
        return private.poisson_draw(key, step, ROWS, RATE)
    per_epoch = round(1 / RATE)
    order = np.random.default_rng(step // per_epoch).permutation(ROWS)
    return np.array_split(order, per_epoch)[step % per_epoch]


def lower_bound(statistics: tuple[np.ndarray, np.ndarray], confidence: float = 0.95) -> float:
    """Return a lower bound of ε: the canary is said to be there if that is the more likely.

    Args:
        statistics: log-likelihood ratios of runs without it and with it.
        confidence: of the bound.

    Source: Jagielski et al. 2020, https://arxiv.org/abs/2006.07709
    """
    without, with_it = statistics
    false = _upper(int((without > 0).sum()), len(without), confidence)
    missed = _upper(int((with_it <= 0).sum()), len(with_it), confidence)
    gains = [(1 - DELTA - missed) / false, (1 - DELTA - false) / missed]
    return float(np.log(max(1.0, *gains)))


def _upper(errors: int, runs: int, confidence: float) -> float:
    """Return the upper end of a rate of errors; both ends of two rates hold with `confidence`."""
    level = 1 - (1 - confidence) / 2
    return 1.0 if errors == runs else float(stats.beta.ppf(level, errors + 1, runs - errors))


# ---- quality


def quality(arguments: argparse.Namespace) -> None:
    """Train both methods at some ε, and print how useful their images are."""
    train, test = (arguments.mnist / f"{part}-00000-of-00001.parquet" for part in ("train", "test"))
    print(f"{'method':8}{'ε':>8}{'accuracy':>10}{'distance':>10}{'coverage':>10}{'minutes':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        for method in arguments.method:
            for budget in arguments.epsilon:
                folder = (arguments.output or Path(scratch)) / f"{method}-{budget:g}"
                command = [sys.executable, str(RECIPE), "--method", method, "--images", str(train)]
                command += ["--conditional"]
                command += ["--epsilon", str(budget), "--output_dir", str(folder)]
                started = time.monotonic()
                done = subprocess.run(
                    [*command, *arguments.words.split()], capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
                row(arguments, method, folder, test, (time.monotonic() - started) / 60)


def row(
    arguments: argparse.Namespace, method: str, folder: Path, test: Path, minutes: float
) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spent = max(line.get("epsilon", 0.0) for line in lines)
    accuracy = evaluate(folder, test, task="classify").accuracy  # type: ignore[union-attr]
    cells = [f"{method:8}{spent:8.3f}{accuracy:10.4f}"]
    if arguments.extractor:
        judge = Judge(test, extractor=load_extractor(arguments.extractor))
        labels = np.arange(5000) % 10
        figures = judge.judge(draw_samples(gan.load_gan(folder), range(5000), labels)).figures
        cells += [f"{figures[name].value:10.4f}" for name in ("distance", "coverage")]
    else:
        cells += [f"{'':10}"] * 2
    print("".join(cells) + f"{minutes:9.1f}", flush=True)


if __name__ == "__main__":
    main()
