"""A table model as it is saved and loaded: a stock decoder, and table.json with its columns."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel, PreTrainedModel

from genkit import machine
from genkit.data.columns import Column
from genkit.data.order import blocks
from genkit.hub import download, kinds, model_files, safe_weights, safety
from genkit.models import table as tokens
from genkit.models.gaussian import Gaussian
from genkit.models.margins import Margin
from genkit.models.residual_bins import Bins
from genkit.models.table import TableFormat

Array = NDArray[np.float64]
FILE = "table.json"
AT_ONCE = 256  # rows that are scored at once


@dataclasses.dataclass(frozen=True)
class TableModel:
    """A model of tables.

    Args:
        model: a decoder by `genkit.models.table.make_model`, or loaded.
        columns: of the table.
        table: the columns as tokens.
        usual: how surprising rows that were held out are, in nats, rising.
        usual_columns: how surprising each column of such rows is on average, given all others.
        window: rows of a series that make one row of the model; 0 for a table.
        name: folder or Hub id.
    """

    model: PreTrainedModel
    columns: Sequence[Column]
    table: TableFormat
    usual: Sequence[float] = ()
    usual_columns: Sequence[float] = ()
    window: int = 0
    name: str = "this model"

    def __repr__(self) -> str:
        kinds_of = [column.kind for column in self.columns]
        counts = ", ".join(f"{kinds_of.count(kind)} {kind}" for kind in dict.fromkeys(kinds_of))
        return (
            f"table model of {len(self.columns)} columns ({counts}), "
            f"{self.model.num_parameters():,} parameters, on {self.model.device}"
        )

    @property
    def series_columns(self) -> list[Column]:
        """The columns of a series whose windows these are."""
        count = len(self.columns) // self.window
        return [
            dataclasses.replace(column, name=column.name.rpartition(" ")[0])
            for column in self.columns[:count]
        ]

    def log_densities(self, values: Array, orders: NDArray[np.int64]) -> Array:
        """Return the log density of each value given those before it, (n, columns).

        Args:
            values: (n, columns), NaN for gaps.
            orders: of the columns, (n, columns).

        Returns:
            By column, not by place in the order. Of categories and gaps log probabilities; of
            numbers log densities, of an atom its probability over the step of the numbers.
        """
        found = np.zeros(values.shape)
        answers = self.table.answers.to(self.model.device)
        for some in blocks(len(values), AT_ONCE):
            batch = self.table.encode(values[some], orders[some])
            with torch.inference_mode():
                logs = tokens.log_probabilities(self.model, batch.to(self.model.device), answers)
            density = machine.to_float64(logs).cpu() + batch.inside
            own = np.zeros((len(some), self.table.count))
            np.put_along_axis(own, batch.orders.numpy(), density.numpy(), 1)
            found[some] = own
        return found

    def log_density(self, values: Array) -> Array:
        """Return the log density of rows, (n,): the mean density over the model's orders."""
        logs = [
            self.log_densities(values, np.tile(order, (len(values), 1))).sum(1)
            for order in self.table.orders
        ]
        return np.logaddexp.reduce(logs, 0) - math.log(len(logs))

    def surprises(self, values: Array) -> Array:
        """Return how surprising each value is given all others of its row, in nats, (n, columns).

        Gaps are not surprising.
        """
        count, found = self.table.count, np.zeros(values.shape)
        for j in range(count):
            order = [i for i in self.table.orders[j % len(self.table.orders)] if i != j]
            orders = np.tile([*order, j], (len(values), 1))
            found[:, j] = -self.log_densities(values, orders)[:, j]
        return np.where(np.isnan(values), 0.0, found)


# ---------------------------------------------------------------------------------------------
# table.json


def save_table(table_model: TableModel, folder: Path) -> None:
    """Write the model as transformers does, and its columns beside it."""
    table_model.model.save_pretrained(folder)
    table = table_model.table
    columns = []
    for j, column in enumerate(table_model.columns):
        margin = table.margins[j]
        own = dataclasses.asdict(column) | {"first_token": int(table.value_tokens[j])}
        own |= {"shares": list(table.shares[j]), "atoms": list(table.atoms[j])}
        own |= {"margin": dataclasses.asdict(margin) if margin else None}
        own |= {"size": table.sizes[j], "step": table.steps[j], "gap_share": table.gaps[j]}
        columns.append(own)
    content = {
        "columns": columns,
        "bins": list(table.bins.borders),
        "mean": table.gaussian.mean.tolist(),
        "covariance": table.gaussian.covariance.tolist(),
        "orders": table.orders.tolist(),
        "usual": list(table_model.usual),
        "usual_columns": list(table_model.usual_columns),
        "window": table_model.window,
    }
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def read_table(folder: Path) -> dict[str, Any]:
    """Read table.json: the columns, the format, what is usual and the window.

    Raises:
        ValueError: it is damaged; KeyError and TypeError likewise.
    """
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    fields = [field.name for field in dataclasses.fields(Column)]
    rows = content["columns"]
    columns = [Column(**{name: row[name] for name in fields}) for row in rows]
    table = TableFormat(
        sizes=[_whole(row["size"]) for row in rows],
        gaps=[float(row["gap_share"]) for row in rows],
        margins=[Margin(**row["margin"]) if row["margin"] else None for row in rows],
        shares=[list(map(float, row["shares"])) for row in rows],
        atoms=[list(map(float, row["atoms"])) for row in rows],
        steps=[float(row["step"]) for row in rows],
        gaussian=Gaussian(
            torch.tensor(content["mean"], dtype=torch.float64),
            torch.tensor(content["covariance"], dtype=torch.float64),
        ),
        bins=Bins(list(map(float, content["bins"]))),
        orders=np.array(content["orders"], np.int64),
    )
    _check_format(table)
    usual = {name: list(map(float, content[name])) for name in ("usual", "usual_columns")}
    if len(usual["usual_columns"]) != table.count:
        raise ValueError(f"{FILE} contradicts itself")
    window = _whole(content["window"])
    return {"columns": columns, "table": table, "window": window, **usual}


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 20:
        raise ValueError(f"{FILE} has {value!r:.40} where it needs a whole number")
    return value


def _check_format(table: TableFormat) -> None:
    """Refuse what contradicts itself."""
    count, features = table.count, len(table.owners)
    orders = np.sort(table.orders, 1)
    right = table.gaussian.mean.shape == (features,)
    right &= table.gaussian.covariance.shape == (features, features)
    right &= orders.ndim == 2 and (orders == np.arange(count)).all()
    for j, (margin, size) in enumerate(zip(table.margins, table.sizes, strict=True)):
        right &= (margin is None) == (size > 0)
        right &= len(table.shares[j]) == (size or len(table.atoms[j]))
        right &= table.steps[j] > 0 and 0 <= table.gaps[j] <= 1
    if not right:
        raise ValueError(f"{FILE} contradicts itself")


# ---------------------------------------------------------------------------------------------
# Loading


def load_table_model(
    model: str, revision: str | None = None, device: str | None = None
) -> TableModel:
    """Load a table model onto a device; the last ones are cached.

    Args:
        model: folder, or Hub id.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Raises:
        ValueError: there is no such model or device, or its files are unsafe.
    """
    where = machine.find_device(device)
    folder = download.fetch(model, revision).resolve()
    kinds.check_kind(folder, model, kinds.TABLE)
    return _load(folder, model_files.last_written(folder), where, model)


@functools.lru_cache(maxsize=2)
def _load(folder: Path, written: int, device: torch.device, name: str) -> TableModel:
    with safety.opened(folder) as private:
        try:
            parts = read_table(private)
            network, report = GPT2LMHeadModel.from_pretrained(
                private, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{FILE} is damaged: {type(error).__name__} {error}") from None
        safe_weights.check_loaded(network, report)
    table, config = parts["table"], network.config
    if config.vocab_size != table.vocab_size or config.n_positions < 2 * table.count:
        raise ValueError(
            f"model: {name!r}: {FILE} needs {table.vocab_size} tokens, and the model has "
            f"{config.vocab_size}"
        )
    return TableModel(network.eval().to(device), name=name, **parts)


def as_table_model(
    model: Any, revision: str | None = None, device: str | None = None
) -> TableModel:
    """Return a table model that is loaded, or load one by its name.

    Raises:
        ValueError: it cannot be loaded; or it is, and there is an option for loading it.
    """
    if isinstance(model, TableModel):
        kinds.refuse_loading(revision=revision, device=device)
        return model
    kinds.check_loaded(model, takes="TableModel")
    return load_table_model(kinds.as_name(model), revision, device)


def check_no_series(model: TableModel, verb: str) -> None:
    """Refuse a model of windows.

    Raises:
        ValueError: it is one.
    """
    if model.window:
        raise ValueError(
            f"model: {model.name!r} is of windows of {model.window} rows of a series, which "
            f"genkit.{verb} does not take; genkit.anomalies does"
        )
