"""genkit.features: rows of a table as features for another model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genkit.arguments import explain_names
from genkit.hub import kinds
from genkit.models.table_autoencoder import TableAutoencoderPipeline
from genkit.notebook import TextRecord
from genkit.tabular import writing
from genkit.tabular.autoencoder import find_autoencoder, load_autoencoder_model, read_columns
from genkit.tabular.reading import Given, read_values


@dataclass(frozen=True)
class Features(TextRecord):
    """Rows of a table as features, in their order.

    Args:
        names: of the features.
        values: hidden activations, (rows, features), float32.
        notes: what should be said of the table.
        model: name of the autoencoder.
    """

    names: list[str] = field(repr=False)
    values: NDArray[np.float32] = field(repr=False)
    notes: list[str]
    model: str

    def __str__(self) -> str:
        rows, count = self.values.shape
        always = int((self.values == 0).all(0).sum())
        said = f", {always:,} of which are 0 in all rows" if always else ""
        total = f"{rows:,} rows, {count:,} features of {self.model}{said}"
        return "\n".join([total, *(f"! {note}" for note in self.notes)])

    def save(self, path: str | Path) -> None:
        """Write the features as a table, CSV or Parquet, by the ending of the file's name."""
        writing.save_numbers(self.names, self.values, path)


@explain_names
def features(
    data: Given,
    *,
    model: str | Path | TableAutoencoderPipeline,
    revision: str | None = None,
    device: str | None = None,
) -> Features:
    """Turn rows of a table into features for another model: hidden activations of an autoencoder.

    Args:
        data: a file (csv, parquet, jsonl), a dataset or a Hub id; in Python also rows, as
            dictionaries.
        model: folder or Hub id of an autoencoder of tables, or what `genkit.load` returned.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: an argument is invalid, or a cell is no value of its column.
    """
    pipeline = _load(model, revision, device)
    given = read_values(data, read_columns(pipeline))
    found = pipeline(given.values).features
    names = [f"feature_{i}" for i in range(found.shape[1])]
    return Features(names, found, given.notes, getattr(pipeline, "name", "this model"))


def _load(model: Any, revision: str | None, device: str | None) -> TableAutoencoderPipeline:
    found = find_autoencoder(model, revision, device)
    return found or load_autoencoder_model(kinds.as_name(model), revision, device)
