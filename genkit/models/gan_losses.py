"""Losses of generative adversarial networks, their regularizers and augmentations.

A discriminator gives each image a score, (n,); a higher score means more probably real. Functions
are pure: random numbers come as an argument, u, uniform in [0, 1), so that the result for a row
does not depend on the process that computes it. Images are in [-1, 1], of the shape
(n, channels, height, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CROSS_ENTROPY = ("minimax", "non_saturating", "maximum_likelihood")
TARGETED = (*CROSS_ENTROPY, "least_squares")  # losses that compare scores with targets
LOSSES = (*TARGETED, "hinge", "wasserstein", "relativistic")
POLICIES = ("colour", "translation", "cutout")
AUGMENT_UNIFORMS = 7  # uniform random numbers that `augment` takes for an image
# that a `Game` takes for a row: two targets, an interpolation, two images
UNIFORMS = 3 + 2 * AUGMENT_UNIFORMS
SHIFT, HOLE = 1 / 8, 1 / 2  # parts of the side: the longest translation, the side of the cutout

# ---------------------------------------------------------------------------------------------
# Losses


def discriminator_loss(
    loss: str,
    real: torch.Tensor,
    fake: torch.Tensor,
    real_targets: torch.Tensor | float = 1.0,
    fake_targets: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Return the discriminator's loss, a scalar.

    Args:
        loss: one of LOSSES.
        real, fake: scores, (n,).
        real_targets, fake_targets: of the scores, for a loss of TARGETED.

    Source: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661 (cross-entropy); Mao et al.
    2017, https://arxiv.org/abs/1611.04076 (least squares); Lim and Ye 2017,
    https://arxiv.org/abs/1705.02894 (hinge); Arjovsky et al. 2017,
    https://arxiv.org/abs/1701.07875 (Wasserstein); Jolicoeur-Martineau 2018,
    https://arxiv.org/abs/1807.00734, section 4.2 (relativistic, in pairs)
    """
    if loss in CROSS_ENTROPY:
        return (_cross_entropy(real, real_targets) + _cross_entropy(fake, fake_targets)).mean()
    if loss == "least_squares":
        return ((real - real_targets).square() + (fake - fake_targets).square()).mean() / 2
    if loss == "hinge":
        return (F.relu(1 - real) + F.relu(1 + fake)).mean()
    if loss == "wasserstein":
        return (fake - real).mean()
    assert loss == "relativistic", f"loss must be one of {LOSSES}, got {loss!r}"
    return F.softplus(fake - real).mean()


def generator_loss(loss: str, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the generator's loss, a scalar; for its sources see `discriminator_loss`.

    Args:
        loss: one of LOSSES.
        real, fake: scores, (n,); only the relativistic loss uses those of real images.

    Source: Goodfellow 2014, https://arxiv.org/abs/1412.6515 (maximum likelihood)
    """
    if loss == "minimax":
        return -F.softplus(fake).mean()
    if loss == "non_saturating":
        return F.softplus(-fake).mean()
    if loss == "maximum_likelihood":
        return -fake.exp().mean()
    if loss == "least_squares":
        return (fake - 1).square().mean() / 2
    if loss in ("hinge", "wasserstein"):
        return -fake.mean()
    assert loss == "relativistic", f"loss must be one of {LOSSES}, got {loss!r}"
    return F.softplus(real - fake).mean()


def _cross_entropy(scores: torch.Tensor, targets: torch.Tensor | float) -> torch.Tensor:
    """Return the cross-entropy of logits with targets, which may lie outside [0, 1]; (n,)."""
    return F.softplus(scores) - targets * scores


def targets(
    u: torch.Tensor, smoothing: float = 0.0, noise: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets of real and of generated images, (n,) each: 1 and 0, smoothed and noisy.

    Args:
        u: (n, 2).
        smoothing: the targets of real images are lower by this (Salimans et al. 2016).
        noise: each target is raised by a uniform random number below this.
    """
    real, fake = (noise * u).unbind(1)
    return 1 - smoothing + real, fake


# ---------------------------------------------------------------------------------------------
# Regularizers


def squared_gradient(scores: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of each score's gradient with respect to its own image, (n,).

    Its mean over real images is the penalty R1, over generated ones R2.

    Args:
        scores: (n,), each computed from its own image alone.
        images: the input of the discriminator, which requires a gradient.

    Source: Mescheder et al. 2018, https://arxiv.org/abs/1801.04406
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def gradient_penalty(squares: torch.Tensor) -> torch.Tensor:
    """Return the mean of (norm - 1)², a scalar.

    Args:
        squares: `squared_gradient` at `interpolate_images`, (n,).

    Source: Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, equation 3
    """
    # the gradient of the root at 0 is infinite
    return ((squares + 1e-12).sqrt() - 1).square().mean()


def interpolate_images(real: torch.Tensor, fake: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return a random point between each real and each generated image; u is (n,)."""
    return torch.lerp(fake, real, u.view(-1, *[1] * (real.ndim - 1)))


def initialize_weights(module: torch.nn.Module, std: float | None) -> None:
    """Draw the weights of a network anew, and set its biases to 0.

    Args:
        module: a Generator or Discriminator of the network "dcgan" without spectral normalisation.
        std: of a normal distribution (Radford et al. 2016); None for Glorot's uniform one.
    """
    kinds = torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear
    for layer in module.modules():
        if isinstance(layer, kinds):
            if std is None:
                torch.nn.init.xavier_uniform_(layer.weight)
            else:
                torch.nn.init.normal_(layer.weight, std=std)
            assert layer.bias is not None
            torch.nn.init.zeros_(layer.bias)


@torch.no_grad()
def clip_weights(module: torch.nn.Module, limit: float) -> None:
    """Clamp every parameter to [-limit, limit] (Arjovsky et al. 2017)."""
    for parameter in module.parameters():
        parameter.clamp_(-limit, limit)


def pack(images: torch.Tensor, count: int) -> torch.Tensor:
    """Join every `count` images in their channels, so that the discriminator sees mode collapse.

    Returns:
        (n / count, count * channels, height, width).

    Source: Lin et al. 2018, https://arxiv.org/abs/1712.04086
    """
    return images.unflatten(0, (-1, count)).flatten(1, 2)


# ---------------------------------------------------------------------------------------------
# Augmentation


def augment(images: torch.Tensor, u: torch.Tensor, policies: tuple[str, ...]) -> torch.Tensor:
    """Augment real or generated images for the discriminator, differentiably.

    Args:
        images: (n, channels, height, width).
        u: (n, AUGMENT_UNIFORMS).
        policies: some of POLICIES: "colour" changes brightness, saturation and contrast,
            "translation" shifts by at most an eighth of the side, "cutout" sets a square to 0.

    Source: Zhao et al. 2020, https://arxiv.org/abs/2006.10738
    """
    u = u.to(images.dtype)
    if "colour" in policies:
        images = _colour(images, u[:, 0:3])
    if "translation" in policies:
        images = _translate(images, u[:, 3:5])
    if "cutout" in policies:
        images = _cut_out(images, u[:, 5:7])
    return images


def _colour(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    brightness, saturation, contrast = u[:, :, None, None, None].unbind(1)
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = torch.lerp(grey.expand_as(images), images, 2 * saturation)
    middle = images.mean((1, 2, 3), keepdim=True)
    return torch.lerp(middle.expand_as(images), images, contrast + 0.5)


def _translate(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Shift by whole pixels, and pad with 0, which is grey."""
    n, _, height, width = images.shape
    rows, columns = (
        torch.arange(side, device=images.device) - _shifts(own, round(side * SHIFT))[:, None]
        for side, own in ((height, u[:, 0]), (width, u[:, 1]))
    )
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None
    ]
    which = torch.arange(n, device=images.device)[:, None, None]
    index = which, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    shifted = images.permute(0, 2, 3, 1)[index]  # (n, height, width, channels)
    return (shifted * inside[..., None]).permute(0, 3, 1, 2)


def _shifts(u: torch.Tensor, most: int) -> torch.Tensor:
    """Return whole numbers from -most to most, (n,)."""
    return (u * (2 * most + 1)).long() - most


def _cut_out(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Set a square to 0; its centre may be any pixel."""
    inside = []
    for side, own in zip(images.shape[2:], u.unbind(1), strict=True):
        middle = (own * side).long()[:, None]
        distance = torch.arange(side, device=images.device) - middle
        half = round(side * HOLE) // 2
        inside.append((distance >= -half) & (distance < half))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole, 0.0)


# ---------------------------------------------------------------------------------------------
# Loss with regularizers


@dataclass
class Batch:
    """The input of a training step of both networks; row i of every part belongs together."""

    real: torch.Tensor  # images, (n, …)
    noise: torch.Tensor  # (n, latent_dim)
    u: torch.Tensor  # (n, UNIFORMS), uniform in [0, 1)
    labels: torch.Tensor | None = None  # (n,), of the real and of the generated image
    instance_noise: torch.Tensor | None = None  # (2, n, …), of real and of generated images


GeneratorCall = Callable[..., torch.Tensor]
DiscriminatorCall = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Game:
    """The objective of adversarial training: a loss with its regularizers.

    Args:
        loss: one of LOSSES.
        r1, r2: weights of half the mean squared gradient at real and at generated images.
        gradient_penalty: weight of (norm - 1)² between real and generated images.
        weight_clip: largest absolute value of the critic's weights; the caller clips them.
        smoothing, label_noise: see `targets`.
        instance_noise: standard deviation of noise added to every image that the discriminator
            scores (Sønderby et al. 2017).
        augmentations: see `augment`.
        packing: images that are scored together, with the u of the first; see `pack`.

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    loss: str = "relativistic"
    r1: float = 0.0
    r2: float = 0.0
    gradient_penalty: float = 0.0
    weight_clip: float = 0.0
    smoothing: float = 0.0
    label_noise: float = 0.0
    instance_noise: float = 0.0
    augmentations: tuple[str, ...] = ()
    packing: int = 1

    def __post_init__(self) -> None:
        """Check each value, then combinations."""
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        unknown = [name for name in self.augmentations if name not in POLICIES]
        if unknown:
            choices = ", ".join(POLICIES)
            raise ValueError(f"augmentations must be some of {choices}, got {unknown[0]!r}")
        for name in ("r1", "r2", "gradient_penalty", "weight_clip", "instance_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("smoothing", "label_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0 or more, below 1, got {getattr(self, name)}")
        if self.packing < 1:
            raise ValueError(f"packing must be 1 or more, got {self.packing}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        for name in ("weight_clip", "gradient_penalty"):
            if getattr(self, name) and self.loss != "wasserstein":
                raise ValueError(
                    f"{name} requires the wasserstein loss, got loss {self.loss}; use r1 and r2"
                )
        if self.weight_clip and (self.gradient_penalty or self.r1 or self.r2):
            other = next(n for n in ("gradient_penalty", "r1", "r2") if getattr(self, n))
            raise ValueError(
                f"weight_clip and {other} both limit the critic's slope; give only one"
            )
        for name in ("smoothing", "label_noise"):
            if getattr(self, name) and self.loss not in TARGETED:
                raise ValueError(
                    f"{name} requires a loss with targets, one of {', '.join(TARGETED)}, got "
                    f"loss {self.loss}"
                )

    def discriminator_loss(
        self,
        discriminator: DiscriminatorCall,
        generator: GeneratorCall,
        batch: Batch,
        penalty: float = 1.0,
    ) -> torch.Tensor:
        """Return the discriminator's loss with its penalties, a scalar.

        Args:
            discriminator, generator: with the calls of those of genkit/models/gan.py.
            penalty: factor of the penalties; 0 to leave them out.
        """
        with torch.no_grad():
            fake = generator(batch.noise, batch.labels)
        real, fake = self._prepare(batch.real, batch, 0), self._prepare(fake, batch, 1)
        labels, u = batch.labels, batch.u[:: self.packing]
        real.requires_grad_(bool(penalty and self.r1))
        fake.requires_grad_(bool(penalty and self.r2))
        real_scores, real_classes = discriminator(real, labels)
        fake_scores, fake_classes = discriminator(fake, labels)
        wanted = targets(u[:, :2], self.smoothing, self.label_noise)
        loss = discriminator_loss(self.loss, real_scores.float(), fake_scores.float(), *wanted)
        for classes in (real_classes, fake_classes):
            if classes is not None and labels is not None:
                loss = loss + F.cross_entropy(classes.float(), labels)
        if penalty and self.r1:
            loss = loss + penalty * self.r1 / 2 * squared_gradient(real_scores, real).mean()
        if penalty and self.r2:
            loss = loss + penalty * self.r2 / 2 * squared_gradient(fake_scores, fake).mean()
        if penalty and self.gradient_penalty:
            between = interpolate_images(real, fake, u[:, 2]).requires_grad_()
            squares = squared_gradient(discriminator(between, labels)[0], between)
            loss = loss + penalty * self.gradient_penalty * gradient_penalty(squares)
        return loss

    def generator_loss(
        self, discriminator: DiscriminatorCall, generator: GeneratorCall, batch: Batch
    ) -> torch.Tensor:
        """Return the generator's loss, a scalar; freeze the discriminator first."""
        fake = self._prepare(generator(batch.noise, batch.labels), batch, 1)
        scores, classes = discriminator(fake, batch.labels)
        real_scores = scores
        if self.loss == "relativistic":
            with torch.no_grad():
                real_scores = discriminator(self._prepare(batch.real, batch, 0), batch.labels)[0]
        loss = generator_loss(self.loss, real_scores.float(), scores.float())
        if classes is not None and batch.labels is not None:
            loss = loss + F.cross_entropy(classes.float(), batch.labels)
        return loss

    def _prepare(self, images: torch.Tensor, batch: Batch, side: int) -> torch.Tensor:
        """Augment images, add instance noise and pack them; side: 0 for real, 1 for generated."""
        images = images.float()
        if self.augmentations:
            start = 3 + side * AUGMENT_UNIFORMS
            images = augment(
                images, batch.u[:, start : start + AUGMENT_UNIFORMS], self.augmentations
            )
        if batch.instance_noise is not None:
            images = images + batch.instance_noise[side]
        return pack(images, self.packing) if self.packing > 1 else images
