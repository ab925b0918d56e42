"""Load images: how fast files are decoded, and an epoch of MNIST against `datasets`.

python benchmarks/images.py --mnist mnist/train-00000-of-00001.parquet
"""

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from genkit.data import images, pixels, workers

CHUNK = 256  # files of a task
BATCH = 256
KINDS: dict[str, tuple[int, tuple[int, int], str, int | None]] = {
    "JPEG of 500 x 375 to 64 x 64": (2000, (500, 375), "RGB", 64),
    "PNG of 28 x 28": (20_000, (28, 28), "L", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", help="a parquet file of it; without it, only decoding")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for name, (count, size, mode, resolution) in KINDS.items():
        files = [(f"file {i}", encode_image(i, size, mode)) for i in range(count)]
        print(f"{count:,} {name}, {len(files[0][1]):,} bytes the first; images a second:")
        for way, seconds in time_decoding(files, resolution, arguments.workers):
            print(f"  {way}: {count / seconds:,.0f} ({seconds:.2f} s)", flush=True)
    if arguments.mnist:
        with tempfile.TemporaryDirectory() as work:
            os.environ["GENKIT_CACHE"] = str(Path(work) / "cache")
            time_epochs(arguments.mnist)


# ---------------------------------------------------------------------------------------------
# Decoding


def encode_image(seed: int, size: tuple[int, int], mode: str) -> bytes:
    """Return an image file of smooth noise, which compresses as a photograph does."""
    rng = np.random.default_rng(seed)
    shape = (size[1] // 7, size[0] // 7, 3) if mode == "RGB" else (size[1] // 7, size[0] // 7)
    coarse = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    file = io.BytesIO()
    fine = coarse.resize(size, Image.Resampling.BICUBIC)
    fine.save(file, "jpeg" if mode == "RGB" else "png")
    return file.getvalue()


def time_decoding(
    files: list[workers.File], resolution: int | None, count: int
) -> Iterator[tuple[str, float]]:
    """Yield the ways of decoding and the seconds of each, the start of its workers included."""
    start = time.monotonic()
    decode_here(files, resolution)
    yield "here", time.monotonic() - start
    pools: dict[str, Callable[[], Executor]] = {
        "1 thread": partial(ThreadPoolExecutor, 1),
        f"{count} threads": partial(ThreadPoolExecutor, count),
        f"{count} processes, forked": partial(
            ProcessPoolExecutor, count, multiprocessing.get_context("fork")
        ),
        f"{count} processes, spawned": partial(
            ProcessPoolExecutor, count, multiprocessing.get_context("spawn")
        ),
    }
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    for way, pool in pools.items():
        start = time.monotonic()
        with pool() as executor:
            done = sum(map(len, executor.map(partial(decode_here, resolution=resolution), chunks)))
        assert done == len(files)
        yield way, time.monotonic() - start
    start, options = time.monotonic(), workers.DecodeOptions(resolution)
    done = sum(1 for _ in workers.decode_files(iter(files), len(files), options))
    assert done == len(files)
    yield f"genkit ({os.cpu_count()} processes)", time.monotonic() - start


def decode_here(files: list[workers.File], resolution: int | None) -> list[np.ndarray]:
    found = [pixels.decode_image(data, name) for name, data in files]
    return [pixels.image_to_array(image, resolution, len(image.getbands())) for image in found]


# ---------------------------------------------------------------------------------------------
# Epochs


def time_epochs(mnist: str) -> None:
    for name in ("first", "second"):
        start = time.monotonic()
        found = images.load_images(mnist)
        print(f"{len(found):,} images, {name} load: {time.monotonic() - start:.2f} s")
    order = np.random.default_rng(0).permutation(len(found))
    start = time.monotonic()
    total = sum(
        float(found.batch(order[i : i + BATCH]).mean() + found.classes(order[i : i + BATCH])[0])
        for i in range(0, len(order), BATCH)
    )
    ours = time.monotonic() - start
    print(f"an epoch in shuffled batches of {BATCH}: {ours:.2f} s (sum {total:.3f})")
    theirs = time_peer(mnist, order)
    print(f"`datasets`, torch format: {theirs:.2f} s, {theirs / ours:.0f} times as long")


def time_peer(mnist: str, order: np.ndarray) -> float:
    """Iterate over the same batches with `datasets`, which decodes them to tensors."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from datasets import Dataset

    rows = Dataset(pq.read_table(mnist)).with_format("torch")  # a file name is no pattern here
    start, total = time.monotonic(), 0.0
    for i in range(0, len(order), BATCH):
        batch = rows[order[i : i + BATCH]]
        stacked = batch["image"]
        values = stacked if isinstance(stacked, torch.Tensor) else torch.stack(stacked)
        total += float((values.float() / 127.5 - 1).mean() + batch["label"][0])
    seconds = time.monotonic() - start
    print(f"(sum {total:.3f})")
    return seconds


if __name__ == "__main__":
    main()
