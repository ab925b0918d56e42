"""A reward model of 2,000 pairs, and what becomes of the reward that it stands for.

    genkit train charlm --text tinyshakespeare/input.txt --output_dir runs/charlm
    python benchmarks/over_optimisation.py --model runs/charlm \\
        --text tinyshakespeare/input.txt --output_dir runs/proxy

The reward that is meant, the gold one, is highest where half of a completion's letters are vowels.
In a pair of the model's own completions the one of the higher gold reward is chosen. Hardly any has
as many vowels, so that what a reward model can learn of them is: the more, the better. A policy
that follows it for long enough leaves the best place on the other side (Gao et al. 2023,
https://arxiv.org/abs/2210.10760).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
from alignment import draw_completions, find_prompts  # type: ignore[import-not-found]

import genkit
from genkit.plots import save_figure
from genkit.text.rewards import load_reward

ROOT = Path(__file__).parents[1]
PAIRS = 2000
GOLD = '''
"""The reward of the benchmark: half of the letters should be vowels."""

def score(prompts, completions):
    return [reward(text) for text in completions]

def reward(text):
    letters = [letter for letter in text.lower() if letter.isalpha()]
    vowels = sum(letter in "aeiou" for letter in letters) / max(1, len(letters))
    return 1 - abs(vowels - 0.5) / 0.5
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a character model of the text")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="of the policy")
    words = parser.parse_args()
    folder = words.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gold_reward.py").write_text(GOLD)
    sys.path.insert(0, str(folder))
    prompts, _ = find_prompts(words.text)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    write_pairs(words.model, prompts, folder / "pairs.jsonl")
    start = ["--init_from", str(words.model.resolve()), "--quiet"]
    learn = ["--data", "pairs.jsonl", "--epochs", "5", "--learning_rate", "1e-3"]
    run(folder, "train_reward", [*start, *learn, "--output_dir", "reward"])
    best = min(log_of(folder / "reward", "accuracy"), key=lambda line: line["val_loss"])
    print(f"held-out pairs in the right order: {best['accuracy']:.1%}", flush=True)
    policy = ["--reward", "reward", "--gold", "gold_reward:score", "--prompts", "prompts.txt"]
    policy += ["--method", "grpo", "--beta", "0.001", "--evaluations", "12"]
    policy += ["--output_dir", "policy", "--max_minutes", str(words.minutes)]
    run(folder, "align", [*start, *policy])
    show(log_of(folder / "policy", "val_gold"), folder / "over_optimisation.png")


def write_pairs(model: Path, prompts: list[str], path: Path) -> None:
    """Write pairs of completions of the model, the one of the higher gold reward chosen."""
    lines: list[str] = []
    gold = load_reward("gold_reward:score")
    drawn = draw_completions(genkit.load(model), prompts, 12, 1 << 30)
    rewards = gold([""] * len(drawn), [each.text for each in drawn])
    for i in range(0, len(drawn), 2):
        one, two = drawn[i], drawn[i + 1]
        if rewards[i] == rewards[i + 1] or not one.text.strip() or not two.text.strip():
            continue
        better, worse = (one, two) if rewards[i] > rewards[i + 1] else (two, one)
        pair = {"chosen": better.text, "rejected": worse.text}
        lines.append(json.dumps({"prompt": prompts[one.prompt]} | pair))
    path.write_text("\n".join(lines[:PAIRS]) + "\n")


def run(folder: Path, recipe: str, more: list[str]) -> None:
    """Run a recipe as a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    recipe_path = str(ROOT / "recipes" / f"{recipe}.py")
    subprocess.run([*command, recipe_path, *more], cwd=folder, env=environment, check=True)


def log_of(folder: Path, metric: str) -> list[dict[str, Any]]:
    """Return the evaluations of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if metric in line]


def show(log: list[dict[str, Any]], path: Path) -> None:
    """Print both rewards and the divergence, and draw the rewards by step."""
    for line in log:
        print(
            f"step {line['step']:5} KL {line['val_kl']:7.2f}  reward model "
            f"{line['val_reward']:7.3f}  gold {line['val_gold']:.4f}"
        )
    figure = matplotlib.figure.Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in log]
    axes.plot(steps, [line["val_reward"] for line in log], "o-", color="tab:blue")
    axes.set_xlabel("step")
    axes.set_ylabel("reward model", color="tab:blue")
    other = axes.twinx()
    other.plot(steps, [line["val_gold"] for line in log], "s-", color="tab:red")
    other.set_ylabel("the reward that is meant", color="tab:red")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
