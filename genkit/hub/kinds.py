"""The kind of a saved model, by the settings in its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from genkit import files
from genkit.hub import names
from genkit.hub.model_files import ADAPTERS, ROOTS, is_model

LARGEST = 1 << 24  # bytes of a model's settings
TEXT, ANSWERS, CLASSIFIER = "text", "answers", "classifier"
TEXT_CLASSIFIER, REWARD = "text classifier", "reward model"
AUTOENCODER, GAN, DIFFUSION, PIXELS = "autoencoder", "gan", "diffusion", "pixels"
IMAGES = (AUTOENCODER, GAN, DIFFUSION, PIXELS)  # which draw images
TEXT_TO_IMAGE, STYLIZER, TRANSLATION = "text-to-image", "stylizer", "translation"
TABLE, TABLE_AUTOENCODER = "table", "table autoencoder"
ADAPTER = "adapter"  # of a text-to-image pipeline: low-rank weights, or new words
ON_PAGE = (TEXT, ANSWERS, CLASSIFIER, *IMAGES)  # which the page has a tab for

# by the class that model_index.json names: a stock one, or a file beside it and its class
PIPELINES: dict[Any, str] = {
    ("autoencoder", "AutoencoderPipeline"): AUTOENCODER,
    ("gan", "GANPipeline"): GAN,
    ("diffusion", "DenoisingPipeline"): DIFFUSION,
    ("stylizer", "StylizerPipeline"): STYLIZER,
    ("translation", "TranslationPipeline"): TRANSLATION,
    ("text_diffusion", "TextDiffusionPipeline"): TEXT_TO_IMAGE,
    ("table_autoencoder", "TableAutoencoderPipeline"): TABLE_AUTOENCODER,
    "DDPMPipeline": DIFFUSION,
}
# genkit's own classes of components
COMPONENTS = {
    *(("autoencoder", "Autoencoder"), ("gan", "Generator"), ("stylizer", "Stylizer")),
    ("table_autoencoder", "TableAutoencoder"),
}
# by the end of the name of a transformers class
HEADS = {
    "ForQuestionAnswering": ANSWERS,
    "ForImageClassification": CLASSIFIER,
    "ForSequenceClassification": TEXT_CLASSIFIER,
    "ForCausalLM": TEXT,
    "LMHeadModel": TEXT,
    "ForConditionalGeneration": TEXT,
}
# what each kind is, and the verb that takes it
TAKEN = {
    TEXT: "a language model, which genkit.generate takes",
    ANSWERS: "a reader of answers, which genkit.answer takes",
    CLASSIFIER: "an image classifier, which genkit.attribute and genkit.attack take",
    TEXT_CLASSIFIER: "a classifier of texts, which genkit.attack takes",
    REWARD: "a reward model, which genkit compare --reward and recipes/align.py --reward take",
    AUTOENCODER: "an autoencoder, which genkit.sample takes",
    GAN: "a GAN, which genkit.sample takes",
    DIFFUSION: "a diffusion model, which genkit.sample takes",
    PIXELS: "a model of pixels, which genkit.sample takes",
    TEXT_TO_IMAGE: "a text-to-image pipeline, which genkit.imagine takes",
    STYLIZER: "a stylizer, which genkit.stylize takes",
    TRANSLATION: "a model that translates images, which genkit.translate takes",
    TABLE: "a model of tables, which genkit.sample_table, fill and anomalies take",
    TABLE_AUTOENCODER: "an autoencoder of tables, which genkit.features and fill take",
    ADAPTER: "an adapter of a text-to-image pipeline, which genkit.imagine takes as its adapter",
}
DRAWS = "an image pipeline, which draws when it is called"
# the same of models that genkit.load has returned, by their classes
LOADED = {
    "LanguageModel": TAKEN[TEXT],
    "Reader": TAKEN[ANSWERS],
    "Classifier": TAKEN[CLASSIFIER],
    "TextClassifier": TAKEN[TEXT_CLASSIFIER],
    "AutoencoderPipeline": DRAWS,
    "GANPipeline": DRAWS,
    "DenoisingPipeline": DRAWS,
    "PixelPipeline": DRAWS,
    "StylizerPipeline": TAKEN[STYLIZER],
    "TranslationPipeline": TAKEN[TRANSLATION],
    "TableModel": TAKEN[TABLE],
    "TableAutoencoderPipeline": TAKEN[TABLE_AUTOENCODER],
}


def kind_of(folder: Path, argument: str = "model") -> str:
    """Return what kind of model a folder holds: one of the names above.

    Args:
        argument: the name of the folder's argument, for messages.

    Raises:
        ValueError: the folder holds no model, or one of a kind that genkit does not support.
    """
    if not is_model(folder) and any((folder / name).exists() for name in ADAPTERS):
        return ADAPTER
    name = next((name for name in ROOTS if (folder / name).exists()), ROOTS[-1])
    settings = _read_settings(folder, name, argument)
    found = _pipeline_kind(settings) if name == "model_index.json" else _network_kind(settings)
    if found is None:
        what = settings.get("_class_name") or settings.get("architectures")
        raise ValueError(
            f"{argument}: {names.describe(folder)!r} holds a {what}; language models, readers of "
            "answers, classifiers of images and of texts, reward models, autoencoders, GANs, "
            "diffusion models, models of pixels and of tables, stylizers, models that translate "
            "images and diffusers' text-to-image pipelines are supported"
        )
    return found


def check_kind(folder: Path, name: str, wanted: str, argument: str = "model") -> None:
    """Refuse a saved model of another kind; one of no kind that is known may be of this one.

    Args:
        name: by which the user gave it, for the message.

    Raises:
        ValueError: it is of another kind; the verb that takes it is named.
    """
    try:
        found = kind_of(folder, argument)
    except ValueError:
        return
    if found != wanted:
        raise ValueError(f"{argument}: cannot load {name!r}: it is {TAKEN[found]}")


def check_loaded(model: Any, argument: str = "model", takes: str = "") -> None:
    """Refuse a loaded model of another kind.

    Args:
        takes: the name of the class that the argument takes.

    Raises:
        ValueError: it is of another kind; the verb that takes it is named.
    """
    cls = type(model).__name__
    if cls in LOADED and cls != takes:
        raise ValueError(f"{argument}: this {cls} is {LOADED[cls]}")


def refuse_loading(**options: Any) -> None:
    """Refuse options of loading for a model that is loaded; those that are None were not given.

    Raises:
        ValueError: one is given; it is named.
    """
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} is for loading; the model given is loaded")


def as_name(model: Any, argument: str = "model") -> str:
    """Return the name of a model, a folder or a Hub id, as a text.

    Raises:
        ValueError: it is something else, such as a loaded model of another kind.
    """
    check_loaded(model, argument)
    if not isinstance(model, str | os.PathLike):
        raise ValueError(
            f"{argument} must be a folder or a Hub id, got a {type(model).__name__}; save it to a "
            "folder first"
        )
    name = os.path.expanduser(os.fspath(model))  # noqa: PTH111  Path's own raises for unknown users
    # a path, as an object, is never an id
    return name if isinstance(model, str) or names.is_path(name) else f"./{name}"


def _read_settings(folder: Path, name: str, argument: str) -> dict[str, Any]:
    try:
        settings = json.loads(files.read_inside(folder / name, folder, LARGEST).decode())
    except (OSError, ValueError, RecursionError) as error:
        shown = names.describe(folder)
        why = files.reason(error).replace(str(folder), shown)
        raise ValueError(
            f"{argument}: {shown!r} holds no model ({name}: {why}); give the folder of one that a "
            "recipe trained, or the id of one on the Hub"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{argument}: {name} in {names.describe(folder)!r} holds no settings of a model"
        )
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
    if "table" in settings:
        return TABLE
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind = next((kind for end, kind in HEADS.items() if name.endswith(end)), None)
    labels = settings.get("id2label")  # written unless they are two
    one = isinstance(labels, dict) and len(labels) == 1
    return REWARD if kind == TEXT_CLASSIFIER and one else kind
