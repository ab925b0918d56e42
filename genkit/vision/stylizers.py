"""Trained stylizers: loading them by folder or Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genkit import machine
from genkit.engine.summary import summarize_pipeline
from genkit.hub import download, kinds, safe_weights, safety
from genkit.models import stylizer
from genkit.models.stylizer import StylizerPipeline

# its file travels without genkit, and cannot import it
StylizerPipeline.__repr__ = summarize_pipeline  # type: ignore[method-assign]


def load_stylizer_model(
    model: str, revision: str | None = None, device: str | None = None
) -> StylizerPipeline:
    """Load a stylizer onto a device.

    Args:
        model: folder, or Hub id.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such model or device, or its files are unsafe.
    """
    where = machine.find_device(device)
    folder = download.fetch(model, revision)
    kinds.check_kind(folder, model, kinds.STYLIZER)
    with safety.opened(folder) as private:
        pipeline = stylizer.load_stylizer(private)
        safe_weights.check_loaded(pipeline.stylizer)
    pipeline.name = model
    return pipeline.to(where)


def find_stylizer(
    model: Any, revision: str | None = None, device: str | None = None
) -> StylizerPipeline | None:
    """Return a stylizer as it was given, or by its name; None for any other model.

    Raises:
        ValueError: see `load_stylizer_model`.
    """
    machine.find_device(device)
    if isinstance(model, StylizerPipeline):
        return model
    if not isinstance(model, str | Path):
        return None
    name = kinds.as_name(model)
    found = kinds.kind_of(download.fetch_settings(name, revision))
    return load_stylizer_model(name, revision, device) if found == kinds.STYLIZER else None
