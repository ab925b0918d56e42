"""Diffusion and flow matching: networks, samplers, pipeline.

Images are in [-1, 1], (n, channels, height, width). The file stands alone: it travels with every
class-conditional model that it saved, which loads without genkit. Losses are in genkit/noising.py.
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

TIMES = 1000  # that noise is added at; those of flow matching lie between them, too
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # diffusers' words
OBJECTIVES = (*PREDICTIONS, "flow")
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
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
}
FLOWS = tuple(FLOW_SAMPLERS.values())
# what keeps images that a network means in [-1, 1], and what spaces steps
CLIPPED = {"dpm++": "thresholding", "unipc": "thresholding", "heun": "clip_sample"}
SPACED = {"dpm++": "use_exponential_sigmas", "unipc": "use_exponential_sigmas"}
SPACED |= {"heun": "use_karras_sigmas", "euler": "use_karras_sigmas"}
GIVEN = {f"use_{spacing}_sigmas" for spacing in ("karras", "exponential", "beta")}
GIVEN |= {"rescale_betas_zero_snr"}
NEAREST, FARTHEST = 0.02, 80.0  # noise over signal
FEW = 20  # steps
DEFAULT_STEPS = {"ddpm": TIMES, "ddim": 50, "dpm++": 20, "unipc": 20, "heun": 15, "euler": 50}

# ---------------------------------------------------------------------------------------------
# Network and schedule


def make_unet(
    image_size: Sequence[int],
    widths: Sequence[int],
    layers: int = 1,
    attention: bool = False,
    labels: int = 0,
) -> UNet2DModel:
    """Build a stock UNet, which halves the picture between any two widths.

    Args:
        image_size: channels, height, width.
        widths: of the features, the largest map first.
        layers: residual blocks at a size on the way down; one more on the way up.
        attention: between the places of the smallest map.
        labels: classes that it is told; one more stands for "none of them". 0 for none.

    Raises:
        ValueError: the picture cannot be halved that often.
    """
    channels, height, width = image_size
    multiple = 2 ** (len(widths) - 1)
    if height % multiple or width % multiple:
        most = int(math.log2(math.gcd(height, width) & -math.gcd(height, width))) + 1
        raise ValueError(
            f"resolution: {len(widths)} widths halve the picture {len(widths) - 1} times, and "
            f"{width} x {height} do not divide by {multiple}; give --resolution "
            f"{-(-max(height, width) // multiple) * multiple}, or {most} widths at most"
        )
    kinds = ["Attn" if attention and i == len(widths) - 1 else "" for i in range(len(widths))]
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        layers_per_block=layers,
        add_attention=attention,
        attention_head_dim=min(32, widths[-1]),
        norm_num_groups=math.gcd(8, *widths),
        num_class_embeds=labels + 1 if labels else None,
    )


Scheduler = Any  # of diffusers


def make_scheduler(objective: str, schedule: str = "linear") -> Scheduler:
    """Build the scheduler that a model is saved with.

    Args:
        objective: what the network tells, one of `OBJECTIVES`.
        schedule: how noise grows, one of `SCHEDULES`; flow matching has its own.
    """
    _check("objective", objective, OBJECTIVES)
    _check("schedule", schedule, tuple(SCHEDULES))
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler(TIMES)
    return DDPMScheduler(
        TIMES,
        beta_schedule=SCHEDULES[schedule],
        prediction_type=PREDICTIONS[objective],
        timestep_spacing="trailing",
    )


def objective_of(scheduler: Any) -> str:
    """Return what a network that is sampled by this scheduler tells, one of `OBJECTIVES`."""
    if isinstance(scheduler, FLOWS):
        return "flow"
    words = {word: objective for objective, word in PREDICTIONS.items()}
    return words[scheduler.config.prediction_type]


# ---------------------------------------------------------------------------------------------
# Sampling

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One evaluation of the network on the way from noise to an image."""

    time: torch.Tensor
    seen: torch.Tensor  # x_t as the network sees it
    told: torch.Tensor  # what it tells
    after: torch.Tensor  # what the scheduler makes of it


def resolve_sampler(scheduler: Any, name: str | None, steps: int | None) -> tuple[str, int]:
    """Check the name of a sampler and its steps, and fill in what is not told.

    Args:
        scheduler: that the model was saved with.
        name: one of `SAMPLERS`, of a flow one of `FLOW_SAMPLERS`; None for dpm++, of a flow heun.
        steps: of it; those of heun, but for the last, ask the network twice. None for
            `DEFAULT_STEPS`.

    Raises:
        ValueError: the name is not one that fits, or the steps cannot be made.
    """
    objective, names = objective_of(scheduler), compatible_samplers(scheduler)
    name = ("heun" if objective == "flow" else "dpm++") if name is None else name
    if name not in names:
        raise ValueError(
            f"scheduler: {name!r} does not fit a model of the objective {objective}; there are "
            f"{', '.join(names)}"
        )
    if steps is None:
        steps = min(DEFAULT_STEPS[name], scheduler.config.num_train_timesteps)
    steps = check_steps(scheduler, steps)
    if objective != "flow":
        _check_spacing(name, steps, scheduler.config.num_train_timesteps)
    return name, steps


def compatible_samplers(scheduler: Any) -> list[str]:
    """Return the names of the samplers that fit a model that was saved with this scheduler."""
    objective = objective_of(scheduler)
    known = FLOW_SAMPLERS if objective == "flow" else SAMPLERS
    return [name for name in known if (name, objective) != ("heun", "x0")]


def check_steps(scheduler: Any, steps: Any) -> int:
    """Refuse steps that are none, or more than there are in training."""
    most = scheduler.config.num_train_timesteps
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or not 1 <= steps <= most:
        raise ValueError(
            f"steps must be a whole number from 1 to {most}, as many as there are in training, "
            f"got {steps!r}"
        )
    return int(steps)


def _check_spacing(name: str, steps: int, most: int) -> None:
    """Refuse steps that diffusers would put at wrong times."""

    def fits(count: int) -> bool:
        if name == "ddim":
            return most % count == 0
        return len(np.arange(most, 0, -most / count)) == count

    if _spaced(name, steps) or fits(steps):
        return
    below = next(count for count in range(steps - 1, 0, -1) if fits(count))
    above = next(count for count in range(steps + 1, most + 1) if fits(count))
    raise ValueError(
        f"steps: {name} cannot spread {steps} over the {most} times of training; {below} or "
        f"{above} would do"
    )


def make_sampler(scheduler: Any, name: str | None = None, steps: int | None = None) -> Any:
    """Make the scheduler that draws images, its times set; see `resolve`."""
    name, steps = resolve_sampler(scheduler, name, steps)
    kind = (FLOW_SAMPLERS if isinstance(scheduler, FLOWS) else SAMPLERS)[name]
    known = inspect.signature(kind).parameters
    options = _options(scheduler, name, steps)
    given = GIVEN if "trained_betas" in options else set()  # it has its own of these
    config = {k: v for k, v in scheduler.config.items() if k in known and k not in given}
    with warnings.catch_warnings():  # NumPy 2 complains to torch of how diffusers makes arrays
        message = "__array__ implementation doesn't accept a copy keyword"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        made = kind.from_config(config, **options)
        if "trained_betas" in options and steps <= FEW:
            ratios = _noise_to_signal(scheduler)
            nearest = ratios[ratios >= NEAREST][0].item()  # of a time of training, and not below it
            made.register_to_config(sigma_min=nearest * (1 + 1e-5))
        made.set_timesteps(steps)
    return made


def _options(scheduler: Any, name: str, steps: int) -> dict[str, Any]:
    """Say what a sampler has beyond what the model's own scheduler was saved with.

    Solvers walk evenly in the logarithm of noise over signal, or nearly so, which takes a fraction
    of the steps that even times do; and from where it is `FARTHEST`, since the cosine's has no end
    (Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1). Few steps end with one from
    where it is `NEAREST`: from there on hardly anything changes but the noise.
    """
    if isinstance(scheduler, FLOWS):
        return {}
    options: dict[str, Any] = {CLIPPED[name]: True} if name in CLIPPED else {}
    if not _spaced(name, steps):
        return options
    times = int((_noise_to_signal(scheduler) <= FARTHEST).sum())
    options |= {"trained_betas": scheduler.betas[:times].tolist(), "num_train_timesteps": times}
    return options | {SPACED[name]: True}


def _noise_to_signal(scheduler: Any) -> torch.Tensor:
    kept = scheduler.alphas_cumprod
    return ((1 - kept) / kept).sqrt()


def _spaced(name: str, steps: int) -> bool:
    """Tell whether a sampler spaces its steps by noise; many of them would share times."""
    return name in SPACED and (steps <= FEW or "karras" in SPACED[name])


def denoise(
    network: Network,
    scheduler: Any,
    noise: torch.Tensor,
    labels: torch.Tensor | None = None,
    none: int = 0,
    guidance: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Iterator[Step]:
    """Walk from noise to images, a step an evaluation; what the last leaves are the images.

    Args:
        network: called with x_t, times (n,) and labels; returns what it tells.
        scheduler: by `sampler`.
        noise: standard normal, (n, channels, height, width).
        labels: classes, (n,), for a model that is told.
        none: the label that stands for no class.
        guidance: how far from no class to go: 1 for what the class alone says, more for images
            that show it more clearly (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598).
        generator: of the noise that ddpm adds.
    """
    flow = objective_of(scheduler) == "flow"
    noisy = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
    x = noise if flow else noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        seen = x if flow else scheduler.scale_model_input(x, time)
        told = _tell(network, seen, time.to(x.device), labels, none, guidance)
        x = scheduler.step(told, time, x, **noisy).prev_sample
        yield Step(time, seen, told, x)


def _tell(
    network: Network,
    seen: torch.Tensor,
    time: torch.Tensor,
    labels: torch.Tensor | None,
    none: int,
    guidance: float,
) -> torch.Tensor:
    times = time.float().expand(len(seen))
    if labels is None or guidance == 1:
        return network(seen, times, labels)
    nothing = torch.full_like(labels, none)
    both = network(seen.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, nothing]))
    told, free = both.chunk(2)
    return free + guidance * (told - free)


# ---------------------------------------------------------------------------------------------
# Pipeline


class DenoisingPipeline(DiffusionPipeline):
    """Draws images, of a class if the model is told one, by any sampler that fits.

    Args:
        unet: a UNet2DModel.
        scheduler: by `make_scheduler`.
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's noise: that of the image."""
        config = self.unet.config
        side = config.sample_size
        return (config.in_channels, *((side, side) if isinstance(side, int) else side))

    @property
    def labels(self) -> int:
        """How many classes the model is told; 0 for none."""
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
        """Draw images.

        Args:
            batch_size: how many.
            generator: one, or one an image, so that an image depends on its own alone.
            labels: the class of each image, for a model that is told.
            num_inference_steps, sampler_name: see `sampler`.
            guidance: see `denoise`.
            network: to ask in the unet's place, such as the same compiled.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].

        Raises:
            ValueError: an argument cannot work; it is named.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"generator must be one, or a list of {batch_size} for as many images, got "
                f"{len(generator)}"
            )
        self.check_guidance(guidance)
        known = self.classes(labels, batch_size)
        scheduler = make_sampler(self.scheduler, sampler_name, num_inference_steps)
        noise = randn_tensor((batch_size, *self.latent_shape), generator, self.device)
        ask = network or self.tell
        for step in denoise(ask, scheduler, noise, known, self.labels, guidance, generator):
            made = step.after
        images: Any = (made.float().clamp(-1, 1) + 1) / 2
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def tell(
        self, seen: torch.Tensor, times: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Ask the network."""
        return self.unet(seen, times, class_labels=labels).sample

    def noise_to_latent(self, noise: torch.Tensor) -> torch.Tensor:
        """Turn standard normal numbers, (n, *latent_shape), into latents: they are that already."""
        return noise.to(self.device)

    def decode(
        self, latents: torch.Tensor, labels: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return images in [-1, 1] by the default sampler, which adds no noise; gradients pass."""
        known, scheduler = self.classes(labels, len(latents)), make_sampler(self.scheduler)
        for step in denoise(self.tell, scheduler, latents.to(self.device), known):
            made = step.after
        return made.clamp(-1, 1)

    def classes(self, labels: Any, count: int) -> torch.Tensor | None:
        """Check labels, and return them as a tensor."""
        if not self.labels:
            if labels is not None:
                raise ValueError("labels: this model is not told classes; leave them out")
            return None
        if labels is None:
            raise ValueError(f"labels: this model is told one of {self.labels} classes an image")
        known = torch.as_tensor(labels, device=self.device)
        if (
            known.is_floating_point()
            or known.shape != (count,)
            or not ((known >= 0) & (known < self.labels)).all()
        ):
            raise ValueError(f"labels must be {count} of 0 to {self.labels - 1}, got {labels}")
        return known.long()

    def check_guidance(self, guidance: float) -> None:
        """Refuse guidance that cannot work."""
        number = isinstance(guidance, int | float) and not isinstance(guidance, bool)
        if not number or not guidance >= 0 or math.isinf(guidance):
            raise ValueError(f"guidance must be 0 or more, and finite, got {guidance}")
        if guidance != 1 and not self.labels:
            raise ValueError(
                f"guidance: {guidance} asks to go towards a class, and this model is not told "
                "classes; leave it out"
            )


def load_diffusion(folder: str | Path) -> DenoisingPipeline:
    """Load a pipeline that was saved, a stock one or ours, running none of the code beside it.

    Raises:
        ValueError: there is none.
    """
    index = Path(folder) / "model_index.json"
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if saved["_class_name"] not in ("DDPMPipeline", ["diffusion", DenoisingPipeline.__name__]):
            raise ValueError(f"it is of the class {saved['_class_name']}")
        if list(index.parent.glob("unet/*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        kinds = {kind.__name__: kind for kind in (*SAMPLERS.values(), *FLOW_SAMPLERS.values())}
        scheduler = kinds[saved["scheduler"][1]].from_pretrained(str(folder), subfolder="scheduler")
        objective_of(scheduler)
        unet, told = UNet2DModel.from_pretrained(
            str(folder), subfolder="unet", use_safetensors=True, output_loading_info=True
        )
        if told["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(told['missing_keys'])}")
        _check_sides(unet)
    except (OSError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no diffusion model ({error}); give the folder of one "
            "that recipes/train_diffusion.py trained, or that diffusers saved as a DDPMPipeline"
        ) from error
    return DenoisingPipeline(unet.eval(), scheduler)


def _check_sides(unet: UNet2DModel) -> None:
    """Refuse images whose sides cannot be halved as often as the network does."""
    size = unet.config.sample_size
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if not all(type(side) is int and side >= step and side % step == 0 for side in sides):
        raise ValueError(f"its sample_size is {size}; sides are multiples of {step}")


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
