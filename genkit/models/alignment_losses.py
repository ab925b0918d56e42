"""Losses of alignment: demonstrations, rewards from preferences, PPO, GRPO, RLOO and DPO.

Pure functions of log-probabilities. One of a shape (n, length) has a completion in each row, and a
mask, 1.0 at its tokens and 0.0 elsewhere. Where tokens are counted, `count` is how many the whole
batch has, over all processes, so that the loss does not depend on how the batch is divided.

The symbols are those of the papers: π is the policy, π_old the policy that drew the completions,
π_ref the reference, r a reward, A an advantage, V a value, β the weight of the divergence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SMALL = 1e-8  # added to a variance before it divides

# ---------------------------------------------------------------------------------------------
# Demonstrations and rewards


def supervised_loss(
    log_probabilities: torch.Tensor, mask: torch.Tensor, count: float
) -> torch.Tensor:
    """Return −Σ log π(token) / count over the tokens of the answers, in nats.

    Args:
        log_probabilities: (n, length).
        mask: 1 at the tokens of answers, (n, length).
        count: tokens of answers in the whole batch.
    """
    return -(log_probabilities * mask).sum() / count


def bradley_terry_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | float = 0.0,
    centring: float = 0.0,
) -> torch.Tensor:
    """Return the mean of −log σ(r⁺ − r⁻ − margin) + centring (r⁺ + r⁻)², r⁺ of the chosen.

    Args:
        chosen, rejected: rewards, (n,).
        margin: by how much the chosen one should be better, (n,) or one for all.
        centring: weight of the term that holds the mean of all rewards near 0.

    Source: Touvron et al. 2023, section 3.2.2, https://arxiv.org/abs/2307.09288; centring:
        Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244
    """
    losses = -F.logsigmoid(chosen - rejected - margin)
    return (losses + centring * (chosen + rejected) ** 2).mean()


# ---------------------------------------------------------------------------------------------
# DPO


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the mean loss of direct preference optimisation.

    Args:
        chosen, rejected: log π of whole completions, (n,); for the length-normalised form divided
            by their numbers of tokens.
        reference_chosen, reference_rejected: the same under π_ref.
        beta: β, the weight of the divergence that the loss stands for.
        label_smoothing: probability that a pair is labelled the wrong way round (cDPO).

    Source: Rafailov et al. 2023, equation 7, https://arxiv.org/abs/2305.18290; label smoothing:
        Mitchell 2023, https://ericmitchell.ai/cdpo.pdf; length-normalised: Lambert et al. 2024,
        section 5.1.2, https://arxiv.org/abs/2411.15124
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * right + label_smoothing * wrong).mean()


# ---------------------------------------------------------------------------------------------
# The divergence from the reference


def log_ratio(log_probabilities: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return k1 = log π − log π_ref of each token: unbiased, and below 0 for some."""
    return log_probabilities - reference


def k3(log_probabilities: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return k3 = ρ − 1 − log ρ, ρ = π_ref / π, of each token: unbiased, and never below 0.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html
    """
    difference = reference - log_probabilities
    return difference.exp() - 1 - difference


def later_divergence(divergence: torch.Tensor) -> torch.Tensor:
    """Return the divergence of the tokens after each one, (n, length).

    A token decides which tokens can follow, so that its advantage loses β times this where the loss
    has a term for the divergence of each token alone, as in GRPO.

    Args:
        divergence: k1 of each token, 0 outside of the mask, (n, length).
    """
    return divergence.flip(1).cumsum(1).flip(1) - divergence


def adapt_coefficient(beta: float, divergence: float, target: float, rows: int) -> float:
    """Return β for the next step: larger if the divergence was above the target, else smaller.

    Args:
        divergence: of the step, in nats a completion.
        rows: completions of the step; over 10,000 of them β can change by 20 %.

    Source: Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return beta * (1 + error * rows / 10_000)


# ---------------------------------------------------------------------------------------------
# Advantages


def token_rewards(
    rewards: torch.Tensor, divergence: torch.Tensor, mask: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return the reward of each token, (n, length): −β k1, and at the last one the reward too.

    Args:
        rewards: of whole completions, (n,).
        divergence: k1 of each token, (n, length).
    """
    found = -beta * divergence * mask
    rows = torch.arange(len(mask), device=mask.device)
    found[rows, last_tokens(mask)] += rewards
    return found


def last_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each row's last token, (n,)."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return (mask * places).argmax(1)


def generalised_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    decay: float = 0.95,
) -> torch.Tensor:
    """Return A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t, 0 outside of the mask.

    Args:
        rewards: of each token, (n, length).
        values: V before each token, (n, length). After the last token V is 0.
        mask: each row's tokens follow each other without a gap.
        gamma: γ, discount of a token.
        decay: λ.

    Source: Schulman et al. 2016, equation 16, https://arxiv.org/abs/1506.02438
    """
    found = torch.zeros_like(rewards)
    after, next_value = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = (delta + gamma * decay * after) * mask[:, t]
        found[:, t] = after
        next_value = values[:, t] * mask[:, t]
    return found


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale values, (n, length), to mean 0 and variance 1 over the mask, 0 outside."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean) ** 2 * mask).sum() / count
    return (values - mean) * (variance + SMALL).rsqrt() * mask


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return each reward less the mean of its group, as GRPO takes it.

    Args:
        rewards: (groups, size), or also what is still to be earned at each token: (groups, size,
            length).

    They are not divided by the group's standard deviation: that would weigh the reward against the
    divergence anew in every group (Liu et al. 2025).

    Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300; Liu et al. 2025,
        https://arxiv.org/abs/2503.20783
    """
    return rewards - rewards.mean(1, keepdim=True)


def leave_one_out_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return each reward less the mean of the others of its group, (groups, size), as RLOO does.

    Source: Ahmadian et al. 2024, equation 9, https://arxiv.org/abs/2402.14740
    """
    size = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * size / (size - 1)


# ---------------------------------------------------------------------------------------------
# Losses of completions that the policy has drawn


def clipped_losses(
    log_probabilities: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float
) -> torch.Tensor:
    """Return −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π / π_old, of each token or completion.

    Args:
        log_probabilities, old: log π and log π_old.
        advantages: A, of the same shape or broadcast to it.
        clip: ε.

    Source: Schulman et al. 2017, equation 7, https://arxiv.org/abs/1707.06347
    """
    ratio = (log_probabilities - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def ppo_loss(
    log_probabilities: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    count: float,
    clip: float = 0.2,
) -> torch.Tensor:
    """Return the mean clipped loss of tokens; see `clipped_losses`. All are (n, length)."""
    return (clipped_losses(log_probabilities, old, advantages, clip) * mask).sum() / count


def value_loss(
    values: torch.Tensor,
    old: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    count: float,
    clip: float = 0.2,
) -> torch.Tensor:
    """Return half the mean of max((V − R)², (clip(V, V_old ± ε) − R)²) over tokens.

    Args:
        values, old: V and V_old, (n, length).
        returns: R = A + V_old, (n, length).

    Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, by its code
    """
    near = old + (values - old).clamp(-clip, clip)
    errors = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * (errors * mask).sum() / count


def grpo_loss(
    log_probabilities: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    count: float,
    beta: float,
    clip: float = 0.2,
) -> torch.Tensor:
    """Return the mean over tokens of the clipped loss and of β ρ k3, ρ = π / π_old.

    The ratio before k3 makes its gradient that of the divergence, too, and not of the reverse one.

    Args:
        log_probabilities, old, reference: log π, log π_old and log π_ref, (n, length).
        advantages: of tokens, (n, length), or of whole completions, (n, 1).

    Source: Shao et al. 2024, equation 3, https://arxiv.org/abs/2402.03300; the ratio: DeepSeek-AI
        2025, section 3.1, https://arxiv.org/abs/2512.02556
    """
    losses = clipped_losses(log_probabilities, old, advantages, clip)
    divergence = (log_probabilities - old).exp() * k3(log_probabilities, reference)
    return ((losses + beta * divergence) * mask).sum() / count


def rloo_loss(
    log_probabilities: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    count: float,
    clip: float = 0.2,
) -> torch.Tensor:
    """Return the mean clipped loss of completions, each one action; β k1 is in their rewards.

    Args:
        log_probabilities, old: of tokens, (n, length).
        advantages: of whole completions, (n,).
        count: completions in the whole batch.

    Source: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740
    """
    whole, before = (log_probabilities * mask).sum(1), (old * mask).sum(1)
    return clipped_losses(whole, before, advantages, clip).sum() / count
