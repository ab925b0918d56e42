"""What a saved model is, told from the settings in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genkit import files

LARGEST = 1 << 24  # bytes of a model's settings
TEXT, ANSWERS, CLASSIFIER = "text", "answers", "classifier"
AUTOENCODER, GAN, DIFFUSION, PIXELS = "autoencoder", "gan", "diffusion", "pixels"
IMAGES = (AUTOENCODER, GAN, DIFFUSION, PIXELS)  # which draw images
PICTURES = "text-to-image"

# names of classes, as model_index.json has them: a stock one, or a file beside it and its class
PIPELINES: dict[Any, str] = {
    ("autoencoder", "AutoencoderPipeline"): AUTOENCODER,
    ("gan", "GANPipeline"): GAN,
    ("diffusion", "DenoisingPipeline"): DIFFUSION,
    "DDPMPipeline": DIFFUSION,
}
# classes of components that are ours
COMPONENTS = {("autoencoder", "Autoencoder"), ("gan", "Generator")}
# ends of the names of transformers' classes
HEADS = {
    "ForQuestionAnswering": ANSWERS,
    "ForImageClassification": CLASSIFIER,
    "ForCausalLM": TEXT,
    "LMHeadModel": TEXT,
    "ForConditionalGeneration": TEXT,
}


def is_model(folder: Path) -> bool:
    """Tell the folder of a saved model from any other."""
    return any((folder / name).exists() for name in ("model_index.json", "config.json"))


def kind_of(folder: Path, argument: str = "model") -> str:
    """Return what kind of model a folder holds: one of the names above.

    Args:
        argument: how an error calls what was given.

    Raises:
        ValueError: none, or one that genkit does not know.
    """
    pipeline = (folder / "model_index.json").exists()
    settings = _read(folder, "model_index.json" if pipeline else "config.json", argument)
    found = _pipeline(settings) if pipeline else _network(settings)
    if found is None:
        what = settings.get("_class_name") or settings.get("architectures")
        raise ValueError(
            f"{argument}: {str(folder)!r} holds a {what}; language models, readers of answers, "
            "image classifiers, autoencoders, GANs, diffusion models, models of pixels and "
            "diffusers' text-to-image pipelines are known"
        )
    return found


def _read(folder: Path, name: str, argument: str) -> dict[str, Any]:
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


def _pipeline(settings: dict[str, Any]) -> str | None:
    name = settings.get("_class_name")
    if isinstance(name, list):
        return PIPELINES.get(tuple(map(str, name)))
    if not isinstance(name, str):
        return None
    told = any(part.startswith("text_encoder") for part in settings)
    return PIPELINES.get(name, PICTURES if told else None)


def _network(settings: dict[str, Any]) -> str | None:
    if "pixels" in settings:
        return PIXELS
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return next((kind for end, kind in HEADS.items() if name.endswith(end)), None)
