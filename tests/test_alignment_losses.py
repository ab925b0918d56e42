"""Losses of alignment: their papers' formulas, closed forms, and what must not change them."""

import math

import pytest
import torch

from genkit.models import alignment_losses as losses

N, LENGTH = 5, 7


@pytest.fixture
def logs() -> dict[str, torch.Tensor]:
    """Log-probabilities under three models, in float64, and a mask of completions."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return -torch.rand(N, LENGTH, generator=generator, dtype=torch.float64) - 0.1

    mask = torch.zeros(N, LENGTH, dtype=torch.float64)
    for row, (start, end) in enumerate([(0, 7), (2, 5), (1, 2), (3, 7), (0, 1)]):
        mask[row, start:end] = 1
    return {"new": draw() * mask, "old": draw() * mask, "reference": draw() * mask, "mask": mask}


def test_supervised_loss_is_cross_entropy_of_the_answers_alone():
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([[1, 2, 3, 4], [5, 0, 1, 2]])
    mask = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 0]])
    found = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    ignored = targets.masked_fill(mask == 0, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ignored.flatten())
    torch.testing.assert_close(losses.supervised_loss(found, mask, 3), expected)


def test_bradley_terry_is_the_cross_entropy_of_a_preference():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    likely = [1 / (1 + math.exp(b - a)) for a, b in ((1.0, 0.5), (-2.0, 1.0))]
    expected = -sum(map(math.log, likely)) / 2
    assert losses.bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-6)
    shifted = losses.bradley_terry_loss(chosen + 3, rejected + 3)
    assert shifted.item() == pytest.approx(expected, rel=1e-5)
    centred = losses.bradley_terry_loss(chosen, rejected, centring=0.1).item()
    assert centred == pytest.approx(expected + 0.1 * (1.5**2 + 1) / 2, rel=1e-6)
    moved = losses.bradley_terry_loss(chosen - 2.0, rejected)
    torch.testing.assert_close(losses.bradley_terry_loss(chosen, rejected, 2.0), moved)


def test_dpo_is_bradley_terry_of_implicit_rewards():
    chosen, rejected, old_chosen, old_rejected = torch.randn(4, 6, dtype=torch.float64)
    implicit = [0.3 * (chosen - old_chosen), 0.3 * (rejected - old_rejected)]
    found = losses.dpo_loss(chosen, rejected, old_chosen, old_rejected, 0.3)
    torch.testing.assert_close(found, losses.bradley_terry_loss(*implicit))
    start = losses.dpo_loss(chosen, rejected, chosen, rejected, 0.3)
    assert start.item() == pytest.approx(math.log(2))
    half = losses.dpo_loss(chosen, rejected, old_chosen, old_rejected, 0.3, 0.5)
    turned = losses.dpo_loss(rejected, chosen, old_rejected, old_chosen, 0.3, 0.5)
    torch.testing.assert_close(half, turned)


def test_k3_has_the_mean_of_k1_and_is_never_negative():
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    k1 = losses.log_ratio(policy.log(), reference.log())
    k3 = losses.k3(policy.log(), reference.log())
    assert (k3 >= 0).all() and (k1 < 0).any()
    torch.testing.assert_close((policy * k1).sum(), (policy * k3).sum())


def test_the_ratio_before_k3_makes_its_gradient_that_of_the_divergence():
    logits = torch.tensor([0.4, -0.1, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    logs = logits.log_softmax(0)
    exact = torch.autograd.grad((logs.exp() * (logs - reference)).sum(), logits)[0]
    logs = logits.log_softmax(0)
    probabilities = logs.detach().exp()  # every token once, as often as the policy draws it
    ones = torch.ones(3, 1, dtype=torch.float64)
    each = [
        losses.grpo_loss(
            logs[i : i + 1, None],
            logs[i : i + 1, None].detach(),
            reference[i : i + 1, None],
            torch.zeros(1, 1, dtype=torch.float64),
            ones[:1],
            1.0,
            beta=1.0,
        )
        for i in range(3)
    ]
    found = torch.autograd.grad((probabilities * torch.stack(each)).sum(), logits)[0]
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo"])
def test_the_gradient_is_that_of_reward_less_divergence(method):
    """On the mean over all texts of two tokens, each as often as the policy writes it."""
    beta = 0.3
    torch.manual_seed(0)
    first, second, *reference = (torch.randn(n, 3).double() for n in (1, 3, 1, 3))
    weights = [first.requires_grad_(), second.requires_grad_()]
    texts = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    rewards = torch.rand(9).double()

    def read(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        one = first.log_softmax(1)[0, texts[:, 0]]
        two = second.log_softmax(1)[texts[:, 0], texts[:, 1]]
        return torch.stack([one, two], 1)

    under_reference = read(*reference)
    logs = read(*weights)
    often = logs.sum(1).exp()
    objective = (often * (rewards - beta * (logs - under_reference).sum(1))).sum()
    exact = torch.autograd.grad(-objective, weights)

    logs = read(*weights)
    old, often = logs.detach(), often.detach()
    k1, mask = losses.log_ratio(old, under_reference), torch.ones(9, 2).double()
    later = rewards[:, None] - beta * losses.later_divergence(k1)
    earned, none = losses.token_rewards(rewards, k1, mask, beta), torch.zeros(9, 2).double()
    advantages = losses.generalised_advantages(earned, none, mask, decay=1.0)
    loss = {
        "grpo": lambda i: losses.grpo_loss(
            logs[i], old[i], under_reference[i], later[i], mask[i], 1.0, beta
        ),
        "rloo": lambda i: losses.rloo_loss(
            logs[i], old[i], (rewards - beta * k1.sum(1))[i], mask[i], 1.0
        ),
        "ppo": lambda i: losses.ppo_loss(logs[i], old[i], advantages[i], mask[i], 1.0),
    }[method]
    found = sum(often[i] * loss(slice(i, i + 1)) for i in range(9))
    torch.testing.assert_close(torch.autograd.grad(found, weights), exact)


def test_generalised_advantages_by_their_definition(logs):
    rewards, values = logs["new"], logs["old"]
    mask, gamma, decay = logs["mask"], 0.9, 0.8
    found = losses.generalised_advantages(rewards, values, mask, gamma, decay)
    for row in range(N):
        tokens = mask[row].nonzero().flatten().tolist()
        v = [*values[row, tokens].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(tokens)]
        for i, t in enumerate(tokens):
            expected = sum((gamma * decay) ** k * d for k, d in enumerate(delta[i:]))
            assert found[row, t].item() == pytest.approx(expected)
    assert (found[mask == 0] == 0).all()


def test_without_discount_an_advantage_is_what_is_still_earned_less_the_value(logs):
    rewards, values, mask = logs["new"], logs["old"], logs["mask"]
    found = losses.generalised_advantages(rewards, values, mask, 1.0, 1.0)
    earned = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found, (earned - values) * mask)


def test_token_rewards_add_up_to_reward_less_divergence(logs):
    divergence = losses.log_ratio(logs["new"], logs["reference"])
    rewards = torch.arange(N, dtype=torch.float64)
    found = losses.token_rewards(rewards, divergence, logs["mask"], 0.1)
    torch.testing.assert_close(found.sum(1), rewards - 0.1 * (divergence * logs["mask"]).sum(1))
    last = losses.last_tokens(logs["mask"])
    assert last.tolist() == [6, 4, 1, 6, 0]


def test_whitened_advantages_have_mean_0_and_variance_1(logs):
    found = losses.whiten(logs["new"], logs["mask"])
    inside = found[logs["mask"] > 0]
    assert inside.mean().item() == pytest.approx(0, abs=1e-12)
    assert inside.var(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_group_advantages_add_up_to_0_and_differ_by_a_factor():
    rewards = torch.tensor([[1.0, 2, 6], [0, 0, 0]])
    group, others = losses.group_advantages(rewards), losses.leave_one_out_advantages(rewards)
    assert group.sum(1).tolist() == [0, 0]
    torch.testing.assert_close(others, group * 3 / 2)
    assert others[0, 0] == 1 - (2 + 6) / 2


def test_a_clipped_loss_has_no_gradient_where_nothing_more_is_gained():
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    losses.clipped_losses(new, old, advantages, 0.2).sum().backward()
    assert (new.grad != 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo", "value", "supervised"])
def test_a_loss_is_the_sum_of_those_of_its_parts(logs, name):
    """With the count of the whole batch it does not matter how the batch is divided."""
    advantages = torch.linspace(-1, 1, N, dtype=torch.float64)

    def loss(rows: slice) -> torch.Tensor:
        new, old, reference, mask = (logs[k][rows] for k in ("new", "old", "reference", "mask"))
        count = logs["mask"].sum().item()
        return {
            "ppo": lambda: losses.ppo_loss(new, old, advantages[rows, None] * mask, mask, count),
            "grpo": lambda: losses.grpo_loss(
                new, old, reference, advantages[rows, None], mask, count, beta=0.1
            ),
            "rloo": lambda: losses.rloo_loss(new, old, advantages[rows], mask, float(N)),
            "value": lambda: losses.value_loss(new, old, reference, mask, count),
            "supervised": lambda: losses.supervised_loss(new, mask, count),
        }[name]()

    torch.testing.assert_close(loss(slice(0, 2)) + loss(slice(2, N)), loss(slice(0, N)))


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo"])
def test_what_is_outside_of_the_mask_changes_nothing(logs, name):
    noise = torch.randn(N, LENGTH, dtype=torch.float64) * (1 - logs["mask"])
    advantages = torch.linspace(-1, 1, N, dtype=torch.float64)
    mask, count = logs["mask"], logs["mask"].sum().item()
    found = [
        {
            "ppo": lambda new: losses.ppo_loss(
                new, logs["old"], advantages[:, None] * mask, mask, count
            ),
            "grpo": lambda new: losses.grpo_loss(
                new, logs["old"], logs["reference"], advantages[:, None], mask, count, beta=0.1
            ),
            "rloo": lambda new: losses.rloo_loss(new, logs["old"], advantages, mask, float(N)),
        }[name](new)
        for new in (logs["new"], logs["new"] + noise)
    ]
    torch.testing.assert_close(*found)


def test_the_coefficient_follows_the_divergence():
    assert losses.adapt_coefficient(0.1, 6.0, 6.0, 512) == 0.1
    assert losses.adapt_coefficient(0.1, 60.0, 6.0, 10_000) == pytest.approx(0.12)
    assert losses.adapt_coefficient(0.1, 0.0, 6.0, 10_000) == pytest.approx(0.08)
