"""Losses of alignment and their gradients against TRL's own code on the same tensors.

    pip install --target peer --no-deps trl==1.16.0
    PYTHONPATH=peer python benchmarks/alignment_parity.py

TRL's loss functions are methods of its trainers. Each is called on a trainer of which only what the
method reads is there, with a model that returns the log-probabilities given. TRL has no PPO.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, RLOOTrainer

from genkit.models import alignment_losses as losses

Both = tuple[torch.Tensor, torch.Tensor]  # the loss by genkit and by TRL
N, LENGTH, GROUP, BETA, CLIP = 12, 9, 4, 0.1, 0.2


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    new, reference = (-3 * torch.rand(N, LENGTH, generator=generator) for _ in range(2))
    old = new + 0.3 * torch.randn(N, LENGTH, generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (N,), generator=generator)
    mask = (torch.arange(LENGTH) < lengths[:, None]).float()
    new, old, reference = (each * mask for each in (new, old, reference))
    rewards = torch.randn(N, generator=generator)
    for each in (new, rewards):
        each.requires_grad_()
    found = {
        "GRPO": (new, grpo(new, old, reference, mask, rewards.detach())),
        "RLOO": (new, rloo(new, old, reference, mask, rewards.detach())),
        "DPO": (new, dpo(new, reference, mask, "sigmoid")),
        "DPO, a token": (new, dpo(new, reference, mask, "sigmoid_norm")),
        "reward model": (rewards, reward_model(rewards)),
    }
    print(f"{'':14} {'genkit':>12} {'TRL':>12} {'difference':>12} {'of gradients':>12}")
    for name, (inputs, (ours, theirs)) in found.items():
        difference = abs(ours.item() - theirs.item())
        a, b = (torch.autograd.grad(loss, inputs)[0] for loss in (ours, theirs))
        apart = (a - b).abs().max().item()
        print(f"{name:14} {ours:12.8f} {theirs:12.8f} {difference:12.1e} {apart:12.1e}")
        assert max(difference, apart) < 1e-6 and a.abs().max() > 1e-3, name


def trainer(**attributes: Any) -> Any:
    """Return what stands for a trainer of one process in training."""
    same = SimpleNamespace(
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        device=torch.device("cpu"),
        num_processes=1,
        sync_gradients=True,
    )
    return SimpleNamespace(
        accelerator=same,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=1),
        beta=BETA,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def drawn(new: torch.Tensor, mask: torch.Tensor, **more: torch.Tensor) -> dict[str, Any]:
    ids = torch.zeros_like(mask, dtype=torch.int64)
    prompt = {"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1]}
    return prompt | {"completion_ids": ids, "completion_mask": mask} | more


def grpo(
    new: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor,
    rewards: torch.Tensor,
) -> Both:
    advantages = losses.group_advantages(rewards.view(-1, GROUP)).flatten()
    count = mask.sum().item()
    ours = losses.grpo_loss(new, old, reference, advantages[:, None], mask, count, BETA, CLIP)
    peer = trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type="dapo",
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )
    inputs = drawn(
        new,
        mask,
        advantages=advantages,
        old_per_token_logps=old,
        ref_per_token_logps=reference,
        num_items_in_batch=mask.sum(),
    )
    return ours, GRPOTrainer._compute_loss(peer, None, inputs)


def rloo(
    new: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor,
    rewards: torch.Tensor,
) -> Both:
    penalised = rewards - BETA * (losses.log_ratio(old, reference) * mask).sum(1)
    advantages = losses.leave_one_out_advantages(penalised.view(-1, GROUP)).flatten()
    ours = losses.rloo_loss(new, old, advantages, mask, N, CLIP)
    others = (penalised.view(-1, GROUP).sum(1, keepdim=True) - penalised.view(-1, GROUP)) / (
        GROUP - 1
    )  # TRL computes them in the middle of a method that also draws
    inputs = drawn(
        new, mask, advantages=penalised - others.flatten(), old_logps=(old * mask).sum(1)
    )
    peer = trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None)
    )
    return ours, RLOOTrainer._compute_loss(peer, None, inputs)


def dpo(new: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, kind: str) -> Both:
    def model(log_probs: torch.Tensor) -> Any:
        zeros = torch.zeros_like(log_probs)
        extra = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return lambda **_: SimpleNamespace(log_probs=log_probs, **extra)

    lengths = mask.sum(1) if kind == "sigmoid_norm" else torch.ones(N)
    (chosen, rejected), (old_chosen, old_rejected) = (
        ((each.sum(1)) / lengths).chunk(2) for each in (new, reference)
    )
    ours = losses.dpo_loss(chosen, rejected, old_chosen, old_rejected, BETA)
    whole = torch.cat([torch.zeros(N, 1), mask], 1)
    inputs = {
        "input_ids": torch.zeros_like(whole, dtype=torch.int64),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
    }
    peer = trainer(
        ld_alpha=None,
        precompute_ref_logps=False,
        ref_model=model(reference),
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
        label_smoothing=0.0,
    )
    peer.args.gradient_checkpointing_kwargs = None
    peer.model = torch.nn.Identity()
    peer.model.is_gradient_checkpointing = False
    return ours, DPOTrainer._compute_loss(peer, model(new), inputs, False)


def reward_model(rewards: torch.Tensor) -> Both:
    margins = torch.linspace(0, 1, N // 2)
    chosen, rejected = rewards.chunk(2)
    ours = losses.bradley_terry_loss(chosen, rejected, margins, 0.05)
    peer = trainer()
    peer.args.center_rewards_coefficient = 0.05
    inputs = {"attention_mask": torch.ones(N, 2), "margin": margins}
    theirs = RewardTrainer.compute_loss(
        peer, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs, False
    )
    return ours, theirs


if __name__ == "__main__":
    main()
