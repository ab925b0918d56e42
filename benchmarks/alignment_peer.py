"""Align a language model by TRL for a number of minutes: the peer of `alignment.py`.

    PYTHONPATH=peer python benchmarks/alignment_peer.py --method grpo --beta 0.05 --minutes 5 \\
        --model runs/charlm --data prompts.txt --reward sentiment --output_dir runs/peer

Learning rate, group and batch are those of genkit's preset; what else there is stays at TRL's
defaults, but for advantages that are not divided by the group's deviation, as β would otherwise
mean something else in every group.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from genkit.text.rewards import load_reward


class Clock(TrainerCallback):
    """Ends training after a number of minutes."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.end = time.monotonic() + self.seconds

    def on_step_end(
        self, _: TrainingArguments, __: TrainerState, control: TrainerControl, **___: Any
    ) -> None:
        control.should_training_stop |= time.monotonic() > self.end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("grpo", "dpo"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="prompts, or pairs for dpo")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--reward", default="sentiment")
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    words = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(words.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(words.model)
    trainer = {"grpo": make_grpo, "dpo": make_dpo}[words.method](words, model, tokenizer)
    trainer.add_callback(Clock(words.minutes))
    trainer.train()
    trainer.model.save_pretrained(words.output_dir)
    tokenizer.save_pretrained(words.output_dir)
    print(f"{trainer.state.global_step} steps")


def shared(words: argparse.Namespace) -> dict[str, Any]:
    """Return the options of both methods."""
    return {
        "output_dir": words.output_dir,
        "learning_rate": words.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "per_device_train_batch_size": 64,
        "beta": words.beta,
        "max_steps": 1_000_000,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def make_grpo(words: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    reward = load_reward(words.reward)
    prompts = words.data.read_text().splitlines()

    def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return reward(prompts, completions)

    options = GRPOConfig(
        **shared(words),
        num_generations=8,
        max_completion_length=words.max_new_tokens,
        scale_rewards=False,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=score,
        args=options,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


def make_dpo(words: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    pairs = [json.loads(line) for line in words.data.read_text().splitlines()]
    return DPOTrainer(
        model=model,
        args=DPOConfig(**shared(words)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
