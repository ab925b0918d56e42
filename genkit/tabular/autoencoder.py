"""Trained autoencoders of tables: loading them by folder or Hub id."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from genkit import machine
from genkit.data.columns import Column
from genkit.engine.summary import summarize_pipeline
from genkit.hub import download, kinds, model_files, safe_weights, safety
from genkit.models import table_autoencoder
from genkit.models.table_autoencoder import TableAutoencoderPipeline

# its file travels without genkit, and cannot import it
TableAutoencoderPipeline.__repr__ = summarize_pipeline  # type: ignore[method-assign]


def load_autoencoder_model(
    model: str, revision: str | None = None, device: str | None = None
) -> TableAutoencoderPipeline:
    """Load an autoencoder of tables onto a device; the last ones are cached.

    Args:
        model: folder, or Hub id.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such model or device, or its files are unsafe.
    """
    where = machine.find_device(device)
    folder = download.fetch(model, revision).resolve()
    kinds.check_kind(folder, model, kinds.TABLE_AUTOENCODER)
    return _load(folder, model_files.last_written(folder), where, model)


@functools.lru_cache(maxsize=2)
def _load(folder: Path, written: int, device: torch.device, name: str) -> TableAutoencoderPipeline:
    with safety.opened(folder) as private:
        pipeline = table_autoencoder.load_table_autoencoder(private)
        safe_weights.check_loaded(pipeline.network)
    try:
        read_columns(pipeline)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"model: {name!r} is damaged: columns: {error}") from None
    pipeline.name = name
    return pipeline.to(device)


def read_columns(pipeline: TableAutoencoderPipeline) -> list[Column]:
    """Return the columns of the rows that an autoencoder takes."""
    fields = [field.name for field in dataclasses.fields(Column)]
    found = pipeline.network.config.columns
    return [Column(**{name: column[name] for name in fields}) for column in found]


def find_autoencoder(
    model: Any, revision: str | None = None, device: str | None = None
) -> TableAutoencoderPipeline | None:
    """Return an autoencoder of tables as it was given, or by its name; None for any other model.

    Raises:
        ValueError: it cannot be loaded; or it is, and there is an option for loading it.
    """
    machine.find_device(device)
    if isinstance(model, TableAutoencoderPipeline):
        kinds.refuse_loading(revision=revision, device=device)
        return model
    if not isinstance(model, str | Path):
        return None
    name = kinds.as_name(model)
    if kinds.kind_of(download.fetch_settings(name, revision)) != kinds.TABLE_AUTOENCODER:
        return None
    return load_autoencoder_model(name, revision, device)
