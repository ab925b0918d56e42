"""Denoising autoencoders of tables: the network, and a pipeline from rows to features and values.

Rows are float64 arrays, (n, columns): of a category its index, of a number itself, of a date the
days since 1970, and NaN for a gap. The file stands alone: it travels with every model that it
saved, which therefore loads without genkit. Losses are in table_autoencoder_losses.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from numpy.typing import NDArray

Array = NDArray[np.float64]
CATEGORY = "category"
AT_ONCE = 1024  # rows
POINTS = 32  # of the distribution of a number, evenly by probability
INTERVAL = (0.05, 0.95)  # levels of the ends of an interval

# ---------------------------------------------------------------------------------------------
# Network


def column_sizes(columns: Sequence[dict[str, Any]]) -> list[int]:
    """Return the number of categories of each column; 0 for a number or a date."""
    return [max(1, len(c["categories"])) if c["kind"] == CATEGORY else 0 for c in columns]


class TableAutoencoder(ModelMixin, ConfigMixin):
    """A noisy row in, the clean one out; the activations of all hidden layers are its features.

    The network reads scores, (n, columns): of a number its normal score by rank, of a category its
    index, NaN for a gap. A category enters as one-hot, a gap as a mark of its own.

    Args:
        columns: of the table: of each at least its name, its kind ("category", "number", "date")
            and its categories.
        knots: of each column, values of a number, rising, and their scores; two empty lists for a
            category.
        widths: of the hidden layers.

    Source: Vincent et al. 2010, https://jmlr.org/papers/v11/vincent10a.html; with swap noise and
        ranks as scores, Jahrer 2018, the winner of Kaggle's Porto Seguro.
    """

    @register_to_config
    def __init__(
        self,
        columns: Sequence[dict[str, Any]],
        knots: Sequence[Sequence[Sequence[float]]],
        widths: Sequence[int] = (256, 256, 256),
    ) -> None:
        super().__init__()
        sizes = column_sizes(columns)
        if len(knots) != len(sizes) or not widths:
            raise ValueError("knots and widths must be given, one of each column and layer")
        first = np.cumsum([0] + [size + 1 for size in sizes])  # a mark of a gap, then categories
        self.register_buffer("first", torch.tensor(first[:-1]), persistent=False)
        self.register_buffer("is_category", torch.tensor(sizes) > 0, persistent=False)
        self.marks = int(first[-1])
        inputs = [self.marks + len(sizes), *widths[:-1]]
        self.hidden = torch.nn.ModuleList(map(torch.nn.Linear, inputs, widths))
        self.predict = torch.nn.Linear(widths[-1], sum(size or 1 for size in sizes))
        # how far a number that is left out is from its prediction: a standard deviation of scores
        self.register_buffer("errors", torch.ones(len(sizes)))

    def forward(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return predictions and features.

        Returns:
            The score of a number and the logits of a category, one column after the other,
            (n, predictions); and hidden activations, (n, sum of widths).
        """
        is_gap = scores.isnan()
        known = scores.nan_to_num(0.0)
        marks = scores.new_zeros(len(scores), self.marks)
        place = torch.where(self.is_category & ~is_gap, known.long() + 1, 0)
        marks.scatter_(1, self.first + place, (self.is_category | is_gap).to(scores.dtype))
        x = torch.cat([marks, torch.where(self.is_category, 0.0, known)], 1)
        features = []
        for layer in self.hidden:
            x = layer(x).relu()
            features.append(x)
        return self.predict(x), torch.cat(features, 1)

    def to_scores(self, values: Array) -> torch.Tensor:
        """Return rows as the network reads them, (n, columns), float32.

        Numbers beyond those of training become the outermost of these.
        """
        scores = [
            np.where(np.isnan(own), np.nan, np.interp(own, *knots)) if knots[0] else own
            for own, knots in zip(values.T, self.config.knots, strict=True)
        ]
        return torch.from_numpy(np.stack(scores, 1)).float()


# ---------------------------------------------------------------------------------------------
# Pipeline


@dataclass
class TableOutput(BaseOutput):
    """What an autoencoder makes of rows.

    Args:
        features: hidden activations, (n, sum of widths), float32.
        expected: of each cell, (n, columns): the mean of a number, the likeliest category.
        low, high: ends of an interval of 90 % of what a number may be if it is a gap, (n, columns);
            NaN for categories.
        probability: of the category in `expected`, (n, columns); NaN for numbers.
    """

    features: NDArray[np.float32]
    expected: Array
    low: Array
    high: Array
    probability: Array


class TableAutoencoderPipeline(DiffusionPipeline):
    """Turns rows into features for another model, and fills their gaps.

    Args:
        network: a TableAutoencoder; `network.config.columns` says what the columns are.
    """

    def __init__(self, network: TableAutoencoder) -> None:
        super().__init__()
        self.register_modules(network=network)

    @torch.no_grad()
    def __call__(self, values: Array, return_dict: bool = True) -> Any:
        """Return a TableOutput of rows.

        Args:
            values: (n, columns), NaN for gaps; see the top of this file.
        """
        columns = len(self.network.config.columns)
        if values.ndim != 2 or values.shape[1] != columns:
            raise ValueError(f"values must be (rows, {columns}), got {values.shape}")
        parts = []
        for start in range(0, max(1, len(values)), AT_ONCE):
            scores = self.network.to_scores(values[start : start + AT_ONCE])
            parts.append([part.cpu() for part in self.network(scores.to(self.device))])
        predictions, features = (torch.cat(part) for part in zip(*parts, strict=True))
        output = TableOutput(features.float().numpy(), *self._expect(predictions.double()))
        return output if return_dict else output.to_tuple()

    def _expect(self, predictions: torch.Tensor) -> Array:
        """Return what is expected, low, high and probability, (4, n, columns)."""
        config = self.network.config
        levels = np.concatenate([(np.arange(POINTS) + 0.5) / POINTS, INTERVAL])
        z = torch.special.ndtri(torch.from_numpy(levels)).numpy()
        sizes = column_sizes(config.columns)
        found = np.full((4, len(predictions), len(sizes)), np.nan)
        columns = predictions.split([size or 1 for size in sizes], 1)
        for j, (size, own) in enumerate(zip(sizes, columns, strict=True)):
            if size:
                probability, likeliest = own.softmax(1).max(1)
                found[0, :, j], found[3, :, j] = likeliest.numpy(), probability.numpy()
                continue
            values, scores = config.knots[j]
            points = np.interp(own.numpy() + float(self.network.errors[j]) * z, scores, values)
            found[0, :, j] = points[:, :POINTS].mean(1)
            found[1, :, j], found[2, :, j] = points[:, POINTS:].T
        return found


def load_table_autoencoder(folder: str | Path) -> TableAutoencoderPipeline:
    """Load a saved pipeline without running the code in its folder.

    Raises:
        ValueError: the folder holds no autoencoder of tables.
    """
    index = Path(folder) / "model_index.json"
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if saved["_class_name"][-1] != TableAutoencoderPipeline.__name__:
            raise ValueError(f"its class is {saved['_class_name']}")
        if list(index.parent.glob("network/*.index.json")):  # its names could lead anywhere
            raise ValueError("its weights are in several files")
        network, report = TableAutoencoder.from_pretrained(
            str(folder), subfolder="network", use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])}")
        network.to_scores(np.zeros((1, len(network.config.columns))))
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: {str(folder)!r} holds no autoencoder of tables ({error}); give the output "
            "folder of train_table_autoencoder"
        ) from error
    return TableAutoencoderPipeline(network.eval())
