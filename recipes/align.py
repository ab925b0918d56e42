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

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from genkit import files, machine
from genkit.data import dialogues, table_sources, tables
from genkit.data.dialogues import Pair, Prompt
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card, download
from genkit.models import alignment_losses as losses
from genkit.models import completions, lm, lora
from genkit.models.completions import Rows
from genkit.text import rewards
from genkit.text.dialogue_tokens import Row, encode_dialogue
from genkit.text.drawing import check_room
from genkit.text.language_model import LanguageModel
from genkit.text.rewards import Reward
from genkit.training import rollouts
from genkit.training.alignment_curves import alignment_curve, preference_curve
from genkit.training.optim import optimizers
from genkit.training.progress import count_steps
from genkit.training.rollouts import Completion, Rollout
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, RunSettings, parse, setting

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; see also RunSettings in genkit/training."""

    output_dir: str = setting("runs/aligned", "folder of the run and of the model")
    init_from: str | None = setting(
        None, "language model to start from: a folder or a Hub id; required"
    )
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
    table_memory: int = setting(
        tables.MEMORY, "MiB of the process that reads a table", least=tables.MIN_MEMORY
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
        table_sources.check_source(self.data)
        download.check_exists(self.init_from, "--init_from")


SMALL_RATIO = 1e-4  # how far |ρ - 1| may be before the first update
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


@dataclass
class Actors:
    """The networks of a run, as functions of rows."""

    network: PreTrainedModel  # the policy
    inner: PreTrainedModel  # the same without peft's wrapper, which writes
    policy: Callable[[Rows], tuple[torch.Tensor, torch.Tensor]]  # log π and entropies, trained
    reference: Callable[[Rows], tuple[torch.Tensor, torch.Tensor]]
    value: Callable[[Rows], torch.Tensor] | None  # of ppo
    before: LanguageModel  # the reference, to write with

    @property
    def language(self) -> LanguageModel:
        """The policy as it is now, to write with."""
        return LanguageModel(self.inner, self.before.tokenizer, "this run", compiled=False)

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token."""
        return int(self.network.config.vocab_size)


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    check_settings(settings)

    with Run(settings) as run:
        actors, facts = make_actors(run, settings)
        if settings.method == "dpo":
            train_on_pairs(run, settings, actors, facts)
        else:
            train_by_drawing(run, settings, actors, facts)


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


def make_actors(run: Run, settings: Settings) -> tuple[Actors, dict[str, Any]]:
    """Load the policy and its frozen copy, and for ppo a network of values that starts at 0."""
    assert settings.init_from, "checked"
    with run.accelerator.local_main_process_first():
        network, tokenizer = lm.load_lm(settings.init_from)
    facts = {"model_sha256": files.weights_hash(network)}
    reference = copy.deepcopy(network).to(run.device).eval().requires_grad_(False)
    before = LanguageModel(reference, tokenizer, settings.init_from, compiled=False)
    value = None
    if settings.method == "ppo":
        critic = lm.make_critic(network)
        rate = dataclasses.replace(settings, learning_rate=settings.value_learning_rate)
        wrapped = run.network("value", critic, optimizers(critic, rate), averaged=False)
        value = partial(completions.token_values, wrapped)
    inner = network  # adapters are put into it
    if settings.lora_rank:
        network = lora.add_adapters(network, settings.lora_rank)
    wrapped = run.network("model", network, optimizers(network, settings), averaged=False)
    for each in run.networks.values():
        each.module.eval()  # no dropout: probabilities are those that drew
    policy = run.autocast(partial(completions.log_probabilities, wrapped))
    under_reference = run.autocast(partial(completions.log_probabilities, reference))
    return Actors(network, inner, policy, under_reference, value, before), facts


# ---- learning from completions that the policy draws


def train_by_drawing(run: Run, settings: Settings, actors: Actors, facts: dict[str, Any]) -> None:
    """Draw completions, score them, and make those of more reward than expected more likely."""
    # ---- data
    check_batch(run, settings)
    assert settings.reward and settings.prompts, "checked"
    reward = rewards.load_reward(settings.reward, str(run.device))
    gold = rewards.load_reward(settings.gold, str(run.device)) if settings.gold else None
    prompts = dialogues.read_prompts(settings.prompts, settings.table_memory)
    check_room(prompts, actors.before, settings.max_new_tokens)
    own = actors.before.tokenizer
    if reward.tokenizer and reward.tokenizer.get_vocab() != own.get_vocab():
        run.log(f"reward {reward.name} has another tokenizer: it reads completions as text")
    train, val = dialogues.split(prompts, settings.val_fraction, "prompts")
    check_held_out(run, len(val), "prompts")
    order = Order(len(train), settings.seed)
    scores = {"reward": reward} | ({"gold": gold} if gold else {})
    facts |= {f"{name}_sha256": score.sha256 for name, score in scores.items()}
    facts |= {"prompts_sha256": dialogues.content_hash(prompts)}
    run.log(
        f"{actors.network.num_parameters():,} parameters · {len(train):,} prompts to train on, "
        f"{len(val):,} to validate · reward {reward.name}"
    )

    # ---- loop
    run.identify(**facts)
    run.progress.coefficient = settings.beta
    before = draw_one_each(run, settings, actors.before, val, reward)
    evaluate = partial(evaluate_drawn, run, settings, actors, val, before, scores)
    run.restore(before=evaluate)
    for step in run.steps():
        positions = (step - 1) * count_prompts(settings) + np.arange(count_prompts(settings))
        which = order(positions)[1]
        drawn = rollouts.draw_scored(
            run,
            actors.language,
            train,
            which,
            positions,
            seed=settings.seed,
            group_size=settings.group_size,
            max_new_tokens=settings.max_new_tokens,
            reward=reward,
        )
        rollout = rollouts.roll_out(run, drawn, actors.policy, actors.reference, actors.vocabulary)
        batch = weigh_completions(run, settings, actors, rollout)
        clipped = torch.zeros(2, dtype=torch.float64)  # of all tokens, and all tokens
        for turn, mine, count in minibatches(run, settings, batch):
            for rows in run.parts(mine):
                loss, ratios = policy_loss(run, settings, actors, batch, rows, count)
                check_ratios(run, ratios, turn)
                clipped += torch.tensor([count_clipped(ratios, settings), ratios.numel()])
                run.backward(loss)
                if actors.value:
                    run.backward(critic_loss(run, settings, actors, batch, rows, count), "value")
            run.update()
            if actors.value:
                run.update("value")
        log_rollout(run, settings, rollout, run.sum(clipped))
        if run.evaluation_due():
            with run.clock.paused():
                evaluate()


@dataclass(frozen=True)
class Batch:
    """A rollout with how much better than expected each token or completion was."""

    rollout: Rollout
    advantages: torch.Tensor  # ppo: (n, length); else (n,)
    values: torch.Tensor | None = None  # ppo: V_old, (n, length)
    returns: torch.Tensor | None = None  # ppo: (n, length)


def weigh_completions(run: Run, settings: Settings, actors: Actors, rollout: Rollout) -> Batch:
    """Compare rewards with what was expected, over the whole batch of all processes."""
    beta, mask = run.progress.coefficient, rollout.rows.mask
    grouped = (-1, settings.group_size)
    if settings.method == "grpo":
        return Batch(rollout, losses.group_advantages(rollout.rewards.view(grouped)).flatten())
    if settings.method == "rloo":
        penalised = rollout.rewards - beta * rollout.divergence
        return Batch(rollout, losses.leave_one_out_advantages(penalised.view(grouped)).flatten())
    assert actors.value, "ppo has one"
    values = rollouts.evaluate_shared(run, actors.value, rollout.rows)
    earned = losses.token_rewards(
        rollout.rewards, losses.log_ratio(rollout.old, rollout.reference), mask, beta
    )
    advantages = losses.generalised_advantages(earned, values, mask, decay=settings.gae_decay)
    return Batch(rollout, losses.whiten(advantages, mask), values, advantages + values)


def minibatches(
    run: Run, settings: Settings, batch: Batch
) -> Iterator[tuple[int, np.ndarray, float]]:
    """Yield the number of each update, this process's rows of it, and what its losses count.

    That is tokens of the minibatch over all processes; for rloo, completions.
    """
    lengths = batch.rollout.rows.mask.sum(1).numpy()
    for epoch in range(settings.policy_epochs):
        rng = np.random.default_rng((settings.seed, run.progress.step, epoch))
        parts = np.split(rng.permutation(len(lengths)), settings.updates)
        for turn, which in enumerate(parts, epoch * settings.updates):
            mine = which[np.array(run.shard(len(which)), int)]
            count = len(which) if settings.method == "rloo" else lengths[which].sum()
            yield turn, mine, float(count)


def policy_loss(
    run: Run, settings: Settings, actors: Actors, batch: Batch, rows: np.ndarray, count: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of some rows, and π / π_old of each token, (tokens,)."""
    rollout, device = batch.rollout, run.device
    own = rollout.rows.take(rows).to(device)
    length = own.mask.shape[1]
    old = rollout.old[rows, :length].to(device)
    advantages = batch.advantages[rows].to(device)
    logs, _ = actors.policy(own)
    options: dict[str, Any] = {"mask": own.mask, "count": count / run.shares}
    options["clip"] = settings.clip_ratio
    if settings.method == "ppo":
        loss = losses.ppo_loss(logs, old, advantages[:, :length], **options)
    elif settings.method == "grpo":
        reference = rollout.reference[rows, :length].to(device)
        options["beta"] = run.progress.coefficient
        loss = losses.grpo_loss(logs, old, reference, advantages, **options)
    else:
        loss = losses.rloo_loss(logs, old, advantages, **options)
    return loss, (logs.detach() - old).exp()[own.mask > 0]


def critic_loss(
    run: Run, settings: Settings, actors: Actors, batch: Batch, rows: np.ndarray, count: float
) -> torch.Tensor:
    """Return the loss of the values of some rows."""
    assert actors.value and batch.values is not None and batch.returns is not None, "ppo has them"
    own = batch.rollout.rows.take(rows).to(run.device)
    length = own.mask.shape[1]
    old, returns = (each[rows, :length].to(run.device) for each in (batch.values, batch.returns))
    return losses.value_loss(
        actors.value(own), old, returns, own.mask, count / run.shares, settings.clip_ratio
    )


def count_clipped(ratios: torch.Tensor, settings: Settings) -> int:
    """Count the tokens whose probability has changed by more than the clip."""
    return int(((ratios - 1).abs() > settings.clip_ratio).sum())


def check_ratios(run: Run, ratios: torch.Tensor, turn: int) -> None:
    """Stop a run whose probabilities are not those that drew, before it learns from them."""
    if turn:
        return
    worst = (ratios - 1).abs().max().item()
    if worst > SMALL_RATIO:
        raise ValueError(
            f"step {run.progress.step}: before the first update a token's probability differs by "
            f"{worst:.1e} from the one it was drawn with, more than {SMALL_RATIO:g}; give "
            "--mixed_precision no, or a smaller --learning_rate if weights have grown large"
        )


def log_rollout(run: Run, settings: Settings, rollout: Rollout, clipped: torch.Tensor) -> None:
    """Log how the step's completions were, and adapt beta if there is a target."""
    mask, k = rollout.rows.mask, settings.group_size
    divergence = rollout.divergence.mean().item()
    spread = rollout.rewards.view(-1, k).std(1) if k > 1 else torch.ones(1)
    run.add_metrics(
        reward=rollout.rewards.mean().item(),
        kl=divergence,
        kl_k3=(losses.k3(rollout.old, rollout.reference) * mask).sum(1).mean().item(),
        beta=run.progress.coefficient,
        entropy=(rollout.entropies.sum() / mask.sum()).item(),
        tokens=mask.sum(1).mean().item(),
        ended=float(np.mean([completion.ended for completion in rollout.completions])),
        clipped=(clipped[0] / clipped[1]).item(),
        groups_alike=(spread == 0).double().mean().item(),
    )
    if settings.kl_target is not None:
        run.progress.coefficient = losses.adapt_coefficient(
            run.progress.coefficient, divergence, settings.kl_target, len(mask)
        )


def evaluate_drawn(
    run: Run,
    settings: Settings,
    actors: Actors,
    prompts: list[Prompt],
    before: list[Completion],
    scores: dict[str, Reward],
) -> None:
    """Compare the policy with the reference on validation prompts, and save it if it is the best.

    Args:
        before: the reference's completions, of the same seeds.
        scores: "reward" and perhaps "gold".
    """
    after = draw_one_each(run, settings, actors.language, prompts, scores["reward"])
    rollout = rollouts.roll_out(run, after, actors.policy, actors.reference, actors.vocabulary)
    metrics = compare_rewards(settings, rollout, before)
    asked = [prompts[each.prompt] for each in after]
    if "gold" in scores:
        gold = scores["gold"](asked, [each.text for each in after])
        metrics["val_gold"] = float(np.mean(gold))
    if run.is_main:
        page = sample_page(run.progress.step, asked, before, after)
        run.folder.write(f"samples/step-{run.progress.step:08d}.md", page)
    if run.report("objective", metrics, lower_is_better=False, curve=alignment_curve):
        run.publish(partial(save_model, run, settings, actors, metrics, len(prompts)))


def draw_one_each(
    run: Run, settings: Settings, language: LanguageModel, prompts: list[Prompt], reward: Reward
) -> list[Completion]:
    """Draw a completion of each validation prompt, from the same seeds every time."""
    which = np.arange(len(prompts))
    return rollouts.draw_scored(
        run,
        language,
        prompts,
        which,
        which,
        seed=settings.seed,
        group_size=1,
        max_new_tokens=settings.max_new_tokens,
        reward=reward,
    )


def compare_rewards(
    settings: Settings, rollout: Rollout, before: list[Completion]
) -> dict[str, float]:
    """Return what the policy gains over the reference, and what it pays."""
    reference = torch.tensor([completion.reward for completion in before])
    wins = (rollout.rewards > reference).double() + (rollout.rewards == reference).double() / 2
    reward, divergence = rollout.rewards.mean().item(), rollout.divergence.mean().item()
    return {
        "objective": reward - settings.beta * divergence,
        "val_reward": reward,
        "reference_reward": reference.mean().item(),
        "win_rate": wins.mean().item(),
        "val_kl": divergence,
    }


SHOWN = 8  # prompts on a page of samples


def sample_page(
    step: int, prompts: list[Prompt], before: list[Completion], after: list[Completion]
) -> str:
    """Return completions of reference and policy, one after the other, in Markdown."""
    lines = [f"# Step {step}\n"]
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:SHOWN]:
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines.append(f"## {' '.join(shown.split())[:80]}\n")
        lines.append(f"Reference, reward {old.reward:.3f}\n\n~~~text\n{old.text}\n~~~\n")
        lines.append(f"Policy, reward {new.reward:.3f}\n\n~~~text\n{new.text}\n~~~\n")
    return "\n".join(lines)


def count_prompts(settings: Settings) -> int:
    """Return the number of prompts of a step, over all processes."""
    return settings.batch_size // settings.group_size


def check_batch(run: Run, settings: Settings) -> None:
    """Refuse completions that do not divide into groups, or into updates and their parts."""
    groups, parts = settings.group_size * run.processes, settings.updates * run.shares
    for name, number in (("group_size", groups), ("updates", parts)):
        if settings.batch_size % number:
            right = -(-settings.batch_size // number) * number
            raise ValueError(
                f"--batch_size {settings.batch_size} completions do not divide by --{name} "
                f"{getattr(settings, name)} on {run.processes} processes with "
                f"--gradient_accumulation {settings.gradient_accumulation}; {right} would"
            )


def check_held_out(run: Run, count: int, what: str) -> None:
    """Refuse fewer rows to validate on than there are processes."""
    if count < run.processes:
        raise ValueError(
            f"--val_fraction leaves {count} {what} for {run.processes} processes; give more"
        )


# ---- learning from pairs


def train_on_pairs(run: Run, settings: Settings, actors: Actors, facts: dict[str, Any]) -> None:
    """Make chosen answers more likely than rejected ones, compared with the reference."""
    # ---- data
    assert settings.data, "checked"
    pairs = dialogues.read_pairs(settings.data, settings.table_memory)
    encoded = encode_pairs(pairs, actors.before)
    train, val = map(EncodedPairs, dialogues.split(encoded, settings.val_fraction, "data"))
    check_held_out(run, len(val), "pairs")
    order = Order(len(train), settings.seed)
    facts |= {"pairs_sha256": dialogues.content_hash(pairs)}
    run.log(
        f"{actors.network.num_parameters():,} parameters · {len(train):,} pairs to train on, "
        f"{len(val):,} to validate"
    )

    # ---- loop
    run.identify(**facts)
    settings.max_steps = count_steps(
        settings.epochs, len(train), settings.batch_size, settings.max_steps
    )
    evaluate = partial(evaluate_pairs, run, settings, actors, val)
    run.restore(before=evaluate)
    for _ in run.steps():
        for rows in run.rows():
            run.backward(preference_loss(run, settings, actors, train.take(order(rows)[1])))
        run.update()
        if run.evaluation_due():
            with run.clock.paused():
                evaluate()


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as rows of tokens, the chosen one and the rejected one."""

    pairs: list[tuple[Row, Row]]

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, which: np.ndarray) -> Rows:
        """Return the chosen rows of some pairs, then the rejected ones, as one batch."""
        rows = [self.pairs[i][side] for side in (0, 1) for i in which]
        return completions.pad_rows([row.ids for row in rows], [row.answers for row in rows])


def encode_pairs(pairs: list[Pair], language: LanguageModel) -> list[tuple[Row, Row]]:
    """Encode both sides of each pair."""
    found = []
    for i, pair in enumerate(pairs):
        name = f"data: row {i}"
        chosen = encode_dialogue(pair.prompt, pair.chosen, language, f"{name}: chosen")
        rejected = encode_dialogue(pair.prompt, pair.rejected, language, f"{name}: rejected")
        found.append((chosen, rejected))
    return found


def preference_loss(run: Run, settings: Settings, actors: Actors, rows: Rows) -> torch.Tensor:
    """Return the loss of pairs, whose chosen rows come first."""
    rows = rows.to(run.device)
    logs = sum_up(settings, actors.policy(rows)[0], rows)
    with torch.no_grad():
        reference = sum_up(settings, actors.reference(rows)[0], rows)
    (chosen, rejected), (old_chosen, old_rejected) = logs.chunk(2), reference.chunk(2)
    return losses.dpo_loss(
        chosen, rejected, old_chosen, old_rejected, settings.beta, settings.label_smoothing
    )


def sum_up(settings: Settings, logs: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the log-probability of each whole answer, or its mean over tokens."""
    whole = logs.sum(1)
    return whole / rows.mask.sum(1) if settings.normalize_length else whole


@torch.no_grad()
def evaluate_pairs(run: Run, settings: Settings, actors: Actors, val: EncodedPairs) -> None:
    """Compare chosen and rejected answers of validation pairs, and save the best model."""
    shard = np.array(run.shard(len(val)), int)
    found = []
    for which in np.array_split(shard, max(1, -(-len(shard) // settings.batch_size))):
        rows = val.take(which).to(run.device)
        both = actors.policy, actors.reference
        each = [sum_up(settings, score(rows)[0], rows) for score in both]
        found.append(torch.stack([*each[0].chunk(2), *each[1].chunk(2)], 1).cpu().numpy())
    (logs,) = run.gather_arrays(np.concatenate(found))
    chosen, rejected, old_chosen, old_rejected = torch.from_numpy(logs).T
    margins = settings.beta * ((chosen - old_chosen) - (rejected - old_rejected))
    metrics = {
        "val_loss": losses.dpo_loss(
            chosen, rejected, old_chosen, old_rejected, settings.beta, settings.label_smoothing
        ).item(),
        "accuracy": (margins > 0).double().mean().item(),
        "margin": margins.mean().item(),
        "chosen": (chosen - old_chosen).mean().item(),
        "rejected": (rejected - old_rejected).mean().item(),
    }
    if run.report("val_loss", metrics, curve=preference_curve):
        run.publish(partial(save_model, run, settings, actors, metrics, len(val)))


# ---- save


NAMES = {
    "ppo": "proximal policy optimisation (PPO)",
    "grpo": "group relative policy optimisation (GRPO)",
    "rloo": "REINFORCE with a leave-one-out baseline (RLOO)",
    "dpo": "direct preference optimisation (DPO)",
}
USAGE = """
from transformers import pipeline
print(pipeline("text-generation", model)("Once"))

import genkit  # the same text for the same seed, at any batch size
print(genkit.generate("Once", model=model, seed=1))
"""
DRAWN = (
    "One completion of each of {count:,} validation prompts, drawn at temperature 1 from fixed "
    "seeds by this model and by the one that it started from. The divergence val_kl is the mean of "
    "log π - log π_ref over this model's completions (k1), in nats a completion; the objective is "
    "the reward less {beta:g} times it; win_rate counts a tie as half."
)
PAIRED = (
    "All {count:,} validation pairs. Chosen and rejected are the mean changes of an answer's "
    "log-probability from the model that it started from, in nats; the margin is {beta:g} times "
    "their difference, and accuracy the share of pairs where it is above 0."
)


def save_model(
    run: Run, settings: Settings, actors: Actors, metrics: dict[str, float], count: int, path: Path
) -> None:
    """Write the policy as transformers does, adapters merged, with its card."""
    network: Any = actors.network
    network = lora.merge_adapters(network) if settings.lora_rank else network
    network.save_pretrained(path)
    lm.save_tokenizer(actors.before.tokenizer, path)
    offline = settings.method == "dpo"
    source = f"pairs of {settings.data}" if offline else f"the reward {settings.reward}"
    card.write_card(
        path,
        run.folder.path,
        title=f"{Path(actors.before.name).name}, aligned",
        task="text-generation",
        about=f"{actors.before.name}, {network.num_parameters():,} parameters, aligned by "
        f"{NAMES[settings.method]} with {source} for {run.progress.step:,} steps.",
        usage=USAGE,
        figures=metrics,
        protocol=(PAIRED if offline else DRAWN).format(count=count, beta=settings.beta),
        data=settings.data if offline else settings.prompts,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
