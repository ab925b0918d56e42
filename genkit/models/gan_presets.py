"""Presets of generative adversarial networks: networks, loss and rates that belong together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from genkit.models.gan_losses import TARGETED


@dataclass(frozen=True)
class Preset:
    """Networks of a generator and a discriminator, and the settings to train them with.

    Args:
        generator, discriminator: arguments of `gan.Generator` and `gan.Discriminator`.
        std: of initial weights, see `gan_losses.initialize_weights`; None for Glorot's.
        discriminator_learning_rate: None for the generator's learning rate.
        max_steps: None for the recipe's own length.
        generator_conditioning, discriminator_conditioning: of a conditional model.
    """

    generator: dict[str, Any]
    discriminator: dict[str, Any]
    loss: str
    latent_dim: int
    batch_size: int
    optimizer: str
    learning_rate: float
    betas: tuple[float, float]
    std: float | None = None
    discriminator_learning_rate: float | None = None
    r1: float = 0.0
    r2: float = 0.0
    gradient_penalty: float = 0.0
    penalty_every: int = 1
    weight_clip: float = 0.0
    label_noise: float = 0.0
    critic_steps: int = 1
    warmup: float = 0.0
    decay: float = 0.0
    ema: float = 0.0
    max_steps: int | None = None
    generator_conditioning: str = "concat"
    discriminator_conditioning: str = "projection"


# Huang et al. 2024, https://arxiv.org/abs/2501.05441; Muon, sizes and rates are genkit's own
MODERN = Preset(
    generator={"network": "residual"},
    discriminator={"network": "residual"},
    loss="relativistic",
    latent_dim=64,
    batch_size=32,
    optimizer="muon",
    learning_rate=1e-3,
    betas=(0.0, 0.99),
    r1=1.0,
    r2=1.0,
    penalty_every=4,
    decay=0.5,
    ema=0.999,
)
# network and rates of Keras' introduction to adversarial training, noise of its labels included
DCGAN = Preset(
    generator={"network": "dcgan", "widths": [128, 128, 128], "kernels": [4, 7], "unit": True},
    discriminator={"network": "dcgan", "widths": [64, 128], "strides": [2, 2], "kernel": 3}
    | {"pool": "max", "unit": True},
    loss="non_saturating",
    latent_dim=128,
    batch_size=64,
    optimizer="adamw",
    learning_rate=4e-4,
    discriminator_learning_rate=3e-4,
    betas=(0.9, 0.999),
    label_noise=0.05,
)
# Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, algorithm 1
WGAN_GP = Preset(
    generator={"network": "dcgan", "widths": [256, 128, 64], "kernels": [5, 5], "slope": 0.0},
    discriminator={"network": "dcgan", "widths": [64, 128, 256], "strides": [2, 2, 2], "kernel": 5},
    loss="wasserstein",
    latent_dim=128,
    batch_size=64,
    optimizer="adamw",
    learning_rate=1e-4,
    betas=(0.0, 0.9),
    gradient_penalty=10.0,
    critic_steps=5,
)
# Arjovsky et al. 2017, https://arxiv.org/abs/1701.07875, with Odena's auxiliary classifier
AC_WGAN = Preset(
    generator={"network": "dcgan", "widths": [256, 128, 64], "tail": [32], "kernels": [5, 5]}
    | {"growth": "nearest", "slope": 0.3},
    discriminator={"network": "dcgan", "widths": [64, 128, 256, 512], "strides": [2, 2, 2, 1]}
    | {"kernel": 5, "dropout": 0.4, "slope": 0.3},
    loss="wasserstein",
    latent_dim=100,
    batch_size=64,
    optimizer="rmsprop",
    learning_rate=5e-5,
    betas=(0.0, 0.9),
    std=0.02,
    weight_clip=0.01,
    critic_steps=100,
    max_steps=25_000,
    generator_conditioning="embedding_product",
    discriminator_conditioning="auxiliary",
)
PRESETS = {"modern": MODERN, "dcgan": DCGAN, "wgan_gp": WGAN_GP, "ac_wgan": AC_WGAN}
NETWORK_FIELDS = ("generator", "discriminator", "std")
CONDITIONING_FIELDS = ("generator_conditioning", "discriminator_conditioning")


def choose_values(
    name: str,
    *,
    loss: str | None,
    weight_clip: float | None,
    learning_rate: float | None,
    conditional: bool,
) -> dict[str, Any]:
    """Return the values of all settings that are not given, by name.

    What is given has precedence, and the caller keeps it. Then come what follows from a loss,
    a weight limit or a learning rate that is given: the preset's own regularizers that do not go
    with it are off, its rate holds for both networks. Then comes the preset, and last the default
    of a field, those of conditioning in a conditional model only.

    Args:
        name: of PRESETS.
        loss, weight_clip, learning_rate: as given; None if they are not.
        conditional: whether the model is class-conditional.
    """
    preset = PRESETS[name]
    left_out = NETWORK_FIELDS if conditional else (*NETWORK_FIELDS, *CONDITIONING_FIELDS)
    values = {f.name: getattr(preset, f.name) for f in fields(preset) if f.name not in left_out}
    values["betas"] = list(preset.betas)
    off: list[str] = []
    loss = loss or preset.loss
    off += [] if loss in TARGETED else ["label_noise"]
    off += [] if loss == "wasserstein" else ["gradient_penalty", "weight_clip"]
    off += ["r1", "r2", "gradient_penalty"] if weight_clip else []
    values |= dict.fromkeys(off, 0.0)
    if learning_rate or preset.discriminator_learning_rate is None:
        values["discriminator_learning_rate"] = learning_rate or preset.learning_rate
    return values
