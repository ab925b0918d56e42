"""What is private of a run under differential privacy: its settings, its secret, its budget.

The secret is a key from the operating system. Draws and noise follow from it, so that a step that
is done again after a crash repeats both. The checkpoints, which hold it, must not be published.
"""

from __future__ import annotations

import hmac
import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genkit.data import images
from genkit.data.image_files import check_source
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.metrics.monitor import FEWEST
from genkit.models import private
from genkit.models.mean_embedding import RandomFeatures, class_sums
from genkit.training import accounting
from genkit.training.image_data import ImageSettings
from genkit.training.run import Run, TrainingDivergedError
from genkit.training.settings import CHOSEN, setting

FEWEST_PRIVATE = 1000  # images, below which noise that protects one of them drowns them all
BLOCK = 1000  # images that are looked up at once


@dataclass
class PrivateSettings(ImageSettings):
    """Settings of a recipe that trains under differential privacy."""

    epsilon: float | None = setting(
        CHOSEN, "budget of ε, from which the noise follows if it is not given", above=0
    )
    delta: float = setting(1e-5, "δ, well below 1 over the number of images", above=0, below=1)
    noise: float | None = setting(
        None, "standard deviation of the noise, in units of clip_norm", above=0
    )
    clip_norm: float = setting(1.0, "largest norm of an image's gradient", above=0)
    accountant: str = setting(
        CHOSEN, "accountant of ε; prv needs opacus", choices=accounting.ACCOUNTANTS
    )
    public_images: str | None = setting(
        None, "images that need no protection, by which the best model is chosen"
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, or would spend privacy unaccounted, before any long work."""
        super().__post_init__()
        check_source(self.public_images, "public_images")
        if self.val_images is not None:
            raise ValueError(
                "--val_images: figures of private images spend privacy; give images that need no "
                "protection by --public_images"
            )
        if self.accept_changes:
            raise ValueError(
                "--accept_changes: steps that are repeated with other settings would reuse their "
                "noise, which reveals what it hides; start another run"
            )
        for name, usual in {"compile": False, "gradient_accumulation": 1}.items():
            if (getattr(self, name) or usual) != usual:
                raise ValueError(f"--{name} is not for private training; leave it out")
        if self.mixed_precision == "bf16":
            raise ValueError("--mixed_precision bf16: gradients are clipped in float32; give no")
        if self.patience and self.public_images is None:
            raise ValueError(f"--patience {self.patience} requires --public_images")


def load_private(run: Run, settings: PrivateSettings) -> tuple[Images, Images | None]:
    """Load the private images, all of them to train on, and the public ones, if there are any.

    Raises:
        ValueError: there are too few; see also `images.load_images`.
    """
    sources = [settings.images, *([settings.public_images] if settings.public_images else [])]
    with run.accelerator.local_main_process_first():
        loaded = [
            images.load_images(
                source,
                settings.resolution,
                settings.channels,
                settings.skip_corrupt,
                allow_outside=settings.allow_outside,
                max_pixels=settings.max_pixels,
                max_bytes=settings.max_bytes,
                table_memory=settings.table_memory,
            )
            for source in sources
        ]
    train, public = loaded[0], None
    if len(train) < FEWEST_PRIVATE:
        raise ValueError(
            f"--images {settings.images} has {len(train):,} images; with fewer than "
            f"{FEWEST_PRIVATE:,} no useful ε is to be had"
        )
    if len(loaded) == 2:
        train, public = images.split_images(train, loaded[1], settings.val_fraction)
        if len(public) < FEWEST:
            raise ValueError(f"--public_images: give {FEWEST} images or more, got {len(public)}")
    return train, public


class Secret:
    """The key of a private run's draws and noise, and what only its owner can check.

    Args:
        run: whose checkpoints keep it.
        data: hash of the private images. Only its keyed hash is kept, which tells nothing without
            the key, and refuses to resume with other images.
    """

    def __init__(self, run: Run, data: str) -> None:
        self.key = bytes.fromhex(run.broadcast(secrets.token_hex(private.KEY_BYTES)))
        self._run, self._data = run, data
        run.kept["secret"] = self

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"key": self.key.hex(), "data": self._digest(self.key)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`.

        Raises:
            ValueError: the key is missing, or the images are others.
            TrainingDivergedError: the run has left this checkpoint behind.
        """
        if self._run.progress.step:
            raise TrainingDivergedError(
                "training diverged, and a private run does not roll back, as its noise would be "
                "used twice; start another one with a lower --learning_rate"
            )
        if not isinstance(state.get("key"), str):
            raise ValueError("it does not hold the key of the run's noise")
        key = bytes.fromhex(state["key"])
        if not hmac.compare_digest(state["data"], self._digest(key)):
            raise ValueError("the run was started with other --images")
        self.key = key

    def _digest(self, key: bytes) -> str:
        return hmac.digest(key, self._data.encode(), "sha256").hex()


@dataclass(frozen=True)
class Budget:
    """What a run may spend, and what its steps do spend.

    Args:
        rate: probability with which an image is drawn in a step.
        noise: standard deviation of the noise, in units of the largest norm of a gradient.
        steps: of the whole run.
        delta, accountant: see `accounting.epsilon`.
    """

    rate: float
    noise: float
    steps: int
    delta: float
    accountant: str

    def spent(self, steps: int) -> float:
        """Return the ε of so many steps."""
        return accounting.epsilon(self.accountant, self.noise, self.rate, steps, self.delta)


def plan(run: Run, settings: PrivateSettings, count: int, once: bool = False) -> Budget:
    """Choose the noise from the budget, or end the run before it would exceed the budget.

    The settings get the noise and the number of steps that are chosen.

    Args:
        count: number of private images.
        once: the images are used in one step, all of them, whatever the length of the run.

    Raises:
        ValueError: the batch is larger than the data, δ too large, or the budget too small.
    """
    if run.batch_size > count and not once:
        raise ValueError(f"--batch_size {run.batch_size} is more than the {count:,} images")
    if settings.delta >= 1 / count:
        raise ValueError(
            f"--delta {settings.delta:g} allows publishing one of {count:,} images; give less than "
            f"{1 / count:.1g}"
        )
    rate = 1.0 if once else run.batch_size / count
    name, delta = settings.accountant, settings.delta
    length = 1 if once else settings.max_steps
    if settings.noise is None:
        assert settings.epsilon is not None, "the preset chooses it"
        if length is None:
            raise ValueError(
                "--max_minutes: the noise follows from the number of steps; give --max_steps, too, "
                "or --noise"
            )
        settings.noise = run.broadcast(
            accounting.find_noise(name, settings.epsilon, rate, length, delta) if run.is_main else 0
        )
    elif settings.epsilon is not None:
        length = accounting.find_steps(name, settings.epsilon, settings.noise, rate, delta, length)
        settings.max_steps = settings.max_steps if once else length
    assert settings.noise is not None
    if length is None or math.isinf(length):
        raise ValueError("--noise without --epsilon requires --max_steps")
    return Budget(rate, settings.noise, length, delta, name)


def section(budget: Budget, steps: int, clip_norm: float, count: int) -> str:
    """Write the section of a card that says what is guaranteed, and what is not."""
    rows = {
        "ε of the whole run, and of all that it shows": f"{budget.spent(budget.steps):.3f}",
        "ε of the steps until this model": f"{budget.spent(steps):.3f}",
        "δ": f"{budget.delta:g}",
        "neighbouring data sets": "one image with its class added or removed",
        "mechanism": "sum of clipped contributions of images, with Gaussian noise",
        "sampling": "Poisson: each image by itself" if budget.rate < 1 else "none: all, once",
        "sampling rate q": f"{budget.rate:.6g}",
        "noise, in units of C": f"{budget.noise:.6g}",
        "largest norm C of an image's contribution": f"{clip_norm:g}",
        "steps of the whole run, and until this model": f"{budget.steps:,}, {steps:,}",
        "accountant": accounting.describe_accountant(budget.accountant),
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"""## Differential privacy

| | |
|---|---|
{table}
Outside the guarantee: the choice of settings, if it was made by looking at models of the same
images; the number of images ({count:,}), their size and the names of their classes, which count as
public; other images of the same person; attacks by the rounding of floating-point numbers (Mironov
2012), and whatever reads this run's checkpoints, which hold the key of the noise.
"""


# ---- rows


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return classes as vectors, (n, classes), float32; without classes, a single one for all."""
    if not classes:
        return torch.ones(len(labels), 1, device=labels.device)
    return F.one_hot(labels, classes).float()


def rows(
    train: Images, which: np.ndarray, conditional: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up private images and their one-hot classes; see `one_hot`."""
    if not conditional:
        return train.batch(which, device), torch.ones(len(which), 1, device=device)
    labels = train.classes(which, device)
    return train.batch(which, device), one_hot(labels, len(train.names))


def release_embedding(
    run: Run,
    train: Images,
    conditional: bool,
    budget: Budget,
    secret: Secret,
    extract: RandomFeatures,
) -> torch.Tensor:
    """Return the noisy mean embedding of all private images, (classes, features).

    It is the same when a run is resumed: the noise follows from the key.
    """
    total = torch.zeros(
        len(train.names) if conditional else 1, 2 * extract.pairs, dtype=torch.float64
    )
    mine = np.array(run.shard(len(train)))
    for block in blocks(len(mine), BLOCK):
        images, hot = rows(train, mine[block], conditional, run.device)
        total += class_sums(extract(images), hot).double().cpu()
    summed = run.sum(total.flatten())
    normal = private.normals(secret.key, "noise", 1, len(summed))
    mean = private.noisy_mean(summed, normal, budget.noise, 1.0, len(train))
    return mean.view_as(total).float().to(run.device)
