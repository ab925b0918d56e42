"""Autoencoders and variational autoencoders: networks, losses, likelihood bounds, pipeline.

Images are in [-1, 1], (n, channels, height, width). The file stands alone: it travels with every
model that it saved, which therefore loads without genkit.
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
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

LIKELIHOODS = ("bernoulli", "gaussian")
NETWORKS = ("dense", "conv")

# ---------------------------------------------------------------------------------------------
# Networks


class Dense(torch.nn.Sequential):
    """Layers of all-to-all connections, each but the last followed by a SiLU."""

    def __init__(self, *sizes: int) -> None:
        layers: list[torch.nn.Module] = []
        for i, (inside, outside) in enumerate(itertools.pairwise(sizes)):
            layers += [torch.nn.SiLU()] if i else []
            layers.append(torch.nn.Linear(inside, outside))
        super().__init__(*layers)


class Shrink(torch.nn.Sequential):
    """Convolutions, each followed by max pooling, which halves the picture, and a SiLU."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        layers: list[torch.nn.Module] = []
        for inside, outside in zip([channels, *widths], widths, strict=False):
            layers.append(torch.nn.Conv2d(inside, outside, 3, padding=1))
            # pooled first: a quarter of the activations
            layers += [torch.nn.MaxPool2d(2, ceil_mode=True), torch.nn.SiLU()]
        super().__init__(*layers)


class Grow(torch.nn.Module):
    """The way back: each convolution follows an upsampling to the size that pooling left."""

    def __init__(self, widths: Sequence[int], channels: int, sizes: Sequence[Sequence[int]]):
        super().__init__()
        self.start, self.sizes = (widths[-1], *sizes[-1]), [tuple(s) for s in sizes[-2::-1]]
        outward = [*widths[::-1], channels]
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(inside, outside, 3, padding=1)
            for inside, outside in itertools.pairwise(outward)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features, (n, all of them), into a picture."""
        x = features.unflatten(1, self.start)
        for layer, size in zip(self.layers, self.sizes, strict=True):
            x = layer(F.interpolate(F.silu(x), size=size))
        return x


class Autoencoder(ModelMixin, ConfigMixin):
    """A network that squeezes images through a vector, called as diffusers' AutoencoderKL is.

    Args:
        image_size: channels, height, width.
        latent_dim: length of the vector.
        network: "dense" or "conv".
        widths: of the encoder's hidden layers, or of its convolutions; the decoder mirrors them.
        variational: the encoder names a Gaussian instead of a point.
        likelihood: what the decoder names: a Bernoulli's logits or a Gaussian's mean per pixel.
        labels: classes that it is told; 0 for none.
        head: classes that a linear layer on the latents tells; 0 for none.
        inverted: it sees and makes negatives; the pipeline turns them.
    """

    @register_to_config
    def __init__(
        self,
        image_size: Sequence[int] = (1, 28, 28),
        latent_dim: int = 32,
        network: str = "dense",
        widths: Sequence[int] = (400,),
        variational: bool = False,
        likelihood: str = "bernoulli",
        labels: int = 0,
        head: int = 0,
        inverted: bool = False,
    ) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"network must be one of {NETWORKS}, got {network!r}")
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {LIKELIHOODS}, got {likelihood!r}")
        channels, height, width = image_size
        pixels, moments = math.prod(image_size), latent_dim * (2 if variational else 1)
        if network == "dense":
            self.squeeze = Dense(pixels + labels, *widths, moments)
            self.stretch = Dense(latent_dim + labels, *widths[::-1], pixels)
        else:
            sizes = [(height, width)]
            for _ in widths:
                sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
            features = widths[-1] * math.prod(sizes[-1])
            self.shrink = Shrink(channels, widths)
            self.squeeze = Dense(features + labels, moments)
            self.stretch = Dense(latent_dim + labels, features)
            self.grow = Grow(widths, channels, sizes)
        self.tell = torch.nn.Linear(latent_dim, head) if head else None
        # where latents lie: for a variational one the prior, for others see `fit_prior`
        self.register_buffer("prior_mean", torch.zeros(latent_dim))
        self.register_buffer("prior_scale", torch.eye(latent_dim))

    def encode(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Return the distribution of the latents as `.latent_dist`; a point has no variance."""
        seen = self.shrink(images) if self.config.network == "conv" else images
        moments = self.squeeze(self._told(seen.flatten(1), labels))
        if not self.config.variational:
            moments = torch.cat([moments, torch.zeros_like(moments)], 1)
        deterministic = not self.config.variational
        return AutoencoderKLOutput(DiagonalGaussianDistribution(moments.float(), deterministic))

    def predict(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the decoder says of each pixel: logits, or means in [-1, 1]."""
        out = self.stretch(self._told(latents, labels))
        conv = self.config.network == "conv"
        out = self.grow(out) if conv else out.unflatten(1, self.config.image_size)
        return out if self.config.likelihood == "bernoulli" else out.tanh()

    def decode(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> DecoderOutput:
        """Return mean images as `.sample`."""
        prediction = self.predict(latents, labels)
        bernoulli = self.config.likelihood == "bernoulli"
        return DecoderOutput(2 * prediction.sigmoid() - 1 if bernoulli else prediction)

    def _told(self, values: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Append the classes, one-hot, to vectors; there may be several vectors to a label."""
        if not self.config.labels:
            return values
        assert labels is not None, "a class-conditional model needs labels"
        known = F.one_hot(labels, self.config.labels).to(values.dtype)
        return torch.cat([values, known.repeat(len(values) // len(known), 1)], 1)

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode, draw and decode: all that a loss needs.

        Args:
            images: (n, channels, height, width).
            noise: standard normal, (samples, n, latent_dim); None for the mean.
            labels: (n,), for a model that is told classes.

        Returns:
            mean and logvar, (n, latent_dim); latents, (samples, n, latent_dim); prediction,
            (samples, n, channels, height, width); logits, (n, head), if there is a head.
        """
        posterior = self.encode(images, labels).latent_dist
        latents = reparameterize(posterior, noise)
        prediction = self.predict(latents.flatten(0, 1), labels).unflatten(0, latents.shape[:2])
        seen = {"mean": posterior.mean, "logvar": posterior.logvar, "latents": latents}
        seen["prediction"] = prediction
        return seen | ({"logits": self.tell(posterior.mean)} if self.tell is not None else {})

    @torch.no_grad()
    def fit_prior(self, latents: torch.Tensor) -> None:
        """Put a Gaussian over latents, (n, latent_dim), to sample from (Ghosh et al. 2020)."""
        values = latents.double()
        spread = torch.cov(values.T).reshape(values.shape[1], values.shape[1])
        tiny = 1e-6 * torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
        self.prior_mean.copy_(values.mean(0))
        self.prior_scale.copy_(torch.linalg.cholesky(spread + tiny))


class Spatial(torch.nn.Module):
    """A stock AutoencoderKL in training, called as an Autoencoder is; latents are feature maps."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Do as `Autoencoder.forward` does."""
        assert labels is None, "AutoencoderKL knows no classes"
        # in bfloat16 a divergence near 0 would have no gradient
        moments = self.vae.encode(images).latent_dist.parameters.float()
        posterior = DiagonalGaussianDistribution(moments)
        latents = reparameterize(posterior, noise)
        prediction = self.vae.decode(latents.flatten(0, 1)).sample
        seen = {"mean": posterior.mean, "logvar": posterior.logvar, "latents": latents}
        return seen | {"prediction": prediction.unflatten(0, latents.shape[:2])}


def reparameterize(
    posterior: DiagonalGaussianDistribution, noise: torch.Tensor | None
) -> torch.Tensor:
    """Reparameterise: mean + std * noise, (samples, n, …); one sample, the mean, without noise."""
    return posterior.mean[None] if noise is None else posterior.mean + posterior.std * noise


# ---------------------------------------------------------------------------------------------
# Pipeline


class AutoencoderPipeline(DiffusionPipeline):
    """Samples, encodes, decodes and reconstructs.

    Args:
        vae: an Autoencoder, or a stock AutoencoderKL of square images.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""
        config = self.vae.config
        if not isinstance(self.vae, AutoencoderKL):
            return (config.latent_dim,)
        side = config.sample_size >> (len(config.block_out_channels) - 1)
        return (config.latent_channels, side, side)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        labels: Sequence[int] | torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            batch_size: how many.
            generator: one, or one an image, so that an image depends on its own alone.
            labels: the class of each image, for a model that is told.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator must be one, or a list of {batch_size} for as many images, got "
                f"{len(generator)}"
            )
        noise = randn_tensor((batch_size, *self.latent_shape), generator, self.device)
        images: Any = (self.decode(self.noise_to_latent(noise), labels) + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def noise_to_latent(self, noise: torch.Tensor) -> torch.Tensor:
        """Turn standard normal numbers, (n, …), into latents as the model's own are spread."""
        noise = noise.to(self.device)
        if isinstance(self.vae, AutoencoderKL):
            return noise
        return self.vae.prior_mean + noise @ self.vae.prior_scale.T

    @torch.no_grad()
    def encode(
        self, images: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean latents of images in [-1, 1]."""
        known = self._classes(labels, len(images))
        return self.vae.encode(self._sign * images.to(self.device), *known).latent_dist.mode()

    def decode(
        self, latents: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return images in [-1, 1]; gradients pass."""
        known = self._classes(labels, len(latents))
        made = self.vae.decode(latents.to(self.device), *known).sample
        return self._sign * made.clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(
        self, images: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what is left of images in [-1, 1] after the way through the latents."""
        return self.decode(self.encode(images, labels), labels)

    @property
    def _sign(self) -> int:
        return -1 if self.vae.config.get("inverted") else 1

    def _classes(self, labels: Any, count: int) -> tuple[torch.Tensor, ...]:
        """Return the labels as the model takes them: not at all, or as a tensor."""
        classes = 0 if isinstance(self.vae, AutoencoderKL) else self.vae.config.labels
        if not classes:
            if labels is not None:
                raise ValueError("labels: this model is not told classes; leave them out")
            return ()
        if labels is None:
            raise ValueError(f"labels: this model is told one of {classes} classes an image")
        known = torch.as_tensor(labels, device=self.device)
        if (
            known.is_floating_point()
            or known.shape != (count,)
            or not ((known >= 0) & (known < classes)).all()
        ):
            raise ValueError(f"labels must be {count} of 0 to {classes - 1}, got {labels}")
        return (known.long(),)


def load_autoencoder(folder: str | Path) -> AutoencoderPipeline:
    """Load a pipeline that was saved, running none of the code beside it.

    Raises:
        ValueError: there is none.
    """
    index = Path(folder) / "model_index.json"
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if saved["_class_name"][-1] != AutoencoderPipeline.__name__:
            raise ValueError(f"it is of the class {saved['_class_name']}")
        if list(index.parent.glob("vae/*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        cls = {"Autoencoder": Autoencoder, "AutoencoderKL": AutoencoderKL}[saved["vae"][1]]
        vae, told = cls.from_pretrained(
            str(folder), subfolder="vae", use_safetensors=True, output_loading_info=True
        )
        if told["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(told['missing_keys'])}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no autoencoder ({error}); give the folder of one that "
            "recipes/train_autoencoder.py or recipes/train_vae.py trained"
        ) from error
    return AutoencoderPipeline(vae.eval())
