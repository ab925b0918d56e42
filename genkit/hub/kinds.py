"""The kind of a saved model, by the settings in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genkit import files
from genkit.hub.model_files import ROOTS

LARGEST = 1 << 24  # bytes of a model's settings
TEXT, ANSWERS, CLASSIFIER = "text", "answers", "classifier"
AUTOENCODER, GAN, DIFFUSION, PIXELS = "autoencoder", "gan", "diffusion", "pixels"
IMAGES = (AUTOENCODER, GAN, DIFFUSION, PIXELS)  # which draw images
TEXT_TO_IMAGE = "text-to-image"

# by the class that model_index.json names: a stock one, or a file beside it and its class
PIPELINES: dict[Any, str] = {
    ("autoencoder", "AutoencoderPipeline"): AUTOENCODER,
    ("gan", "GANPipeline"): GAN,
    ("diffusion", "DenoisingPipeline"): DIFFUSION,
    "DDPMPipeline": DIFFUSION,
}
# genkit's own classes of components
COMPONENTS = {("autoencoder", "Autoencoder"), ("gan", "Generator")}
# by the end of the name of a transformers class
HEADS = {
    "ForQuestionAnswering": ANSWERS,
    "ForImageClassification": CLASSIFIER,
    "ForCausalLM": TEXT,
    "LMHeadModel": TEXT,
    "ForConditionalGeneration": TEXT,
}


def kind_of(folder: Path, argument: str = "model") -> str:
    """Return what kind of model a folder holds: one of the names above.

    Args:
        argument: the name of the folder's argument, for messages.

    Raises:
        ValueError: the folder holds no model, or one of a kind that genkit does not support.
    """
    name = next((name for name in ROOTS if (folder / name).exists()), ROOTS[-1])
    settings = _read_settings(folder, name, argument)
    found = _pipeline_kind(settings) if name == "model_index.json" else _network_kind(settings)
    if found is None:
        what = settings.get("_class_name") or settings.get("architectures")
        raise ValueError(
            f"{argument}: {str(folder)!r} holds a {what}; language models, readers of answers, "
            "image classifiers, autoencoders, GANs, diffusion models, models of pixels and "
            "diffusers' text-to-image pipelines are supported"
        )
    return found


def _read_settings(folder: Path, name: str, argument: str) -> dict[str, Any]:
    try:
        settings = json.loads(files.read_inside(folder / name, folder, LARGEST).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{argument}: {str(folder)!r} holds no model ({name}: {error}); give the folder of one "
            "that a recipe trained, or the id of one on the Hub"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"{argument}: {name} in {str(folder)!r} holds no settings of a model")
    return settings


def _pipeline_kind(settings: dict[str, Any]) -> str | None:
    name = settings.get("_class_name")
    if isinstance(name, list):
        return PIPELINES.get(tuple(map(str, name)))
    if not isinstance(name, str):
        return None
    has_prompt = any(part.startswith("text_encoder") for part in settings)
    return PIPELINES.get(name, TEXT_TO_IMAGE if has_prompt else None)


def _network_kind(settings: dict[str, Any]) -> str | None:
    if "pixels" in settings:
        return PIXELS
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return next((kind for end, kind in HEADS.items() if name.endswith(end)), None)
