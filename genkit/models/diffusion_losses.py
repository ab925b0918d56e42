"""The forward process of diffusion and flow matching, and the losses of their networks.

x_t = alpha_t · image + sigma_t · noise; from x_t and t, a network predicts the image, the noise, or
a mixture of the two. Images are in [-1, 1], (n, channels, height, width).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genkit.models.diffusion import Scheduler, objective_of


@dataclass(frozen=True)
class Noising:
    """How much noise each row has; all are (n,).

    Args:
        timesteps: t, the network's input.
        alpha, sigma: alpha_t and sigma_t: alpha² + sigma² = 1, in a flow alpha + sigma = 1.
    """

    timesteps: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor

    def mix(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return x_t."""
        return _wide(self.alpha) * images + _wide(self.sigma) * noise


def noising_at_quantiles(scheduler: Scheduler, quantiles: torch.Tensor) -> Noising:
    """Return timesteps of training at quantiles of their distribution.

    It is uniform, in a flow logit-normal: more in the middle, where there is most to learn (Esser
    et al. 2024, https://arxiv.org/abs/2403.03206).

    Args:
        scheduler: by `make_scheduler`.
        quantiles: in [0, 1), (n,).
    """
    count = scheduler.config.num_train_timesteps
    if objective_of(scheduler) == "flow":
        sigma = torch.special.ndtri(quantiles.clamp(1e-6, 1 - 1e-6)).sigmoid()
        return Noising(count * sigma, 1 - sigma, sigma)
    return noising_at_timesteps(scheduler, (count * quantiles).long())


def noising_at_timesteps(scheduler: Scheduler, timesteps: torch.Tensor) -> Noising:
    """Return alpha_t and sigma_t at timesteps, (n,)."""
    if objective_of(scheduler) == "flow":
        sigma = timesteps / scheduler.config.num_train_timesteps
        return Noising(timesteps, 1 - sigma, sigma)
    squares = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]  # alpha_t²
    return Noising(timesteps, squares.sqrt(), (1 - squares).sqrt())


# ---------------------------------------------------------------------------------------------
# Losses


def loss(
    model: torch.nn.Module,
    images: torch.Tensor,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    timesteps: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    objective: str,
    min_snr: float = 0.0,
) -> torch.Tensor:
    """Return the mean squared error of the network's prediction, a scalar.

    Args:
        model: a UNet2DModel.
        images, noise: (n, channels, height, width).
        labels: classes, (n,), if the model is class-conditional.
        timesteps, alpha, sigma: see `Noising`.
        objective: one of `diffusion.OBJECTIVES`.
        min_snr: see `min_snr_weights`; 0 for no weights.
    """
    mixed = _wide(alpha) * images + _wide(sigma) * noise
    prediction = model(mixed, timesteps, class_labels=labels).sample.float()
    each = (prediction - target(images, noise, alpha, sigma, objective)).square().mean((1, 2, 3))
    return (min_snr_weights(alpha, sigma, objective, min_snr) * each if min_snr else each).mean()


def target(
    images: torch.Tensor,
    noise: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    objective: str,
) -> torch.Tensor:
    """Return the target of the network's prediction.

    epsilon: the noise (Ho et al. 2020, https://arxiv.org/abs/2006.11239); v: alpha_t · noise -
    sigma_t · image (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512); x0: the image; flow:
    the velocity, noise - image (Lipman et al. 2023, https://arxiv.org/abs/2210.02747).
    """
    if objective == "epsilon":
        return noise
    if objective == "v":
        return _wide(alpha) * noise - _wide(sigma) * images
    return images if objective == "x0" else noise - images


def predicted_image(
    mixed: torch.Tensor,
    prediction: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    objective: str,
) -> torch.Tensor:
    """Return the image, x_0, that a prediction from x_t implies; see `target`."""
    alpha, sigma = _wide(alpha), _wide(sigma)
    if objective == "epsilon":
        return (mixed - sigma * prediction) / alpha
    if objective == "v":
        return alpha * mixed - sigma * prediction
    return prediction if objective == "x0" else mixed - sigma * prediction


def min_snr_weights(
    alpha: torch.Tensor, sigma: torch.Tensor, objective: str, min_snr: float
) -> torch.Tensor:
    """Return min-SNR weights, (n,): an error of the predicted image weighs min(SNR, min_snr).

    Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4.
    """
    snr = alpha.square() / sigma.square()
    capped = snr.clamp(max=min_snr)
    if objective == "epsilon":
        return capped / snr.clamp(min=1e-8)
    return capped / (snr + 1) if objective == "v" else capped


def stratified_quantiles(order: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Return stratified (low-discrepancy) quantiles of timesteps, so that the loss varies less.

    Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix I.1.

    Args:
        order: a permutation of 0 to n - 1.
        offset: one number, uniform in [0, 1).

    Returns:
        In [0, 1), (n,).
    """
    quantiles = (order + offset) / len(order)
    return quantiles.clamp(max=1 - 2**-24)  # the largest offset rounds to 1


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
