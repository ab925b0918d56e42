"""Reward against divergence for every method, with the optimum and best-of-N.

    genkit train charlm --text tinyshakespeare/input.txt --output_dir runs/charlm
    python benchmarks/alignment.py --model runs/charlm --text tinyshakespeare/input.txt \\
        --output_dir runs/frontier --minutes 5

The reward is `sentiment` of a completion of 64 tokens. Each method runs by its recipe with each β,
on prompts that begin lines of the text's first nine tenths; it is measured on prompts of the rest.
DPO learns from pairs of completions by the reference, the one of the higher reward chosen.

The optimum of E[r] - β KL(π, π_ref) is π* ∝ π_ref exp(r / β). Its reward and divergence are
estimated by the reference's own completions, weighted by exp(r / β); the effective sample size of
the weights is printed, and below 1,000 the estimate should not be trusted. Best-of-N is estimated
by the same completions; its divergence is at most log N - (N - 1) / N (Beirami et al. 2024).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import accelerate
import matplotlib.figure
import numpy as np
import torch

import genkit
from genkit.models.completions import log_probabilities, split_blocks
from genkit.plots import save_figure
from genkit.text.language_model import LanguageModel
from genkit.text.rewards import load_reward
from genkit.training.processes import Processes
from genkit.training.rollouts import Completion, as_rows, draw_scored

ROOT = Path(__file__).parents[1]
REWARD, LONGEST = "sentiment", 64
TRAINED, HELD = 400, 20  # prompts
WORDS = 3  # of a prompt, the first ones of a line
COLOURS = {"ppo": "tab:blue", "grpo": "tab:orange", "rloo": "tab:green", "dpo": "tab:red"}


@dataclass(frozen=True)
class Point:
    """A policy: how it was made, what it earns and how far it has gone."""

    method: str
    beta: float
    reward: float
    reward_error: float
    kl: float  # nats a completion
    kl_error: float
    share: float  # of the attainable objective at its β


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a character model of the text")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(COLOURS))
    parser.add_argument("--betas", nargs="+", type=float, default=[0.02, 0.05, 0.1])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--draws", type=int, default=500, help="of each held-out prompt")
    words, more = parser.parse_known_args()
    folder = words.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    trained, held = find_prompts(words.text)
    (folder / "prompts.txt").write_text("\n".join(trained) + "\n")
    reference = genkit.load(words.model)
    rewards, _ = measure(reference, reference, held, words.draws)
    print_optimum(rewards, words.betas)
    if "dpo" in words.methods:
        write_pairs(reference, trained, folder / "pairs.jsonl")
    points = []
    for method in words.methods:
        for beta in words.betas:
            run = folder / f"{method}_{beta:g}"
            train(run, method, beta, words, more)
            points.append(evaluate(run, method, beta, reference, held, rewards))
            print_point(points[-1])
            (folder / "points.json").write_text(json.dumps(list(map(asdict, points)), indent=1))
    draw(points, rewards, folder / "frontier.png")


# ---- data


def find_prompts(text: Path) -> tuple[list[str], list[str]]:
    """Return beginnings of lines of the first nine tenths of a text, and of the rest."""
    whole = text.read_text()
    border = len(whole) * 9 // 10
    found = []
    for part, count in ((whole[:border], TRAINED), (whole[border:], HELD)):
        lines = [line.split() for line in part.splitlines()]
        starts = [" ".join(line[:WORDS]) + " " for line in lines if len(line) > WORDS]
        which = np.random.default_rng(0).permutation(len(starts))
        found.append(list(dict.fromkeys(starts[i] for i in which))[:count])
    return found[0], found[1]


def draw_completions(
    language: LanguageModel, prompts: list[str], count: int, first: int
) -> list[Completion]:
    """Draw so many completions of each prompt, whose seeds begin at a position of a run."""
    which = np.arange(len(prompts))
    return draw_scored(
        Processes(accelerate.Accelerator(cpu=True)),
        prompts,
        which,
        which + first,
        count,
        language,
        reward=load_reward(REWARD),
        seed=0,
        max_new_tokens=LONGEST,
    )


def write_pairs(reference: LanguageModel, prompts: list[str], path: Path) -> None:
    """Write two completions of each prompt, eight times over, the better one chosen."""
    lines = []
    drawn = draw_completions(reference, prompts, 16, 1 << 30)
    for one, two in zip(drawn[::2], drawn[1::2], strict=True):
        better, worse = (one, two) if one.reward > two.reward else (two, one)
        if better.reward > worse.reward and better.text.strip() and worse.text.strip():
            pair = {"chosen": better.text, "rejected": worse.text}
            lines.append(json.dumps({"prompt": prompts[one.prompt]} | pair))
    path.write_text("\n".join(lines) + "\n")


# ---- measuring


def measure(
    language: LanguageModel, reference: LanguageModel, prompts: list[str], draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards and divergences of completions, (prompts, draws) each."""
    drawn = draw_completions(language, prompts, draws, 1 << 31)
    rewards = np.array([each.reward for each in drawn]).reshape(len(prompts), draws)
    if language is reference:
        return rewards, np.zeros_like(rewards)
    rows, parts = as_rows(drawn), []
    with torch.inference_mode():
        for block in split_blocks(rows, language.model.config.vocab_size):
            new, old = (log_probabilities(m.model, rows[block])[0] for m in (language, reference))
            parts.append((new - old).double().sum(1))
    return rewards, torch.cat(parts).numpy().reshape(rewards.shape)


def optimum(rewards: np.ndarray, beta: float) -> tuple[float, float, float]:
    """Return reward and divergence of π*, and the effective sample size over all prompts."""
    logs = torch.from_numpy(rewards) / beta
    weights = logs.softmax(1).numpy()
    reward = (weights * rewards).sum(1)
    mean = (logs.logsumexp(1) - math.log(rewards.shape[1])).numpy()
    divergence = reward / beta - mean
    return reward.mean(), divergence.mean(), (1 / (weights**2).sum(1)).sum()


def best_of(rewards: np.ndarray, count: int) -> tuple[float, float]:
    """Return the expected reward of the best of so many, and its divergence at most."""
    ordered = np.sort(rewards, 1)
    size = rewards.shape[1]
    ranks = np.arange(1, size + 1) / size
    weights = ranks**count - (ranks - 1 / size) ** count
    return float((ordered * weights).sum(1).mean()), math.log(count) - (count - 1) / count


def evaluate(
    run: Path,
    method: str,
    beta: float,
    reference: LanguageModel,
    prompts: list[str],
    before: np.ndarray,
) -> Point:
    """Measure a policy on the held-out prompts."""
    draws = before.shape[1] // 5
    rewards, divergences = measure(genkit.load(run), reference, prompts, draws)
    reward, divergence, _ = optimum(before, beta)
    start = before.mean()
    gain = rewards.mean() - beta * divergences.mean() - start
    error = [values.std() / math.sqrt(values.size) for values in (rewards, divergences)]
    return Point(
        method,
        beta,
        float(rewards.mean()),
        float(error[0]),
        float(divergences.mean()),
        float(error[1]),
        float(gain / (reward - beta * divergence - start)),
    )


# ---- running, printing, drawing


def train(run: Path, method: str, beta: float, words: argparse.Namespace, more: list[str]) -> None:
    """Run the recipe as a user does."""
    online = ["--prompts", "prompts.txt", "--reward", REWARD]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"),
        *(str(ROOT / "recipes" / "align.py"), "--method", method, "--output_dir", str(run)),
        *("--init_from", str(words.model.resolve()), "--beta", str(beta), "--quiet"),
        *("--max_minutes", str(words.minutes), "--max_new_tokens", str(LONGEST)),
        *(["--data", "pairs.jsonl"] if method == "dpo" else online),
        *more,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=run.parent, env=environment, check=True)


def print_optimum(rewards: np.ndarray, betas: list[float]) -> None:
    print(f"reference: reward {rewards.mean():.4f}, of {rewards.size:,} completions")
    for beta in betas:
        reward, divergence, size = optimum(rewards, beta)
        print(f"optimum at β {beta:g}: reward {reward:.4f}, KL {divergence:.2f}, ESS {size:,.0f}")
    for count in (4, 16, 64):
        reward, divergence = best_of(rewards, count)
        print(f"best of {count}: reward {reward:.4f}, KL {divergence:.2f}", flush=True)


def print_point(point: Point) -> None:
    print(
        f"{point.method:5} β {point.beta:<5g} reward {point.reward:.4f} ± "
        f"{point.reward_error:.4f}, KL {point.kl:6.2f} ± {point.kl_error:.2f}, "
        f"{point.share:.1%} of the attainable",
        flush=True,
    )


def draw(points: list[Point], rewards: np.ndarray, path: Path) -> None:
    """Draw reward against divergence."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    curve = [optimum(rewards, beta) for beta in np.geomspace(0.02, 2, 60)]
    trusted = [(kl, reward) for reward, kl, size in curve if size >= 1000]
    axes.plot(*zip(*trusted, strict=True), color="black", label="optimum")
    line = [best_of(rewards, count)[::-1] for count in (1, 2, 4, 8, 16, 32, 64, 128)]
    axes.plot(*zip(*line, strict=True), "--", color="grey", label="best of N")
    for method in dict.fromkeys(point.method for point in points):
        own = sorted((p.kl, p.reward) for p in points if p.method == method)
        axes.plot(*zip(*own, strict=True), "o-", color=COLOURS[method], label=method.upper())
    axes.set(xlabel="KL(π, π_ref), nats a completion", ylabel="reward")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
