"""The latents of an autoencoder, in which diffusion trains: a stock AutoencoderKL.

Source: Rombach et al. 2022, https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL


def load_vae(folder: Path) -> AutoencoderKL:
    """Load a stock AutoencoderKL from its own folder, or from that of a pipeline which has one.

    Raises:
        ValueError: the folder holds none.
    """
    part = "vae" if (folder / "model_index.json").exists() else ""
    home = folder / part
    try:
        saved = json.loads((home / "config.json").read_text(encoding="utf-8"))
        if saved["_class_name"] != AutoencoderKL.__name__:
            raise ValueError(f"its class is {saved['_class_name']!r:.80}")
        if list(home.glob("*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        vae, report = AutoencoderKL.from_pretrained(
            str(folder), subfolder=part, use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])}")
    except (OSError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} holds no AutoencoderKL ({error})") from error
    return vae.eval().requires_grad_(False)


def factor(vae: AutoencoderKL) -> int:
    """Return by which an image's sides are larger than those of its latents."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_size(vae: AutoencoderKL, size: Sequence[int]) -> None:
    """Refuse images that an autoencoder cannot encode.

    Args:
        size: channels, height, width.

    Raises:
        ValueError: the message names the setting that would do.
    """
    channels, height, width = size
    own, multiple = vae.config.in_channels, factor(vae)
    if channels != own:
        what = f"images of {own} channel{'s' * (own > 1)}"
        raise ValueError(
            f"latent: this autoencoder takes {what}, got {channels}; give --channels {own}, or "
            "another autoencoder"
        )
    if height % multiple or width % multiple:
        raise ValueError(
            f"latent: this autoencoder takes sides that are multiples of {multiple}, got images of "
            f"{width} x {height}; give --resolution {-(-max(height, width) // multiple) * multiple}"
        )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return the mean latents of images in [-1, 1], as they come, (n, channels, height, width)."""
    moments = vae.encode(images.to(vae.device)).latent_dist
    latents: torch.Tensor = moments.mode()
    return latents
