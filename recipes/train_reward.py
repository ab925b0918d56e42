"""Train a reward model: it gives the answer that people prefer the higher reward.

    accelerate launch recipes/train_reward.py --init_from runs/sft --data pairs.jsonl
    accelerate launch recipes/train_reward.py --init_from runs/charlm --data pairs.jsonl --epochs 2
    accelerate launch recipes/train_reward.py --output_dir runs/reward --resume

The output folder is an ordinary transformers model for sequence classification with one label, at
any time the best one so far. It reads a prompt and its answer as one text, and its reward stands at
the last token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genkit import files, machine
from genkit.data import dialogues
from genkit.data.dialogues import Pair
from genkit.data.order import Order
from genkit.engine.encoder import token_limit
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.models import lm, reward_model
from genkit.models.alignment_losses import bradley_terry_loss
from genkit.text.dialogue_tokens import add_template, encode_whole
from genkit.text.language_model import LanguageModel
from genkit.training.alignment_curves import reward_curve
from genkit.training.optim import optimizers
from genkit.training.preference_data import PreferenceSettings
from genkit.training.progress import count_steps
from genkit.training.run import Run
from genkit.training.settings import parse, setting

# ---- settings


@dataclass
class Settings(PreferenceSettings):
    """Settings of this recipe; see also PreferenceSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/reward", "folder of the run and of the model")
    centring: float = setting(0.01, "weight of the term that holds the mean reward near 0", least=0)


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    run: dict[str, Any] = {"batch_size": 64 if device == "accelerator" else 32}
    if not (settings.epochs or settings.max_steps or settings.max_minutes):
        run |= {"epochs": 3.0}
    rates = {"learning_rate": 1e-4, "muon_learning_rate": 2e-3, "weight_decay": 0.01}
    step = {"optimizer": "adamw", "ema": 0.0, "compile": False}
    return run | rates | step | {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    for name in ("init_from", "data"):
        if getattr(settings, name) is None:
            raise ValueError(f"--{name} is missing; give it")

    with Run(settings) as run:
        # ---- model
        assert settings.init_from and settings.data, "checked"
        with run.accelerator.local_main_process_first():
            base, tokenizer = lm.load_lm(settings.init_from, settings.init_revision)
        facts = {"model_sha256": files.weights_hash(base)}
        network = reward_model.make_reward_model(base, tokenizer)
        model = run.network("model", network, optimizers(network, settings))
        network.eval()  # no dropout: the rewards of a pair are compared
        score = run.autocast(partial(reward_model.rewards, model, network.config.pad_token_id))

        # ---- data
        pairs = dialogues.read_pairs(settings.data, settings.table_memory)
        chats = any(not isinstance(pair.prompt, str) for pair in pairs)
        if chats:
            add_template(tokenizer)
        language = LanguageModel(network, tokenizer, settings.init_from)
        encoded = encode_pairs(pairs, language)
        train, val = dialogues.split(encoded, settings.val_fraction, "data")
        order = Order(len(train), settings.seed)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} pairs to train on, "
            f"{len(val):,} to validate"
        )

        # ---- loop
        run.identify(**facts, pairs_sha256=dialogues.content_hash(pairs))
        settings.max_steps = count_steps(
            settings.epochs, len(train), settings.batch_size, settings.max_steps
        )
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                chosen, rejected, margins = score_pairs(score, train, order(rows)[1], run.device)
                run.backward(bradley_terry_loss(chosen, rejected, margins, settings.centring))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, score, val)
                    if run.report("val_loss", metrics, curve=reward_curve):
                        usage = CHAT_USAGE if chats else USAGE
                        run.publish(
                            partial(save_model, run, settings, tokenizer, metrics, len(val), usage)
                        )


# ---- data


@dataclass(frozen=True)
class EncodedPair:
    """The tokens of two texts, and by how much the first one is preferred."""

    chosen: list[int]
    rejected: list[int]
    margin: float


def encode_pairs(pairs: list[Pair], language: LanguageModel) -> list[EncodedPair]:
    """Encode both texts of each pair, prompt and answer.

    Raises:
        ValueError: one is longer than what the model reads.
    """
    most = token_limit(language.model, language.tokenizer)
    found = []
    for i, pair in enumerate(pairs):
        rows = []
        for side in ("chosen", "rejected"):
            name = f"data: row {i}: {side}"
            rows.append(encode_whole(pair.prompt, getattr(pair, side), language, name))
            if len(rows[-1]) > most:
                raise ValueError(
                    f"{name}: with the prompt it is {len(rows[-1])} tokens, and {language.name} "
                    f"reads {most}; shorten it, or leave the row out"
                )
        found.append(EncodedPair(rows[0], rows[1], pair.margin))
    return found


Score = Callable[[list[list[int]], torch.device], torch.Tensor]


def score_pairs(
    score: Score, pairs: list[EncodedPair], which: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rewards of chosen and of rejected texts, and the margins, (n,) each."""
    some = [pairs[i] for i in which]
    rows = [pair.chosen for pair in some] + [pair.rejected for pair in some]
    chosen, rejected = score(rows, device).chunk(2)
    return chosen, rejected, torch.tensor([pair.margin for pair in some], device=device)


# ---- evaluate


@torch.no_grad()
def evaluate(
    run: Run, settings: Settings, score: Score, val: list[EncodedPair]
) -> dict[str, float]:
    """Score all validation pairs, and say how often the chosen answer has the higher reward."""
    shard = np.array(run.shard(len(val)), int)
    found = [np.empty((0, 3), np.float32)]
    for which in np.array_split(shard, -(-len(shard) // settings.batch_size) or 1):
        if len(which):
            parts = score_pairs(score, val, which, run.device)
            found.append(torch.stack(parts, 1).float().cpu().numpy())
    (rewards,) = run.gather_arrays(np.concatenate(found))
    chosen, rejected, margins = torch.from_numpy(rewards).T
    both = torch.cat([chosen, rejected])
    return {
        "val_loss": bradley_terry_loss(chosen, rejected, margins).item(),
        "accuracy": (chosen > rejected).double().mean().item(),
        "reward_mean": both.mean().item(),
        "reward_std": both.std().item(),
    }


# ---- save


USAGE = """
from transformers import pipeline

score = pipeline("text-classification", model, function_to_apply="none")
print(score("a prompt" + " and its answer"))
"""
CHAT_USAGE = """
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(model)
network = AutoModelForSequenceClassification.from_pretrained(model)
chat = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "its answer"},
]
rows = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
print(network(**rows).logits.item())
"""


def save_model(
    run: Run,
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    metrics: dict[str, float],
    count: int,
    usage: str,
    path: Path,
) -> None:
    """Write the model as transformers does, with its card."""
    network: PreTrainedModel = run.weights()
    network.save_pretrained(path)
    lm.save_tokenizer(tokenizer, path)
    card.write_card(
        path,
        run.folder.path,
        title=f"{Path(settings.init_from or '').name}, a reward model",
        task="text-classification",
        about=f"{settings.init_from}, {network.num_parameters():,} parameters, trained on pairs of "
        f"answers of {settings.data} for {run.progress.step:,} steps.",
        usage=usage,
        figures=metrics,
        protocol=f"All {count:,} validation pairs: the loss is that of Bradley and Terry on their "
        "rewards, in nats, accuracy the share of pairs whose chosen answer has the higher one.",
        data=settings.data,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
