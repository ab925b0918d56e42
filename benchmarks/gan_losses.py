"""Every adversarial loss on three problems, with the same networks, optimizer, batch and seconds.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/gan_losses.py --output runs/laboratory
    python benchmarks/gan_losses.py --parts mnist --train train.parquet --test test.parquet \\
        --extractor runs/classifier --minutes 5

The problems: `ring`, 8 Gaussians on a circle (Metz et al. 2017, https://arxiv.org/abs/1611.02163);
`grid`, 25 Gaussians (Srivastava et al. 2017, https://arxiv.org/abs/1705.07761); `mnist`. As in the
latter paper a point is good if it lies within three standard deviations of a mode, and a mode is
found if a good point lies there; of the points of the distribution itself 98.9 % are good. `even`
is how often the rarest mode is drawn, over how often it should be.

`coverage` is the part of the neighbourhoods of real ones, of points or of features, in which a
generated one is; `distance` is Frechet's between features, and between points the mean over
directions of Wasserstein's between their shadows. `gradients` are medians over the second half of
the training, of the discriminator and of the generator. The first row is another draw of real ones.

What is equal is the time, in seconds of a core, whatever else runs on it: a loss whose critic takes
several steps, or that has penalties, takes fewer. The rate falls to 0 over it. Penalties weigh the
same in every loss; `modern` averages its generator's weights. A minute shows which losses fail;
those that do not come nearer to the real points with each further minute.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.figure
import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from genkit.data import images
from genkit.data.images import Images
from genkit.metrics.features import Classifier, Features, extract, load_extractor
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.given_images import as_images
from genkit.metrics.neighbours import K, manifold
from genkit.models import gan, gan_losses
from genkit.models.gan_losses import Batch, Game
from genkit.training.optim import averaging, rate_factor

DRAWN = 10_000  # points evaluated
COVERED = 2000  # of them, for coverage
DEVIATIONS = 3  # from a mode at most, for a good point
DIRECTIONS = 64  # along which distances of points are measured
STRIP = 5  # rows and columns of images in the picture
EMA = 0.999
WIDTHS, SLOPE = [64] * 6, 0.2  # of the networks for points


@dataclass(frozen=True)
class Contender:
    """A loss with its regularizers."""

    loss: str
    bounds: tuple[str, ...] = ()  # arguments of a Game, weighted as the problem has them
    critic_steps: int = 1
    averaged: bool = False


CONTENDERS = {
    "minimax": Contender("minimax"),
    "non_saturating": Contender("non_saturating"),
    "maximum_likelihood": Contender("maximum_likelihood"),
    "least_squares": Contender("least_squares"),
    "hinge": Contender("hinge"),
    "wgan_clip": Contender("wasserstein", ("weight_clip",), critic_steps=2),
    "wgan_gp": Contender("wasserstein", ("gradient_penalty",), critic_steps=2),
    "relativistic": Contender("relativistic"),
    "non_saturating_r1": Contender("non_saturating", ("r1",)),
    "modern": Contender("relativistic", ("r1", "r2"), averaged=True),
}


@dataclass(frozen=True)
class Training:
    """What all contenders on a problem have in common."""

    latent_dim: int
    learning_rate: float
    decay: float  # part of the time over which the rate falls to 0
    bounds: dict[str, float]  # weights of regularizers
    batch_size: int = 128
    betas: tuple[float, float] = (0.0, 0.99)


POINTS = Training(
    latent_dim=2,
    learning_rate=3e-3,
    decay=1.0,
    bounds={"r1": 0.1, "r2": 0.1, "gradient_penalty": 1.0, "weight_clip": 0.1},
)
IMAGES = Training(
    latent_dim=64,
    learning_rate=5e-4,
    decay=0.5,
    bounds={"r1": 1.0, "r2": 1.0, "gradient_penalty": 10.0, "weight_clip": 0.01},
)


@dataclass(frozen=True)
class Played:
    """A generator after its training, and how that went."""

    generator: torch.nn.Module
    gradients: tuple[float, float]
    steps: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """The figures of a loss; played: None for real points or images."""

    part: str
    name: str
    seed: int
    modes: str
    good: float | None
    even: float
    coverage: float
    distance: float
    played: Played | None


Shown = dict[tuple[str, str], np.ndarray]  # by part and name, what the picture shows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["ring", "grid"])
    parser.add_argument("--losses", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of a core, to train on points")
    parser.add_argument("--minutes", type=float, default=5.0, help="of a core, to train on MNIST")
    parser.add_argument("--train", help="MNIST's training images, a parquet file")
    parser.add_argument("--test", help="its test images, to compare with")
    parser.add_argument("--extractor", help="folder of a classifier, to see images through")
    parser.add_argument("--output", type=Path, default=Path("runs/laboratory"))
    arguments = parser.parse_args()
    if "mnist" in arguments.parts:
        for name in ("train", "test", "extractor"):
            if getattr(arguments, name) is None:
                parser.error(f"--parts mnist needs --{name}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    shown: Shown = {}
    for part in arguments.parts:
        for row, sample in PARTS[part](arguments):
            rows.append(row)
            shown.setdefault((part, row.name), sample)
            table = markdown(rows)
            (arguments.output / "losses.md").write_text(table, encoding="utf-8")
        draw(shown, arguments.output / "losses.png")
    print(f"\n{table}\nalso in {arguments.output}")


# ---- the game


def play(
    contender: Contender,
    training: Training,
    generator: torch.nn.Module,
    discriminator: torch.nn.Module,
    real: Callable[[torch.Generator], torch.Tensor],
    seconds: float,
    seed: int,
) -> Played:
    """Train both networks for some seconds of a core; `real` draws a batch of real data."""
    bounds: dict[str, Any] = {name: training.bounds[name] for name in contender.bounds}
    game = Game(contender.loss, **bounds)
    optimizers = [
        torch.optim.AdamW(
            player.parameters(), training.learning_rate, training.betas, weight_decay=0, fused=True
        )
        for player in (discriminator, generator)
    ]
    average = AveragedModel(generator, multi_avg_fn=averaging(EMA)) if contender.averaged else None
    chance = torch.Generator().manual_seed(seed)
    norms: list[tuple[float, float]] = []
    start = time.process_time()
    with tqdm(total=seconds, bar_format="{l_bar}{bar:30}| {n:.0f} s{postfix}", leave=False) as bar:
        while (spent := time.process_time() - start) < seconds:
            rate = training.learning_rate * rate_factor(spent / seconds, 0.0, training.decay)
            for _ in range(contender.critic_steps):
                loss = game.discriminator_loss(
                    discriminator, generator, batch(training, real, chance)
                )
                scored = update(discriminator, optimizers[0], loss, rate)
                if game.weight_clip:
                    gan_losses.clip_weights(discriminator, game.weight_clip)
            discriminator.requires_grad_(False)
            loss = game.generator_loss(discriminator, generator, batch(training, real, chance))
            norms.append((scored, update(generator, optimizers[1], loss, rate)))
            discriminator.requires_grad_(True)
            if average is not None:
                average.update_parameters(generator)
            bar.update(min(spent, seconds) - bar.n)
    late = norms[len(norms) // 2 :]
    medians = statistics.median(d for d, _ in late), statistics.median(g for _, g in late)
    made = generator if average is None else average.module
    return Played(made.eval(), medians, len(norms), spent)


def update(
    player: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float
) -> float:
    """Take an optimizer step; return the gradient's norm."""
    loss.backward()
    gradients = [p.grad for p in player.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def batch(
    training: Training, real: Callable[[torch.Generator], torch.Tensor], chance: torch.Generator
) -> Batch:
    count = training.batch_size
    noise = torch.randn(count, training.latent_dim, generator=chance)
    return Batch(real(chance), noise, torch.rand(count, gan_losses.UNIFORMS, generator=chance))


# ---- points


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one size in the plane."""

    centres: torch.Tensor  # (modes, 2)
    deviation: float

    def draw(self, count: int, chance: torch.Generator) -> torch.Tensor:
        """Draw points, (count, 2)."""
        which = torch.randint(len(self.centres), (count,), generator=chance)
        return self.centres[which] + self.deviation * torch.randn(count, 2, generator=chance)


def ring() -> Mixture:
    angles = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(2 * torch.stack([angles.cos(), angles.sin()], 1), 0.02)


def grid() -> Mixture:
    steps = torch.arange(-4.0, 5.0, 2.0)
    return Mixture(torch.cartesian_prod(steps, steps), 0.05)


def found(points: torch.Tensor, mixture: Mixture) -> tuple[int, float, float]:
    """Return the modes found, the share of good points, and how even they are; points: (n, 2)."""
    distances, nearest = torch.cdist(points, mixture.centres).min(1)
    good = distances <= DEVIATIONS * mixture.deviation
    counts = torch.bincount(nearest[good], minlength=len(mixture.centres))
    even = counts.min().item() * len(counts) / len(points)
    return int((counts > 0).sum()), good.double().mean().item(), even


def sliced_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the sliced Wasserstein distance of two sets of points, (n, 2) each."""
    angles = torch.arange(DIRECTIONS) * (math.pi / DIRECTIONS)
    directions = torch.stack([angles.cos(), angles.sin()])
    shadows = [(points @ directions).sort(0).values for points in (first, second)]
    return (shadows[0] - shadows[1]).abs().mean().item()


class Scorer(torch.nn.Module):
    """A discriminator that predicts no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = dense(2, 1)

    def forward(self, points: torch.Tensor, labels: None) -> tuple[torch.Tensor, None]:
        return self.layers(points).squeeze(1), None


class Maker(torch.nn.Module):
    """A generator of points."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.layers = dense(latent_dim, 2)

    def forward(self, noise: torch.Tensor, labels: None = None) -> torch.Tensor:
        return self.layers(noise)


def dense(inputs: int, outputs: int) -> torch.nn.Sequential:
    sizes = [inputs, *WIDTHS, outputs]
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        linear = torch.nn.Linear(before, after)
        torch.nn.init.kaiming_normal_(linear.weight, SLOPE)
        layers += [linear, torch.nn.LeakyReLU(SLOPE)]
    return torch.nn.Sequential(*layers[:-1])


Results = Iterable[tuple[Row, np.ndarray]]


def on_points(part: str, mixture: Mixture, arguments: argparse.Namespace) -> Results:
    """Yield a row and points for each loss and seed; the networks see data of unit variance."""
    scale = mixture.centres.std().item()
    judge = torch.Generator().manual_seed(1)
    yield evaluated(part, mixture, "real", 0, mixture.draw(DRAWN, judge), None)
    for name in arguments.losses:
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            generator, discriminator = Maker(POINTS.latent_dim), Scorer()

            def real(chance: torch.Generator) -> torch.Tensor:
                return mixture.draw(POINTS.batch_size, chance) / scale

            seconds, players = arguments.seconds, (generator, discriminator)
            played = play(CONTENDERS[name], POINTS, *players, real, seconds, seed)
            noise = torch.randn(DRAWN, POINTS.latent_dim, generator=judge)
            with torch.inference_mode():
                points = played.generator(noise) * scale
            yield evaluated(part, mixture, name, seed, points, played)


def evaluated(
    part: str, mixture: Mixture, name: str, seed: int, points: torch.Tensor, played: Played | None
) -> tuple[Row, np.ndarray]:
    """Measure points against the mixture, and against points drawn from it."""
    real = mixture.draw(len(points), torch.Generator().manual_seed(0))
    modes, good, even = found(points, mixture)
    row = Row(
        part,
        name,
        seed,
        f"{modes}/{len(mixture.centres)}",
        good,
        even,
        manifold(real[:COVERED], points[:COVERED], K).coverage,
        sliced_distance(real, points),
        played,
    )
    print(" ".join(cells(row)), flush=True)
    return row, points.numpy()


# ---- images


def on_images(arguments: argparse.Namespace) -> Results:
    """Yield a row and images for each loss and seed."""
    train, test = images.load_images(arguments.train), images.load_images(arguments.test)
    extractor = load_extractor(arguments.extractor)
    assert isinstance(extractor, Classifier), "Inception predicts no digits"
    order = np.random.default_rng(0).permutation(len(test))
    seen = extract(test.take(order), extractor)
    yield compared("real", 0, train.take(np.arange(len(test))), extractor, seen, None)
    for name in arguments.losses:
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            generator = gan.Generator(train.size, IMAGES.latent_dim)
            discriminator = gan.Discriminator(train.size)
            for player in (generator, discriminator):
                player.to(memory_format=torch.channels_last)

            def real(chance: torch.Generator) -> torch.Tensor:
                which = torch.randint(len(train), (IMAGES.batch_size,), generator=chance)
                return train.batch(which.numpy())

            seconds = 60 * arguments.minutes
            played = play(CONTENDERS[name], IMAGES, generator, discriminator, real, seconds, seed)
            made = sampled(played.generator, len(test))
            yield compared(name, seed, as_images(made, None, []), extractor, seen, played)


@torch.inference_mode()
def sampled(generator: torch.nn.Module, count: int) -> torch.Tensor:
    """Draw images in [-1, 1], (count, channels, height, width)."""
    chance = torch.Generator().manual_seed(1)
    noise = torch.randn(count, IMAGES.latent_dim, generator=chance)
    return torch.cat([generator(block) for block in noise.split(500)])


def compared(
    name: str, seed: int, made: Images, extractor: Classifier, seen: Features, played: Played | None
) -> tuple[Row, np.ndarray]:
    """Measure images against real ones, by what an extractor sees."""
    fakes = extract(made, extractor)
    counts = np.bincount(fakes.classes, minlength=len(extractor.names))
    row = Row(
        "mnist",
        name,
        seed,
        f"{(counts > 0).sum()}/{len(counts)}",
        None,
        counts.min() * len(counts) / counts.sum(),
        manifold(seen.features[:COVERED], fakes.features[:COVERED], K).coverage,
        frechet_distance(seen.features, fakes.features),
        played,
    )
    print(" ".join(cells(row)), flush=True)
    return row, made.batch(np.arange(STRIP**2)).numpy()


PARTS: dict[str, Callable[[argparse.Namespace], Results]]
PARTS = {
    "ring": lambda arguments: on_points("ring", ring(), arguments),
    "grid": lambda arguments: on_points("grid", grid(), arguments),
    "mnist": on_images,
}


# ---- output


HEADINGS = {
    "problem": "{part:7}",
    "loss": "{name:18}",
    "seed": "{seed:4}",
    "modes": "{modes:>6}",
    "good": "{good:>7}",
    "even": "{even:5.2f}",
    "coverage": "{coverage:8.3f}",
    "distance": "{distance:8.3f}",
    "gradients": "{gradients:>16}",
    "steps": "{steps:>7}",
    "seconds": "{seconds:>7}",
}


def cells(row: Row) -> list[str]:
    """Write the numbers of a row as wide as their columns are."""
    values = dict(vars(row))
    values["good"] = "" if row.good is None else f"{100 * row.good:.1f} %"
    played = row.played
    values["gradients"] = "{:.2g} · {:.2g}".format(*played.gradients) if played else ""
    values["steps"] = f"{played.steps:,}" if played else ""
    values["seconds"] = f"{played.seconds:.0f}" if played else ""
    return [form.format(**values) for form in HEADINGS.values()]


def markdown(rows: list[Row]) -> str:
    """Lay out the table."""
    columns = [cells(row) for row in rows]
    widths = [len(cell) for cell in columns[0]]
    heads = [name.ljust(width) for name, width in zip(HEADINGS, widths, strict=True)]
    lines = [heads, ["-" * len(head) for head in heads], *columns]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(shown: Shown, path: Path) -> None:
    """Draw a row of panels for each problem: generated in colour, real ones behind them in grey."""
    parts = list(dict.fromkeys(part for part, _ in shown))
    names = list(dict.fromkeys(name for _, name in shown if name != "real"))
    size = 2.1 * max(1, len(names)), 2.1 * len(parts) + 0.4
    figure = matplotlib.figure.Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(len(parts), max(1, len(names)), squeeze=False)
    for part, line in zip(parts, panels, strict=True):
        for name, axes in zip(names, line, strict=False):
            axes.set(xticks=[], yticks=[], aspect="equal")
            axes.set_frame_on(False)
            if part == parts[0]:
                axes.set_title(name.replace("_", " "), fontsize=11)
            if (part, name) in shown and shown[part, name].ndim == 4:
                axes.imshow(tiled(shown[part, name]), cmap="gray", vmin=-1, vmax=1)
            elif (part, name) in shown:
                points(axes, shown[part, "real"], shown[part, name])
    figure.savefig(path)


def points(axes: matplotlib.axes.Axes, real: np.ndarray, made: np.ndarray) -> None:
    side = 1.25 * np.abs(real).max()
    axes.scatter(real[:, 0], real[:, 1], 14, "0.8", linewidths=0)
    axes.scatter(made[:, 0], made[:, 1], 1.5, "tab:red", alpha=0.4, linewidths=0)
    axes.set(xlim=(-side, side), ylim=(-side, side))


def tiled(images: np.ndarray) -> np.ndarray:
    """Lay grey images out in a square, (STRIP * height, STRIP * width)."""
    _, _, height, width = images.shape
    rows = images.reshape(STRIP, STRIP, height, width).transpose(0, 2, 1, 3)
    return rows.reshape(STRIP * height, STRIP * width)


if __name__ == "__main__":
    main()
