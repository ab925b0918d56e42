"""Completions that a policy draws in a step, scored: the same at any number of processes.

Each process draws for its part of the step's prompts and scores what it drew; then every process
has all of it, and takes from there on its part of each minibatch. A completion depends on the
weights and on (seed, position of the prompt in the run, which completion of the prompt) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genkit.data.dialogues import Prompt
from genkit.models.alignment_losses import k3
from genkit.models.completions import Rows, pad_rows, split_blocks
from genkit.text.dialogue_tokens import encode_prompt_of
from genkit.text.drawing import draw_completions
from genkit.text.language_model import LanguageModel
from genkit.text.rewards import Reward, check_chats, describe_reading, load_reward
from genkit.training.processes import Processes
from genkit.training.run import Run


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt, as plain data."""

    prompt: int  # which of the prompts
    ids: list[int]  # of prompt and completion
    start: int  # tokens of the prompt
    text: str  # of the completion
    ended: bool  # by itself, before the longest allowed
    reward: float


@dataclass(frozen=True)
class Rollout:
    """All completions of a step, in the order of their prompts, on the CPU."""

    completions: list[Completion]
    rows: Rows
    rewards: torch.Tensor  # (n,)
    old: torch.Tensor  # log π_old of each token, (n, length)
    reference: torch.Tensor  # log π_ref, (n, length)
    entropies: torch.Tensor  # of π_old, (n, length)

    @property
    def divergence(self) -> torch.Tensor:
        """k1 of whole completions, (n,), in nats."""
        return (self.old - self.reference).sum(1)


def prepare_reward(run: Run, name: str, prompts: Sequence[Prompt], policy: LanguageModel) -> Reward:
    """Load a reward onto the run's device, and log what it reads otherwise than the policy does.

    Raises:
        ValueError: there is no such reward, or it cannot read the prompts.
    """
    reward = load_reward(name, str(run.device))
    check_chats(reward, prompts)
    if note := describe_reading(reward, prompts, policy.tokenizer):
        run.log(note)
    return reward


def completion_seed(seed: int, position: int, index: int) -> int:
    """Return the seed of a completion: of the prompt at a position of the run, the index-th."""
    state = np.random.SeedSequence((seed, position, index)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def draw_scored(
    processes: Processes,
    prompts: Sequence[Prompt],
    which: np.ndarray,
    positions: np.ndarray,
    group_size: int,
    language: LanguageModel,
    *,
    reward: Reward,
    seed: int,
    max_new_tokens: int,
) -> list[Completion]:
    """Draw completions from the model's own distribution and score them.

    Args:
        which: prompts of the step, (n,), and `positions` where they stand in the run, (n,).
        group_size: completions of each prompt.

    Returns:
        Those of all processes: (n · group_size) in the order of the prompts.
    """
    mine = processes.shard(len(which))
    rows = [(int(which[i]), int(positions[i]), k) for i in mine for k in range(group_size)]
    asked = [prompts[prompt] for prompt, _, _ in rows]
    if not rows:
        return processes.gather([])
    seeds = [completion_seed(seed, position, k) for _, position, k in rows]
    records = draw_completions(asked, language, max_new_tokens, seeds)
    rewards = reward(asked, [record.completion for record in records])
    known: dict[int, list[int]] = {}
    found: list[Any] = []
    for (prompt, _, _), record, score in zip(rows, records, rewards, strict=True):
        if prompt not in known:
            known[prompt] = encode_prompt_of(prompts[prompt], language, "prompts")
        start = len(known[prompt])
        ended = record.finish == "eos"
        found.append(
            [prompt, known[prompt] + record.tokens, start, record.completion, ended, score]
        )
    return [Completion(*each) for each in processes.gather(found)]


def roll_out(
    processes: Processes,
    completions: list[Completion],
    policy: Callable[[Rows], tuple[torch.Tensor, torch.Tensor]],
    reference: Callable[[Rows], tuple[torch.Tensor, torch.Tensor]],
    vocabulary: int,
) -> Rollout:
    """Add what policy and reference give each token, by the forward pass of training.

    Args:
        policy, reference: see `completions.log_probabilities`, without their first argument.
    """
    rows = as_rows(completions)
    own = _own_part(processes, rows)
    old, entropies = evaluate(policy, own, vocabulary, processes.device)
    under_reference, _ = evaluate(reference, own, vocabulary, processes.device)
    arrays = [part.numpy() for part in (old, entropies, under_reference)]
    old, entropies, under_reference = map(torch.from_numpy, processes.gather_arrays(*arrays))
    rewards = torch.tensor([completion.reward for completion in completions])
    return Rollout(completions, rows, rewards, old, under_reference, entropies)


def evaluate_shared(
    processes: Processes, model: Callable[[Rows], torch.Tensor], rows: Rows
) -> torch.Tensor:
    """Return what a model gives each row, (n, length), of which each process computes its part."""
    own = _own_part(processes, rows)
    (found,) = evaluate(lambda part: (model(part),), own, 1, processes.device)
    return torch.from_numpy(processes.gather_arrays(found.numpy())[0])


def describe(rollout: Rollout, group_size: int) -> dict[str, float]:
    """Return the figures of a step's completions, for its log."""
    mask, rewards = rollout.rows.mask, rollout.rewards
    spread = rewards.view(-1, group_size).std(1, correction=0)
    return {
        "reward": rewards.mean().item(),
        "kl": rollout.divergence.mean().item(),
        "kl_k3": (k3(rollout.old, rollout.reference) * mask).sum(1).mean().item(),
        "entropy": (rollout.entropies.sum() / mask.sum()).item(),
        "tokens": mask.sum(1).mean().item(),
        "ended": float(np.mean([completion.ended for completion in rollout.completions])),
        "groups_alike": (spread == 0).double().mean().item() if group_size > 1 else 0.0,
    }


def compare(rollout: Rollout, before: Sequence[Completion], beta: float) -> dict[str, float]:
    """Return what the policy gains over the reference, and what it pays.

    Args:
        before: the reference's completions of the same prompts, from the same seeds.
        beta: weight of the divergence in the objective.
    """
    rewards = rollout.rewards
    reference = torch.tensor([completion.reward for completion in before])
    wins = (rewards > reference).double() + (rewards == reference).double() / 2
    divergence = rollout.divergence.mean().item()
    return {
        "objective": rewards.mean().item() - beta * divergence,
        "val_reward": rewards.mean().item(),
        "reference_reward": reference.mean().item(),
        "win_rate": wins.mean().item(),
        "val_kl": divergence,
    }


def as_rows(completions: Sequence[Completion]) -> Rows:
    """Pad completions with their prompts into one batch."""
    answers = [[i >= c.start for i in range(len(c.ids))] for c in completions]
    return pad_rows([c.ids for c in completions], answers)


@torch.no_grad()
def evaluate(
    model: Callable[[Rows], tuple[torch.Tensor, ...]],
    rows: Rows,
    vocabulary: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """Return what a model gives rows, on the CPU, computed in blocks that fit into memory."""
    parts = [model(rows[block].to(device)) for block in split_blocks(rows, vocabulary)]
    return [torch.cat(each).cpu() for each in zip(*parts, strict=True)]


def _own_part(processes: Processes, rows: Rows) -> Rows:
    """Return the rows that this process evaluates."""
    mine = processes.shard(len(rows.ids))
    return rows[mine.start : mine.stop]
