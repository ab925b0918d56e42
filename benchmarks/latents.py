r"""Diffusion of latents against diffusion of pixels: the time of a step, and how good images are.

    python benchmarks/translation.py data --mnist mnist --edge 2 --output coloured
    genkit train vae --images coloured/train.parquet --network spatial --widths 8 16 32 \
        --likelihood laplace --scale 0.05 --output_dir runs/kl
    genkit train diffusion --images coloured/train.parquet --latent runs/kl \
        --output_dir runs/latents
    python benchmarks/latents.py speed --data coloured --vae runs/kl
    python benchmarks/latents.py measure --data coloured --vae runs/kl --models runs/latents \
        runs/pixels --extractor runs/classifier

The digits are in colour, 32 x 32. Times are of one thread, in seconds of the CPU, which other
programs do not change much.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.data.images import Images, load_images, split_images
from genkit.metrics.monitor import Monitor
from genkit.models import denoisers, diffusion, diffusion_losses, latent_space
from genkit.training.optim import optimizers
from genkit.training.settings import RunSettings
from genkit.vision import image_grid, pipelines, sampling

WIDTHS = (16, 32, 96)
BATCH, STEPS, ROUNDS = 64, 2, 5  # steps of a round, which is of pixels, then of latents
COLUMNS = 16


# ---- speed


class Trainer:
    """A network that trains as that of train_diffusion does, on images or latents of a size."""

    def __init__(self, size: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.network = denoisers.make_unet(size, WIDTHS)
        settings = RunSettings(
            optimizer="muon", learning_rate=3e-3, muon_learning_rate=0.008, weight_decay=0.0
        )
        self.optimizers = optimizers(self.network, settings)
        quantiles = (torch.arange(BATCH) + 0.5) / BATCH
        noising = diffusion_losses.noising_at_quantiles(diffusion.make_scheduler("v"), quantiles)
        levels = noising.timesteps, noising.alpha, noising.sigma
        images, noise = torch.randn(2, BATCH, *size)
        self.loss = partial(diffusion_losses.loss, self.network, images, noise, None, *levels, "v")

    def seconds(self) -> float:
        """Return the seconds of a step, of several."""
        start = time.process_time()
        for _ in range(STEPS):
            self.loss().backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return (time.process_time() - start) / STEPS


def compare_speed(train: Images, folder: Path) -> None:
    """Print the time of a step on pixels and on latents, by networks of equal widths."""
    vae = latent_space.load_vae(folder)
    encode = partial(latent_space.encode, vae)
    latents = tuple(encode(train.batch(np.arange(1))).shape[1:])
    trainers = {"pixels": Trainer(train.size), "latents": Trainer(latents)}
    taken: dict[str, list[float]] = {name: [] for name in trainers}
    for i in range(ROUNDS + 1):
        for name, trainer in trainers.items():
            seconds = trainer.seconds()
            taken[name] += [seconds] if i else []  # the first round warms up
    for name, times in taken.items():
        print(f"{name}: {1000 * statistics.median(times):.0f} ms a step of {BATCH} images")
    ratios = [one / other for one, other in zip(*taken.values(), strict=True)]
    print(
        f"latents {latents} are {statistics.median(ratios):.1f} times as fast a step, "
        f"{min(ratios):.1f} to {max(ratios):.1f} in {ROUNDS} rounds"
    )
    start = time.process_time()
    for which in np.split(np.arange(5 * BATCH), 5):
        encode(train.batch(which))
    seconds = (time.process_time() - start) / (5 * BATCH) * len(train)
    print(f"encoding all {len(train):,} images, once: {seconds:.0f} s")


# ---- quality


def measure(
    test: Images, folder: Path, models: list[Path], extractor: str, count: int, steps: int
) -> None:
    """Print how near reconstructions and samples are to real images, and draw some."""
    real, others = split_images(test, None, count / len(test))
    monitor, given = Monitor(real, extractor, count), others.batch(np.arange(count))
    autoencoder: Any = pipelines.load_pipeline(folder)
    decoded = pipelines.decode(autoencoder, pipelines.encode(autoencoder, given))
    error = (decoded - given).square().mean().item() / 4
    drawn = {"real": given, "decoded": decoded}
    for path in models:
        pipeline: Any = pipelines.load_pipeline(path)
        options = sampling.resolve_sampler(pipeline, steps).arguments
        labels = pipelines.labels_to_draw(pipeline, None, count)
        drawn[path.name] = sampling.draw_samples(pipeline, range(count), labels, options)
    print(f"{'images':12}  distance  coverage")
    for name, images in drawn.items():
        found = monitor.measure(images)
        print(f"{name:12}  {found['distance']:8.3f}  {found['coverage']:8.3f}")
    print(f"reconstruction: peak signal-to-noise ratio {-10 * math.log10(error):.1f} dB")
    image_grid.rows({name: images[:COLUMNS] for name, images in drawn.items()}, Path("latents.png"))


def main() -> None:
    """Read the command line, and do what it asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    speed, table = commands.add_parser("speed"), commands.add_parser("measure")
    for each in (speed, table):
        each.add_argument("--data", type=Path, required=True)
        each.add_argument("--vae", type=Path, required=True)
    table.add_argument("--models", type=Path, nargs="+", required=True)
    table.add_argument("--extractor", required=True)
    table.add_argument("--count", type=int, default=2000)
    table.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "speed":
        compare_speed(load_images(given.data / "train.parquet"), given.vae)
    else:
        test = load_images(given.data / "test.parquet")
        measure(test, given.vae, given.models, given.extractor, given.count, given.steps)


if __name__ == "__main__":
    main()
