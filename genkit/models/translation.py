"""Translation of images: from a condition, such as a grey photograph, to plausible images.

Images are in [-1, 1], (n, channels, height, width). The network is a stock UNet: of a diffusion
model its input is the noisy image with the condition beside it, else the condition alone. The file
stands alone: it travels with every model that it saved, which therefore loads without genkit.
Losses are in genkit/models/translation_losses.py.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

CONDITIONS = ("grey", "low", "mask", "edges", "pairs")
FACTOR = 4  # of a low resolution, to each side
MODES = {1: "L", 3: "RGB"}
LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as Pillow's L
STEPS, MOST_STEPS = 20, 100  # of the sampler: by default, and at most
LEAST_RATIO, MOST_RATIO = 0.02, 80.0  # of sigma_t to alpha_t, at the last and the first step
FLOW_POWER = 1.25  # of how the steps of a flow are spaced
ROWS = 64  # tiles that the network takes at once
SCHEDULERS = {kind.__name__: kind for kind in (DDPMScheduler, FlowMatchEulerDiscreteScheduler)}

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# ---------------------------------------------------------------------------------------------
# Colours


def luminance(images: torch.Tensor) -> torch.Tensor:
    """Return the luminance of colour images, (n, 1, height, width); grey images as they are."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def with_luminance(images: torch.Tensor, grey: torch.Tensor) -> torch.Tensor:
    """Return colour images with the luminance of others.

    Only the difference of each pixel from its grey is kept, and made smaller where a channel would
    leave [-1, 1]; that difference has no luminance of its own.

    Args:
        images: (n, 3, height, width).
        grey: in [-1, 1], (n, 1, height, width).
    """
    colour = images - luminance(images)
    room = torch.where(colour > 0, 1 - grey, 1 + grey) / colour.abs().clamp(min=1e-6)
    return grey + colour * room.amin(1, keepdim=True).clamp(max=1)


# ---------------------------------------------------------------------------------------------
# Tiles


def tile_starts(side: int, tile: int) -> list[int]:
    """Return where tiles begin, which overlap by half or more and together cover a side."""
    count = 1 + math.ceil(max(0, side - tile) / (tile // 2))
    return [round(i * (side - tile) / max(1, count - 1)) for i in range(count)]


def in_tiles(
    predict: Predict, x: torch.Tensor, condition: torch.Tensor, tile: tuple[int, int]
) -> torch.Tensor:
    """Return a network's prediction for large images: the weighted mean of those of its tiles.

    A pixel of a tile weighs the more the farther it is from the tile's border, so that there are no
    seams. Where all tiles share x, and what follows from the mean, overlaps agree at every step
    (Bar-Tal et al. 2023, https://arxiv.org/abs/2302.08113, equation 5).

    Args:
        predict: called with tiles of x and of the condition, (rows, channels, *tile) each.
        x: (n, channels, height, width); it has no channels for a network that takes no noise.
        condition: (n, condition channels, height, width).
        tile: height and width.
    """
    height, width = condition.shape[2:]
    corners = [(y, z) for y in tile_starts(height, tile[0]) for z in tile_starts(width, tile[1])]
    if len(corners) == 1:
        return predict(x, condition)
    weights = _tent(tile[0])[:, None] * _tent(tile[1])
    weights = weights.to(condition)
    places = [(row, y, z) for row in range(len(x)) for y, z in corners]
    total: Any = 0
    covered = condition.new_zeros(height, width)
    for start in range(0, len(places), ROWS):
        some = places[start : start + ROWS]
        cut = [[each[r, :, y : y + tile[0], z : z + tile[1]] for r, y, z in some]
               for each in (x, condition)]  # fmt: skip
        predicted = predict(torch.stack(cut[0]), torch.stack(cut[1])) * weights
        if isinstance(total, int):
            total = predicted.new_zeros(len(x), predicted.shape[1], height, width)
        for (row, y, z), each in zip(some, predicted, strict=True):
            total[row, :, y : y + tile[0], z : z + tile[1]] += each
    for y, z in corners:
        covered[y : y + tile[0], z : z + tile[1]] += weights
    return total / covered


def _tent(side: int) -> torch.Tensor:
    """Return weights that fall evenly from the middle of a side to its ends, (side,)."""
    places = torch.arange(side) + 0.5
    return torch.minimum(places, side - places)


# ---------------------------------------------------------------------------------------------
# Sampling


def make_sampler(scheduler: Any, steps: int) -> DPMSolverMultistepScheduler:
    """Make the scheduler that samples images, dpm++ of the second order, with its timesteps set.

    Args:
        scheduler: that the model was saved with.
        steps: evaluations of the network.
    """
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    times = scheduler.config.num_train_timesteps
    if flow:
        options: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    else:
        alphas = scheduler.alphas_cumprod
        ratios = ((1 - alphas) / alphas).sqrt()
        betas = scheduler.betas[ratios <= MOST_RATIO]  # that of the cosine schedule has no end
        times = len(betas)
        options = {"prediction_type": scheduler.config.prediction_type, "thresholding": True}
        options |= {"trained_betas": betas.tolist(), "use_exponential_sigmas": True}
    with warnings.catch_warnings():  # NumPy 2 complains to torch of how diffusers makes arrays
        message = "__array__ implementation doesn't accept a copy keyword"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        made = DPMSolverMultistepScheduler(num_train_timesteps=times, **options)
        if not flow:
            least = ratios[ratios >= LEAST_RATIO][0].item()  # of a timestep of training
            made.register_to_config(sigma_min=least * (1 + 1e-5))
        made.set_timesteps(steps)
    if flow:  # steps from noise alone to the image, the shortest at both ends
        left = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        noise, image = left**FLOW_POWER, (1 - left) ** FLOW_POWER
        made.sigmas = (noise / (noise + image)).float()
        made.timesteps = made.sigmas[:-1] * times
    made.set_begin_index(
        0
    )  # many steps share their timesteps, by which it would look for the first
    return made


# ---------------------------------------------------------------------------------------------
# Pipeline


class TranslationPipeline(DiffusionPipeline):
    """Translates images of any size, each seed to an image of its own.

    Args:
        unet: a UNet2DModel.
        scheduler: that a diffusion model was trained with; None for a network that predicts the
            image at once, and the same one for every seed.
        condition: what it translates from, one of `CONDITIONS`.
    """

    _optional_components = ("scheduler",)

    def __init__(self, unet: Any, scheduler: Any = None, condition: str = "pairs") -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(condition=condition)

    @property
    def channels(self) -> int:
        """Channels of its images: 1 for grey, 3 for colour."""
        return self.unet.config.out_channels

    @property
    def condition_channels(self) -> int:
        """Channels of the condition, as the network takes it."""
        return self.unet.config.in_channels - (self.channels if self.scheduler else 0)

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of the images that it was trained on."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def deterministic(self) -> bool:
        """Whether it makes the same image for every seed."""
        return self.scheduler is None

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        mask: Image.Image | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Translate one image.

        Args:
            image: what the model translates from, of any size: to colour, grey or in colour; to
                enlarge, the small one; to complete, with `mask`; edges, white on black. Or the
                condition itself, (1, condition_channels, height, width).
            generator: one, or one for each image to make.
            num_inference_steps: of the sampler, each an evaluation; default: 20.
            mask: white where the image is to be filled in, for a model of that condition.
            output_type: "pil", "np" for (n, height, width, channels) in [0, 1], or "pt" for
                (n, channels, height, width) in [0, 1].
        """
        condition = image if isinstance(image, torch.Tensor) else self.prepare(image, mask)
        if condition.ndim != 4 or condition.shape[1] != self.condition_channels:
            raise ValueError(
                f"image must have {self.condition_channels} channels for this model, got the shape "
                f"{tuple(condition.shape)}"
            )
        count = len(generator) if isinstance(generator, list) else 1
        shape = (count, self.channels, *condition.shape[2:])
        noise = randn_tensor(shape, generator, self.device, self.unet.dtype)
        condition = condition.expand(count, -1, -1, -1)
        made: Any = (self.translate(condition, noise, num_inference_steps) + 1) / 2
        if output_type != "pt":
            made = made.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            made = self.numpy_to_pil(made)
        return ImagePipelineOutput(made) if return_dict else (made,)

    def prepare(self, image: Image.Image, mask: Image.Image | None = None) -> torch.Tensor:
        """Return the condition that a picture is, (1, condition_channels, height, width)."""
        if (mask is not None) != (self.condition == "mask"):
            needs = "requires a mask" if self.condition == "mask" else "takes no mask"
            raise ValueError(f"mask: this model was trained for {self.condition}, and {needs}")
        channels = self.condition_channels - (self.condition == "mask")
        coloured = image.mode not in ("1", "L")
        if coloured and channels == 1 and self.condition not in ("grey", "edges"):
            raise ValueError("image: this model takes grey images alone, got one in colour")
        values = _tensor(image, channels)
        if self.condition == "low":
            return values.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
        if mask is None:
            return values
        if mask.size != image.size:
            raise ValueError(f"mask must have the image's size {image.size}, got {mask.size}")
        return hide(values, _tensor(mask, 1) > 0)

    @torch.no_grad()
    def translate(
        self, condition: torch.Tensor, noise: torch.Tensor, steps: int | None = None
    ) -> torch.Tensor:
        """Translate conditions, each with its noise, to images in [-1, 1].

        Args:
            condition: (n, condition_channels, height, width).
            noise: standard normal, (n, channels, height, width); unused by a deterministic model.
            steps: evaluations of the network; default: 20, of a deterministic model 1.
        """
        steps = self.check_steps(steps)
        size, tile = condition.shape[2:], self.tile
        missing = [max(0, own - side) for own, side in zip(tile, size, strict=True)]
        edges = (0, missing[1], 0, missing[0])  # of images smaller than a tile
        given, x = (
            F.pad(each.to(self.device, self.unet.dtype), edges, mode)
            for each, mode in ((condition, "replicate"), (noise, "constant"))
        )
        if self.deterministic:
            x = in_tiles(partial(self.predict, 0), x[:, :0], given, tile)
        else:
            scheduler = make_sampler(self.scheduler, steps)
            for t in scheduler.timesteps:
                predicted = in_tiles(partial(self.predict, t), x, given, tile)
                x = scheduler.step(predicted, t, x).prev_sample
        made = x[:, :, : size[0], : size[1]].clamp(-1, 1)
        return self._keep(made, condition.to(made))

    def predict(
        self, t: torch.Tensor | int, x: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """Return the network's prediction at a timestep; x has no channels without noise."""
        inputs = torch.cat([x, condition], 1)
        timesteps = torch.as_tensor(t).float().to(inputs.device).expand(len(inputs))
        return self.unet(inputs, timesteps).sample

    def _keep(self, made: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Keep what the condition knows for certain of the image."""
        if self.condition == "grey":
            return with_luminance(made, condition)
        if self.condition == "mask":
            return torch.where(condition[:, -1:] > 0, made, condition[:, :-1])
        return made

    def check_steps(self, steps: int | None) -> int:
        """Refuse steps that are out of range, or that a deterministic model does not have."""
        if self.deterministic:
            if steps not in (None, 1):
                raise ValueError(f"steps: this model takes a single one, got {steps!r}")
            return 1
        steps = STEPS if steps is None else steps
        if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"steps must be a whole number from 1 to {MOST_STEPS}, got {steps!r}")
        return steps

    @property
    def condition(self) -> str:
        """What it translates from, one of `CONDITIONS`."""
        return self.config.condition


def hide(images: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return images with the hidden pixels at 0, and a plane beside them: 1 where hidden, else -1.

    Args:
        hidden: bool, (n, 1, height, width).
    """
    return torch.cat([images.masked_fill(hidden, 0), hidden.to(images) * 2 - 1], 1)


def _tensor(image: Image.Image, channels: int) -> torch.Tensor:
    """Return a picture in [-1, 1], (1, channels, height, width)."""
    values = np.asarray(image.convert(MODES[channels]), np.float32)
    values = values.reshape(image.height, image.width, channels)
    return torch.from_numpy(values).permute(2, 0, 1)[None] / 127.5 - 1


def load_translation(folder: str | Path) -> TranslationPipeline:
    """Load a saved pipeline without running the code in its folder.

    Raises:
        ValueError: the folder holds no translation model.
    """
    index = Path(folder) / "model_index.json"
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if saved["_class_name"][-1] != TranslationPipeline.__name__:
            raise ValueError(f"its class is {saved['_class_name']}")
        if saved["condition"] not in CONDITIONS:
            raise ValueError(f"its condition is {saved['condition']!r:.80}")
        if list(index.parent.glob("unet/*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        kind = saved["scheduler"][1]
        scheduler = None
        if kind is not None:
            scheduler = SCHEDULERS[kind].from_pretrained(str(folder), subfolder="scheduler")
        unet, report = UNet2DModel.from_pretrained(
            str(folder), subfolder="unet", use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])}")
        pipeline = TranslationPipeline(unet.eval(), scheduler, saved["condition"])
        _check_shape(pipeline)
    except (OSError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no translation model ({error}); give the output folder "
            "of train_translation"
        ) from error
    return pipeline


def _check_shape(pipeline: TranslationPipeline) -> None:
    """Refuse a network whose channels or sides do not fit its condition."""
    made, given = pipeline.channels, pipeline.condition_channels
    fits = {"grey": (1,), "edges": (1,), "low": (made,), "mask": (made + 1,), "pairs": (1, 3)}
    if made not in MODES or given not in fits[pipeline.condition]:
        raise ValueError(f"from {given} to {made} channels do not fit {pipeline.condition}")
    step = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if not all(type(side) is int and side >= step and side % step == 0 for side in pipeline.tile):
        raise ValueError(f"its sample_size is {pipeline.tile}; sides are multiples of {step}")
