"""Images a second that genkit.sample draws, beside the stock pipeline on the same weights.

    python benchmarks/diffusion_sampling.py runs/diffusion --mnist mnist --extractor runs/classifier

An unconditional model that recipes/train_diffusion.py trained, the same sampler, steps, seeds and
batch; each in turn, several rounds, compilation before the first. Differences are of images in
[0, 1]. The lines after that say what is left: the time of one evaluation an image by kind of
operation, and the rate of its convolutions beside that of a large product of matrices, which no
convolution exceeds that multiplies every weight. With MNIST and an extractor it also measures the
effect of bfloat16 on the Frechet distance.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

import genkit
from genkit.data import images
from genkit.metrics.features import extract, extract_cached, load_extractor
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.given_images import as_images
from genkit.models import diffusion

PASSES, SHOWN = 5, 6  # of the network that are timed; kinds of operations that are named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of an unconditional diffusion model")
    parser.add_argument("--scheduler", default="ddim", choices=("ddpm", "ddim", "dpm++"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--extractor")
    parser.add_argument("--count", type=int, default=10_000, help="images for the distance")
    arguments = parser.parse_args()
    ways = {
        "stock": stock(arguments),
        "float32": ours(arguments, "float32"),
        "bfloat16": ours(arguments, "bfloat16"),
        "compiled float32": ours(arguments, "float32", True),
        "compiled bfloat16": ours(arguments, "bfloat16", True),
    }
    drawn = {name: way(arguments.batch) for name, way in ways.items()}  # compiles
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way(arguments.batch)
            rates[name].append(arguments.batch / (time.perf_counter() - started))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    for name, rate in medians.items():
        apart = (drawn[name] - drawn["stock"]).abs().max().item() / 2
        ratio = rate / medians["stock"]
        print(
            f"{name:17} {rate:8.1f} images a second, {ratio:5.2f} times the stock pipeline's; "
            f"images differ by {apart:.1e} at most",
            flush=True,
        )
    profile_network(arguments)
    if arguments.mnist:
        compare(arguments, ways)


Way = Callable[[int], torch.Tensor]


def stock(arguments: argparse.Namespace) -> Way:
    """Diffusers' own pipeline, eager, in float32."""
    pipeline = DDPMPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusion.make_sampler(
        pipeline.scheduler, arguments.scheduler, arguments.steps
    )

    def draw(count: int) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
        steps = {"num_inference_steps": arguments.steps, "output_type": "np"}
        drawn = pipeline(count, seeds, **steps).images
        return 2 * torch.from_numpy(drawn).permute(0, 3, 1, 2) - 1

    return draw


def ours(arguments: argparse.Namespace, dtype: str, compile: bool = False) -> Way:
    def draw(count: int) -> torch.Tensor:
        how = {"scheduler": arguments.scheduler, "steps": arguments.steps, "dtype": dtype}
        return genkit.sample(arguments.model, count, seed=0, compile=compile, **how).images

    return draw


def profile_network(arguments: argparse.Namespace) -> None:
    """Print what one evaluation an image takes, uncompiled, in both precisions."""
    network = UNet2DModel.from_pretrained(arguments.model / "unet").eval()
    side = network.config.sample_size
    noise = torch.randn(arguments.batch, network.config.in_channels, side, side)
    times = torch.full((arguments.batch,), 500.0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(noise[:1], times[:1])
    products = counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2
    for dtype in (torch.float32, torch.bfloat16):
        predict = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)(network)
        with torch.no_grad():
            predict(noise, times)
            with torch.profiler.profile() as profile:
                for _ in range(PASSES):
                    predict(noise, times)
        images = PASSES * arguments.batch
        spent = {e.key: e.self_cpu_time_total / images / 1e3 for e in profile.key_averages()}
        largest = sorted(spent, key=lambda key: spent[key], reverse=True)[:SHOWN]
        parts = ", ".join(f"{key.removeprefix('aten::')} {spent[key]:.2f}" for key in largest)
        rate = products / spent["aten::mkldnn_convolution"] / 1e6
        print(
            f"{str(dtype).removeprefix('torch.'):9} {sum(spent.values()):.2f} ms: {parts}; "
            f"convolutions {rate:.0f} GMAC/s, a matrix product {matrix_rate(dtype):.0f}",
            flush=True,
        )


def matrix_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """Return billions of multiply-adds a second of a product of square matrices."""
    matrix = torch.randn(side, side).to(dtype)
    matrix @ matrix
    seconds = []
    for _ in range(PASSES):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return side**3 / min(seconds) / 1e9


def compare(arguments: argparse.Namespace, ways: dict[str, Way]) -> None:
    """Print the distance from MNIST's training images in both precisions."""
    train = images.load_images(arguments.mnist / "train-00000-of-00001.parquet")
    extractor = load_extractor(arguments.extractor)
    real, found = extract_cached(train, extractor), {}
    for name in ("float32", "bfloat16"):
        seen = extract(as_images(ways[name](arguments.count), None, []), extractor)
        found[name] = frechet_distance(real.features, seen.features)
        print(f"{name:9} distance {found[name]:.4f} of {arguments.count:,} images", flush=True)
    print(f"ratio {found['bfloat16'] / found['float32']:.4f}")


if __name__ == "__main__":
    main()
