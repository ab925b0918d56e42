"""Losses of autoencoders: likelihoods, variational bounds, and corruption for denoising."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

NOISES = ("gaussian", "mask", "salt")
LOG_2PI = math.log(2 * math.pi)
AT_ONCE = 1 << 22  # pixels decoded at once


# ---------------------------------------------------------------------------------------------
# Losses and bounds, in nats per image, (n,) or (samples, n)


def log_likelihood(
    prediction: torch.Tensor, images: torch.Tensor, likelihood: str, scale: float = 1.0
) -> torch.Tensor:
    """Return the log-likelihood of images under the decoder's prediction of their pixels.

    Args:
        prediction: logits or means, (samples, n, channels, height, width).
        images: in [-1, 1], (n, channels, height, width).
        likelihood: "bernoulli", where a pixel x is on with probability (x + 1) / 2, "gaussian" or
            "laplace", whose loss is the absolute error.
        scale: standard deviation of the Gaussian, or mean absolute deviation of the other.

    Returns:
        Sums over pixels, (samples, n); but for a Bernoulli, of densities.
    """
    prediction, images = prediction.float(), images.float()
    if likelihood == "bernoulli":
        on = ((images + 1) / 2).expand_as(prediction)
        return (
            -F.binary_cross_entropy_with_logits(prediction, on, reduction="none").flatten(2).sum(2)
        )
    error = (prediction - images) / scale
    if likelihood == "laplace":
        return (-error.abs() - math.log(2 * scale)).flatten(2).sum(2)
    return (-0.5 * error**2 - math.log(scale) - 0.5 * LOG_2PI).flatten(2).sum(2)


def gaussian_kl(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), each dimension by itself, (n, …).

    Source: Kingma and Welling 2014, appendix B, https://arxiv.org/abs/1312.6114
    """
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def variational_loss(
    outputs: dict[str, torch.Tensor],
    images: torch.Tensor,
    likelihood: str,
    scale: float,
    beta: torch.Tensor | float = 1.0,
    free_bits: float = 0.0,
) -> torch.Tensor:
    """Negative evidence lower bound, mean over the batch.

    Args:
        outputs: of the model's forward.
        images: in [-1, 1], (n, channels, height, width).
        likelihood, scale: see `log_likelihood`.
        beta: weight of the KL divergence (Higgins et al. 2017).
        free_bits: nats of each latent dimension's mean divergence that cost nothing (Kingma et al.
            2016, https://arxiv.org/abs/1606.04934).
    """
    fit = log_likelihood(outputs["prediction"], images, likelihood, scale).mean()
    kl = gaussian_kl(outputs["mean"], outputs["logvar"]).mean(0)
    if free_bits:
        kl = kl.clamp(min=free_bits)
    return beta * kl.sum() - fit


def adversarial_loss(discriminator: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return how clearly a discriminator knows decoded images from real ones, a scalar."""
    discriminator.requires_grad_(False)
    scores = discriminator(images)
    discriminator.requires_grad_(True)
    return F.softplus(-scores).mean()


def discriminator_loss(
    discriminator: torch.nn.Module,
    model: torch.nn.Module,
    images: torch.Tensor,
    noise: torch.Tensor | None,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the discriminator's loss, a scalar: half the cross-entropy, as in pix2pix.

    Args:
        model: whose forward is called with images, noise and labels.
    """
    with torch.no_grad():
        decoded = model(images, noise, labels)["prediction"][0]
    real, made = discriminator(torch.cat([images, decoded])).chunk(2)
    return (F.softplus(-real).mean() + F.softplus(made).mean()) / 2


def importance_weighted_bound(
    outputs: dict[str, torch.Tensor],
    noise: torch.Tensor,
    images: torch.Tensor,
    likelihood: str,
    scale: float,
) -> torch.Tensor:
    """Return the importance-weighted lower bound of log p(x), which is tighter with more samples.

    Args:
        outputs: of the model's forward for this noise.
        noise: (samples, n, …).

    Returns:
        (n,), in nats.

    Source: Burda et al. 2016, equation 8, https://arxiv.org/abs/1509.00519
    """
    fit = log_likelihood(outputs["prediction"], images, likelihood, scale)
    # log p(z) - log q(z | x), of which the constants are the same
    ratio = 0.5 * (noise**2 + outputs["logvar"] - outputs["latents"] ** 2).flatten(2).sum(2)
    return torch.logsumexp(fit + ratio, 0) - math.log(len(noise))


@torch.inference_mode()
def negative_log_likelihood(
    model: torch.nn.Module,
    images: torch.Tensor,
    samples: int,
    likelihood: str,
    scale: float,
    generator: torch.Generator,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimate -log p(x) by importance sampling: in expectation an upper bound.

    Args:
        model: an Autoencoder or a Spatial.
        images: (n, channels, height, width).
        samples: samples of the encoder's Gaussian for each image; more make the bound tighter.
        generator: of the noise, on the CPU.

    Returns:
        (n,), in nats.
    """
    shape = model(images, labels=labels)["latents"].shape[1:]
    at_once = max(1, AT_ONCE // images.numel())
    bounds, counts = [], []
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        noise = torch.randn(count, *shape, generator=generator).to(images.device)
        outputs = model(images, noise, labels)
        bounds.append(importance_weighted_bound(outputs, noise, images, likelihood, scale))
        counts.append(math.log(count))
    weighted = torch.stack(bounds) + torch.tensor(counts, device=images.device)[:, None]
    return math.log(samples) - torch.logsumexp(weighted, 0)


def reconstruction_loss(
    outputs: dict[str, torch.Tensor], images: torch.Tensor, likelihood: str
) -> torch.Tensor:
    """Return the mean over pixels: cross-entropy, or squared or absolute error."""
    if likelihood == "bernoulli":
        return -log_likelihood(outputs["prediction"], images, likelihood).mean() / images[0].numel()
    error = F.l1_loss if likelihood == "laplace" else F.mse_loss
    return error(outputs["prediction"][0].float(), images)


def corrupt(
    images: torch.Tensor, noise: str, amount: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Corrupt images for a denoising autoencoder (Vincent et al. 2010).

    Args:
        images: in [-1, 1].
        noise: "gaussian", of standard deviation `amount`; "mask": a part `amount` of the pixels
            becomes -1; or "salt": that part becomes -1 or 1 with equal probability.
        amount: see noise.
        generator: of the random numbers, on the images' device.
    """
    if noise == "gaussian":
        normal = torch.randn(images.shape, generator=generator, device=images.device)
        return (images + amount * normal).clamp(-1, 1)
    u = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    corrupted = images.masked_fill(u < amount, -1.0)
    return corrupted.masked_fill(u < amount / 2, 1.0) if noise == "salt" else corrupted
