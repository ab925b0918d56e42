"""Images a second that recipes/train_gan.py trains on, and a plain PyTorch loop, in turn.

    taskset -c 0,1 env OMP_NUM_THREADS=2 python benchmarks/gan_throughput.py --images train.parquet

Both have the same networks, losses, penalties, optimizers, precision, memory format, batch and
images, and average the generator's weights alike. The loop writes no log, no checkpoint and no
evaluation, heeds no signal, and draws from the global random state; the recipe's seconds are those
of its log: of its steps, without evaluations, checkpoints, and the 0.2 ms in which it writes a line
of the log. The first steps of both are left out.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from genkit.data import images
from genkit.data.images import Images
from genkit.models import gan, gan_losses
from genkit.training.optim import BatchedMuon

RECIPE = Path(__file__).parent.parent / "recipes" / "train_gan.py"
SKIPPED = 5  # steps before time counts

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="MNIST's training images, a parquet file")
    parser.add_argument("--presets", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("recipe_arguments", nargs="*", help="after --, flags for the recipe")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    for preset in arguments.presets:
        rates: dict[str, list[float]] = {"recipe": [], "loop": []}
        for _ in range(arguments.rounds):
            rate, settings = recipe(arguments, preset)
            rates["recipe"].append(rate)
            rates["loop"].append(loop(arguments, preset, settings, device))
        for name, values in rates.items():
            each = "  ".join(f"{value / 1000:.3f}" for value in values)
            print(
                f"{preset:8} {name:7} {statistics.median(values) / 1000:8.3f} thousand images/s"
                f"   of {each}",
                flush=True,
            )
        overhead = statistics.median(rates["loop"]) / statistics.median(rates["recipe"]) - 1
        print(f"{preset:8} overhead {100 * overhead:+6.1f} %", flush=True)


def recipe(arguments: argparse.Namespace, preset: str) -> tuple[float, dict[str, Any]]:
    """Train with the recipe; return images a second, and its settings."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        words += [str(RECIPE), "--images", arguments.images, "--preset", preset]
        words += ["--output_dir", str(folder), "--evaluations", "1", "--eval_samples", "100"]
        words += ["--max_minutes", str(arguments.seconds / 60), *arguments.recipe_arguments]
        subprocess.run(words, check=True, stdout=subprocess.PIPE)
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        settings = json.loads((folder / "run.json").read_text())["settings"]
    first, last = log[SKIPPED - 1], log[-1]
    steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    return steps * settings["batch_size"] / seconds, settings


def loop(
    arguments: argparse.Namespace, preset: str, settings: dict[str, Any], device: str
) -> float:
    """Train with a plain loop; return images a second."""
    torch.manual_seed(0)
    train, _ = images.load_train_val(arguments.images, None, settings["val_fraction"])
    step = LOOPS[preset](train, settings, device)
    for _ in range(SKIPPED):
        step()
    synchronize(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < arguments.seconds:
        step()
        synchronize(device)  # the recipe reads its losses at every step, too
        count += 1
    return count * settings["batch_size"] / (time.perf_counter() - start)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- plain loops


def modern(train: Images, settings: dict[str, Any], device: str) -> Step:
    """Relativistic loss, R1 and R2 every few steps, Muon, averaged weights."""
    batch_size, latent_dim, every = (
        settings[name] for name in ("batch_size", "latent_dim", "penalty_every")
    )
    half = settings["mixed_precision"] == "bf16"
    generator = gan.Generator(train.size, latent_dim, widths=[64], patch=4)
    discriminator = gan.Discriminator(train.size, widths=[64], patch=4)
    for player in (generator, discriminator):
        player.to(device).train()
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(settings["ema"]))
    making, scoring = muon(generator, settings), muon(discriminator, settings)
    count = 0

    def real() -> torch.Tensor:
        return train.batch(torch.randint(len(train), (batch_size,)).numpy(), device)

    def step() -> None:
        nonlocal count
        count += 1
        with torch.autocast(device, torch.bfloat16, enabled=half):
            with torch.no_grad():
                fakes = generator(torch.randn(batch_size, latent_dim, device=device)).float()
            reals = real()
            punish = count % every == 0
            reals.requires_grad_(punish)
            fakes.requires_grad_(punish)
            real_scores = discriminator(reals)[0].float()
            fake_scores = discriminator(fakes)[0].float()
            loss = F.softplus(fake_scores - real_scores).mean()
            if punish:
                for weight, scores, seen in (
                    (settings["r1"], real_scores, reals),
                    (settings["r2"], fake_scores, fakes),
                ):
                    (slope,) = torch.autograd.grad(scores.sum(), seen, create_graph=True)
                    loss = loss + every * weight / 2 * slope.square().flatten(1).sum(1).mean()
        loss.backward()
        for optimizer in scoring:
            optimizer.step()
        discriminator.zero_grad()
        discriminator.requires_grad_(False)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            fakes = generator(torch.randn(batch_size, latent_dim, device=device)).float()
            with torch.no_grad():
                real_scores = discriminator(real())[0].float()
            loss = F.softplus(real_scores - discriminator(fakes)[0].float()).mean()
        loss.backward()
        for optimizer in making:
            optimizer.step()
        generator.zero_grad()
        average.update_parameters(generator)
        discriminator.requires_grad_(True)

    return step


def muon(player: torch.nn.Module, settings: dict[str, Any]) -> list[torch.optim.Optimizer]:
    kernels = [p for p in player.parameters() if p.ndim == 4]
    others = [p for p in player.parameters() if p.ndim != 4]
    rate, betas = settings["learning_rate"], tuple(settings["betas"])
    muon_rate, momentum = settings["muon_learning_rate"], settings["momentum"]
    return [
        BatchedMuon(kernels, muon_rate, settings["weight_decay"], momentum),
        torch.optim.AdamW(others, rate, betas, weight_decay=0.0, fused=True),
    ]


def dcgan(train: Images, settings: dict[str, Any], device: str) -> Step:
    """Cross-entropy against noisy labels, AdamW."""
    batch_size, latent_dim = settings["batch_size"], settings["latent_dim"]
    noise, betas = settings["label_noise"], tuple(settings["betas"])
    generator = gan.Generator(
        train.size, latent_dim, "dcgan", [128, 128, 128], kernels=[4, 7], unit=True
    )
    discriminator = gan.Discriminator(
        train.size, "dcgan", [64, 128], strides=[2, 2], kernel=3, pool="max", unit=True
    )
    for player in (generator, discriminator):
        gan_losses.initialize_weights(player, None)
        player.to(device).train()
    making = torch.optim.AdamW(
        generator.parameters(), settings["learning_rate"], betas, weight_decay=0.0, fused=True
    )
    scoring = torch.optim.AdamW(
        discriminator.parameters(),
        settings["discriminator_learning_rate"],
        betas,
        weight_decay=0.0,
        fused=True,
    )

    def step() -> None:
        reals = train.batch(torch.randint(len(train), (batch_size,)).numpy(), device)
        with torch.no_grad():
            fakes = generator(torch.randn(batch_size, latent_dim, device=device))
        loss = torch.zeros((), device=device)
        for seen, target in ((reals, 1.0), (fakes, 0.0)):
            targets = target + noise * torch.rand(batch_size, device=device)
            scores, _ = discriminator(seen)
            loss = loss + F.binary_cross_entropy_with_logits(scores, targets)
        loss.backward()
        scoring.step()
        discriminator.zero_grad()
        discriminator.requires_grad_(False)
        scores, _ = discriminator(generator(torch.randn(batch_size, latent_dim, device=device)))
        F.softplus(-scores).mean().backward()
        making.step()
        generator.zero_grad()
        discriminator.requires_grad_(True)

    return step


LOOPS: dict[str, Callable[[Images, dict[str, Any], str], Step]]
LOOPS = {"modern": modern, "dcgan": dcgan}


if __name__ == "__main__":
    main()
