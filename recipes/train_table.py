"""Train a model of a table: its rows, gaps and unlikely rows, given any of its columns.

    accelerate launch recipes/train_table.py --data policies.csv
    accelerate launch recipes/train_table.py --data policies.parquet --leave_out id
    accelerate launch recipes/train_table.py --data load.csv --window 24 --output_dir runs/series
    accelerate launch recipes/train_table.py --output_dir runs/table --resume

The output folder is an ordinary transformers model with table.json, which has the columns; it is at
any time the best one so far.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from genkit import machine
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.models import lm, table
from genkit.models.table import TableFormat
from genkit.models.table_fit import fit_table
from genkit.tabular import pictures
from genkit.tabular.drawing import draw
from genkit.tabular.model import TableModel, save_table
from genkit.tabular.reading import as_windows, window_columns
from genkit.training import table_data
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.training.table_data import TableSettings

# ---- settings


@dataclass
class Settings(TableSettings):
    """Settings of this recipe; see also TableSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/table", "folder of the run and of the model")
    window: int = setting(0, "of a series: rows that are modelled together; 0 for a table", least=0)
    depth: int = setting(CHOSEN, "layers: the one dial of the model's size", least=1)
    width: int = setting(CHOSEN, "size of a layer's vectors", least=1)
    heads: int = setting(CHOSEN, "attention heads", least=1)
    dropout: float = setting(CHOSEN, "dropout", least=0, below=1)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if self.window == 1:
            raise ValueError("--window must be 2 or more, or 0 for a table, got 1")


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        depth = settings.depth or 4
        run: dict[str, Any] = {"batch_size": 256, "max_steps": 5000}
    else:
        depth = settings.depth or 2
        run = {"batch_size": 32, "max_minutes": 1.5}
    shape = lm.choose_shape(depth, settings.width, settings.heads, 32) | {"dropout": 0.1}
    rates = {"learning_rate": 2e-3, "muon_learning_rate": 0.01, "weight_decay": 0.1}
    precision = {"mixed_precision": "no", "compile": False}
    return shape | run | rates | precision | {"optimizer": "adamw", "ema": 0.99}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    if settings.data is None:
        raise ValueError("--data is required: a table, such as policies.csv")

    with Run(settings) as run:
        # ---- data
        with run.accelerator.local_main_process_first():
            data = Rows(settings)
        run.check_held_out(len(data.val), "rows")

        # ---- model
        network = table.make_model(
            data.table, settings.depth, settings.width, settings.heads, settings.dropout
        )
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(table.loss)
        answers = data.table.answers.to(run.device)
        run.log(f"{network.num_parameters():,} parameters · {data}")
        for note in data.notes:
            run.log(note)

        # ---- loop
        run.identify(**data.facts)
        run.warm_up(lambda rows: loss(model, data.batch(rows).to(run.device), answers))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, data.batch(rows).to(run.device), answers))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics, usual = evaluate(run, data)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save_model, run, settings, data, metrics, usual))


class Rows:
    """Rows of a table, or windows of a series, in a shuffled order, their columns in any order."""

    def __init__(self, settings: Settings) -> None:
        data = table_data.read_for_run(settings)
        self.columns, self.notes = data.columns, data.notes
        self.seed, self.window = settings.seed, settings.window
        self.train, self.val = self._split(data.values, settings.val_fraction)
        table_data.check_numbers(self.columns, self.train)
        self.facts: dict[str, Any] = {"data_sha256": data.sha256, "rows": len(data.values)}
        self.order = Order(len(self.train), settings.seed)
        self.table = self._fit()

    def _split(self, values: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Hold rows out, or the end of a series, cut into windows."""
        if not self.window:
            return table_data.hold_out(values, fraction, self.seed)
        held = max(1, round(fraction * len(values)))
        parts = values[:-held], values[-held:]
        if min(map(len, parts)) < self.window:
            raise ValueError(
                f"--window {self.window}: {len(values):,} rows are too few, {held:,} of them to "
                "validate on; give fewer, or a larger --val_fraction"
            )
        self.columns = window_columns(self.columns, self.window)
        train, val = (as_windows(part, self.window) for part in parts)
        return train, val

    def _fit(self) -> TableFormat:
        sizes = [len(column.categories) for column in self.columns]
        steps = [10.0**-column.decimals for column in self.columns]
        return fit_table(sizes, steps, self.train, self.seed)

    def __str__(self) -> str:
        return (
            f"{len(self.train):,} {'windows' if self.window else 'rows'} to train on, "
            f"{len(self.val):,} to validate, columns: {table_data.count_kinds(self.columns)}"
        )

    def batch(self, positions: np.ndarray) -> table.Batch:
        """Look up rows by position in the endless order; each has its own order of columns."""
        orders = [
            np.random.default_rng((self.seed, int(position))).permutation(self.table.count)
            for position in positions
        ]
        return self.table.encode(self.train[self.order(positions)[1]], np.stack(orders))


# ---- evaluate


def evaluate(run: Run, data: Rows) -> tuple[dict[str, float], list[float]]:
    """Evaluate the model on the validation rows; return figures, and how surprising rows are."""
    network = run.weights().eval()
    model = TableModel(network, data.columns, data.table, window=data.window)
    mine = np.array(run.shard(len(data.val)), int)
    surprises = -model.log_density(data.val[mine])
    gathered = np.sort(np.array(run.gather(surprises.tolist())))
    if run.is_main:
        save_pictures(run, model, data)
    network.train()
    levels = np.linspace(0, 1, min(len(gathered), USUAL))
    nats = float(gathered.mean())
    return {"val_loss": nats, "nats_per_column": nats / data.table.count}, np.quantile(
        gathered, levels
    ).tolist()


USUAL = 201  # quantiles of how surprising held-out rows are
SHOWN = 1000  # rows that are drawn for the picture


def save_pictures(run: Run, model: TableModel, data: Rows) -> None:
    """Draw the columns of synthetic rows of the same seeds beside those of real ones."""
    count = min(SHOWN, len(data.train))
    nothing = np.full((count, len(data.columns)), np.nan)
    rows = draw(model, nothing, range(count), gaps=True).values
    pictures.columns(data.columns, data.train, rows, run.folder.path / "columns.png")


# ---- save


EXAMPLES = 64  # held-out rows that say how surprising each column is

USAGE = """
import genkit

rows = genkit.sample_table(model, 5, seed=0)  # a row depends on its seed alone
print(rows)
rows.save("synthetic.csv")

from transformers import AutoModelForCausalLM

network = AutoModelForCausalLM.from_pretrained(model)  # its tokens are described in table.json
"""


def save_model(
    run: Run,
    settings: Settings,
    data: Rows,
    metrics: dict[str, float],
    usual: list[float],
    path: Path,
) -> None:
    """Write the model as transformers does, with its columns and its card."""
    network: PreTrainedModel = run.weights().eval()
    model = TableModel(network, data.columns, data.table, usual, window=data.window)
    by_column = model.surprises(data.val[:EXAMPLES]).mean(0).tolist()
    save_table(dataclasses.replace(model, usual_columns=by_column), path)
    network.train()
    what = f"windows of {data.window} rows" if data.window else "rows"
    card.write_card(
        path,
        run.folder.path,
        title="A model of a table",
        task="other",
        about=f"{network.num_parameters():,} parameters, trained on {len(data.train):,} {what} of "
        f"{settings.data} for {run.progress.step:,} steps. {table_data.describe(data.columns)}",
        usage=USAGE,
        figures=metrics,
        protocol=f"val_loss is the negative log-likelihood of {len(data.val):,} held-out {what}, "
        "in nats a row, the mean density over the orders of columns in table.json: of categories "
        "and gaps a probability, of numbers a density in the units of the table.",
        data=settings.data,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
