"""Generative adversarial networks: generators, discriminators, pipeline.

Images are in [-1, 1], (n, channels, height, width). The file stands alone: it travels with every
model that it saved, which therefore loads without genkit. Losses: genkit/models/gan_losses.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.utils.parametrizations import spectral_norm

NETWORKS = ("dcgan", "residual")
GROWTHS = ("transposed", "nearest")
POOLS = ("flatten", "max")
GENERATOR_CONDITIONING = ("embedding_product", "concat")
DISCRIMINATOR_CONDITIONING = ("concat", "auxiliary", "projection")
RAW = "raw"  # diffusers' variant name of the weights that are not averaged

# ---------------------------------------------------------------------------------------------
# Modern: residual blocks without normalisation


class Residual(torch.nn.Module):
    """Two convolutions beside an identity path; the second starts at zero."""

    def __init__(self, width: int, slope: float) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(width, width, 3, padding=1)
        self.second = torch.nn.Conv2d(width, width, 3, padding=1)
        self.slope = slope
        for parameter in self.second.parameters():
            torch.nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of the same shape."""
        hidden = self.first(F.leaky_relu(x, self.slope))
        return x + self.second(F.leaky_relu(hidden, self.slope))


class Grow(torch.nn.Module):
    """From a small feature map to an image: residual blocks, and upsampling between two widths.

    Each last feature vector holds a patch of pixels, so no convolution runs at full size.
    """

    def __init__(
        self, widths: Sequence[int], blocks: int, channels: int, patch: int, slope: float
    ) -> None:
        super().__init__()
        self.stages, self.turns = _stages(widths, blocks, slope)
        self.last = torch.nn.Conv2d(widths[-1], channels * patch**2, 3, padding=1)
        self.patch, self.slope = patch, slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn (n, widths[0], height, width) into pixel logits, (n, channels, height, width)."""
        x = self.stages[0](x)
        for turn, stage in zip(self.turns, self.stages[1:], strict=True):
            x = stage(F.interpolate(turn(x), scale_factor=2))
        return F.pixel_shuffle(self.last(F.leaky_relu(x, self.slope)), self.patch)


class Shrink(torch.nn.Module):
    """From an image, in patches, to a small feature map: `Grow` in reverse."""

    def __init__(
        self, channels: int, widths: Sequence[int], blocks: int, patch: int, slope: float
    ) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.stages, self.turns = _stages(widths, blocks, slope)
        self.patch, self.slope = patch, slope

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Turn images into features, (n, widths[-1], height, width)."""
        x = F.pixel_unshuffle(images, self.patch).contiguous(memory_format=torch.channels_last)
        x = self.stages[0](self.first(x))
        for turn, stage in zip(self.turns, self.stages[1:], strict=True):
            x = stage(turn(F.avg_pool2d(x, 2)))
        return F.leaky_relu(x, self.slope)


def _stages(
    widths: Sequence[int], blocks: int, slope: float
) -> tuple[torch.nn.ModuleList, torch.nn.ModuleList]:
    """Return residual blocks for each width, and 1 x 1 convolutions between two widths."""
    stages = [[Residual(width, slope) for _ in range(blocks)] for width in widths]
    turns = [torch.nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)]
    return torch.nn.ModuleList(torch.nn.Sequential(*s) for s in stages), torch.nn.ModuleList(turns)


# ---------------------------------------------------------------------------------------------
# Classic: Radford et al. 2016, https://arxiv.org/abs/1511.06434


def _growing(
    widths: Sequence[int],
    tail: Sequence[int],
    channels: int,
    kernels: Sequence[int],
    growth: str,
    normalize: bool,
    slope: float,
) -> torch.nn.Sequential:
    """Build layers that upsample by 2 between two widths, then keep the size; see `Generator`."""
    layers: list[torch.nn.Module] = [torch.nn.LeakyReLU(slope)]
    for before, after in itertools.pairwise(widths):
        side = kernels[0]
        if growth == "nearest":
            grow: list[torch.nn.Module] = [torch.nn.Upsample(scale_factor=2)]
            grow.append(torch.nn.ConvTranspose2d(before, after, side, padding=side // 2))
        else:
            extra = side % 2  # output padding: an odd kernel falls a pixel short of doubling
            grow = [torch.nn.ConvTranspose2d(before, after, side, 2, (side - 1) // 2, extra)]
        layers += [*grow, *_normal(after, normalize), torch.nn.LeakyReLU(slope)]
    side = kernels[1]
    for before, after in itertools.pairwise([widths[-1], *tail]):
        layers.append(torch.nn.ConvTranspose2d(before, after, side, padding=side // 2))
        layers += [*_normal(after, normalize), torch.nn.LeakyReLU(slope)]
    last = [widths[-1], *tail][-1]
    return torch.nn.Sequential(
        *layers, torch.nn.ConvTranspose2d(last, channels, side, padding=side // 2)
    )


def _shrinking(
    channels: int,
    widths: Sequence[int],
    strides: Sequence[int],
    kernel: int,
    normalize: bool,
    dropout: float,
    slope: float,
) -> torch.nn.Sequential:
    """Build convolutions; the first has no batch normalisation."""
    layers: list[torch.nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise([channels, *widths])):
        layers.append(torch.nn.Conv2d(before, after, kernel, strides[i], kernel // 2))
        layers += [*_normal(after, normalize and i > 0), torch.nn.LeakyReLU(slope)]
        layers += [torch.nn.Dropout(dropout)] if dropout else []
    return torch.nn.Sequential(*layers)


def _normal(width: int, normalize: bool) -> list[torch.nn.Module]:
    return [torch.nn.BatchNorm2d(width)] if normalize else []


# ---------------------------------------------------------------------------------------------
# Generator and discriminator


class Generator(ModelMixin, ConfigMixin):
    """Turns noise into images.

    Args:
        image_size: channels, height, width; the sides are multiples of `size_multiple`.
        latent_dim: length of a noise vector.
        network: "residual" or "dcgan".
        widths: channels, from the smallest feature map on; the map doubles between two of them.
        labels: number of classes; 0 for an unconditional generator.
        conditioning: "embedding_product" of noise and class embedding, or "concat" of the two.
        blocks: residual blocks at each size.
        patch: side of the square of pixels that a last feature vector of "residual" holds.
        tail: channels of further layers of "dcgan" at full size.
        kernels: kernel sizes of "dcgan": of the upsampling layers, and of those after them.
        growth: of "dcgan": "transposed" convolutions of stride 2, or "nearest" upsampling.
        normalize: batch normalisation in "dcgan".
        slope: negative slope of the leaky ReLUs.
        unit: the output is a sigmoid, scaled to [-1, 1]; otherwise a tanh.
        spectral: spectral normalisation of every layer (Miyato et al. 2018).
    """

    @register_to_config
    def __init__(
        self,
        image_size: Sequence[int] = (1, 28, 28),
        latent_dim: int = 64,
        network: str = "residual",
        widths: Sequence[int] = (64,),
        labels: int = 0,
        conditioning: str = "concat",
        blocks: int = 1,
        patch: int = 4,
        tail: Sequence[int] = (),
        kernels: Sequence[int] = (4, 7),
        growth: str = "transposed",
        normalize: bool = False,
        slope: float = 0.2,
        unit: bool = False,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        _check("network", network, NETWORKS)
        _check("conditioning", conditioning, GENERATOR_CONDITIONING)
        _check("growth", growth, GROWTHS)
        channels, height, width = image_size
        shrunk = size_multiple(network, widths, patch)
        _check_size("generator", image_size, shrunk)
        self.start = (widths[0], height // shrunk, width // shrunk)
        self.table = torch.nn.Embedding(labels, latent_dim) if labels else None
        inputs = 2 * latent_dim if labels and conditioning == "concat" else latent_dim
        self.first = torch.nn.Linear(inputs, math.prod(self.start))
        self.body: torch.nn.Module
        if network == "residual":
            self.body = Grow(widths, blocks, channels, patch, slope)
        else:
            self.body = _growing(widths, tail, channels, kernels, growth, normalize, slope)
        if spectral:
            _normalize_spectrum(self)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Generate images in [-1, 1], (n, channels, height, width).

        Args:
            latents: (n, latent_dim), standard normal.
            labels: classes, (n,), if the generator is class-conditional.
        """
        if self.table is not None:
            assert labels is not None, "a class-conditional generator needs labels"
            vectors = self.table(labels)
            product = self.config.conditioning == "embedding_product"
            latents = latents * vectors if product else torch.cat([latents, vectors], 1)
        x = self.first(latents).unflatten(1, self.start)
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        return 2 * x.sigmoid() - 1 if self.config.unit else x.tanh()


class Discriminator(ModelMixin, ConfigMixin):
    """Scores images: a higher score means more probably real.

    Args:
        image_size: channels, height, width; see `Generator`. Packed images have as many times the
            channels.
        network: "residual" or "dcgan".
        widths: channels: of "residual" at each size, of "dcgan" after each convolution.
        labels: number of classes; 0 for an unconditional discriminator.
        conditioning: "concat": a one-hot map of the class joins the image; "auxiliary": it
            predicts the class instead (Odena et al. 2017); "projection" of features on the class
            embedding (Miyato and Koyama 2018).
        blocks, patch, slope, normalize, spectral: see `Generator`.
        strides, kernel: of the convolutions of "dcgan".
        pool: the score is computed from all features, "flatten", or from their maxima, "max".
        unit: scale images to [0, 1] first.
        dropout: after each convolution of "dcgan".
    """

    @register_to_config
    def __init__(
        self,
        image_size: Sequence[int] = (1, 28, 28),
        network: str = "residual",
        widths: Sequence[int] = (64,),
        labels: int = 0,
        conditioning: str = "projection",
        blocks: int = 1,
        patch: int = 4,
        strides: Sequence[int] = (2, 2),
        kernel: int = 3,
        pool: str = "flatten",
        normalize: bool = False,
        dropout: float = 0.0,
        slope: float = 0.2,
        unit: bool = False,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        _check("network", network, NETWORKS)
        _check("conditioning", conditioning, DISCRIMINATOR_CONDITIONING)
        _check("pool", pool, POOLS)
        channels, height, width = image_size
        channels += labels if conditioning == "concat" else 0
        self.body: torch.nn.Module
        if network == "residual":
            shrunk = size_multiple(network, widths, patch)
            _check_size("discriminator", image_size, shrunk)
            self.body = Shrink(channels, widths, blocks, patch, slope)
            sides = height // shrunk, width // shrunk
        else:
            if len(widths) != len(strides):
                wanted = f"{len(strides)} numbers for this network"
                raise ValueError(f"discriminator_widths must be {wanted}, got {list(widths)}")
            self.body = _shrinking(channels, widths, strides, kernel, normalize, dropout, slope)
            shrunk = math.prod(strides)
            sides = -(-height // shrunk), -(-width // shrunk)
        features = widths[-1] * (math.prod(sides) if pool == "flatten" else 1)
        self.score = torch.nn.Linear(features, 1)
        project = labels and conditioning == "projection"
        self.table = torch.nn.Embedding(labels, features) if project else None
        if self.table is not None:  # the score does not depend on the class at first
            torch.nn.init.zeros_(self.table.weight)
        auxiliary = labels and conditioning == "auxiliary"
        self.classifier = torch.nn.Linear(features, labels) if auxiliary else None
        if spectral:
            _normalize_spectrum(self)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score images.

        Args:
            images: (n, channels, height, width).
            labels: classes, (n,), for "concat" and "projection".

        Returns:
            Scores, (n,), and class logits, (n, labels), if the conditioning is "auxiliary".
        """
        features = self.features(images, labels)
        scores = self.score(features).squeeze(1)
        if self.table is not None:
            assert labels is not None, "conditioning by projection needs labels"
            scores = scores + (self.table(labels) * features).sum(1)
        return scores, None if self.classifier is None else self.classifier(features)

    def features(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the features that scores are computed from, (n, d)."""
        if self.config.unit:
            images = (images + 1) / 2
        if self.config.labels and self.config.conditioning == "concat":
            assert labels is not None, "conditioning by concatenation needs labels"
            maps = F.one_hot(labels, self.config.labels).to(images.dtype)[:, :, None, None]
            images = torch.cat([images, maps.expand(-1, -1, *images.shape[2:])], 1)
        x = self.body(images.contiguous(memory_format=torch.channels_last))
        return x.amax((2, 3)) if self.config.pool == "max" else x.flatten(1)


def size_multiple(network: str, widths: Sequence[int], patch: int) -> int:
    """Return the number that the sides of an image must be a multiple of."""
    return 2 ** (len(widths) - 1) * (patch if network == "residual" else 1)


def _normalize_spectrum(module: torch.nn.Module) -> None:
    kinds = torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear | torch.nn.Embedding
    for layer in [m for m in module.modules() if isinstance(m, kinds)]:
        layer.reset_parameters()  # weights of zero have no spectral norm to divide by
        spectral_norm(layer)


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_size(network: str, image_size: Sequence[int], wanted: int) -> None:
    _, height, width = image_size
    if height % wanted or width % wanted:
        fits = dict.fromkeys(max(1, n // wanted) * wanted for n in sorted((height, width)))
        raise ValueError(
            f"resolution: a {network} of these widths needs multiples of {wanted} pixels, got "
            f"{width} x {height}; give --resolution {' or '.join(map(str, fits))}, or other widths"
        )


# ---------------------------------------------------------------------------------------------
# Pipeline


class GANPipeline(DiffusionPipeline):
    """Samples images.

    Args:
        generator: a Generator.
    """

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.register_modules(generator=generator)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""
        return (self.generator.config.latent_dim,)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        labels: Sequence[int] | torch.Tensor | None = None,
        truncation: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample images.

        Args:
            batch_size: number of images.
            generator: one, or one for each image, which then depends on its own alone.
            labels: the class of each image, if the model is class-conditional.
            truncation: see `truncate`; None for no truncation.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator must be one or a list of {batch_size}, got {len(generator)}"
            )
        noise = randn_tensor((batch_size, *self.latent_shape), generator, self.device)
        latents = noise if truncation is None else truncate(noise, truncation)
        images: Any = (self.decode(latents, labels) + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def noise_to_latent(self, noise: torch.Tensor) -> torch.Tensor:
        """Return noise, (n, latent_dim), as latents: for a GAN they are the same."""
        return noise.to(self.device)

    def decode(
        self, latents: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return images in [-1, 1]; gradients pass."""
        classes = self._classes(labels, len(latents))
        return self.generator(latents.to(self.device), classes).float()

    def _classes(self, labels: Any, count: int) -> torch.Tensor | None:
        """Check labels, and return them as int64, (count,); None for an unconditional model."""
        number = self.generator.config.labels
        if not number:
            if labels is not None:
                raise ValueError("labels: this model is unconditional; leave them out")
            return None
        if labels is None:
            kind = f"class-conditional ({number} classes)"
            raise ValueError(f"labels are required: this model is {kind}")
        classes = torch.as_tensor(labels, device=self.device)
        fits = not classes.is_floating_point() and classes.shape == (count,)
        if not fits or not ((classes >= 0) & (classes < number)).all():
            raise ValueError(f"labels must be {count} of 0 to {number - 1}, got {labels}")
        return classes.long()


def truncate(noise: torch.Tensor, limit: float) -> torch.Tensor:
    """Turn standard normal noise into noise of the truncated normal distribution.

    Every number keeps its rank, so that images change smoothly with the limit: a lower one makes
    them better and less diverse (Brock et al. 2019, https://arxiv.org/abs/1809.11096).

    Args:
        noise: standard normal.
        limit: the largest absolute value; 0 for zeros.

    Raises:
        ValueError: the limit is below 0.
    """
    if not limit >= 0:
        raise ValueError(f"truncation must be 0 or more, got {limit}")
    if not limit:
        return torch.zeros_like(noise)
    inside = math.erf(limit / math.sqrt(2))  # probability of -limit to limit
    ranks = torch.special.ndtr(noise.cpu().double()) - 0.5  # not every GPU has float64
    return torch.special.ndtri(0.5 + inside * ranks).to(noise)


def load_gan(folder: str | Path, weights: str = "averaged") -> GANPipeline:
    """Load a saved pipeline without running the code in its folder.

    Args:
        folder: of the model.
        weights: "averaged" over training, or "raw".

    Raises:
        ValueError: the folder holds no GAN, or none with these weights.
    """
    _check("weights", weights, ("averaged", RAW))
    index = Path(folder) / "model_index.json"
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if saved["_class_name"][-1] != GANPipeline.__name__:
            raise ValueError(f"its class is {saved['_class_name']}")
        if list(index.parent.glob("generator/*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        generator, report = Generator.from_pretrained(
            str(folder),
            subfolder="generator",
            variant=RAW if weights == RAW else None,
            use_safetensors=True,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no GAN with {weights} weights ({error}); give the "
            "output folder of train_gan"
        ) from error
    return GANPipeline(generator.eval())
