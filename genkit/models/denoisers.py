"""Denoisers, stock UNets of diffusers: made for training, saved and loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel

from genkit.files import weights_hash
from genkit.hub import vendoring
from genkit.models import latent_space
from genkit.models.diffusion import (
    FLOW_SAMPLERS,
    PLANES,
    SAMPLERS,
    DenoisingPipeline,
    Scheduler,
    objective_of,
    takes_planes,
)


def make_unet(
    image_size: Sequence[int],
    widths: Sequence[int],
    layers: int = 1,
    attention: bool = False,
    labels: int = 0,
    mean: bool = False,
    inputs: int | None = None,
    factor: int = 1,
) -> UNet2DModel:
    """Build a stock UNet, which halves the image between two widths.

    Args:
        image_size: channels, height, width.
        widths: channels, of the largest feature map first.
        layers: residual blocks at each size of the encoder; the decoder has one more.
        attention: self-attention in the smallest feature map.
        labels: number of classes; one more embedding stands for "no class". 0 for an unconditional
            model.
        mean: for a mean flow, whose input has further planes.
        inputs: channels of the input; default: those of the image, and these planes.
        factor: by which the sides of images are larger, where these are latents.

    Raises:
        ValueError: the image cannot be halved that often.
    """
    channels, height, width = image_size
    check_halvings(image_size, widths, factor)
    kinds = ["Attn" if attention and i == len(widths) - 1 else "" for i in range(len(widths))]
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=inputs or channels + (PLANES if mean else 0),
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


def check_halvings(image_size: Sequence[int], widths: Sequence[int], factor: int = 1) -> None:
    """Refuse images that cannot be halved between every two widths.

    Args:
        image_size: channels, height, width.
        widths: channels, of the largest feature map first.
        factor: by which the sides of images are larger, where these are latents.

    Raises:
        ValueError: naming a resolution that can.
    """
    _, height, width = image_size
    multiple = 2 ** (len(widths) - 1)
    if height % multiple or width % multiple:
        most = int(math.log2(math.gcd(height, width) & -math.gcd(height, width))) + 1
        raise ValueError(
            f"resolution: {len(widths)} widths need sides that are multiples of {multiple}, got "
            f"{'latents' if factor > 1 else 'images'} of {width} x {height}; give --resolution "
            f"{-(-max(height, width) // multiple) * multiple * factor}, or {most} widths at most"
        )


def start_from(network: UNet2DModel, folder: Path, vae: AutoencoderKL | None = None) -> Scheduler:
    """Give a new mean flow the weights of a trained flow: it begins with nearly its velocity.

    The fast waves of a flow's time are left out: see `diffusion.MEAN_TIMES`.

    Args:
        network: by `make_unet`.
        folder: of a flow or a mean flow of the same shape.
        vae: the autoencoder whose latents the mean flow denoises, if it does.

    Returns:
        The scheduler whose timesteps the network now has.

    Raises:
        ValueError: it is no flow, has another shape, or denoises something else.
    """
    pipeline = load_diffusion(folder)
    trained = pipeline.unet.state_dict()
    if objective_of(pipeline.scheduler) != "flow":
        raise ValueError(f"init_from: {folder.name!r} is no flow; train one by --objective flow")
    if _latents(pipeline.vae) != _latents(vae):
        raise ValueError(
            f"init_from: {folder.name!r} denoises {'pixels' if pipeline.vae is None else 'latents'}"
            f", this model {'pixels' if vae is None else 'latents'}"
            f"{'' if None in (pipeline.vae, vae) else ' of another autoencoder'}; give --latent as "
            "that run was given it"
        )
    own, scheduler = network.state_dict(), pipeline.scheduler
    if not pipeline.mean:
        first, whole = trained["conv_in.weight"], own["conv_in.weight"].clone()
        if whole[:, : first.shape[1]].shape == first.shape:
            whole[:, : first.shape[1]] = first  # the planes are 0 where the velocity is asked for
            trained["conv_in.weight"] = whole
        waves = trained["time_embedding.linear_1.weight"]
        trained["time_embedding.linear_1.weight"], slower = _without_fast_waves(waves)
        count = round(scheduler.config.num_train_timesteps / slower)
        scheduler = FlowMatchEulerDiscreteScheduler(count)
    shapes = {name: each.shape for name, each in own.items()}
    if {name: each.shape for name, each in trained.items()} != shapes:
        raise ValueError(
            f"init_from: {folder.name!r} has another shape than this model; give the same images, "
            "--widths, --layers, --attention and --conditional"
        )
    network.load_state_dict(trained)
    return scheduler


def _latents(vae: AutoencoderKL | None) -> str | None:
    """Return what identifies latents: the weights that make them; None for pixels."""
    return None if vae is None else weights_hash(vae)


def _without_fast_waves(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Leave out the fastest three eighths of the sines and cosines of time.

    Args:
        weight: of the first layer that sees them, (features, waves): all sines, then all cosines,
            in geometric order from 1 to nearly 1 / 10,000 of a radian a timestep.

    Returns:
        The weight for slower timesteps, where the next wave is the first; and how much slower.
    """
    half = weight.shape[1] // 2
    count, slow = 3 * half // 8, torch.zeros_like(weight)
    for start in (0, half):
        slow[:, start : start + half - count] = weight[:, start + count : start + half]
    return slow, 10_000 ** (count / half)


def is_stock(pipeline: DenoisingPipeline) -> bool:
    """Whether diffusers' DDPMPipeline can draw what this pipeline draws."""
    return not (pipeline.labels or pipeline.mean or pipeline.vae)


def save_diffusion(pipeline: DenoisingPipeline, folder: Path) -> None:
    """Save a pipeline as a stock one, or with the file of its class where no stock one would do."""
    if is_stock(pipeline):
        DDPMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(folder)
    else:
        vendoring.save_pipeline(pipeline, folder)


def load_diffusion(folder: str | Path) -> DenoisingPipeline:
    """Load a saved pipeline, stock or ours, without running the code in its folder.

    Raises:
        ValueError: the folder holds no diffusion model.
    """
    index = Path(folder) / "model_index.json"
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if saved["_class_name"] not in ("DDPMPipeline", ["diffusion", DenoisingPipeline.__name__]):
            raise ValueError(f"its class is {saved['_class_name']}")
        if list(index.parent.glob("unet/*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        kinds = {kind.__name__: kind for kind in (*SAMPLERS.values(), *FLOW_SAMPLERS.values())}
        scheduler = kinds[saved["scheduler"][1]].from_pretrained(str(folder), subfolder="scheduler")
        objective_of(scheduler)
        unet, report = UNet2DModel.from_pretrained(
            str(folder), subfolder="unet", use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])}")
        _check_sides(unet)
        vae = _load_vae(index.parent, saved.get("vae"), unet)
        if takes_planes(unet) and objective_of(scheduler) != "flow":
            raise ValueError(f"its scheduler, {saved['scheduler'][1]}, is no flow's")
    except (OSError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no diffusion model ({error}); give the output folder of "
            "train_diffusion, or a DDPMPipeline of diffusers"
        ) from error
    return DenoisingPipeline(unet.eval(), scheduler, vae)


def _load_vae(folder: Path, saved: Any, unet: UNet2DModel) -> AutoencoderKL | None:
    """Load the autoencoder whose latents a network denoises.

    Args:
        saved: library and class of the component; None, or a list of two, if there is none.
    """
    if saved in (None, [None, None]):
        return None
    vae = latent_space.load_vae(folder)
    made, taken = vae.config.latent_channels, unet.config.out_channels
    if made != taken:
        raise ValueError(f"its vae has {made} channels, its unet {taken}")
    return vae


def _check_sides(unet: UNet2DModel) -> None:
    """Refuse sides that cannot be halved as often as the network halves them."""
    size = unet.config.sample_size
    step = 2 ** (len(unet.config.block_out_channels) - 1)
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if not all(type(side) is int and side >= step and side % step == 0 for side in sides):
        raise ValueError(f"its sample_size is {size}; sides are multiples of {step}")
