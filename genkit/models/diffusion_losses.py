"""How noise is added to images, and the losses of networks that tell the two apart.

On the way from an image to noise lie x_t = signal · image + grain · noise; a network that sees x_t
and t tells one of them, or a mixture. Images are in [-1, 1], (n, channels, height, width).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genkit.models.diffusion import FLOWS, Scheduler


@dataclass(frozen=True)
class Noising:
    """Where on the way from an image to noise a row is; all are (n,).

    Args:
        times: as the network is told them.
        signal, grain: of the mixture; signal² + grain² = 1, or signal + grain = 1 in a flow.
    """

    times: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor

    def mix(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return x_t."""
        return _wide(self.alpha) * images + _wide(self.sigma) * noise


def noising_at_quantiles(scheduler: Scheduler, ranks: torch.Tensor) -> Noising:
    """Turn ranks of times into times: uniform ones, or logit-normal ones of a flow.

    The latter are in the middle more often, where there is most to learn (Esser et al. 2024,
    https://arxiv.org/abs/2403.03206).

    Args:
        scheduler: by `make_scheduler`.
        ranks: in [0, 1), (n,).
    """
    times = scheduler.config.num_train_timesteps
    if isinstance(scheduler, FLOWS):
        sigma = torch.special.ndtri(ranks.clamp(1e-6, 1 - 1e-6)).sigmoid()
        return Noising(times * sigma, 1 - sigma, sigma)
    return noising_at_timesteps(scheduler, (times * ranks).long())


def noising_at_timesteps(scheduler: Scheduler, times: torch.Tensor) -> Noising:
    """Return where rows are at given times, (n,)."""
    if isinstance(scheduler, FLOWS):
        sigma = times / scheduler.config.num_train_timesteps
        return Noising(times, 1 - sigma, sigma)
    kept = scheduler.alphas_cumprod.to(times.device)[times]
    return Noising(times, kept.sqrt(), (1 - kept).sqrt())


# ---------------------------------------------------------------------------------------------
# Losses


def loss(
    model: torch.nn.Module,
    images: torch.Tensor,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    times: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    objective: str,
    min_snr: float = 0.0,
) -> torch.Tensor:
    """Mean squared error of what the network tells of noisy images.

    Args:
        model: a UNet2DModel.
        images, noise: (n, channels, height, width).
        labels: classes, (n,), for a model that is told.
        times, signal, grain: see `Noising`.
        objective: one of `diffusion.OBJECTIVES`.
        min_snr: see `weights`; 0 for none.
    """
    mixed = _wide(alpha) * images + _wide(sigma) * noise
    told = model(mixed, times, class_labels=labels).sample.float()
    wanted = target(images, noise, alpha, sigma, objective)
    each = (told - wanted).square().mean((1, 2, 3))
    return (min_snr_weights(alpha, sigma, objective, min_snr) * each if min_snr else each).mean()


def target(
    images: torch.Tensor,
    noise: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    objective: str,
) -> torch.Tensor:
    """Return what the network should tell.

    epsilon: the noise (Ho et al. 2020, https://arxiv.org/abs/2006.11239); v: signal · noise -
    grain · image (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512); x0: the image; flow: the
    velocity, noise - image (Lipman et al. 2023, https://arxiv.org/abs/2210.02747).
    """
    if objective == "epsilon":
        return noise
    if objective == "v":
        return _wide(alpha) * noise - _wide(sigma) * images
    return images if objective == "x0" else noise - images


def predicted_image(
    mixed: torch.Tensor,
    told: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    objective: str,
) -> torch.Tensor:
    """Return the image that a network means by what it tells of x_t; see `target`."""
    alpha, sigma = _wide(alpha), _wide(sigma)
    if objective == "epsilon":
        return (mixed - sigma * told) / alpha
    if objective == "v":
        return alpha * mixed - sigma * told
    return told if objective == "x0" else mixed - sigma * told


def min_snr_weights(
    alpha: torch.Tensor, sigma: torch.Tensor, objective: str, min_snr: float
) -> torch.Tensor:
    """Return min-SNR weights, (n,): errors of the clean image weigh min(SNR, min_snr).

    Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4.
    """
    snr = alpha.square() / sigma.square()
    capped = snr.clamp(max=min_snr)
    if objective == "epsilon":
        return capped / snr.clamp(min=1e-8)
    return capped / (snr + 1) if objective == "v" else capped


def stratified_quantiles(order: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Return ranks of times that a batch covers evenly, so that its loss varies less.

    Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix I.1.

    Args:
        order: a permutation of 0 to n - 1.
        offset: in [0, 1), one number.

    Returns:
        In [0, 1), (n,).
    """
    ranks = (order + offset) / len(order)
    return ranks.clamp(max=1 - 2**-24)  # the largest offset rounds to 1


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
