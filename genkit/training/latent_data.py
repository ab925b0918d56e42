"""Images of a run as latents of an autoencoder."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from diffusers import AutoencoderKL

from genkit.data.images import Images
from genkit.data.latents import Latents, encode_images
from genkit.files import weights_hash
from genkit.hub import download, safe_weights, safety
from genkit.models import latent_space
from genkit.training.run import Run

HINT = "give the output folder of train_vae --network spatial, or an AutoencoderKL of diffusers"


def load_latents(
    run: Run, name: str, train: Images, val: Images
) -> tuple[AutoencoderKL, Latents, Latents]:
    """Load an autoencoder and encode images by it, once a machine.

    Args:
        name: folder or Hub id of an AutoencoderKL, or of a pipeline that has one.
        train, val: images to train and to validate on.

    Returns:
        The autoencoder, whose scaling_factor gives the training latents a deviation of 1; latents
        of the images, so scaled.

    Raises:
        ValueError: there is no such autoencoder, or it does not fit the images.
    """
    vae = _load_vae(name).to(run.device)
    latent_space.check_size(vae, train.size)
    encode, identity = partial(latent_space.encode, vae), weights_hash(vae)
    with run.accelerator.local_main_process_first():
        encoded = [encode_images(part, encode, identity) for part in (train, val)]
    deviation = encoded[0].deviation()
    if not deviation:
        raise ValueError(f"latent: {name!r} encodes all images alike; give another autoencoder")
    # libraries would note the folder that was read, which is a private one
    vae.register_to_config(scaling_factor=1 / deviation, _name_or_path=Path(name).name)
    first, second = (dataclasses.replace(part, scale=1 / deviation) for part in encoded)
    return vae, first, second


def _load_vae(name: str) -> AutoencoderKL:
    """Load an autoencoder once its files have been checked."""
    folder = download.fetch(name, argument="latent", hint=HINT.capitalize())
    with safety.opened(folder, argument="latent") as private:
        try:
            vae = latent_space.load_vae(private)
        except ValueError as error:
            raise ValueError(f"{error}; {HINT}") from error
        safe_weights.check_loaded(vae)
    return vae
