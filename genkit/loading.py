"""genkit.load: a saved model of any kind, from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genkit import garbage, machine
from genkit.hub import download, kinds, names
from genkit.text.language_model import DEFAULT, HINT, REVISION


@garbage.paused()
def load(
    model: str | Path = DEFAULT,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> Any:
    """Load a saved model of any kind; a second call returns the same one.

    Args:
        model: folder, Hub id, or GGUF file of a decoder; default: GPT-2.
        revision: a branch, tag or commit on the Hub.
        dtype, quantize, trust_remote_code: of language models and readers of answers, see
            `load_language_model` and `load_reader`; others take none of them.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        What its verb takes as a model: `genkit.generate` a language model, `genkit.answer` a
        reader, `genkit.evaluate` an image classifier as its extractor, `genkit.attack` a classifier
        of images or of texts, `genkit.stylize` a stylizer, `genkit.translate` a model that
        translates images, `genkit.fill` a model of tables, `genkit.features` an autoencoder of
        tables. Any other image model is a pipeline, which draws when it is called.

    Raises:
        ValueError: the model does not exist, its files are not safe, or an option cannot work.
    """
    machine.find_device(device)
    model = kinds.as_name(model)
    if model == DEFAULT and revision is None and not names.is_folder(model):
        revision = REVISION
    kind = kind_of_model(model, revision)
    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize}
    options["trust_remote_code"] = trust_remote_code
    _check_options(model, kind, options)
    # only what this kind of model needs is imported
    if kind == kinds.TEXT:
        from genkit.text import language_model

        return language_model.load_language_model(
            model, revision=revision, device=device, **options
        )
    if kind == kinds.ANSWERS:
        from genkit.qa import reader

        return reader.load_reader(model, revision=revision, device=device, **options)
    return _load_exact(kind, model, revision, device)


def kind_of_model(model: str, revision: str | None = None) -> str:
    """Return the kind of a model by its settings, which are fetched if it is on the Hub."""
    if names.is_gguf(model):
        return kinds.TEXT
    return kinds.kind_of(download.fetch_settings(model, revision, hint=HINT))


def _check_options(model: str, kind: str, options: dict[str, Any]) -> None:
    """Refuse options that models of this kind do not have."""
    if kind in (kinds.TEXT, kinds.ANSWERS):
        return
    for name, value in options.items():
        if value not in (None, False):
            raise ValueError(
                f"{name}={value!r} is for language models and readers of answers; {model!r} is a "
                f"{kind} model"
            )


def _load_exact(kind: str, model: str, revision: str | None, device: str | None) -> Any:
    """Load a model of a kind that takes neither a precision nor code of its own."""
    if kind == kinds.TEXT_CLASSIFIER:
        from genkit.text import classifiers

        return classifiers.load_text_classifier(model, revision=revision, device=device)
    if kind == kinds.CLASSIFIER:
        from genkit.metrics import features

        return features.load_extractor(model, revision, device)
    if kind in kinds.IMAGES:
        from genkit.vision import sampling

        return sampling.load_image_model(model, revision, device)
    if kind == kinds.STYLIZER:
        from genkit.vision import stylizers

        return stylizers.load_stylizer_model(model, revision, device)
    if kind == kinds.TRANSLATION:
        from genkit.vision import translators

        return translators.load_translation_model(model, revision, device)
    if kind == kinds.TABLE:
        from genkit.tabular import model as table_model

        return table_model.load_table_model(model, revision, device)
    if kind == kinds.TABLE_AUTOENCODER:
        from genkit.tabular import autoencoder

        return autoencoder.load_autoencoder_model(model, revision, device)
    if kind in (kinds.REWARD, kinds.ADAPTER):
        raise ValueError(f"model: {model!r} is {kinds.TAKEN[kind]}")
    raise ValueError(f"model: {model!r} makes images from text; pass it to genkit.imagine")
