"""Align a language model with a reward, or with what people prefer: PPO, GRPO, RLOO and DPO.

    accelerate launch recipes/align.py --init_from runs/sft --reward runs/reward --prompts p.txt
    accelerate launch recipes/align.py --init_from runs/sft --data pairs.jsonl --method dpo
    accelerate launch recipes/align.py --init_from runs/charlm --reward sentiment --prompts p.txt
    accelerate launch recipes/align.py --output_dir runs/aligned --resume

The objective is the expected reward less beta times the divergence from the model that the run
started from, in nats a completion. The output folder is an ordinary transformers model, at any time
the one of the highest objective so far, or with DPO of the lowest loss.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import machine
from genkit.data import dialogues
from genkit.data.dialogues import Prompt
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.models import alignment_losses as losses
from genkit.models.completions import Rows
from genkit.text import rewards
from genkit.text.drawing import check_room
from genkit.text.language_model import LanguageModel
from genkit.text.rewards import Reward
from genkit.training import preferences, rollouts
from genkit.training.actors import Actors, make_actors
from genkit.training.alignment_cards import write_aligned_card
from genkit.training.alignment_curves import alignment_curve, preference_curve
from genkit.training.alignment_samples import AnswerPages, write_completions
from genkit.training.policy_updates import (
    Batch,
    check_batch,
    check_ratios,
    critic_loss,
    minibatches,
    policy_loss,
    weigh_tokens,
)
from genkit.training.preference_data import PreferenceSettings
from genkit.training.progress import count_steps
from genkit.training.rollouts import Completion, Rollout
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting

# ---- settings


@dataclass
class Settings(PreferenceSettings):
    """Settings of this recipe; see also PreferenceSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/aligned", "folder of the run and of the model")
    method: str = setting("ppo", "how to align", choices=("ppo", "grpo", "rloo", "dpo"))
    reward: str | None = setting(None, f"{rewards.KINDS}; not for dpo")
    gold: str | None = setting(None, "a second reward, watched and not trained on")
    prompts: str | None = setting(None, "prompts: a text file, one a line, or a table; not for dpo")
    data: str | None = setting(None, "for dpo: pairs of answers, a table or a dataset")
    val_fraction: float = setting(
        0.1, "part of the prompts or pairs to validate on", above=0, below=1
    )
    beta: float = setting(CHOSEN, "weight of the divergence, in rewards a nat", above=0)
    kl_target: float | None = setting(
        None, "ppo: adapt beta to this divergence, in nats a completion", above=0
    )
    max_new_tokens: int = setting(64, "tokens of the longest completion", least=1)
    group_size: int = setting(CHOSEN, "completions of each prompt of a step", least=1)
    updates: int = setting(CHOSEN, "minibatches of a step's completions, each an update", least=1)
    policy_epochs: int = setting(CHOSEN, "passes over a step's completions", least=1)
    clip_ratio: float = setting(
        0.2, "ratio of probabilities beyond which nothing is gained", above=0
    )
    gae_decay: float = setting(0.95, "ppo: lambda of generalised advantages", least=0, most=1)
    value_learning_rate: float = setting(CHOSEN, "ppo: peak learning rate of the values", above=0)
    label_smoothing: float = setting(
        0.0, "dpo: probability that a pair is the wrong way round", least=0, below=0.5
    )
    normalize_length: bool = setting(False, "dpo: log-probabilities a token, not a completion")
    lora_rank: int = setting(
        0, "train LoRA adapters of this rank; 0 to train the weights themselves", least=0
    )
    epochs: float | None = setting(
        None, "dpo: passes over the pairs, unless max_steps is fewer steps", above=0
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if self.kl_target is not None and self.method != "ppo":
            raise ValueError(f"--kl_target {self.kl_target} is for --method ppo")
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise ValueError("--lora_rank requires peft: pip install 'hf-genkit[align]'")


VALIDATED = 64  # completions to validate on, at least
PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {"group_size": 1, "updates": 4, "policy_epochs": 2, "beta": 0.05},
    "grpo": {"group_size": 8, "updates": 2, "policy_epochs": 1, "beta": 0.05},
    "rloo": {"group_size": 4, "updates": 1, "policy_epochs": 1, "beta": 0.05},
    "dpo": {"group_size": 1, "updates": 1, "policy_epochs": 1, "beta": 0.1},
}


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    run: dict[str, Any] = {"batch_size": 256 if device == "accelerator" else 64}
    if not (settings.epochs or settings.max_steps or settings.max_minutes):
        run |= {"max_minutes": 5.0} if settings.method != "dpo" else {"epochs": 3.0}
    rates = {"learning_rate": 1e-4, "muon_learning_rate": 2e-3, "weight_decay": 0.0}
    if settings.lora_rank:
        rates |= {"learning_rate": 5e-4}
    rates |= {"value_learning_rate": 3 * (settings.learning_rate or rates["learning_rate"])}
    # half precision would make old and new probabilities differ before anything is learned
    step = {"optimizer": "adamw", "ema": 0.0, "compile": False, "mixed_precision": "no"}
    return run | rates | step | PRESETS[settings.method]


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    check_settings(settings)

    with Run(settings) as run:
        assert settings.init_from, "checked"
        rate = settings.value_learning_rate if settings.method == "ppo" else None
        actors = make_actors(
            run, settings.init_from, settings.init_revision, settings.lora_rank, rate
        )
        train = train_on_pairs if settings.method == "dpo" else train_by_drawing
        train(run, settings, actors)


def check_settings(settings: Settings) -> None:
    """Refuse settings that lack what the method needs, or have what it does not."""
    method, offline = settings.method, settings.method == "dpo"
    needed, other = (("data",), ("prompts",)) if offline else (("reward", "prompts"), ("data",))
    for name in ("init_from", *needed):
        if getattr(settings, name) is None:
            raise ValueError(f"--{name} is missing; --method {method} requires it")
    for name in other:
        if getattr(settings, name) is not None:
            raise ValueError(f"--{name} {getattr(settings, name)} is not for --method {method}")
    if method in ("grpo", "rloo") and settings.group_size == 1:
        raise ValueError(
            f"--group_size 1: {method} compares completions of a prompt; give 2 or more"
        )


# ---- learning from completions that the policy draws


def train_by_drawing(run: Run, settings: Settings, actors: Actors) -> None:
    """Draw completions, score them, and make those of more reward than expected more likely."""
    # ---- data
    check_batch(run, settings.group_size, settings.updates)
    assert settings.reward and settings.prompts, "checked"
    prompts = dialogues.read_prompts(settings.prompts, settings.table_memory)
    prepare = partial(rollouts.prepare_reward, run, prompts=prompts, policy=actors.before)
    reward = prepare(settings.reward)
    gold = prepare(settings.gold) if settings.gold else None
    check_room(prompts, actors.before, settings.max_new_tokens)
    train, val = dialogues.split(prompts, settings.val_fraction, "prompts")
    run.check_held_out(len(val), "prompts")
    order = Order(len(train), settings.seed)
    facts = {"reward_sha256": reward.sha256} | ({"gold_sha256": gold.sha256} if gold else {})
    run.log(
        f"{actors.network.num_parameters():,} parameters · {len(train):,} prompts to train on, "
        f"{len(val):,} to validate · reward {reward.name}"
    )

    # ---- loop
    run.identify(
        model_sha256=actors.sha256, prompts_sha256=dialogues.content_hash(prompts), **facts
    )
    run.progress.coefficient = settings.beta
    draw = partial(
        rollouts.draw_scored,
        run,
        reward=reward,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
    )
    every, times = np.arange(len(val)), -(-VALIDATED // len(val))
    validate = partial(draw, val, every, every, times)  # from the same seeds every time
    before, count = validate(actors.before), settings.batch_size // settings.group_size
    evaluate = partial(evaluate_drawn, run, settings, actors, val, before, validate, gold)
    run.restore(before=evaluate)
    for step in run.steps():
        positions = (step - 1) * count + np.arange(count)
        which = order(positions)[1]
        drawn = draw(train, which, positions, settings.group_size, actors.language)
        rollout = rollouts.roll_out(run, drawn, actors.policy, actors.reference, actors.vocabulary)
        clipped = learn(run, settings, actors, weigh(run, settings, actors, rollout))
        log_rollout(run, settings, rollout, clipped)
        if run.evaluation_due():
            with run.clock.paused():
                evaluate()


def weigh(run: Run, settings: Settings, actors: Actors, rollout: Rollout) -> Batch:
    """Compare rewards with what was expected, over the whole batch of all processes."""
    beta, size, mask = run.progress.coefficient, settings.group_size, rollout.rows.mask
    k1 = losses.log_ratio(rollout.old, rollout.reference)
    batch = partial(Batch, rollout.rows, rollout.old, rollout.reference)
    if settings.method == "grpo":
        earned = rollout.rewards[:, None] - beta * losses.later_divergence(k1)
        grouped = earned.view(-1, size, mask.shape[1])
        return batch(losses.group_advantages(grouped).view(mask.shape))
    if settings.method == "rloo":
        penalised = rollout.rewards - beta * rollout.divergence
        return batch(losses.leave_one_out_advantages(penalised.view(-1, size)).view(-1, 1))
    assert actors.value, "ppo has one"
    values = rollouts.evaluate_shared(run, actors.value, rollout.rows)
    advantages, returns = weigh_tokens(rollout.rewards, k1, values, mask, beta, settings.gae_decay)
    return batch(advantages, values, returns)


def learn(run: Run, settings: Settings, actors: Actors, batch: Batch) -> float:
    """Update the policy, and for ppo the values; return the share of tokens that were clipped."""
    lengths = batch.rows.mask.sum(1).numpy()
    clip, beta = settings.clip_ratio, run.progress.coefficient
    clipped = torch.zeros(2, dtype=torch.float64)  # of all tokens, and all tokens
    seed = settings.seed, run.progress.step
    orders = minibatches(len(lengths), settings.policy_epochs, settings.updates, seed)
    for turn, which in enumerate(orders):
        count = float(len(which) if settings.method == "rloo" else lengths[which].sum())
        for rows in run.parts(which[np.array(run.shard(len(which)), int)]):
            part = batch.take(rows, run.device)
            logs, _ = actors.policy(part.rows)
            ratios = (logs.detach() - part.old).exp()[part.rows.mask > 0]
            if turn == 0:
                check_ratios(ratios, run.progress.step)
            clipped += torch.tensor([((ratios - 1).abs() > clip).sum(), len(ratios)])
            run.backward(policy_loss(settings.method, logs, part, count / run.shares, clip, beta))
            if actors.value:
                values = actors.value(part.rows)
                run.backward(critic_loss(values, part, count / run.shares, clip), "value")
        run.update()
        if actors.value:
            run.update("value")
    some, every = run.sum(clipped).tolist()
    return some / every


def log_rollout(run: Run, settings: Settings, rollout: Rollout, clipped: float) -> None:
    """Log how the step's completions were, and adapt beta if there is a target."""
    beta = run.progress.coefficient
    figures = rollouts.describe(rollout, settings.group_size)
    run.add_metrics(beta=beta, clipped=clipped, **figures)
    if settings.kl_target is not None:
        run.progress.coefficient = losses.adapt_coefficient(
            beta, figures["kl"], settings.kl_target, settings.batch_size
        )


def evaluate_drawn(
    run: Run,
    settings: Settings,
    actors: Actors,
    prompts: list[Prompt],
    before: list[Completion],
    draw: Callable[[LanguageModel], list[Completion]],
    gold: Reward | None,
) -> None:
    """Compare the policy with the reference on validation prompts, and save it if it is the best.

    Args:
        before: the reference's completions, as `draw` has drawn them.
    """
    after = draw(actors.language)
    rollout = rollouts.roll_out(run, after, actors.policy, actors.reference, actors.vocabulary)
    metrics = rollouts.compare(rollout, before, settings.beta)
    if gold:
        asked = [prompts[each.prompt] for each in after]
        metrics["val_gold"] = float(np.mean(gold(asked, [each.text for each in after])))
    write_completions(run, prompts, before, after)
    if run.report("objective", metrics, lower_is_better=False, curve=alignment_curve):
        run.publish(partial(save_model, run, settings, actors, metrics, len(after), prompts[0]))


# ---- learning from pairs


def train_on_pairs(run: Run, settings: Settings, actors: Actors) -> None:
    """Make chosen answers more likely than rejected ones, compared with the reference."""
    # ---- data
    assert settings.data, "checked"
    pairs = dialogues.read_pairs(settings.data, settings.table_memory)
    encoded = preferences.encode_pairs(pairs, actors.before)
    parts = dialogues.split(encoded, settings.val_fraction, "data")
    train, val = map(preferences.EncodedPairs, parts)
    run.check_held_out(len(val), "pairs")
    order = Order(len(train), settings.seed)
    run.log(
        f"{actors.network.num_parameters():,} parameters · {len(train):,} pairs to train on, "
        f"{len(val):,} to validate"
    )

    # ---- loop
    run.identify(model_sha256=actors.sha256, pairs_sha256=dialogues.content_hash(pairs))
    settings.max_steps = count_steps(
        settings.epochs, len(train), settings.batch_size, settings.max_steps
    )
    held = dialogues.split(pairs, settings.val_fraction, "data")[1]
    pages = AnswerPages(run, [pair.prompt for pair in held], actors.before)
    compare = partial(preferences.pair_logs, actors, settings.normalize_length)
    evaluate = partial(evaluate_pairs, run, settings, actors, val, compare, pages)
    run.restore(before=evaluate)
    for _ in run.steps():
        for rows in run.rows():
            logs = compare(train.take(order(rows)[1], run.device))
            run.backward(logs.loss(settings.beta, settings.label_smoothing))
        run.update()
        if run.evaluation_due():
            with run.clock.paused():
                evaluate()


def evaluate_pairs(
    run: Run,
    settings: Settings,
    actors: Actors,
    val: preferences.EncodedPairs,
    compare: Callable[[Rows], preferences.PairLogs],
    pages: AnswerPages,
) -> None:
    """Compare chosen and rejected answers of validation pairs, and save the best model."""
    pages.write(actors.language)
    logs = preferences.all_pair_logs(run, val, compare, settings.batch_size)
    loss = logs.loss(settings.beta, settings.label_smoothing).item()
    metrics = {"val_loss": loss} | logs.figures(settings.beta)
    if run.report("val_loss", metrics, curve=preference_curve):
        prompt = pages.prompts[0]
        run.publish(partial(save_model, run, settings, actors, metrics, len(val), prompt))


# ---- save


def save_model(
    run: Run,
    settings: Settings,
    actors: Actors,
    metrics: dict[str, float],
    count: int,
    prompt: Prompt,
    path: Path,
) -> None:
    """Write the policy as transformers does, adapters merged, with its card."""
    actors.save(path)
    offline = settings.method == "dpo"
    data = settings.data if offline else settings.prompts
    assert data, "checked"
    write_aligned_card(
        path,
        run,
        actors,
        method=settings.method,
        source=f"pairs of {data}" if offline else f"the reward {settings.reward}",
        data=data,
        beta=settings.beta,
        figures=metrics,
        count=count,
        prompt=prompt,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
