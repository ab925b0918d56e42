"""Diffusion models of MNIST after equal training time: ours, and those of two other libraries.

    taskset -c 0,1 env OMP_NUM_THREADS=2 python benchmarks/diffusion_peers.py --mnist mnist \\
        --extractor runs/classifier --minutes 20 --runs 3

The folder of MNIST has the parquet files of the Hub's ylecun/mnist; the extractor is a classifier
by recipes/train_classifier.py. All see the 60,000 training images without labels, train in turn on
the same machine, draw as many images with as many evaluations of the network (50 of DDIM), by their
averaged weights, and are evaluated alike: distance is Fréchet's to all training images, coverage
that of 2,000 of them at k = 5. The ratio is of our median distance to the better peer's. What the
output folder has already is not trained again.

genkit is recipes/train_diffusion.py as it comes, but for a single evaluation at the end, so that no
weights are chosen by what an extractor sees. Its minutes leave out evaluations, checkpoints and
compilation; the peers, which do none of it, train longer by the seconds of the last.

diffusers is its examples/unconditional_image_generation/train_unconditional.py with the options of
its README: UNet2DModel with two layers a block, the noise as target, linear betas, AdamW 1e-4 with
500 steps of warm-up and a cosine, EMAModel, gradients clipped at 1, batch 16, float32. Its network
has three of six levels, as 28 halves twice, of a quarter of the width. The cosine follows the
clock. Images lie in memory, and nothing is logged or saved. DDIM is for its 1,000 steps of DDPM.

denoising-diffusion-pytorch is its Trainer by that class's defaults: GaussianDiffusion with v as
target and a sigmoid schedule, Adam 1e-4 (0.9, 0.99), EMA 0.995 every 10 steps, gradients clipped at
1, batch 16, float32; with the flash attention of its README. Its network has three levels for four
and a width of 22 for 64. Digits are not mirrored, images lie in memory, and nothing is saved.

Other batches and rates of the peers, which minutes may suit better, are --batch_size and
--learning_rate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

import genkit
from genkit.data import images, order
from genkit.data.images import Images
from genkit.metrics.features import Extractor, Features, extract, extract_cached, load_extractor
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.given_images import as_images
from genkit.metrics.neighbours import manifold
from genkit.vision import image_grid, sampling

RECIPE = Path(__file__).parent.parent / "recipes" / "train_diffusion.py"
COVERED, K, SHOWN, BLOCK = 2000, 5, 64, 100
TIMES, WARMUP = 1000, 500
PROTOCOL = ("minutes", "count", "steps", "sampler", "batch_size", "learning_rate")  # of a row
COLUMNS = {
    "parameters": ",.0f",
    "seconds": ",.0f",
    "images": ",.0f",
    "images/s": ",.0f",
    "distance": ".3f",
    "coverage": ".3f",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--minutes", type=float, default=20.0, help="of training")
    parser.add_argument("--count", type=int, default=2000, help="images to judge")
    parser.add_argument("--runs", type=int, default=1, help="of each, of different seeds")
    parser.add_argument("--steps", type=int, default=50, help="evaluations of the network an image")
    parser.add_argument("--sampler", default="ddim", help="of genkit")
    parser.add_argument("--batch_size", type=int, default=16, help="of the peers")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of the peers")
    parser.add_argument("--output", type=Path, default=Path("runs/diffusion_peers"))
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    train = images.load_images(str(parts(arguments.mnist)[0]))
    extractor = load_extractor(arguments.extractor)
    real = extract_cached(train, extractor)
    print(f"{'':28}" + "".join(f"{name:>12}" for name in COLUMNS), flush=True)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    protocol = {name: getattr(arguments, name) for name in PROTOCOL} | {"by": extractor.sha256}
    for seed in range(arguments.runs):
        seconds = 60 * arguments.minutes
        for name in METHODS:
            file = arguments.output / f"{name}-{seed}.json"
            if not file.exists():
                trained = METHODS[name](arguments, train, seed, seconds)
                found = measure(arguments, file, trained, real, extractor)
                file.write_text(json.dumps({"protocol": protocol, "figures": found}))
            kept = json.loads(file.read_text())
            if kept["protocol"] != protocol:
                parser.error(f"output: {file} is of {kept['protocol']}; give another folder")
            rows[name].append(kept["figures"])
            seconds += rows[name][-1]["compiling"]  # the peers' time
            print_row(f"{name} {seed}", rows[name][-1])
    compare(rows)


def compare(rows: dict[str, list[dict[str, float]]]) -> None:
    """Print medians and the ratio of ours to the better peer's."""
    middle = {
        name: {column: statistics.median(row[column] for row in found) for column in COLUMNS}
        for name, found in rows.items()
    }
    for name, found in middle.items():
        print_row(f"{name} median", found)
    ours, *peers = (found["distance"] for found in middle.values())
    print(f"distance / the better peer's: {ours / min(peers):.3f}")


def print_row(name: str, found: dict[str, float]) -> None:
    cells = (f"{found[column]:>12{form}}" for column, form in COLUMNS.items())
    print(f"{name:28}" + "".join(cells), flush=True)


def parts(folder: Path) -> list[Path]:
    return [folder / f"{part}-00000-of-00001.parquet" for part in ("train", "test")]


# ---- measure


@dataclass(frozen=True)
class Trained:
    """A model and what it took."""

    parameters: int
    seconds: float  # of training
    images: int  # shown
    draw: Callable[[int], torch.Tensor]  # so many images in [-1, 1]
    compiling: float = 0.0  # seconds of it


def measure(
    arguments: argparse.Namespace,
    file: Path,
    trained: Trained,
    real: Features,
    extractor: Extractor,
) -> dict[str, float]:
    """Judge images of a model, and draw some into a picture beside the file."""
    torch.manual_seed(0)
    made = trained.draw(arguments.count)
    image_grid.grid(made[:SHOWN], file.with_suffix(".png"))
    fake = extract(as_images(made, None, []), extractor)
    some = np.random.default_rng(0).permutation(len(real))[:COVERED]
    return {
        "parameters": trained.parameters,
        "seconds": trained.seconds,
        "images": trained.images,
        "images/s": trained.images / trained.seconds,
        "distance": frechet_distance(real.features, fake.features),
        "coverage": manifold(real.features[some], fake.features[:COVERED], K).coverage,
        "compiling": trained.compiling,
    }


# ---- models


def train_genkit(
    arguments: argparse.Namespace, train: Images, seed: int, seconds: float
) -> Trained:
    folder, (train_file, test_file) = arguments.output / f"genkit-{seed}", parts(arguments.mnist)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    words += [str(RECIPE), "--output_dir", str(folder), "--seed", str(seed)]
    words += ["--images", str(train_file), "--val_images", str(test_file)]
    words += ["--max_minutes", str(seconds / 60), "--evaluations", "1", "--eval_samples", "100"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    settings = json.loads((folder / "run.json").read_text())["settings"]
    how = {"steps": arguments.steps, "scheduler": arguments.sampler}
    return Trained(
        sampling.load_image_model(str(folder)).unet.num_parameters(),
        last["seconds"],
        last["step"] * settings["batch_size"],
        lambda count: genkit.sample(folder, count, seed=0, **how).images,
        sum(map(float, re.findall(r"compiled in (\d+) s", done.stderr))),
    )


def train_diffusers(
    arguments: argparse.Namespace, train: Images, seed: int, seconds: float
) -> Trained:
    torch.manual_seed(seed)
    accelerator, noising = Accelerator(mixed_precision="no"), DDPMScheduler(TIMES)
    unet = diffusers_unet(train)
    average = EMAModel(unet.parameters(), 0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    average.to(accelerator.device)
    rate = arguments.learning_rate
    optimizer = torch.optim.AdamW(unet.parameters(), rate, (0.95, 0.999), 1e-8, 1e-6)
    unet, optimizer, batches = accelerator.prepare(unet, optimizer, loader(train, arguments))
    clock = Clock(seconds)
    for step, clean in enumerate(clock.repeat(batches)):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * clock.part)) / 2
            group["lr"] = rate * min(1.0, step / WARMUP) * cosine
        noise = torch.randn_like(clean)
        times = torch.randint(TIMES, (len(clean),), device=clean.device)
        loss = F.mse_loss(unet(noising.add_noise(clean, noise, times), times).sample, noise)
        update(accelerator, unet, optimizer, loss)
        average.step(unet.parameters())
    average.copy_to(unet.parameters())
    pipeline = DDIMPipeline(unet.eval(), DDIMScheduler.from_config(noising.config))
    pipeline.set_progress_bar_config(disable=True)

    def draw(count: int) -> torch.Tensor:
        made = pipeline(count, num_inference_steps=arguments.steps, output_type="np").images
        return torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1

    return clock.trained(unet, draw)


def diffusers_unet(train: Images) -> UNet2DModel:
    channels, *sides = train.size
    return UNet2DModel(
        sample_size=tuple(sides),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def train_lucidrains(
    arguments: argparse.Namespace, train: Images, seed: int, seconds: float
) -> Trained:
    diffusion_class, unet_class, ema_class = lucidrains()
    torch.manual_seed(seed)
    accelerator, (channels, *sides) = Accelerator(mixed_precision="no"), train.size
    unet = unet_class(22, dim_mults=(1, 2, 4), channels=channels, flash_attn=True)
    steps = {"timesteps": TIMES, "sampling_timesteps": arguments.steps}
    model = diffusion_class(unet, image_size=sides, **steps)
    optimizer = torch.optim.Adam(model.parameters(), arguments.learning_rate, (0.9, 0.99))
    average = ema_class(model, beta=0.995, update_every=10).to(accelerator.device)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(train, arguments))
    clock = Clock(seconds)
    for clean in clock.repeat(batches):
        update(accelerator, model, optimizer, model((clean + 1) / 2))
        average.update()
    averaged = average.ema_model.eval()

    def draw(count: int) -> torch.Tensor:
        with contextlib.redirect_stderr(io.StringIO()):  # it has a progress bar
            return averaged.sample(count) * 2 - 1

    return clock.trained(unet, draw)


def lucidrains() -> tuple[Any, Any, Any]:
    # it imports torchvision, which has no build for some machines, for its Trainer's data set alone
    names = {"torchvision", "torchvision.transforms", "torchvision.utils"} - sys.modules.keys()
    sys.modules.update({name: ModuleType(name) for name in names})
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    for name in names:
        del sys.modules[name]
    return GaussianDiffusion, Unet, EMA


def update(accelerator: Accelerator, model: Any, optimizer: Any, loss: torch.Tensor) -> None:
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


METHODS: dict[str, Callable[..., Trained]] = {
    "genkit": train_genkit,
    "diffusers": train_diffusers,
    "denoising-diffusion": train_lucidrains,
}


class Clock:
    """Stops a peer's loop, and counts what it was shown."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start, self.images = seconds, time.perf_counter(), 0

    @property
    def part(self) -> float:
        """How much of the time is over."""
        return (time.perf_counter() - self.start) / self.seconds

    def repeat(self, batches: Any) -> Iterator[torch.Tensor]:
        """Yield batches, one epoch after the other, until the time is over."""
        while True:
            for batch in batches:
                if self.part >= 1:
                    self.seconds *= self.part
                    return
                self.images += len(batch)
                yield batch

    def trained(self, unet: torch.nn.Module, draw: Callable[[int], torch.Tensor]) -> Trained:
        def blockwise(count: int) -> torch.Tensor:
            return torch.cat([draw(len(block)).cpu() for block in order.blocks(count, BLOCK)])

        parameters = sum(parameter.numel() for parameter in unet.parameters())
        return Trained(parameters, self.seconds, self.images, blockwise)


def loader(train: Images, arguments: argparse.Namespace) -> DataLoader:
    """Serve images in [-1, 1] from memory."""
    pixels: Any = train.batch(np.arange(len(train)))
    return DataLoader(pixels, arguments.batch_size, shuffle=True)


if __name__ == "__main__":
    main()
