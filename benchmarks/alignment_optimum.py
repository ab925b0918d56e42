"""How much of the attainable objective each method reaches, where the optimum can be enumerated.

    python benchmarks/alignment_optimum.py --output_dir runs/exact --minutes 3

The objective is E[r] - β KL(π, π_ref). Its optimum is π* ∝ π_ref exp(r / β), with the value
β log E_ref[exp(r / β)] (Rafailov et al. 2023, appendix A.1). After two letters the model writes up
to four of six or ends before, 1,555 texts, so that every expectation is a sum over all of them. A
method's share is (its objective - that of the reference) / (the optimum - that of the reference),
mean over all 36 prompts, four of which the runs validate on. Each method runs by its recipe. DPO
learns from pairs that the reference draws, whose preference is drawn with the probability
σ((r1 - r2) / β), that of the rewards r / β: with its own β at 1 it has the same optimum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from genkit.models import lm
from genkit.text.rewards import load_reward

ROOT = Path(__file__).parents[1]
LETTERS, END = "abdeit", "."
PROMPTS = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
LONGEST = 4
PAIRS = 200_000
SMALL = ["--batch_size", "256", "--learning_rate"]  # for so small a model
RATES = {
    "dpo": [*SMALL, "3e-3", "--optimizer", "muon", "--muon_learning_rate", "2e-2"],
    "ppo": [*SMALL, "1e-3"],
    "grpo": [*SMALL, "1e-3"],
    "rloo": [*SMALL, "1e-3"],
}
REWARD = '''
"""The reward of the benchmark: vowels, and letters that stand in the order of the alphabet."""

def score(prompts, completions):
    return [reward(text) for text in completions]

def reward(text):
    vowels = sum(letter in "aei" for letter in text) / 4
    return vowels + sum(first < second for first, second in zip(text, text[1:])) / 3
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(RATES))
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    words, more = parser.parse_known_args()
    folder = words.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "exact_reward.py").write_text(REWARD)
    sys.path.insert(0, str(folder))
    make_reference(folder / "reference")
    world = World(folder / "reference")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    write_pairs(world, words.beta, folder / "pairs.jsonl")
    start, best = world.objective(world.reference, words.beta), world.optimum(words.beta)
    print(f"β {words.beta}: the reference has {start:.4f}, the optimum {best:.4f}")
    for method in words.methods:
        train(folder, method, words, more)
        found = world.load(folder / method)
        reached = world.objective(found, words.beta)
        share = (reached - start) / (best - start)
        print(
            f"{method:5} {share:7.2%} of the attainable objective: {reached:.4f}, reward "
            f"{world.reward(found):.4f}, KL {world.divergence(found):.3f} nats",
            flush=True,
        )


def make_reference(folder: Path) -> None:
    """Save a random model of the letters, with rather peaked predictions."""
    tokens = [END, *LETTERS]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    torch.manual_seed(0)
    model = lm.make_model("llama", len(tokens), 16, 2, 64, 2, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    lm.save_tokenizer(tokenizer, folder)


class World:
    """All texts that may follow each prompt, with their rewards and probabilities."""

    def __init__(self, folder: Path) -> None:
        letters = range(1, len(LETTERS) + 1)
        texts = [
            (*text, *([0] if length < LONGEST else []))
            for length in range(LONGEST + 1)
            for text in itertools.product(letters, repeat=length)
        ]
        self.ids = torch.zeros(len(texts), LONGEST, dtype=torch.int64)
        self.mask = torch.zeros(len(texts), LONGEST)
        for i, text in enumerate(texts):
            self.ids[i, : len(text)] = torch.tensor(text)
            self.mask[i, : len(text)] = 1
        self.texts = ["".join(LETTERS[t - 1] for t in text if t) for text in texts]
        rewards = load_reward("exact_reward:score")([""] * len(self.texts), self.texts)
        self.rewards = torch.tensor(rewards, dtype=torch.float64)
        self.reference = self.load(folder)

    @torch.inference_mode()
    def load(self, folder: Path) -> torch.Tensor:
        """Return the log-probability of every text after every prompt, (prompts, texts)."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
        found = [self._read(model, prompt) for prompt in PROMPTS]
        logs = torch.stack(found)
        assert torch.allclose(logs.exp().sum(1), torch.ones(len(PROMPTS)).double(), atol=1e-5)
        return logs

    def _read(self, model: PreTrainedModel, prompt: str) -> torch.Tensor:
        start = torch.tensor([[LETTERS.index(letter) + 1 for letter in prompt]])
        rows = torch.cat([start.expand(len(self.ids), -1), self.ids], 1)
        logs = model(rows[:, :-1], logits_to_keep=LONGEST).logits.log_softmax(-1)
        return (logs.gather(-1, self.ids[..., None])[..., 0] * self.mask).double().sum(1)

    def reward(self, logs: torch.Tensor) -> float:
        """Return E[r]."""
        return (logs.exp() * self.rewards).sum(1).mean().item()

    def divergence(self, logs: torch.Tensor) -> float:
        """Return KL(π, π_ref) in nats a completion."""
        return (logs.exp() * (logs - self.reference)).sum(1).mean().item()

    def objective(self, logs: torch.Tensor, beta: float) -> float:
        """Return E[r] - β KL."""
        return self.reward(logs) - beta * self.divergence(logs)

    def optimum(self, beta: float) -> float:
        """Return β log E_ref[exp(r / β)]."""
        return beta * (self.reference + self.rewards / beta).logsumexp(1).mean().item()


def write_pairs(world: World, beta: float, path: Path) -> None:
    """Draw pairs from the reference, and the preference by the model of Bradley and Terry."""
    rng = np.random.default_rng(0)
    lines: list[str] = []
    probabilities = world.reference.exp().numpy()
    probabilities /= probabilities.sum(1, keepdims=True)
    for i, prompt in enumerate(PROMPTS):
        drawn = rng.choice(len(world.texts), (PAIRS // len(PROMPTS), 2), p=probabilities[i])
        for first, second in drawn.tolist():
            if first == second or not world.texts[first] or not world.texts[second]:
                continue  # the same text, or none, is no answer
            margin = float(world.rewards[first] - world.rewards[second]) / beta
            if rng.random() > 1 / (1 + np.exp(-margin)):
                first, second = second, first
            pair = {"chosen": world.texts[first], "rejected": world.texts[second]}
            lines.append(json.dumps({"prompt": prompt} | pair))
    path.write_text("\n".join(lines) + "\n")


def train(folder: Path, method: str, words: argparse.Namespace, more: list[str]) -> None:
    """Run the recipe as a user does."""
    online = ["--prompts", "prompts.txt", "--reward", "exact_reward:score"]
    online += ["--beta", str(words.beta)]
    offline = ["--data", "pairs.jsonl", "--beta", "1"]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"),
        *(str(ROOT / "recipes" / "align.py"), "--method", method, "--init_from", "reference"),
        *("--output_dir", method, "--max_minutes", str(words.minutes), *RATES[method]),
        *("--max_new_tokens", str(LONGEST), "--seed", str(words.seed), "--quiet"),
        *(offline if method == "dpo" else online),
        *more,
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    subprocess.run(command, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
