import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.distributions import Bernoulli, Laplace, MultivariateNormal, Normal, kl_divergence

from genkit.models import autoencoder, autoencoder_losses
from genkit.models.autoencoder import Autoencoder
from genkit.models.translation_losses import PatchDiscriminator

SIZE = (1, 8, 8)
KINDS = list(
    itertools.product(
        ["dense", "conv"], [(1, 8, 8), (3, 8, 8), (1, 27, 30), (3, 9, 13)], [0, 4], [0, 3]
    )
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_images(count: int, size: tuple[int, int, int] = SIZE) -> torch.Tensor:
    return random(count, *size, seed=count).tanh()


def network(**options) -> Autoencoder:
    torch.manual_seed(1)
    options = {"image_size": SIZE, "latent_dim": 3, "widths": (16,)} | options
    return Autoencoder(**options).eval()


# ---- networks


@pytest.mark.parametrize(("kind", "size", "labels", "head"), KINDS)
@pytest.mark.parametrize("variational", [False, True])
def test_shapes_go_round_and_gradients_arrive(kind, size, labels, head, variational):
    widths = (6, 5) if kind == "conv" else (16, 8)
    options = {"network": kind, "image_size": size, "widths": widths, "labels": labels}
    model = network(**options, head=head, variational=variational)
    images, told = some_images(4, size), torch.arange(4) if labels else None
    noise = random(2, 4, 3)
    seen = model(images, noise if variational else None, told)
    samples = 2 if variational else 1
    assert seen["mean"].shape == seen["logvar"].shape == (4, 3)
    assert seen["latents"].shape == (samples, 4, 3)
    assert seen["prediction"].shape == (samples, 4, *size)
    assert ("logits" in seen) == bool(head) and (not head or seen["logits"].shape == (4, head))
    assert model.decode(seen["mean"], told).sample.shape == images.shape
    loss = seen["prediction"].square().mean() + seen["logvar"].sum()
    loss = loss + (seen["logits"].square().sum() if head else 0)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("kind", "size", "labels", "head"), KINDS)
def test_an_image_depends_on_itself_alone(kind, size, labels, head):
    model = network(network=kind, image_size=size, labels=labels, head=head, variational=True)
    images, noise = some_images(5, size), random(3, 5, 3)
    told = torch.tensor([0, 3, 1, 1, 2]) if labels else None
    together = model(images, noise, told)
    for i in range(5):
        only = None if told is None else told[i : i + 1]
        alone = model(images[i : i + 1], noise[:, i : i + 1], only)
        for name, value in together.items():
            place = (slice(None), slice(i, i + 1)) if value.ndim != 2 else slice(i, i + 1)
            torch.testing.assert_close(alone[name], value[place], rtol=1e-4, atol=1e-5)


def test_samples_are_mean_and_noise():
    model = network(variational=True)
    images, noise = some_images(4), random(5, 4, 3)
    seen = model(images, noise)
    expected = seen["mean"] + (seen["logvar"] / 2).exp() * noise
    torch.testing.assert_close(seen["latents"], expected)
    for i in range(5):
        torch.testing.assert_close(seen["prediction"][i], model.predict(expected[i]))
    assert torch.equal(model(images)["latents"], seen["mean"][None])


def test_conditional_autoencoder_depends_on_the_class():
    for kind in ("dense", "conv"):
        model = network(network=kind, labels=4, variational=True)
        images, latents = some_images(1), random(1, 3)
        said = [model.decode(latents, torch.tensor([i])).sample for i in range(4)]
        seen = [model.encode(images, torch.tensor([i])).latent_dist.mean for i in range(4)]
        for values in (said, seen):
            for a, b in itertools.combinations(values, 2):
                assert not torch.allclose(a, b)
        with pytest.raises(AssertionError, match="needs labels"):
            model(images)


def test_a_decoder_names_means_between_minus_one_and_one():
    latents = 50 * random(6, 3)
    bernoulli = network()
    logits = bernoulli.predict(latents)
    expected = 2 * Bernoulli(logits=logits).mean - 1
    torch.testing.assert_close(bernoulli.decode(latents).sample, expected)
    gaussian = network(likelihood="gaussian")
    means = gaussian.predict(latents)
    assert 0.1 < means.abs().max() <= 1
    assert torch.equal(gaussian.decode(latents).sample, means)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"network": "transformer 🦉"}, "network must be one of .*got 'transformer 🦉'"),
        ({"likelihood": "poisson"}, "likelihood must be one of .*got 'poisson'"),
    ],
)
def test_names_are_checked(options, what):
    with pytest.raises(ValueError, match=what):
        network(**options)


def test_a_stock_model_in_training_is_called_alike():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=8,
    )
    images, noise = some_images(3), random(2, 3, 2, 8, 8)
    seen = autoencoder.Spatial(vae)(images, noise)
    assert seen["mean"].shape == seen["logvar"].shape == (3, 2, 8, 8)
    assert seen["prediction"].shape == (2, 3, *SIZE)
    loss = autoencoder_losses.variational_loss(seen, images, "gaussian", 1.0)
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise[1]).sample
    torch.testing.assert_close(seen["prediction"][1], decoded, rtol=1e-4, atol=1e-5)
    fit = Normal(seen["prediction"], 1.0).log_prob(images).sum((2, 3, 4)).mean()
    torch.testing.assert_close(loss, posterior.kl().mean() - fit, rtol=1e-5, atol=1e-3)
    loss.backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())


# ---- losses and bounds


def test_the_divergence_is_that_of_torch():
    mean, logvar = random(7, 3, seed=1), random(7, 3, seed=2)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(autoencoder_losses.gaussian_kl(mean, logvar), expected)
    zero = torch.zeros(2, 3)
    assert (autoencoder_losses.gaussian_kl(zero, zero) == 0).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_likelihoods_are_those_of_torch(scale):
    images, prediction = some_images(4), 3 * random(5, 4, *SIZE)
    for likelihood, kind in (("gaussian", Normal), ("laplace", Laplace)):
        found = autoencoder_losses.log_likelihood(prediction, images, likelihood, scale)
        expected = kind(prediction.double(), scale).log_prob(images.double()).sum((2, 3, 4))
        assert found.shape == (5, 4)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    for grey in (images, images.sign()):
        found = autoencoder_losses.log_likelihood(prediction, grey, "bernoulli", scale)
        pixels = Bernoulli(logits=prediction.double(), validate_args=False)  # greys are chances
        expected = pixels.log_prob((grey.double() + 1) / 2).sum((2, 3, 4))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("likelihood", autoencoder.LIKELIHOODS)
@pytest.mark.parametrize("variational", [False, True])
def test_reconstruction_is_measured_per_pixel(likelihood, variational):
    model = network(likelihood=likelihood, variational=variational)
    images = some_images(4)
    seen = model(images)
    found = autoencoder_losses.reconstruction_loss(seen, images, likelihood)
    prediction = seen["prediction"][0]
    if likelihood == "gaussian":
        expected = ((prediction - images) ** 2).mean()
    elif likelihood == "laplace":
        expected = (prediction - images).abs().mean()
    else:
        p, x = prediction.sigmoid(), (images + 1) / 2
        expected = -(x * p.log() + (1 - x) * (1 - p).log()).mean()
    torch.testing.assert_close(found, expected)


def parts(seen: dict, images: torch.Tensor, likelihood: str, scale: float) -> tuple:
    """Mean likelihood and the divergence of each dimension, by torch's distributions."""
    logits = seen["prediction"]
    if likelihood == "bernoulli":
        each = Bernoulli(logits=logits, validate_args=False).log_prob((images + 1) / 2)
    else:
        each = {"gaussian": Normal, "laplace": Laplace}[likelihood](logits, scale).log_prob(images)
    kl = kl_divergence(Normal(seen["mean"], (seen["logvar"] / 2).exp()), Normal(0.0, 1.0))
    return each.sum((2, 3, 4)).mean(), kl.mean(0)


@pytest.mark.parametrize("likelihood", autoencoder.LIKELIHOODS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("free_bits", [0.0, 0.15, 100.0])
def test_the_loss_weighs_the_divergence(likelihood, beta, free_bits):
    model, images = network(likelihood=likelihood, variational=True), some_images(6)
    with torch.no_grad():
        model.squeeze[-1].weight.mul_(3)
    seen = model(images, random(2, 6, 3))
    fit, kl = parts(seen, images, likelihood, 0.7)
    assert kl.min() > 0 and (not free_bits or kl.min() < free_bits)
    found = autoencoder_losses.variational_loss(seen, images, likelihood, 0.7, beta, free_bits)
    expected = beta * torch.stack([max(k, torch.tensor(free_bits)) for k in kl]).sum() - fit
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_free_bits_cost_nothing_and_pull_at_nothing():
    mean, logvar = (0.1 * random(8, 2, seed=i) for i in range(2))
    mean, logvar = mean.requires_grad_(), logvar.requires_grad_()
    mean.data[:, 1] += 3  # the second dimension says more than is free
    seen = {"mean": mean, "logvar": logvar, "prediction": torch.zeros(1, 8, *SIZE)}
    autoencoder_losses.variational_loss(
        seen, torch.zeros(8, *SIZE), "gaussian", 1.0, 1.0, 0.5
    ).backward()
    for gradient in (mean.grad, logvar.grad):
        assert (gradient[:, 0] == 0).all() and (gradient[:, 1] != 0).all()


def test_the_players_of_the_game_learn_from_their_own_losses():
    torch.manual_seed(0)
    discriminator, decoded = PatchDiscriminator(1, 8), some_images(3).requires_grad_()
    scores = discriminator(decoded)
    fooled = autoencoder_losses.adversarial_loss(discriminator, decoded)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        scores, torch.ones(scores.shape)
    )
    torch.testing.assert_close(fooled, expected)
    fooled.backward()
    assert decoded.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    model, images = network(likelihood="laplace"), some_images(4)
    loss = autoencoder_losses.discriminator_loss(discriminator, model, images, None)
    made = discriminator(model(images)["prediction"][0])
    chances = torch.stack([discriminator(images), -made]).sigmoid()
    torch.testing.assert_close(loss, -chances.log().mean())
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())


@pytest.mark.parametrize("likelihood", autoencoder.LIKELIHOODS)
def test_a_bound_of_one_sample_is_the_evidence_lower_bound(likelihood):
    model, images = network(likelihood=likelihood, variational=True, latent_dim=2), some_images(3)
    noise = random(20_000, 3, 2)
    with torch.no_grad():
        seen = model(images, noise)
        one = {"mean": seen["mean"], "logvar": seen["logvar"]}
        singles = torch.stack(
            [
                autoencoder_losses.importance_weighted_bound(
                    one | {k: seen[k][i : i + 1] for k in ("latents", "prediction")},
                    noise[i : i + 1],
                    images,
                    likelihood,
                    1.0,
                )
                for i in range(2000)
            ]
        )
        fit = autoencoder_losses.log_likelihood(seen["prediction"], images, likelihood).mean(0)
        expected = fit - autoencoder_losses.gaussian_kl(seen["mean"], seen["logvar"]).sum(1)
    error = singles.std(0) / math.sqrt(len(singles))
    assert ((singles.mean(0) - expected).abs() < 4 * error).all() and error.max() < 0.1


def linear_gaussian(scale: float, exact: bool) -> tuple[Autoencoder, torch.Tensor, torch.Tensor]:
    """A decoder N(W z + b, scale²), the exact posterior or another as encoder; W and b."""
    # logits are linear, and serve as the means here
    model = network(widths=(), likelihood="bernoulli", variational=True, latent_dim=2)
    squeeze, stretch = model.squeeze[-1], model.stretch[-1]
    with torch.no_grad():
        stretch.weight.copy_(0.3 * random(64, 2, seed=5))
        stretch.bias.copy_(0.1 * random(64, seed=6))
        weight = torch.linalg.qr(stretch.weight)[0] * torch.tensor([1.5, 0.8])  # W'W is diagonal
        stretch.weight.copy_(weight)
        # Bishop 2006, equation 12.42: posterior N(M⁻¹ W'(x - b), s² M⁻¹), M = W'W + s² I
        spread = (weight.T @ weight).diagonal() + scale**2
        towards = weight.T / spread[:, None]
        wrong = 0.0 if exact else 0.4
        squeeze.weight.copy_(torch.cat([towards, torch.zeros(2, 64)]))
        logvar = (scale**2 / spread).log()
        squeeze.bias.copy_(torch.cat([wrong - towards @ stretch.bias, logvar + wrong]))
    return model, stretch.weight.detach(), stretch.bias.detach()


def log_evidence(images, weight, bias, scale) -> torch.Tensor:
    covariance = weight @ weight.T + scale**2 * torch.eye(64)
    exact = MultivariateNormal(bias.double(), covariance.double())
    return exact.log_prob(images.flatten(1).double())


@pytest.mark.parametrize("samples", [1, 2, 50])
def test_with_the_exact_posterior_the_bound_is_the_likelihood(samples):
    model, weight, bias = linear_gaussian(0.5, exact=True)
    images = some_images(6)
    noise = random(samples, 6, 2)
    with torch.no_grad():
        seen = model(images, noise)
        found = autoencoder_losses.importance_weighted_bound(seen, noise, images, "gaussian", 0.5)
    expected = log_evidence(images, weight, bias, 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_with_another_posterior_the_bound_grows_towards_the_likelihood():
    model, weight, bias = linear_gaussian(0.5, exact=False)
    images = some_images(6)
    expected = log_evidence(images, weight, bias, 0.5)

    def bound(samples: int, times: int) -> torch.Tensor:
        found = []
        for seed in range(times):
            noise = random(samples, 6, 2, seed=seed)
            seen = model(images, noise)
            found.append(
                autoencoder_losses.importance_weighted_bound(seen, noise, images, "gaussian", 0.5)
            )
        return torch.stack(found).double().mean(0)

    with torch.no_grad():
        means = [bound(samples, 400) for samples in (1, 2, 8, 32)]
        for less, more in itertools.pairwise(means):
            assert (less < more).all() and (more < expected + 0.02).all()
        assert (expected - means[0]).min() > 0.1
        torch.testing.assert_close(bound(100_000, 1), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("at_once", [1000 * 6 * 64, 10**9])
def test_the_likelihood_is_estimated_whatever_fits_into_memory(monkeypatch, at_once):
    model, weight, bias = linear_gaussian(0.5, exact=False)
    images = some_images(6)
    monkeypatch.setattr(autoencoder_losses, "AT_ONCE", at_once)

    def figure(samples: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return autoencoder_losses.negative_log_likelihood(
            model, images, samples, "gaussian", 0.5, generator
        )

    noise = torch.randn(20, 6, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        seen = model(images, noise)
        expected = -autoencoder_losses.importance_weighted_bound(
            seen, noise, images, "gaussian", 0.5
        )
    torch.testing.assert_close(figure(20), expected, rtol=0, atol=1e-3)
    exact = -log_evidence(images, weight, bias, 0.5)
    torch.testing.assert_close(figure(20_000).double(), exact, rtol=0, atol=0.05)


# ---- noise


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 1.0])
def test_masks_and_salt_change_a_share_of_the_pixels_and_no_other(amount):
    images = 0.9 * some_images(200, (3, 16, 16))
    masked = autoencoder_losses.corrupt(images, "mask", amount, torch.Generator().manual_seed(1))
    salted = autoencoder_losses.corrupt(images, "salt", amount, torch.Generator().manual_seed(2))
    for spoilt, values in ((masked, {-1.0}), (salted, {-1.0, 1.0})):
        changed = (spoilt != images).any(1)
        assert changed.float().mean().item() == pytest.approx(amount, abs=0.01)
        apart = changed[:, None].expand_as(images)
        assert set(spoilt[apart].unique().tolist()) <= values
        assert torch.equal(spoilt[~apart], images[~apart])
    if amount:
        assert (masked == -1).float().mean().item() == pytest.approx(amount, abs=0.01)
        assert (salted == 1).float().mean().item() == pytest.approx(amount / 2, abs=0.01)
        assert (salted == -1).float().mean().item() == pytest.approx(amount / 2, abs=0.01)
        assert torch.equal(salted[:, 0] == 1, salted[:, 2] == 1)  # all channels of a pixel


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.3])
def test_gaussian_noise_has_its_deviation_and_stays_in_range(amount):
    generator = torch.Generator().manual_seed(0)
    middle = torch.zeros(100, 1, 16, 16)
    noise = autoencoder_losses.corrupt(middle, "gaussian", amount, generator)
    assert noise.std().item() == pytest.approx(amount, rel=0.03)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    edge = autoencoder_losses.corrupt(torch.ones(100, 1, 16, 16), "gaussian", amount, generator)
    assert edge.max() == 1
    expected = 1 - amount * math.sqrt(1 / (2 * math.pi))  # half of the noise is cut off
    assert edge.mean().item() == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("noise", autoencoder_losses.NOISES)
def test_noise_is_a_matter_of_the_generator_alone(noise):
    images, before = some_images(4), torch.get_rng_state()
    first, second, other = (
        autoencoder_losses.corrupt(images, noise, 0.5, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(images, some_images(4))


# ---- where latents lie


def test_a_fitted_prior_draws_like_the_latents():
    model = network()
    mixed = random(4000, 3) @ torch.tensor([[2.0, 0.5, 0], [0, 1, -0.7], [0, 0, 0.1]]) + 3
    model.fit_prior(mixed)
    pipeline = autoencoder.AutoencoderPipeline(model)
    noise_to_latent = pipeline.noise_to_latent(random(200_000, 3, seed=9))
    torch.testing.assert_close(noise_to_latent.mean(0), mixed.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(noise_to_latent.T.cov(), mixed.T.cov(), rtol=0, atol=0.04)


def test_a_prior_fits_latents_that_all_agree_and_a_single_dimension():
    model = network()
    model.fit_prior(torch.ones(10, 3))
    pipeline = autoencoder.AutoencoderPipeline(model)
    torch.testing.assert_close(
        pipeline.noise_to_latent(random(5, 3)), torch.ones(5, 3), rtol=0, atol=0.01
    )
    single = network(latent_dim=1)
    single.fit_prior(5 + 2 * random(1000, 1))
    assert single.prior_scale.shape == (1, 1)
    assert single.prior_scale.item() == pytest.approx(2, rel=0.1)


def test_without_a_fit_the_prior_is_standard():
    pipeline = autoencoder.AutoencoderPipeline(network(variational=True))
    noise = random(4, 3)
    assert torch.equal(pipeline.noise_to_latent(noise), noise)
    assert np.prod(pipeline.latent_shape) == 3
