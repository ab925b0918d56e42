"""What PPO, GRPO and RLOO learn from a rollout: advantages, minibatches and losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from genkit.models import alignment_losses as losses
from genkit.models.completions import Rows
from genkit.training.run import Run

SMALL_RATIO = 1e-4  # how far |π / π_old - 1| may be before the first update


@dataclass(frozen=True)
class Batch:
    """Completions, with how much better than expected each token or completion was."""

    rows: Rows
    old: torch.Tensor  # log π_old of each token, (n, length)
    reference: torch.Tensor  # log π_ref, (n, length)
    advantages: torch.Tensor  # (n, length); rloo: of whole completions, (n, 1)
    values: torch.Tensor | None = None  # ppo: V_old, (n, length)
    returns: torch.Tensor | None = None  # ppo: (n, length)

    def take(self, which: np.ndarray, device: torch.device) -> Batch:
        """Return some of the completions, as long as the longest of them, on a device."""
        rows = self.rows.take(which).to(device)
        length = rows.mask.shape[1]
        old, reference, advantages, values, returns = (
            None if each is None else each[which, :length].to(device)
            for each in (self.old, self.reference, self.advantages, self.values, self.returns)
        )
        assert old is not None and reference is not None and advantages is not None
        return Batch(rows, old, reference, advantages, values, returns)


def check_batch(run: Run, group_size: int, updates: int) -> None:
    """Refuse completions that do not divide into groups, or into updates and their parts.

    Raises:
        ValueError: naming the next larger batch that does.
    """
    for name, value, parts in (
        ("group_size", group_size, run.processes),
        ("updates", updates, run.shares),
    ):
        if run.batch_size % (value * parts):
            right = -(-run.batch_size // (value * parts)) * value * parts
            raise ValueError(
                f"--batch_size {run.batch_size} completions do not divide by --{name} {value} on "
                f"{run.processes} processes with --gradient_accumulation "
                f"{run.settings.gradient_accumulation}; {right} would"
            )


def weigh_tokens(
    rewards: torch.Tensor,
    divergence: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    beta: float,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns of ppo, which compares what follows a token with its value.

    Args:
        rewards: of completions, (n,).
        divergence: k1 of each token, (n, length); it is in the reward of the token.
        values: V before each token, (n, length).
        beta: weight of the divergence.
        decay: λ of the generalised advantages.
    """
    earned = losses.token_rewards(rewards, divergence, mask, beta)
    advantages = losses.generalised_advantages(earned, values, mask, decay=decay)
    return losses.whiten(advantages, mask), advantages + values


def minibatches(
    count: int, epochs: int, updates: int, seed: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Yield the rows of each update of a step, over all processes, in an order of the seed."""
    for epoch in range(epochs):
        rng = np.random.default_rng((*seed, epoch))
        yield from np.split(rng.permutation(count), updates)


def policy_loss(
    method: str, logs: torch.Tensor, part: Batch, count: float, clip: float, beta: float
) -> torch.Tensor:
    """Return the loss of some completions.

    Args:
        method: "ppo", "grpo" or "rloo".
        logs: log π of their tokens, (n, length).
        count: what the minibatch has over all processes: tokens, or for rloo completions.
        clip, beta: see `alignment_losses`.
    """
    mask = part.rows.mask
    if method == "ppo":
        return losses.ppo_loss(logs, part.old, part.advantages, mask, count, clip)
    if method == "rloo":
        return losses.rloo_loss(logs, part.old, part.advantages.squeeze(1), mask, count, clip)
    return losses.grpo_loss(
        logs, part.old, part.reference, part.advantages, mask, count, beta, clip
    )


def critic_loss(values: torch.Tensor, part: Batch, count: float, clip: float) -> torch.Tensor:
    """Return the loss of the values, (n, length), of some completions."""
    assert part.values is not None and part.returns is not None, "ppo has them"
    return losses.value_loss(values, part.values, part.returns, part.rows.mask, count, clip)


def check_ratios(ratios: torch.Tensor, step: int) -> None:
    """Stop a run whose probabilities are not those that drew, before it learns from them.

    Args:
        ratios: π / π_old of each token before the first update of a step.

    Raises:
        ValueError: one is not 1.
    """
    worst = (ratios - 1).abs().max().item()
    if worst > SMALL_RATIO:
        raise ValueError(
            f"step {step}: before the first update a token's probability differs by {worst:.1e} "
            f"from the one it was drawn with, more than {SMALL_RATIO:g}; give "
            "--mixed_precision no, or a smaller --learning_rate if weights have grown large"
        )
