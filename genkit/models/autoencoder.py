"""Autoencoders and variational autoencoders: networks and pipeline.

Images are in [-1, 1], (n, channels, height, width). The file stands alone: it travels with every
model that it saved, which therefore loads without genkit. Losses are in
genkit/models/autoencoder_losses.py.
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

LIKELIHOODS = ("bernoulli", "gaussian", "laplace")
NETWORKS = ("dense", "conv")

# ---------------------------------------------------------------------------------------------
# Networks


class Dense(torch.nn.Sequential):
    """Linear layers, each but the last followed by a SiLU."""

    def __init__(self, *sizes: int) -> None:
        layers: list[torch.nn.Module] = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            layers += [torch.nn.SiLU()] if i else []
            layers.append(torch.nn.Linear(inputs, outputs))
        super().__init__(*layers)


class Shrink(torch.nn.Sequential):
    """Convolutions, each followed by max pooling, which halves the image, and a SiLU."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        layers: list[torch.nn.Module] = []
        for inputs, outputs in zip([channels, *widths], widths, strict=False):
            layers.append(torch.nn.Conv2d(inputs, outputs, 3, padding=1))
            # pooled first: a quarter of the activations
            layers += [torch.nn.MaxPool2d(2, ceil_mode=True), torch.nn.SiLU()]
        super().__init__(*layers)


class Grow(torch.nn.Module):
    """The decoder of `Shrink`: each convolution follows upsampling to the size before pooling."""

    def __init__(self, widths: Sequence[int], channels: int, sizes: Sequence[Sequence[int]]):
        super().__init__()
        self.start, self.sizes = (widths[-1], *sizes[-1]), [tuple(s) for s in sizes[-2::-1]]
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(inputs, outputs, 3, padding=1)
            for inputs, outputs in itertools.pairwise([*widths[::-1], channels])
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Turn flat features, (n, d), into images, (n, channels, height, width)."""
        x = features.unflatten(1, self.start)
        for layer, size in zip(self.layers, self.sizes, strict=True):
            x = layer(F.interpolate(F.silu(x), size=size))
        return x


class Autoencoder(ModelMixin, ConfigMixin):
    """An autoencoder with a latent vector; its calls are those of diffusers' AutoencoderKL.

    Args:
        image_size: channels, height, width.
        latent_dim: length of the latent vector.
        network: "dense" or "conv".
        widths: of the encoder's hidden layers, or of its convolutions; the decoder mirrors them.
        variational: the encoder predicts a Gaussian instead of a point.
        likelihood: of a pixel: the decoder predicts a Bernoulli's logit, or the mean of a
            Gaussian or a Laplace distribution.
        labels: number of classes; 0 for an unconditional model.
        head: number of classes that a linear layer on the latents predicts; 0 for none.
        inverted: it was trained on negatives; the pipeline inverts images on both sides.
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
        self.classifier = torch.nn.Linear(latent_dim, head) if head else None
        # the prior of the latents: standard normal, or fitted by `fit_prior`
        self.register_buffer("prior_mean", torch.zeros(latent_dim))
        self.register_buffer("prior_scale", torch.eye(latent_dim))

    def encode(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Return the distribution of the latents as `.latent_dist`; a point has variance 0."""
        features = self.shrink(images) if self.config.network == "conv" else images
        moments = self.squeeze(self._append_classes(features.flatten(1), labels))
        if not self.config.variational:
            moments = torch.cat([moments, torch.zeros_like(moments)], 1)
        deterministic = not self.config.variational
        return AutoencoderKLOutput(DiagonalGaussianDistribution(moments.float(), deterministic))

    def predict(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the decoder's prediction of each pixel: logits, or means in [-1, 1]."""
        out = self.stretch(self._append_classes(latents, labels))
        conv = self.config.network == "conv"
        out = self.grow(out) if conv else out.unflatten(1, self.config.image_size)
        return out if self.config.likelihood == "bernoulli" else out.tanh()

    def decode(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> DecoderOutput:
        """Return mean images as `.sample`."""
        prediction = self.predict(latents, labels)
        bernoulli = self.config.likelihood == "bernoulli"
        return DecoderOutput(2 * prediction.sigmoid() - 1 if bernoulli else prediction)

    def _append_classes(self, values: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Append one-hot classes to vectors, of which there may be several for each label."""
        if not self.config.labels:
            return values
        assert labels is not None, "a class-conditional model needs labels"
        classes = F.one_hot(labels, self.config.labels).to(values.dtype)
        return torch.cat([values, classes.repeat(len(values) // len(classes), 1)], 1)

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode, sample latents and decode: all that a loss needs.

        Args:
            images: (n, channels, height, width).
            noise: standard normal, (samples, n, latent_dim); None for the mean.
            labels: (n,), if the model is class-conditional.

        Returns:
            mean and logvar, (n, latent_dim); latents, (samples, n, latent_dim); prediction,
            (samples, n, channels, height, width); logits, (n, head), if there is a head.
        """
        posterior = self.encode(images, labels).latent_dist
        latents = reparameterize(posterior, noise)
        prediction = self.predict(latents.flatten(0, 1), labels).unflatten(0, latents.shape[:2])
        outputs = {"mean": posterior.mean, "logvar": posterior.logvar, "latents": latents}
        outputs["prediction"] = prediction
        if self.classifier is not None:
            outputs["logits"] = self.classifier(posterior.mean)
        return outputs

    @torch.no_grad()
    def fit_prior(self, latents: torch.Tensor) -> None:
        """Fit a Gaussian prior to latents, (n, latent_dim), to sample from (Ghosh et al. 2020)."""
        values = latents.cpu().double()  # not every GPU has float64
        covariance = torch.cov(values.T).reshape(values.shape[1], values.shape[1])
        tiny = 1e-6 * torch.eye(len(covariance), dtype=values.dtype, device=values.device)
        self.prior_mean.copy_(values.mean(0))
        self.prior_scale.copy_(torch.linalg.cholesky(covariance + tiny))


class Spatial(torch.nn.Module):
    """A stock AutoencoderKL, called as an Autoencoder in training; latents are feature maps."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode, sample latents and decode; see `Autoencoder.forward`."""
        assert labels is None, "AutoencoderKL is unconditional"
        # in bfloat16 a KL divergence near 0 would have no gradient
        moments = self.vae.encode(images).latent_dist.parameters.float()
        posterior = DiagonalGaussianDistribution(moments)
        latents = reparameterize(posterior, noise)
        prediction = self.vae.decode(latents.flatten(0, 1)).sample
        outputs = {"mean": posterior.mean, "logvar": posterior.logvar, "latents": latents}
        return outputs | {"prediction": prediction.unflatten(0, latents.shape[:2])}


def make_spatial(
    image_size: Sequence[int], widths: Sequence[int], latent_dim: int
) -> AutoencoderKL:
    """Build diffusers' AutoencoderKL, which halves the feature map between two widths.

    Args:
        image_size: channels, height and width.
        widths: channels of the encoder's feature maps, the largest map first.
        latent_dim: channels of the latents.

    Raises:
        ValueError: the images are not square, or their side is not divisible often enough.
    """
    channels, height, width = image_size
    levels = len(widths)
    multiple = 2 ** (levels - 1)
    if height != width or height % multiple:
        fits = max(multiple, min(height, width) // multiple * multiple)
        raise ValueError(
            f"resolution: AutoencoderKL of {levels} widths needs squares whose side is a multiple "
            f"of {multiple}, got images of {width} x {height}; give --resolution {fits}"
        )
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=list(widths),
        norm_num_groups=math.gcd(32, *widths),
        latent_channels=latent_dim,
        sample_size=width,
        scaling_factor=1.0,
    )


def reparameterize(
    posterior: DiagonalGaussianDistribution, noise: torch.Tensor | None
) -> torch.Tensor:
    """Return mean + std * noise, (samples, n, …); without noise the mean, as one sample."""
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
        """Sample images.

        Args:
            batch_size: number of images.
            generator: one, or one for each image, which then depends on its own alone.
            labels: the class of each image, if the model is class-conditional.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator must be one or a list of {batch_size}, got {len(generator)}"
            )
        noise = randn_tensor((batch_size, *self.latent_shape), generator, self.device)
        images: Any = (self.decode(self.noise_to_latent(noise), labels) + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def noise_to_latent(self, noise: torch.Tensor) -> torch.Tensor:
        """Turn standard normal noise, (n, …), into samples of the prior of the latents."""
        noise = noise.to(self.device)
        if isinstance(self.vae, AutoencoderKL):
            return noise
        return self.vae.prior_mean + noise @ self.vae.prior_scale.T

    @torch.no_grad()
    def encode(
        self, images: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean latents of images in [-1, 1]."""
        classes = self._classes(labels, len(images))
        return self.vae.encode(self._sign * images.to(self.device), *classes).latent_dist.mode()

    def decode(
        self, latents: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return images in [-1, 1]; gradients pass."""
        classes = self._classes(labels, len(latents))
        images = self.vae.decode(latents.to(self.device), *classes).sample
        return self._sign * images.clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(
        self, images: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return images in [-1, 1], encoded and decoded."""
        return self.decode(self.encode(images, labels), labels)

    @property
    def _sign(self) -> int:
        return -1 if self.vae.config.get("inverted") else 1

    def _classes(self, labels: Any, count: int) -> tuple[torch.Tensor, ...]:
        """Check labels, and return them as arguments of the model: none, or int64, (count,)."""
        number = 0 if isinstance(self.vae, AutoencoderKL) else self.vae.config.labels
        if not number:
            if labels is not None:
                raise ValueError("labels: this model is unconditional; leave them out")
            return ()
        if labels is None:
            kind = f"class-conditional ({number} classes)"
            raise ValueError(f"labels are required: this model is {kind}")
        classes = torch.as_tensor(labels, device=self.device)
        fits = not classes.is_floating_point() and classes.shape == (count,)
        if not fits or not ((classes >= 0) & (classes < number)).all():
            raise ValueError(f"labels must be {count} of 0 to {number - 1}, got {labels}")
        return (classes.long(),)


def load_autoencoder(folder: str | Path) -> AutoencoderPipeline:
    """Load a saved pipeline without running the code in its folder.

    Raises:
        ValueError: the folder holds no autoencoder.
    """
    index = Path(folder) / "model_index.json"
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if saved["_class_name"][-1] != AutoencoderPipeline.__name__:
            raise ValueError(f"its class is {saved['_class_name']}")
        if list(index.parent.glob("vae/*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        cls = {"Autoencoder": Autoencoder, "AutoencoderKL": AutoencoderKL}[saved["vae"][1]]
        vae, report = cls.from_pretrained(
            str(folder), subfolder="vae", use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no autoencoder ({error}); give the output folder of "
            "train_autoencoder or train_vae"
        ) from error
    return AutoencoderPipeline(vae.eval())
