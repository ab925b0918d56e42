"""Train a language model of pixels: it generates an image pixel by pixel, from the top left.

    accelerate launch recipes/train_pixels.py
    accelerate launch recipes/train_pixels.py --images train.parquet --max_minutes 20 --compile yes
    accelerate launch recipes/train_pixels.py --conditional --output_dir runs/classes
    accelerate launch recipes/train_pixels.py --images photos --resolution 16 --levels 16
    accelerate launch recipes/train_pixels.py --output_dir runs/pixels --resume

The output folder is an ordinary transformers model, at any time the best one so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from genkit import machine
from genkit.data.images import Images
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.models import lm
from genkit.training.image_data import ImageSettings, load_for_run
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.vision import gallery, image_grid, pixel_lm
from genkit.vision.pixel_lm import PixelFormat

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/pixels", "folder of the run and of the model")
    conditional: bool = setting(False, "condition the model on the class")
    levels: int = setting(
        256, "levels of each channel of a pixel", least=2, most=pixel_lm.MOST_LEVELS
    )
    depth: int = setting(CHOSEN, "layers: the one dial of the model's size", least=1)
    width: int = setting(CHOSEN, "size of a layer's vectors", least=1)
    heads: int = setting(CHOSEN, "attention heads", least=1)
    dropout: float = setting(0.0, "dropout of attention weights", least=0, below=1)
    eval_samples: int = setting(
        CHOSEN, "validation images of an evaluation, evenly from all", least=1
    )


HALVES, TRIES = 12, 3  # images that are completed, and completions of each


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        depth, width_per_layer = settings.depth or 6, 64
        run: dict[str, Any] = {"batch_size": 64, "max_steps": 10_000, "eval_samples": 10_000}
    else:
        depth, width_per_layer = settings.depth or 4, 32
        run = {"batch_size": 16, "max_minutes": 1.0, "eval_samples": 200}
    shape = lm.choose_shape(depth, settings.width, settings.heads, width_per_layer)
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.3}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # on a CPU, compiling takes as long as the digits do
    compiles = device == "accelerator" and machine.can_compile()
    step = {"optimizer": "muon", "ema": 0.0, "compile": compiles}
    return shape | run | rates | precision | step


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        train, val, order = load_for_run(run, settings)
        val = val.take(np.unique(np.linspace(0, len(val) - 1, settings.eval_samples, dtype=int)))

        # ---- model
        labels = train.count_classes() if settings.conditional else 0
        pixels = PixelFormat(train.size, settings.levels, labels, train.names[:labels])
        network = make_network(settings, pixels)
        attention = machine.attention(run.device.type, settings.mixed_precision)
        network.set_attn_implementation(attention)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(lm.loss)
        get_batch = partial(make_batch, pixels, train, run.device)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} to train on, {len(val):,} to validate · "
            f"{pixels.length:,} levels an image"
        )

        # ---- loop
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256)
        run.warm_up(lambda rows: loss(model, *get_batch(order(rows)[1])))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *get_batch(order(rows)[1])))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, val)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save_model, run, settings, train, val, metrics))


def make_network(settings: Settings, pixels: PixelFormat) -> PreTrainedModel:
    """Build a new model."""
    shape = settings.depth, settings.width, settings.heads, settings.dropout
    return pixel_lm.make_model(pixels, *shape)


def make_batch(
    pixels: PixelFormat, part: Images, device: torch.device, which: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up images as lines of tokens: inputs and targets, (n, length) each."""
    lines = encode_images(pixels, part, device, which)
    return lines[:, :-1], lines[:, 1:]


def encode_images(
    pixels: PixelFormat, part: Images, device: torch.device, which: np.ndarray
) -> torch.Tensor:
    """Look up images as lines of tokens, (n, 1 + length)."""
    labels = part.classes(which, device) if pixels.labels else None
    return pixels.encode(part.batch(which, device), labels)


# ---- evaluate


def evaluate(run: Run, val: Images) -> dict[str, float]:
    """Evaluate the model on the validation images, and save pictures."""
    network = run.weights().eval()
    pipeline = pixel_lm.PixelPipeline(network)
    shard = np.array(run.shard(len(val)), int)
    lines = encode_images(pipeline.pixels, val, run.device, shard)
    bits = pixel_lm.bits_per_dimension(network, lines)
    total, count = run.sum(torch.stack([bits.sum(), bits.new_tensor(len(bits))])).tolist()
    if run.is_main:
        save_pictures(run, pipeline, val)
    network.train()
    return {"val_loss": total / count * math.log(2), "bits_per_dimension": total / count}


def save_pictures(run: Run, pipeline: pixel_lm.PixelPipeline, val: Images) -> None:
    """Save samples of the same seeds at every evaluation, and completions of upper halves."""
    labels = torch.arange(gallery.COUNT) % pipeline.labels if pipeline.labels else None
    generators = gallery.sample_generators()
    samples = pipeline(gallery.COUNT, generators, labels, output_type="pt").images
    gallery.save_samples(run.folder.path, run.progress.step, 2 * samples - 1, film=False)
    some = np.unique(np.linspace(0, len(val) - 1, HALVES, dtype=int))  # of all classes
    images, kept = val.batch(some), val.size[1] // 2
    classes = val.classes(some) if pipeline.labels else None
    given = images.clone()
    given[:, :, kept:] = 0
    named = {"original": images, "given": given}
    for i in range(TRIES):
        own = [torch.Generator().manual_seed(i * len(some) + j) for j in range(len(some))]
        named[f"completion {i + 1}"] = pipeline.complete(images, classes, kept, own)
    image_grid.rows(named, run.folder.path / "completions.png")


# ---- save


USAGE = """
import torch
import genkit

pipeline = genkit.load(model)
seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
pipeline(4, seeds{labels}).images[0].save("sample.png")

from transformers import AutoModelForCausalLM

network = AutoModelForCausalLM.from_pretrained(model)  # without genkit: levels as tokens
network.generate(torch.tensor([[{start}]]))[0, 1:]
"""


def save_model(
    run: Run, settings: Settings, train: Images, val: Images, metrics: dict[str, float], path: Path
) -> None:
    """Write the model as transformers does, with its card."""
    network = run.weights()
    network.save_pretrained(path)
    labels = f", labels={[i % len(train.names) for i in range(4)]}" if settings.conditional else ""
    card.write_card(
        path,
        run.folder.path,
        title="A language model of pixels",
        task="unconditional-image-generation",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} for {run.progress.step:,} steps.",
        usage=USAGE.format(labels=labels, start=settings.levels),
        figures=metrics,
        protocol=f"Exact likelihood of {len(val):,} validation images, evenly from all, each "
        f"channel of a pixel rounded to {settings.levels} levels: nats and bits for each of "
        f"{' x '.join(map(str, train.size))} dimensions"
        f"{', given the class' if settings.conditional else ''}.",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
