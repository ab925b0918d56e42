"""Losses and regularizers against definitions, closed forms and plain loops."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from genkit.models import gan_losses
from genkit.models.gan_losses import AUGMENT_UNIFORMS, LOSSES, UNIFORMS, Batch, Game

floats = st.floats(-8, 8, width=32)


def scores(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return 2 * drawn[0] + 0.5, 2 * drawn[1]


# ---- losses


@pytest.mark.parametrize("loss", gan_losses.CROSS_ENTROPY)
def test_a_classifiers_loss_is_cross_entropy(loss):
    real, fake = scores()
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    wanted = F.binary_cross_entropy_with_logits(real, ones)
    wanted = wanted + F.binary_cross_entropy_with_logits(fake, zeros)
    torch.testing.assert_close(gan_losses.discriminator_loss(loss, real, fake), wanted)
    # beyond 0 and 1 too: -(t log p + (1 - t) log(1 - p))
    aims = torch.linspace(0.9, 1.1, 64), torch.linspace(-0.1, 0.1, 64)
    wanted = sum(
        -(aim * F.logsigmoid(score) + (1 - aim) * F.logsigmoid(-score)).mean()
        for aim, score in zip(aims, (real, fake), strict=True)
    )
    torch.testing.assert_close(gan_losses.discriminator_loss(loss, real, fake, *aims), wanted)


def test_generators_lose_what_the_papers_say():
    real, fake = scores()
    probability = fake.sigmoid()
    wanted = {
        "minimax": (1 - probability).log().mean(),
        "non_saturating": -probability.log().mean(),
        "maximum_likelihood": -(probability / (1 - probability)).mean(),
        "least_squares": ((fake - 1) ** 2).mean() / 2,
        "hinge": -fake.mean(),
        "wasserstein": -fake.mean(),
        "relativistic": -(fake - real).sigmoid().log().mean(),
    }
    assert set(wanted) == set(LOSSES)
    for loss, value in wanted.items():
        torch.testing.assert_close(gan_losses.generator_loss(loss, real, fake), value)


def test_other_discriminators_lose_what_the_papers_say():
    real, fake = scores()
    wanted = {
        "least_squares": ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2,
        "hinge": (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean(),
        "wasserstein": fake.mean() - real.mean(),
        "relativistic": -(real - fake).sigmoid().log().mean(),
    }
    for loss, value in wanted.items():
        torch.testing.assert_close(gan_losses.discriminator_loss(loss, real, fake), value)


def test_minimax_is_a_game_of_zero_sum():
    real, fake = scores()
    nothing = gan_losses.discriminator_loss("minimax", real, torch.full_like(fake, -1e4))
    both = gan_losses.discriminator_loss("minimax", real, fake)
    won = gan_losses.generator_loss("minimax", real, fake)
    torch.testing.assert_close(both - nothing, -won)


def test_the_likelihood_loss_follows_the_gradient_of_the_log_likelihood():
    """With the best discriminator, exp(score) is p / q, whose mean gradient is that of the
    likelihood: of a generator that puts mass s on the first of two values."""
    data = torch.tensor([0.7, 0.3], dtype=torch.float64)
    share = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    made = torch.stack([share, 1 - share])
    (likelihood,) = torch.autograd.grad((data * made.log()).sum(), share)
    best = (data / made.detach()).log()
    losses = torch.stack(
        [gan_losses.generator_loss("maximum_likelihood", s[None], s[None]) for s in best]
    )
    (loss,) = torch.autograd.grad((made * losses).sum(), share)  # by the score-function estimator
    torch.testing.assert_close(loss, -likelihood)


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=8))
def test_losses_are_finite_at_any_score_and_ask_for_the_right_direction(pairs):
    real, fake = (torch.tensor(each, requires_grad=True) for each in zip(*pairs, strict=True))
    for loss in LOSSES:
        lost = gan_losses.discriminator_loss(loss, real, fake)
        up, down = torch.autograd.grad(lost, (real, fake), allow_unused=True)
        assert lost.isfinite()
        if loss != "least_squares":  # which pulls back what is beyond its target
            assert (up <= 0).all() and (down >= 0).all()
        won = gan_losses.generator_loss(loss, real, fake)
        (pull,) = torch.autograd.grad(won, fake)
        assert won.isfinite()
        if loss != "least_squares":
            assert (pull <= 0).all()


def test_targets_are_smoothed_and_raised_by_noise():
    u = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    real, fake = gan_losses.targets(u, smoothing=0.1, noise=0.05)
    torch.testing.assert_close(real, 0.9 + 0.05 * u[:, 0])
    torch.testing.assert_close(fake, 0.05 * u[:, 1])
    assert real.min() < 0.901 and real.max() > 0.949
    real, fake = gan_losses.targets(u)
    assert (real == 1).all() and (fake == 0).all()


# ---- regularizers


def curved(images):
    """Score images by something whose gradient is known: sum of x⁴ / 4 has x³."""
    return images.pow(4).flatten(1).sum(1) / 4


def test_the_squared_gradient_is_each_images_own():
    images = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    squares = gan_losses.squared_gradient(curved(images), images)
    torch.testing.assert_close(squares, images.detach().pow(6).flatten(1).sum(1))
    alone = [
        gan_losses.squared_gradient(curved(one), one)
        for one in (images[i : i + 1].detach().requires_grad_() for i in range(5))
    ]
    torch.testing.assert_close(squares, torch.cat(alone))


def test_penalties_of_a_linear_critic_have_closed_forms():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)  # of norm 5
    images = torch.randn(7, 2, requires_grad=True)
    squares = gan_losses.squared_gradient(images @ weight, images)
    torch.testing.assert_close(squares, torch.full((7,), 25.0))
    penalty = gan_losses.gradient_penalty(squares)
    torch.testing.assert_close(penalty, torch.tensor(16.0))
    (slope,) = torch.autograd.grad(penalty, weight)  # 2 (norm - 1) w / norm
    torch.testing.assert_close(slope, 8 * weight.detach() / 5)


def test_the_gradient_of_a_penalty_is_that_of_differences():
    torch.manual_seed(0)
    critic = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(12, 1)
    ).double()
    images = torch.randn(4, 1, 4, 4, dtype=torch.float64)

    def penalty(*parameters):
        names = [name for name, _ in critic.named_parameters()]
        seen = images.clone().requires_grad_()
        parts = dict(zip(names, parameters, strict=True))
        out = torch.func.functional_call(critic, parts, seen).squeeze(1)
        (gradient,) = torch.autograd.grad(out.sum(), seen, create_graph=True)
        return gradient.square().flatten(1).sum(1).mean()

    assert torch.autograd.gradcheck(penalty, tuple(critic.parameters()))
    seen = images.clone().requires_grad_()
    ours = gan_losses.squared_gradient(critic(seen).squeeze(1), seen).mean()
    torch.testing.assert_close(ours, penalty(*critic.parameters()))


def test_a_critic_without_slope_has_a_finite_penalty():
    images = torch.zeros(3, 2, requires_grad=True)
    penalty = gan_losses.gradient_penalty(gan_losses.squared_gradient(curved(images), images))
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-5) and images.grad.isfinite().all()


def test_a_mixture_lies_between_the_two():
    real, fake = torch.randn(2, 6, 1, 4, 4)
    u = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75, 0.9])
    between = gan_losses.interpolate_images(real, fake, u)
    torch.testing.assert_close(between[0], fake[0])
    torch.testing.assert_close(between[1], real[1])
    torch.testing.assert_close(between[2], 0.25 * real[2] + 0.75 * fake[2])


def test_clipped_weights_stay_inside():
    module = torch.nn.Linear(50, 50)
    before = module.weight.detach().clone()
    gan_losses.clip_weights(module, 0.01)
    assert module.weight.abs().max() <= 0.01 and module.bias.abs().max() <= 0.01
    torch.testing.assert_close(module.weight.detach(), before.clamp(-0.01, 0.01))


def test_a_pack_holds_neighbours_side_by_side():
    images = torch.arange(6 * 2 * 2 * 2).float().view(6, 2, 2, 2)
    packed = gan_losses.pack(images, 3)
    assert packed.shape == (2, 6, 2, 2)
    for i in range(6):
        assert (packed[i // 3, 2 * (i % 3) : 2 * (i % 3) + 2] == images[i]).all()


# ---- augmentation


def pictures(count=16, channels=3, side=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, channels, side, side, generator=generator) * 2 - 1
    return images, torch.rand(count, AUGMENT_UNIFORMS, generator=generator)


def test_nothing_asked_for_changes_nothing():
    images, u = pictures()
    assert gan_losses.augment(images, u, ()) is images


@pytest.mark.parametrize("policy", gan_losses.POLICIES)
def test_augmentations_treat_each_row_by_its_own_chances(policy):
    images, u = pictures()
    whole = gan_losses.augment(images, u, (policy,))
    assert not torch.equal(whole, images)
    for i in range(len(images)):
        alone = gan_losses.augment(images[i : i + 1], u[i : i + 1], (policy,))
        torch.testing.assert_close(alone[0], whole[i])


def test_translation_shifts_by_an_eighth_of_the_side_at_most():
    images, u = pictures(200, side=16)
    moved = gan_losses.augment(images, u, ("translation",))
    padded, found = F.pad(images, (2, 2, 2, 2)), set()
    for before, after in zip(padded, moved, strict=True):
        matches = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(before[:, 2 - down : 18 - down, 2 - right : 18 - right], after)
        ]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) == 25  # every shift occurs


def test_what_is_cut_out_is_a_square_of_half_the_side():
    images, u = pictures(200, side=16)
    holes = (gan_losses.augment(images, u, ("cutout",)) == 0).all(1)
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), rows * columns)  # a rectangle
    assert rows.max() == columns.max() == 8 and rows.min() >= 4 and columns.min() >= 4


def test_colours_change_as_the_paper_says():
    images, u = pictures()
    changed = gan_losses.augment(images, u, ("colour",))
    for i in range(len(images)):
        brightness, saturation, contrast = u[i, :3].tolist()
        wanted = images[i] + brightness - 0.5
        wanted = (wanted - wanted.mean(0)) * 2 * saturation + wanted.mean(0)
        wanted = (wanted - wanted.mean()) * (contrast + 0.5) + wanted.mean()
        torch.testing.assert_close(changed[i], wanted)


def test_gradients_pass_through_augmentations():
    images, u = pictures(4, side=4)
    images = images.double().requires_grad_()

    def changed(some):
        return gan_losses.augment(some, u.double(), gan_losses.POLICIES)

    assert torch.autograd.gradcheck(changed, images)


# ---- the game


def scored(images, labels=None):
    return images.flatten(1).mean(1), None


def told(labels):
    """A discriminator that tells classes with no doubt."""
    return lambda images, _: (images.flatten(1).mean(1), 20 * F.one_hot(labels, 3).float())


def batch_of(count=6, labels=None):
    generator = torch.Generator().manual_seed(3)
    return Batch(
        torch.randn(count, 1, 4, 4, generator=generator),
        torch.randn(count, 16, generator=generator),
        torch.rand(count, UNIFORMS, generator=generator),
        labels,
    )


def made(noise, labels=None):
    return noise.view(-1, 1, 4, 4).tanh()


def test_a_game_adds_up_its_parts():
    batch = batch_of()
    real, fake = scored(batch.real)[0], scored(made(batch.noise))[0]
    plain = Game("relativistic")
    assert plain.discriminator_loss(scored, made, batch) == pytest.approx(
        F.softplus(fake - real).mean().item()
    )
    slope = 16 * (1 / 16) ** 2  # of the mean of 16 pixels, squared
    for name, extra in {"r1": 0.5 * 3 * slope, "r2": 0.5 * 3 * slope}.items():
        game = replace(plain, **{name: 3.0})
        difference = game.discriminator_loss(scored, made, batch)
        difference -= plain.discriminator_loss(scored, made, batch)
        assert difference.item() == pytest.approx(extra, rel=1e-4)
        assert game.discriminator_loss(scored, made, batch, 0.0) == pytest.approx(
            plain.discriminator_loss(scored, made, batch).item()
        )
        twice = game.discriminator_loss(scored, made, batch, 2.0)
        twice -= plain.discriminator_loss(scored, made, batch)
        assert twice.item() == pytest.approx(2 * extra, rel=1e-4)
    plain = Game("wasserstein")
    game = replace(plain, gradient_penalty=10.0)
    difference = game.discriminator_loss(scored, made, batch)
    difference -= plain.discriminator_loss(scored, made, batch)
    assert difference.item() == pytest.approx(10 * (math.sqrt(slope) - 1) ** 2, rel=1e-4)


def test_an_auxiliary_classifier_costs_its_cross_entropy():
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    right, wrong = told(labels), told((labels + 1) % 3)
    batch = batch_of(labels=labels)
    game = Game("hinge")
    for play in (game.discriminator_loss, game.generator_loss):
        both = 2 if play == game.discriminator_loss else 1
        difference = play(wrong, made, batch) - play(right, made, batch)
        assert difference.item() == pytest.approx(both * 20, rel=1e-4)


def test_the_discriminator_gives_the_generator_no_gradient():
    weight = torch.ones((), requires_grad=True)
    batch = batch_of()
    game = Game(r1=1.0, r2=1.0)
    factor = torch.ones((), requires_grad=True)
    loss = game.discriminator_loss(
        lambda x, _: (factor * scored(x)[0], None), lambda z, _: weight * made(z), batch
    )
    loss.backward()
    assert factor.grad is not None and weight.grad is None


def test_instance_noise_and_packs_reach_the_discriminator():
    batch, seen = batch_of(), []

    def watch(images, labels=None):
        seen.append(images.detach().clone())
        return scored(images)

    batch.instance_noise = torch.randn(2, 6, 1, 4, 4)
    Game("hinge", packing=2).discriminator_loss(watch, made, batch)
    noisy = (batch.real + batch.instance_noise[0], made(batch.noise) + batch.instance_noise[1])
    for got, images in zip(seen, noisy, strict=True):
        torch.testing.assert_close(got, gan_losses.pack(images, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "cosine"}, ["loss", "relativistic", "'cosine'"]),
        ({"loss": "hinge", "weight_clip": 0.01}, ["weight_clip", "wasserstein", "hinge"]),
        ({"loss": "minimax", "gradient_penalty": 10.0}, ["gradient_penalty", "minimax"]),
        (
            {"loss": "wasserstein", "gradient_penalty": 10.0, "weight_clip": 0.01},
            ["weight_clip", "gradient_penalty"],
        ),
        ({"loss": "wasserstein", "r1": 1.0, "weight_clip": 0.01}, ["weight_clip", "r1"]),
        ({"loss": "hinge", "label_noise": 0.1}, ["label_noise", "hinge", "least_squares"]),
        ({"smoothing": 0.1}, ["smoothing", "relativistic"]),
        ({"r1": -1.0}, ["r1", "-1.0"]),
        ({"instance_noise": float("nan")}, ["instance_noise", "nan"]),
        ({"packing": 0}, ["packing", "0"]),
        ({"augmentations": ("mirror",)}, ["augmentations", "'mirror'", "cutout"]),
    ],
)
def test_games_that_cannot_be_played_are_refused_by_name(settings, words):
    with pytest.raises(ValueError) as caught:
        Game(**settings)
    for word in words:
        assert word in str(caught.value)
