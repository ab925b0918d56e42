"""Models that translate images: loading them by folder or Hub id."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from genkit import machine
from genkit.engine.summary import summarize_pipeline
from genkit.hub import download, kinds, model_files, safe_weights, safety
from genkit.models import translation
from genkit.models.translation import TranslationPipeline

# its file travels without genkit, and cannot import it
TranslationPipeline.__repr__ = summarize_pipeline  # type: ignore[method-assign]


def load_translation_model(
    model: str, revision: str | None = None, device: str | None = None
) -> TranslationPipeline:
    """Load a model that translates images onto a device; the last ones are cached.

    Args:
        model: folder, or Hub id.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such model or device, or its files are unsafe.
    """
    where = machine.find_device(device)
    folder = download.fetch(model, revision).resolve()
    kinds.check_kind(folder, model, kinds.TRANSLATION)
    pipeline = _load(folder, model_files.last_written(folder), where)
    pipeline.name = model
    return pipeline


@functools.lru_cache(maxsize=2)
def _load(folder: Path, written: int, device: torch.device) -> TranslationPipeline:
    with safety.opened(folder) as private:
        pipeline = translation.load_translation(private)
        safe_weights.check_loaded(pipeline.unet)
    return pipeline.to(device)
