"""Train a denoising autoencoder on a table: features for another model, and values for gaps.

    accelerate launch recipes/train_table_autoencoder.py --data policies.csv
    accelerate launch recipes/train_table_autoencoder.py --data policies.csv --leave_out claims
    accelerate launch recipes/train_table_autoencoder.py --data policies.csv --widths 1500 1500 1500
    accelerate launch recipes/train_table_autoencoder.py --output_dir runs/dae --resume

Cells of a row are replaced by those of other rows, or left out, and the network learns to restore
the row. Leave the column out that another model is to predict from the features. The model in the
output folder is at any time the best so far, in diffusers' layout:

    genkit features policies.csv --model runs/dae --output features.parquet
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import machine
from genkit.data.order import Order, blocks
from genkit.errors import clean_errors
from genkit.hub import card, vendoring
from genkit.models import table_autoencoder, table_autoencoder_losses
from genkit.models.table_autoencoder import TableAutoencoder, TableAutoencoderPipeline
from genkit.training import table_data
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.training.table_data import TableData, TableSettings

# ---- settings


@dataclass
class Settings(TableSettings):
    """Settings of this recipe; see also TableSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/dae", "folder of the run and of the model")
    widths: list[int] = setting(CHOSEN, "sizes of the hidden layers, which are features", least=1)
    swap: float = setting(
        0.1, "part of the cells that are replaced by those of other rows", least=0, most=1
    )
    blank: float = setting(0.1, "part of the cells that are left out", least=0, most=1)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if not 0 < self.swap + self.blank <= 1:
            raise ValueError(
                f"--swap {self.swap:g} and --blank {self.blank:g} must add up to more than 0 and "
                "at most 1"
            )


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        run: dict[str, Any] = {"widths": [1024] * 3, "batch_size": 256, "max_steps": 10_000}
    else:
        run = {"widths": [256] * 3, "batch_size": 64, "max_minutes": 0.5}
    rates = {"learning_rate": 2e-3, "muon_learning_rate": 0.02, "weight_decay": 0.1}
    precision = {"mixed_precision": "no", "compile": False}
    return run | rates | precision | {"optimizer": "adamw", "ema": 0.99}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    if settings.data is None:
        raise ValueError("--data is required: a table, such as policies.csv")

    with Run(settings) as run:
        # ---- data
        with run.accelerator.local_main_process_first():
            table = table_data.read_for_run(settings)
        train, val = table_data.hold_out(table.values, settings.val_fraction, settings.seed)
        run.check_held_out(len(val), "rows")
        table_data.check_numbers(table.columns, train)
        columns = [dataclasses.asdict(column) for column in table.columns]
        sizes = table_autoencoder.column_sizes(columns)

        # ---- model
        knots = [
            ([], []) if size else table_autoencoder_losses.rank_gauss(own)
            for size, own in zip(sizes, train.T, strict=True)
        ]
        network = TableAutoencoder(columns, knots, settings.widths)
        model = run.network("model", network, optimizers(network, settings))
        rows = Rows(settings, network.to_scores(train), network.to_scores(val))
        loss = run.autocast(partial(table_autoencoder_losses.loss, model, sizes=sizes))
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} rows to train on, "
            f"{len(val):,} to validate, columns: {table_data.count_kinds(table.columns)}"
        )
        for note in table.notes:
            run.log(note)

        # ---- loop
        run.identify(data_sha256=table.sha256, rows=len(table.values))
        run.warm_up(lambda positions: loss(*rows.batch(positions, run.device)))
        run.restore()
        for _ in run.steps():
            for positions in run.rows():
                run.backward(loss(*rows.batch(positions, run.device)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics, errors = evaluate(run, rows, sizes)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save_model, run, settings, table, metrics, errors))


class Rows:
    """Rows with noise: in a shuffled order without end, or those to validate on."""

    def __init__(self, settings: Settings, train: Tensor, val: Tensor) -> None:
        self.train, self.val = train, val
        self.seed, self.swap, self.blank = settings.seed, settings.swap, settings.blank
        self.order = Order(len(train), settings.seed)

    def batch(self, positions: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Look up rows by position in the endless order: noisy, clean, (n, columns) each."""
        rows = self.train[self.order(positions)[1]]
        noisy = self._corrupt(rows, [(self.seed, int(i)) for i in positions], self.swap, self.blank)
        return noisy.to(device), rows.to(device)

    def held_out(self, which: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Look up rows to validate on, round and round; their noise depends on `which` alone.

        Returns:
            Rows with noise, rows with gaps alone, and whole ones.
        """
        rows, seeds = self.val[which % len(self.val)], [(int(i),) for i in which]
        noisy = self._corrupt(rows, seeds, self.swap, self.blank)
        return noisy, self._corrupt(rows, seeds, 0.0, LEFT_OUT), rows

    def _corrupt(
        self, rows: Tensor, seeds: Sequence[tuple[int, ...]], swap: float, blank: float
    ) -> Tensor:
        columns = rows.shape[1]
        generators = list(map(np.random.default_rng, seeds))
        u = torch.from_numpy(np.stack([rng.random(columns) for rng in generators]))
        others = np.stack([rng.integers(len(self.train), size=columns) for rng in generators])
        donors = self.train[others, np.arange(columns)]
        return table_autoencoder_losses.corrupt(rows, donors, u, swap, blank)


# ---- evaluate

EVALUATED = 1024  # noisy rows, at least: of few rows each has noise several times
LEFT_OUT = 0.1  # part of the cells that is left out, to see how well gaps are filled
BLOCK = 256  # rows evaluated together


def evaluate(run: Run, rows: Rows, sizes: list[int]) -> tuple[dict[str, float], Tensor]:
    """Evaluate on validation rows: with noise, and with gaps alone.

    Returns:
        Figures, and how far a number that was left out is from its prediction, a standard deviation
        of scores for each column.
    """
    network = run.weights().eval()
    total = len(rows.val) * -(-EVALUATED // len(rows.val))
    chunks = list(blocks(total, BLOCK))
    sums = torch.zeros(3, len(sizes), dtype=torch.float64)
    for i in range(run.accelerator.process_index, len(chunks), run.processes):
        parts = [part.to(run.device) for part in rows.held_out(np.array(chunks[i]))]
        sums += sum_losses(network, sizes, *parts)
    network.train()
    every, gaps, count = run.sum(sums)
    metrics = {"val_loss": float(every.sum()) / total / len(sizes)}
    is_number = torch.tensor(sizes) == 0
    for name, own in (("number", is_number), ("category", ~is_number)):
        if count[own].sum():
            metrics[f"gap_{name}_loss"] = float(gaps[own].sum() / count[own].sum())
    errors = (2 * gaps / count.clamp(min=1)).sqrt()
    return metrics, torch.where(is_number & (count > 0), errors, 1.0)


@torch.inference_mode()
def sum_losses(
    network: TableAutoencoder, sizes: list[int], noisy: Tensor, gappy: Tensor, rows: Tensor
) -> Tensor:
    """Return sums over rows, (3, columns): losses, losses of gaps that were made, their number."""
    losses, of_gaps = (
        table_autoencoder_losses.cell_losses(network(given)[0], rows, sizes)
        for given in (noisy, gappy)
    )
    made = gappy.isnan() & ~rows.isnan()
    parts = losses, of_gaps * made, made
    return torch.stack([machine.to_float64(part).cpu().sum(0) for part in parts])


# ---- save


USAGE = """
import genkit

features = genkit.features("{data}", model=model)
print(features.values.shape)  # (rows, features), for a downstream model
filled = genkit.fill("{data}", model=model)

import numpy as np
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
columns = pipeline.network.config.columns  # what rows of numbers mean
output = pipeline(np.full((1, len(columns)), np.nan))  # a row of gaps
"""


def save_model(
    run: Run,
    settings: Settings,
    table: TableData,
    metrics: dict[str, float],
    errors: Tensor,
    path: Path,
) -> None:
    """Write the model as diffusers does, with its card."""
    network = run.weights().eval()
    network.errors.copy_(errors)
    vendoring.save_pipeline(TableAutoencoderPipeline(network), path)
    network.train()
    card.write_card(
        path,
        run.folder.path,
        title="A denoising autoencoder of a table",
        task="other",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, trained on {len(table.values):,} rows of "
        f"{settings.data} for {run.progress.step:,} steps, of which a part was held out. "
        f"{table_data.describe(table.columns)}",
        usage=USAGE.format(data=settings.data),
        figures=metrics,
        protocol="Means over the cells of held-out rows, of which noise has replaced "
        f"{settings.swap:g} by those of other rows and left out {settings.blank:g}: half the "
        "squared error of a number's normal score, the cross-entropy of a category in nats; gap_ "
        f"losses are those of cells that were left out, {LEFT_OUT:g} of all, others as they are.",
        data=settings.data,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
