"""Translation with a known answer: coloured MNIST, whose hue the grey digit does not determine.

    python benchmarks/translation.py data --mnist mnist --output coloured
    accelerate launch recipes/train_translation.py --images coloured/train.parquet \
        --method diffusion --max_minutes 20 --output_dir runs/diffusion
    python benchmarks/translation.py measure --data coloured --models runs/diffusion runs/l2 …
    python benchmarks/translation.py tiles --model runs/l2

Each digit has the luminance of the grey one, halved, and a hue from two modes that depend on its
class: whoever sees the luminance alone cannot know which. What a model should learn is therefore
known, and so is the histogram of its hues.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from PIL import Image

import genkit
from genkit.data.images import load_images
from genkit.models.translation import LUMA, TranslationPipeline, luminance
from genkit.vision import image_grid

CLASSES = 10
STEP, APART = 36.0, 150.0  # degrees from class to class, and from mode to mode
SHARES = (0.6, 0.38, 0.02)  # of the two modes, and of hues from anywhere
KAPPA = 16.0  # concentration of a mode: a standard deviation of 14.5 degrees
LIGHT = 0.5  # luminance of white pixels of MNIST, so that every hue fits in
BINS = 18
SEEDS = 2
ROWS = 250
SHOWN = 16  # digits in the picture

# ---- the truth


def basis() -> np.ndarray:
    """Return two orthonormal colours without luminance, (2, 3)."""
    first = np.cross(LUMA, (1.0, 0.0, 0.0))
    second = np.cross(LUMA, first)
    return np.stack([each / np.linalg.norm(each) for each in (first, second)])


def draw_hues(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a hue for each label, in radians from -pi to pi, (n,)."""
    mode = rng.choice(3, len(labels), p=SHARES)
    centre = np.radians(STEP * labels + APART * (mode == 1))
    hues = rng.vonmises(0, KAPPA, len(labels)) + centre
    hues = np.where(mode == 2, rng.uniform(-np.pi, np.pi, len(labels)), hues)
    return (hues + np.pi) % (2 * np.pi) - np.pi


def true_histogram(label: int) -> np.ndarray:
    """Return the probability of each bin of a class's hues, (BINS,), by integration."""
    places = (np.arange(BINS * 100) + 0.5) / (BINS * 100) * 2 * np.pi - np.pi
    density = np.full_like(places, SHARES[2] / (2 * np.pi))
    for share, shift in zip(SHARES[:2], (0.0, APART), strict=True):
        away = places - np.radians(STEP * label + shift)
        density += share * np.exp(KAPPA * np.cos(away)) / (2 * np.pi * np.i0(KAPPA))
    mass = density.reshape(BINS, 100).sum(1)
    return mass / mass.sum()


def colour(grey: np.ndarray, hues: np.ndarray) -> np.ndarray:
    """Colour digits, (n, height, width) uint8, at half their luminance; (n, h, w, 3) uint8."""
    directions = np.stack([np.cos(hues), np.sin(hues)], 1) @ basis()  # (n, 3), at most 1 long
    light = LIGHT * grey[..., None] / 255
    return np.round(255 * light * (1 + directions[:, None, None])).astype(np.uint8)


def hues_of(images: torch.Tensor) -> np.ndarray:
    """Return the mean hue of each image, in [-1, 1], (n, 3, height, width); (n,) in radians."""
    chroma = (images - luminance(images)).sum((2, 3)).double().numpy() @ basis().T
    return np.arctan2(chroma[:, 1], chroma[:, 0])


# ---- data


def read_mnist(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read digits, (n, 28, 28) uint8, and their labels, (n,)."""
    table = pq.read_table(file).to_pydict()
    cells = (io.BytesIO(cell["bytes"]) for cell in table["image"])
    return np.stack([np.asarray(Image.open(cell)) for cell in cells]), np.array(table["label"])


def write_data(mnist: Path, output: Path, edge: int) -> None:
    """Write train.parquet and test.parquet of coloured digits, with black pixels around them."""
    output.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", "test")):
        grey, labels = read_mnist(next(mnist.glob(f"{split}*.parquet")))
        grey = np.pad(grey, ((0, 0), (edge, edge), (edge, edge)))
        cells = []
        for image in colour(grey, draw_hues(labels, np.random.default_rng(seed))):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png", compress_level=1)
            cells.append({"bytes": file.getvalue(), "path": None})
        pq.write_table(
            pa.table({"image": cells, "label": labels.tolist()}), output / f"{split}.parquet"
        )


# ---- the judge


class Judge(torch.nn.Sequential):
    """A classifier of digits in any colour: hues say nothing to it of the class."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveMaxPool2d(4),
            torch.nn.Flatten(), torch.nn.Linear(1024, CLASSES),
        )  # fmt: skip


def train_judge(images: torch.Tensor, labels: np.ndarray, steps: int) -> Judge:
    """Train on digits whose hues are drawn anew, without regard to their class."""
    torch.manual_seed(0)
    rng, judge = np.random.default_rng(3), Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    axes = torch.from_numpy(basis()).float()
    for step in range(steps):
        which = rng.integers(len(images), size=64)
        grey = (luminance(images[which]) + 1) / 2
        hues = torch.from_numpy(rng.uniform(-np.pi, np.pi, 64)).float()
        directions = torch.stack([hues.cos(), hues.sin()], 1) @ axes
        batch = 2 * grey * (1 + directions[:, :, None, None]) - 1
        loss = F.cross_entropy(judge(batch), torch.from_numpy(labels[which]))
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


# ---- the figures


def divergence(hues: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over the classes of KL(histogram of hues, truth), in nats."""
    each = []
    for label in range(CLASSES):
        counts, _ = np.histogram(hues[labels == label], BINS, (-np.pi, np.pi))
        found = counts / counts.sum()
        some = found > 0
        each.append((found[some] * np.log(found[some] / true_histogram(label)[some])).sum())
    return float(np.mean(each))


def colourfulness(images: torch.Tensor) -> float:
    """Return the mean of Hasler and Süsstrunk's M3 (2003), for 8-bit channels, over images."""
    red, green, blue = ((images + 1) * 127.5).unbind(1)
    pairs = torch.stack([red - green, (red + green) / 2 - blue]).flatten(2)
    spread = pairs.var(2).sum(0).sqrt()
    return float((spread + 0.3 * pairs.mean(2).square().sum(0).sqrt()).mean())


def figures(
    made: list[torch.Tensor], labels: np.ndarray, judge: Judge, true_distance: float
) -> dict[str, float]:
    """Measure translations of one set of digits by several seeds, each (n, 3, height, width)."""
    with torch.no_grad():
        predicted = [judge(part).argmax(1).numpy() for part in made[0].split(ROWS)]
    return {
        "kl": divergence(hues_of(torch.cat(made)), np.concatenate([labels] * len(made))),
        "colourfulness": colourfulness(made[0]),
        "variety": float((made[0] - made[1]).square().mean().sqrt()) / true_distance,
        "accuracy": float((np.concatenate(predicted) == labels).mean()),
    }


def translate_all(
    pipeline: TranslationPipeline, grey: torch.Tensor, seed: int, steps: int | None
) -> torch.Tensor:
    """Translate all digits, (n, 1, height, width); (n, 3, height, width)."""
    noise = torch.randn(
        len(grey), 3, *grey.shape[2:], generator=torch.Generator().manual_seed(seed)
    )
    parts = zip(grey.split(ROWS), noise.split(ROWS), strict=True)
    return torch.cat([pipeline.translate(own, given, steps) for own, given in parts])


def measure(data: Path, models: list[Path], count: int, steps: int, judge_steps: int) -> None:
    """Print a table of all models, and write translation.json and translation.png."""
    side = genkit.load(models[0]).tile[0]
    train = load_images(data / "train.parquet", side)
    test = load_images(data / "test.parquet", side)
    some = np.arange(len(test) - count, len(test))
    labels = test.classes(some).numpy()
    few = np.arange(20_000)
    judge = train_judge(train.batch(few), train.classes(few).numpy(), judge_steps)
    true = test.batch(some)
    again = recoloured(true, labels, 7)
    distance = float((true - again).square().mean().sqrt())
    table = {"truth": figures([true, again], labels, judge, distance)}
    shown: dict[str, Any] = {"given": luminance(true[:SHOWN]), "truth": true[:SHOWN]}
    for folder in models:
        pipeline, started = genkit.load(folder), time.process_time()
        own = None if pipeline.deterministic else steps
        made = [translate_all(pipeline, luminance(true), seed, own) for seed in range(SEEDS)]
        table[folder.name] = figures(made, labels, judge, distance)
        table[folder.name] |= {"steps": own or 1, "cpu_seconds": time.process_time() - started}
        for seed, part in enumerate(made[: 1 if pipeline.deterministic else SEEDS]):
            shown[f"{folder.name} {seed}"] = part[:SHOWN]
        print(folder.name, table[folder.name], flush=True)
    print(json.dumps(table, indent=2))
    Path("translation.json").write_text(json.dumps(table, indent=2))
    image_grid.rows(shown, Path("translation.png"))


def recoloured(images: torch.Tensor, labels: np.ndarray, seed: int) -> torch.Tensor:
    """Draw the colours of digits anew from the truth."""
    hues = torch.from_numpy(draw_hues(labels, np.random.default_rng(seed))).float()
    directions = torch.stack([hues.cos(), hues.sin()], 1) @ torch.from_numpy(basis()).float()
    light = (luminance(images) + 1) / 2
    return 2 * light * (1 + directions[:, :, None, None]) - 1


# ---- tiles


def measure_tiles(model: Path, side: int) -> None:
    """Print how far a large image is from itself across seams; see bar 5.

    Of a pattern that repeats with the step of the tiles, all tiles see the same: every repetition
    should be translated alike. Of a picture, the step between neighbouring pixels should be no
    larger where a tile begins than elsewhere.
    """
    pipeline = genkit.load(model)
    tile, step = pipeline.tile[0], pipeline.tile[0] // 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, side, side, generator=generator)
    pattern = torch.rand(1, 1, step, step, generator=generator) * 2 - 1
    repeated = pattern.repeat(1, 1, side // step, side // step)
    steps = None if pipeline.deterministic else 2
    started = time.process_time()
    made = pipeline.translate(repeated, noise, steps)
    seconds = time.process_time() - started
    inside = made[..., step:-step, step:-step].unfold(2, step, step).unfold(3, step, step)
    apart = float((inside - inside[:, :, :1, :1]).abs().max())
    rough = torch.rand(1, 1, side // 16, side // 16, generator=generator) * 2 - 1
    picture = F.interpolate(rough, (side, side), mode="bicubic").clamp(-1, 1)
    made = pipeline.translate(picture, noise, steps)
    chroma = made - luminance(made)
    across = chroma.diff(dim=3).abs().mean((0, 1, 2))
    seams = torch.arange(step, side - step, step) - 1
    others = torch.ones(len(across), dtype=torch.bool)
    others[seams] = False
    print(
        f"{side} x {side} in tiles of {tile}: repetitions differ by {apart:.1e} at most "
        f"({seconds:.0f} CPU seconds); steps of colour at seams {across[seams].mean():.5f}, "
        f"elsewhere {across[others].mean():.5f}"
    )


def main() -> None:
    """Make the data, measure models on it, or measure tiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("--mnist", type=Path, required=True, help="folder of its two parquet files")
    data.add_argument("--output", type=Path, required=True)
    data.add_argument("--edge", type=int, default=0, help="black pixels on each side")
    table = commands.add_parser("measure")
    table.add_argument("--data", type=Path, required=True)
    table.add_argument("--models", type=Path, nargs="+", required=True)
    table.add_argument("--count", type=int, default=2000, help="digits of the test set, its last")
    table.add_argument("--steps", type=int, default=10)
    table.add_argument("--judge_steps", type=int, default=1500)
    tiles = commands.add_parser("tiles")
    tiles.add_argument("--model", type=Path, required=True)
    tiles.add_argument("--side", type=int, default=1024)
    given = vars(parser.parse_args())
    command = given.pop("command")
    if command == "data":
        write_data(given["mnist"], given["output"], given["edge"])
    elif command == "measure":
        measure(**given)
    else:
        measure_tiles(**given)


if __name__ == "__main__":
    main()
