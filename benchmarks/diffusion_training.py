"""Images a second that recipes/train_diffusion.py trains on, and diffusers' example, in turn.

    taskset -c 0,1 env OMP_NUM_THREADS=2 python benchmarks/diffusion_training.py \\
        --images mnist/train-00000-of-00001.parquet
    … --widths 32 64 128 --layers 1

Both train the same network at the same batch size. The recipe is run as it comes: its seconds are
those of its log, of its steps, without compilation, evaluations and checkpoints. The example is the
loop of examples/unconditional_image_generation/train_unconditional.py in huggingface/diffusers as
its README runs it: in float32, not compiled, with accelerate's Accelerator, AdamW, a cosine with
warm-up, clipped gradients and EMAModel. It is spared its logs, checkpoints and pictures, and the
decoding of images, which are served from memory. The first steps of both are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from genkit.data import images
from genkit.data.images import Images

RECIPE = Path(__file__).parent.parent / "recipes" / "train_diffusion.py"
SKIPPED = 5  # steps before time counts
TIMES, WARMUP, EPOCHS = 1000, 500, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="such as MNIST's, a parquet file")
    parser.add_argument("--widths", nargs="+", help="of the network; default: the recipe's own")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("recipe_arguments", nargs="*", help="after --, flags for the recipe")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    train = images.load_images(arguments.images)
    rates: dict[str, list[float]] = {"recipe": [], "example": []}
    for _ in range(arguments.rounds):
        rate, config, batch_size = recipe(arguments)
        rates["recipe"].append(rate)
        rates["example"].append(example(train, config, batch_size, arguments.seconds))
    parameters = UNet2DModel.from_config(config).num_parameters()
    widths = " ".join(map(str, config["block_out_channels"]))
    print(f"{parameters:,} parameters, widths {widths}, batch {batch_size}")
    for name, values in rates.items():
        each = "  ".join(f"{value:.1f}" for value in values)
        print(f"{name:8}{statistics.median(values):9.1f} images/s   of {each}")
    ours, peer = map(statistics.median, rates.values())
    print(f"recipe / example: {ours / peer:.2f}")


def recipe(arguments: argparse.Namespace) -> tuple[float, dict[str, Any], int]:
    """Train with the recipe; return images a second, its network and its batch size."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        words += [str(RECIPE), "--images", arguments.images, "--output_dir", str(folder)]
        words += ["--evaluations", "1", "--eval_samples", "100", "--layers", str(arguments.layers)]
        words += ["--widths", *arguments.widths] if arguments.widths else []
        words += ["--max_minutes", str(arguments.seconds / 60), *arguments.recipe_arguments]
        subprocess.run(words, check=True, stdout=subprocess.PIPE)
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        settings = json.loads((folder / "run.json").read_text())["settings"]
        config = UNet2DModel.load_config(str(folder / "unet"))
    assert len(log) > SKIPPED, f"{len(log)} steps are too few; give more --seconds"
    first, last = log[SKIPPED - 1], log[-1]
    steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    return steps * settings["batch_size"] / seconds, config, settings["batch_size"]


def example(train: Images, config: dict[str, Any], batch_size: int, seconds: float) -> float:
    """Train as the example does; return images a second."""
    torch.manual_seed(0)
    accelerator, noising = Accelerator(mixed_precision="no"), DDPMScheduler(TIMES)
    unet = UNet2DModel.from_config(config)
    average = EMAModel(unet.parameters(), 0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-4, (0.95, 0.999), 1e-8, 1e-6)
    pixels: Any = train.batch(np.arange(len(train)))
    batches = DataLoader(pixels, batch_size, shuffle=True, drop_last=True)
    rates = get_cosine_schedule_with_warmup(optimizer, WARMUP, EPOCHS * len(batches))
    unet, optimizer, batches, rates = accelerator.prepare(unet, optimizer, batches, rates)
    average.to(accelerator.device)
    unet.train()
    for step, clean in enumerate(forever(batches), -SKIPPED):
        if step == 0:
            start = time.perf_counter()
        elif step > 0 and (passed := time.perf_counter() - start) >= seconds:
            return step * batch_size / passed
        noise = torch.randn_like(clean)
        times = torch.randint(TIMES, (len(clean),), device=clean.device)
        loss = F.mse_loss(unet(noising.add_noise(clean, noise, times), times).sample, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        loss.item()  # it waits for a GPU at every step, as the example does
    raise AssertionError("batches come forever")


def forever(batches: Any) -> Iterator[torch.Tensor]:
    while True:
        yield from batches


if __name__ == "__main__":
    main()
