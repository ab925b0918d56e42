"""Diffusion and flow matching: networks, samplers, pipeline.

Images are in [-1, 1], (n, channels, height, width). The file needs no genkit: it travels with every
model that is no stock pipeline. Losses are in genkit/models/diffusion_losses.py.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

TIMES = 1000  # timesteps of training; those of flow matching are real numbers up to this
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # diffusers' words
OBJECTIVES = (*PREDICTIONS, "flow")
PLANES = 2  # of the same value everywhere, beside the image in the input of a mean flow
MAX_GUIDANCE = 2.0  # of a mean flow
# timesteps of a mean flow: of more, the embedding turns so fast that du/dt is mostly noise
MEAN_TIMES = 32
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # diffusers' words
SAMPLERS: dict[str, Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "euler": EulerDiscreteScheduler,
}
FLOW_SAMPLERS: dict[str, Any] = {
    "dpm++": DPMSolverMultistepScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
}
FLOWS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
# the options of diffusers' samplers that keep predicted images in [-1, 1], and that space steps
CLIPPED = {"dpm++": "thresholding", "unipc": "thresholding", "heun": "clip_sample"}
SPACED = {"dpm++": "use_exponential_sigmas", "unipc": "use_exponential_sigmas"}
SPACED |= {"heun": "use_karras_sigmas", "euler": "use_karras_sigmas"}
REPLACED = {f"use_{spacing}_sigmas" for spacing in ("karras", "exponential", "beta")}
REPLACED |= {"rescale_betas_zero_snr"}
LEAST_RATIO, MOST_RATIO = 0.02, 80.0  # of sigma_t to alpha_t, at the last and the first step
FEW = 20  # steps
FLOW_POWER = 1.25  # of how dpm++ spaces the steps of a flow
DECODED = 4096  # pixels of latents that are decoded at once
DEFAULT_STEPS = {"ddpm": TIMES, "ddim": 50, "dpm++": 10, "unipc": 10, "heun": 15, "euler": 50}

# ---------------------------------------------------------------------------------------------
# Schedule

Scheduler = Any  # of diffusers


def make_scheduler(
    objective: str, schedule: str = "linear", mean: bool = False, clip: bool = True
) -> Scheduler:
    """Build the scheduler that a model is saved with.

    Args:
        objective: what the network predicts, one of `OBJECTIVES`.
        schedule: of the noise, one of `SCHEDULES`; flow matching has its own.
        mean: the flow is a mean flow.
        clip: what it denoises is in [-1, 1], as images are and latents are not.
    """
    _check("objective", objective, OBJECTIVES)
    _check("schedule", schedule, tuple(SCHEDULES))
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler(MEAN_TIMES if mean else TIMES)
    return DDPMScheduler(
        TIMES,
        beta_schedule=SCHEDULES[schedule],
        prediction_type=PREDICTIONS[objective],
        timestep_spacing="trailing",
        clip_sample=clip,
    )


def objective_of(scheduler: Any) -> str:
    """Return what the network of this scheduler predicts, one of `OBJECTIVES`.

    That of a mean flow predicts what a flow's does, unless it is asked for a mean.
    """
    if isinstance(scheduler, FLOWS):
        return "flow"
    words = {word: objective for objective, word in PREDICTIONS.items()}
    words["flow_prediction"] = "flow"
    return words[scheduler.config.prediction_type]


# ---------------------------------------------------------------------------------------------
# Sampling

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One evaluation of the network in the denoising trajectory; all but the first (n, …)."""

    timestep: torch.Tensor  # t, a scalar
    model_input: torch.Tensor  # x_t, scaled for the network
    prediction: torch.Tensor  # of the network, by its objective
    prev_sample: torch.Tensor  # x_{t-1}, by the scheduler


def resolve_sampler(
    scheduler: Any, name: str | None, steps: int | None, mean: bool = False
) -> tuple[str, int]:
    """Check the name of a sampler and its steps, and fill in defaults.

    Args:
        scheduler: that the model was saved with.
        name: one of `SAMPLERS`, of a flow one of `FLOW_SAMPLERS`; default: dpm++.
        steps: of the sampler; each of heun but the last evaluates the network twice. Default: see
            `DEFAULT_STEPS`; of a mean flow 1.
        mean: the model is a mean flow, whose sampler is euler.

    Raises:
        ValueError: the sampler does not fit the objective, or cannot take so many steps.
    """
    objective, names = objective_of(scheduler), compatible_samplers(scheduler, mean)
    name = ("euler" if mean else "dpm++") if name is None else name
    if name not in names:
        raise ValueError(
            f"scheduler: {name!r} does not fit a model with the objective "
            f"{'meanflow' if mean else objective}; choose one of {', '.join(names)}"
        )
    if steps is None:
        steps = 1 if mean else min(DEFAULT_STEPS[name], scheduler.config.num_train_timesteps)
    steps = check_steps(scheduler, steps)
    if objective != "flow":
        _check_spacing(name, steps, scheduler.config.num_train_timesteps)
    return name, steps


def compatible_samplers(scheduler: Any, mean: bool = False) -> list[str]:
    """Return the names of the samplers that fit a model that was saved with this scheduler."""
    if mean:
        return ["euler"]
    objective = objective_of(scheduler)
    samplers = FLOW_SAMPLERS if objective == "flow" else SAMPLERS
    return [name for name in samplers if (name, objective) != ("heun", "x0")]


def check_steps(scheduler: Any, steps: Any) -> int:
    """Refuse fewer than one step, and more than the timesteps of training."""
    most = scheduler.config.num_train_timesteps
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or not 1 <= steps <= most:
        raise ValueError(
            f"steps must be a whole number from 1 to {most}, the timesteps of training, got "
            f"{steps!r}"
        )
    return int(steps)


def _check_spacing(name: str, steps: int, most: int) -> None:
    """Refuse a number of steps that diffusers would put at wrong timesteps."""

    def fits(count: int) -> bool:
        if name == "ddim":
            return most % count == 0
        return len(np.arange(most, 0, -most / count)) == count

    if _spaced(name, steps) or fits(steps):
        return
    below = next(count for count in range(steps - 1, 0, -1) if fits(count))
    above = next(count for count in range(steps + 1, most + 1) if fits(count))
    raise ValueError(
        f"steps: {name} cannot spread {steps} steps over the {most} timesteps of training; give "
        f"{below} or {above}"
    )


def make_sampler(
    scheduler: Any, name: str | None = None, steps: int | None = None, mean: bool = False
) -> Any:
    """Make the scheduler that samples images, with its timesteps set; see `resolve_sampler`."""
    name, steps = resolve_sampler(scheduler, name, steps, mean)
    flow = objective_of(scheduler) == "flow"
    kind = (FLOW_SAMPLERS if flow else SAMPLERS)[name]
    parameters = inspect.signature(kind).parameters
    options = _options(scheduler, name, steps)
    replaced = REPLACED if "trained_betas" in options else set()
    config = {k: v for k, v in scheduler.config.items() if k in parameters and k not in replaced}
    with warnings.catch_warnings():  # NumPy 2 complains to torch of how diffusers makes arrays
        message = "__array__ implementation doesn't accept a copy keyword"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        made = kind.from_config(config, **options)
        if "trained_betas" in options and steps <= FEW:
            ratios = _noise_to_signal(scheduler)
            least = ratios[ratios >= LEAST_RATIO][0].item()  # of a timestep of training
            made.register_to_config(sigma_min=least * (1 + 1e-5))
        made.set_timesteps(steps)
    if mean:  # steps of equal length, and the last of them ends at the image
        made.set_timesteps(sigmas=[left / steps for left in range(steps, 0, -1)])
    elif flow and name == "dpm++":
        sigmas = flow_sigmas(steps)
        made.sigmas, made.timesteps = sigmas, sigmas[:-1] * made.config.num_train_timesteps
    return made


def flow_sigmas(steps: int) -> torch.Tensor:
    """Return the noise levels between the steps of a flow, from 1 to 0, (steps + 1,).

    The first step begins at noise alone and the last ends at the image, as in training. Between
    them sigma_t / alpha_t is a power of the steps left over the steps done: the way is shortest
    per step at both ends, where the velocity changes most.
    """
    left = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    noise, image = left**FLOW_POWER, (1 - left) ** FLOW_POWER
    return (noise / (noise + image)).float()


def _options(scheduler: Any, name: str, steps: int) -> dict[str, Any]:
    """Return a sampler's options beyond those that the model's own scheduler was saved with.

    Solvers space their steps evenly in log(sigma_t / alpha_t), or nearly so, which takes a fraction
    of the steps that evenly spaced timesteps do. They begin where the ratio is `MOST_RATIO`, since
    that of the cosine schedule has no end (Karras et al. 2022, https://arxiv.org/abs/2206.00364,
    table 1). The last of few steps begins where the ratio is `LEAST_RATIO`: from there on hardly
    anything changes but the noise.
    """
    if objective_of(scheduler) == "flow":
        asked = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return asked if name == "dpm++" else {}
    clips = name in CLIPPED and scheduler.config.get("clip_sample", True)
    options: dict[str, Any] = {CLIPPED[name]: True} if clips else {}
    if not _spaced(name, steps):
        return options
    times = int((_noise_to_signal(scheduler) <= MOST_RATIO).sum())
    options |= {"trained_betas": scheduler.betas[:times].tolist(), "num_train_timesteps": times}
    return options | {SPACED[name]: True}


def _noise_to_signal(scheduler: Any) -> torch.Tensor:
    """Return sigma_t / alpha_t at each timestep of training."""
    alphas = scheduler.alphas_cumprod
    return ((1 - alphas) / alphas).sqrt()


def _spaced(name: str, steps: int) -> bool:
    """Whether a sampler spaces its steps by noise; many steps would share timesteps."""
    return name in SPACED and (steps <= FEW or "karras" in SPACED[name])


def denoise(
    network: Network,
    scheduler: Any,
    noise: torch.Tensor,
    labels: torch.Tensor | None = None,
    null_label: int = 0,
    guidance: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    mean: bool = False,
) -> Iterator[Step]:
    """Denoise noise to images, one network evaluation a step.

    Args:
        network: called with x_t, timesteps (n,) and labels; returns its prediction.
        scheduler: by `make_sampler`.
        noise: standard normal, (n, channels, height, width).
        labels: classes, (n,), if the model is class-conditional.
        null_label: the label that stands for no class.
        guidance: scale of classifier-free guidance: 1 for the conditional prediction, more for
            images that show the class more clearly (Ho and Salimans 2022,
            https://arxiv.org/abs/2207.12598).
        generator: of the noise that ddpm adds.
        mean: the network is that of a mean flow: it predicts the mean velocity of each step, and
            guidance is an input of it.

    Yields:
        Steps; `prev_sample` of the last is the images.
    """
    flow = objective_of(scheduler) == "flow"
    noisy = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
    x = noise if flow else noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        model_input = x if flow else scheduler.scale_model_input(x, t)
        timesteps = t.float().to(x.device).expand(len(x))  # not every GPU has float64
        if mean:
            interval = (scheduler.sigmas[i] - scheduler.sigmas[i + 1]).expand(len(x))
            asked = with_planes(x, interval, torch.full_like(interval, guidance))
            prediction = network(asked, timesteps, labels)
        else:
            prediction = _predict(network, model_input, timesteps, labels, null_label, guidance)
        x = scheduler.step(prediction, t, x, **noisy).prev_sample
        yield Step(t, model_input, prediction, x)


def _predict(
    network: Network,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor | None,
    null_label: int,
    guidance: float,
) -> torch.Tensor:
    """Return the network's prediction under classifier-free guidance."""
    if labels is None or guidance == 1:
        return network(x, timesteps, labels)
    null_labels = torch.full_like(labels, null_label)
    both = network(x.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([labels, null_labels]))
    conditional, unconditional = both.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def with_planes(x: torch.Tensor, interval: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Put beside the images what a mean flow is asked for.

    Args:
        x: x_t, (n, channels, height, width).
        interval: t - r in units of the whole way, (n,), for the mean velocity from r to t; 0 for
            the velocity at t.
        guidance: scale of classifier-free guidance, (n,); 1 for the conditional prediction.

    Returns:
        (n, channels + PLANES, height, width).

    Source: guidance as an input, in the form 1 - 1 / scale, is of Geng et al. 2025,
    https://arxiv.org/abs/2512.02012, section 4.2
    """
    planes = torch.stack([interval.to(x), 1 - 1 / guidance.to(x)], 1)
    return torch.cat([x, planes[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)


def with_all_planes(x: torch.Tensor, network: Any) -> torch.Tensor:
    """Return a network's whole input: of a mean flow by default that for the velocity at t."""
    missing = int(network.config.in_channels) - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, missing))


# ---------------------------------------------------------------------------------------------
# Pipeline


class DenoisingPipeline(DiffusionPipeline):
    """Samples images, of given classes if the model is class-conditional, by any sampler that fits.

    Args:
        unet: a UNet2DModel.
        scheduler: by `make_scheduler`.
        vae: an AutoencoderKL, if it denoises latents: the encoder's, times the scaling_factor.
    """

    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(self, unet: Any, scheduler: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's noise: that of the image, or of its latents."""
        side, channels = self.unet.config.sample_size, self.unet.config.out_channels
        return (channels, *((side, side) if isinstance(side, int) else side))

    @property
    def mean(self) -> bool:
        """Whether the model is a mean flow."""
        return takes_planes(self.unet)

    @property
    def labels(self) -> int:
        """Number of classes; 0 for an unconditional model."""
        return (self.unet.config.num_class_embeds or 1) - 1

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        labels: Sequence[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        sampler_name: str | None = None,
        guidance: float = 1.0,
        network: Network | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample images.

        Args:
            batch_size: number of images.
            generator: one, or one for each image, which then depends on its own alone.
            labels: the class of each image, if the model is class-conditional.
            num_inference_steps, sampler_name: see `resolve_sampler`.
            guidance: see `denoise`.
            network: replaces the UNet, such as the same network compiled; default: the UNet.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].

        Raises:
            ValueError: an argument is invalid.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator must be one or a list of {batch_size}, got {len(generator)}"
            )
        self.check_guidance(guidance)
        classes = self.classes(labels, batch_size)
        scheduler = make_sampler(self.scheduler, sampler_name, num_inference_steps, self.mean)
        noise = randn_tensor((batch_size, *self.latent_shape), generator, self.device)
        predict, own = network or self.predict, (generator, self.mean)
        for step in denoise(predict, scheduler, noise, classes, self.labels, guidance, *own):
            sample = step.prev_sample
        images: Any = (self.to_images(sample) + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def predict(
        self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the network's prediction for x_t; timesteps and labels are (n,)."""
        return self.unet(with_all_planes(x, self.unet), timesteps, class_labels=labels).sample

    def noise_to_latent(self, noise: torch.Tensor) -> torch.Tensor:
        """Return noise, (n, *latent_shape), as latents: here they are the same."""
        return noise.to(self.device)

    def decode(
        self, latents: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return images in [-1, 1] by the default sampler, which adds no noise; gradients pass."""
        classes, noise = self.classes(labels, len(latents)), latents.to(self.device)
        scheduler = make_sampler(self.scheduler, mean=self.mean)
        for step in denoise(self.predict, scheduler, noise, classes, mean=self.mean):
            sample = step.prev_sample
        return self.to_images(sample)

    def to_images(self, x: torch.Tensor) -> torch.Tensor:
        """Return images in [-1, 1] of what is denoised; gradients pass."""
        if self.vae is not None:
            scaled, count = x / self.vae.config.scaling_factor, max(1, DECODED // x[0, 0].numel())
            x = torch.cat([self.vae.decode(some).sample for some in scaled.split(count)])
        return x.float().clamp(-1, 1)

    def classes(self, labels: Any, count: int) -> torch.Tensor | None:
        """Check labels, and return them as int64, (count,); None for an unconditional model."""
        if not self.labels:
            if labels is not None:
                raise ValueError("labels: this model is unconditional; leave them out")
            return None
        if labels is None:
            kind = f"class-conditional ({self.labels} classes)"
            raise ValueError(f"labels are required: this model is {kind}")
        classes = torch.as_tensor(labels, device=self.device)
        fits = not classes.is_floating_point() and classes.shape == (count,)
        if not fits or not ((classes >= 0) & (classes < self.labels)).all():
            raise ValueError(f"labels must be {count} of 0 to {self.labels - 1}, got {labels}")
        return classes.long()

    def check_guidance(self, guidance: float) -> None:
        """Refuse guidance that is out of range, or that an unconditional model cannot take."""
        number = isinstance(guidance, int | float) and not isinstance(guidance, bool)
        if not number or not guidance >= 0 or math.isinf(guidance):
            raise ValueError(f"guidance must be 0 or more, and finite, got {guidance}")
        if guidance != 1 and not self.labels:
            raise ValueError(
                f"guidance: {guidance} requires a class-conditional model, and this model is "
                "unconditional; leave it out"
            )
        if self.mean and not 1 <= guidance <= MAX_GUIDANCE:
            raise ValueError(
                f"guidance must be 1 to {MAX_GUIDANCE:g} for a mean flow, which was trained with "
                f"it, got {guidance}"
            )


def takes_planes(unet: UNet2DModel) -> bool:
    """Whether a network is that of a mean flow."""
    return unet.config.in_channels == unet.config.out_channels + PLANES


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
