"""Train a stylizer: a network that paints any image in one style, in a single pass.

    accelerate launch recipes/train_stylizer.py --style wave.png --images photos \
        --extractor runs/classifier
    accelerate launch recipes/train_stylizer.py --output_dir runs/stylizer --resume

The extractor is a convolutional image classifier, whose hidden states are compared. The model in
the output folder is at any time the best so far, in diffusers' layout; it takes images of any size:

    genkit stylize harbour.png --model runs/stylizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import machine
from genkit.data.images import Images
from genkit.data.order import blocks
from genkit.errors import clean_errors
from genkit.hub import card, download, vendoring
from genkit.models import stylizer
from genkit.training.curves import loss_curve
from genkit.training.image_data import ImageSettings, load_for_run
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.vision import gallery, image_grid, style_target
from genkit.vision.differentiable import DifferentiableClassifier, load_differentiable
from genkit.vision.style_target import StyleTarget

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/stylizer", "folder of the run and of the model")
    style: str | None = setting(None, "image whose style to learn")
    extractor: str | None = setting(
        None, "folder or Hub id of the classifier whose hidden states are compared"
    )
    resolution: int | None = setting(
        CHOSEN, "scale and crop images to squares of this side", least=stylizer.SMALLEST
    )
    style_size: int | None = setting(
        None, "shrink the style to this longer side; default: the resolution", least=1
    )
    style_weight: float = setting(30.0, "weight of the style's loss over the content's", least=0)
    content_layer: int | None = setting(
        None, "hidden state of the content; default: the last one of the third resolution"
    )
    style_layers: list[int] | None = setting(
        None, "those of the style; default: the last one of each of the first four resolutions"
    )
    widths: list[int] = setting(
        CHOSEN, "channels at each size; the image is halved between two of them", least=1
    )
    blocks: int = setting(5, "residual blocks at the smallest size", least=0)
    stride: int = setting(
        CHOSEN, "of the first convolution; 2 saves most of the work at full size", choices=(1, 2)
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        download.check_exists(self.extractor, "--extractor")
        if self.style is not None and not Path(self.style).expanduser().is_file():
            raise ValueError(f"--style: {self.style!r} is no file; give an image")


COLUMNS = 6  # images in a picture
BLOCK = 8  # images evaluated together


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        run: dict[str, Any] = {"resolution": 256, "widths": [32, 64, 128], "stride": 1}
        run |= {"batch_size": 16, "max_steps": 10_000}
    else:
        run = {"resolution": 128, "widths": [16, 32], "stride": 2}
        run |= {"batch_size": 4, "max_minutes": 20.0}
    rates = {"learning_rate": 2e-3, "muon_learning_rate": 0.02, "weight_decay": 0.0}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    return run | rates | precision | {"optimizer": "adamw", "ema": 0.0, "compile": False}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    if settings.style is None:
        raise ValueError("--style is required: the image whose style to learn")
    if settings.extractor is None:
        raise ValueError("--extractor is required: a convolutional image classifier")

    with Run(settings) as run:
        # ---- data
        classifier = load_differentiable(settings.extractor, device=settings.device)
        settings.channels = settings.channels or classifier.classifier.channels
        train, val, order = load_for_run(run, settings)
        check_images(train, classifier.classifier.channels)
        target = make_target(settings, classifier)

        # ---- model
        network = stylizer.Stylizer(
            train.size[0], settings.widths, settings.blocks, settings.stride
        )
        model = run.network("model", network, optimizers(network, settings))
        paint = run.autocast(partial(apply, model))
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} to train on, {len(val):,} to validate · "
            f"hidden state {target.content_layer} of {classifier.name} for the content, "
            f"{', '.join(map(str, target.style_layers))} for the style"
        )

        # ---- loop
        curve = partial(loss_curve, unit="relative squared error")
        style_sha256 = hashlib.sha256(target.pixels.cpu().numpy().tobytes()).hexdigest()
        run.identify(
            train_sha256=train.sha256,
            val_sha256=val.sha256,
            extractor_sha256=classifier.classifier.sha256,
            style_sha256=style_sha256,
        )
        weight = settings.style_weight
        get_batch = partial(make_batch, train, run.device)
        run.warm_up(lambda rows: total_loss(target, weight, paint, get_batch(order(rows)[1])))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(total_loss(target, weight, paint, get_batch(order(rows)[1])))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, target, val)
                    if run.report("val_loss", metrics, curve=curve):
                        run.publish(partial(save_model, run, settings, target, train, val, metrics))


def check_images(train: Images, channels: int) -> None:
    """Refuse images of other channels than the extractor takes, and such as are too small."""
    if train.size[0] != channels:
        raise ValueError(
            f"images: they have {train.size[0]} channels, the extractor takes {channels}; give "
            f"--channels {channels}"
        )
    if min(train.size[1:]) < stylizer.SMALLEST:
        raise ValueError(f"images: {train.size[1:]} are fewer than {stylizer.SMALLEST} pixels")


def make_target(settings: Settings, classifier: DifferentiableClassifier) -> StyleTarget:
    """Read the style, and freeze the network that compares with it."""
    classifier.model.eval().requires_grad_(False)
    assert settings.style is not None and settings.resolution is not None, "checked, and chosen"
    style = style_target.read_pixels(settings.style, classifier.classifier.channels, "style")
    pixels = style_target.shrink(style, settings.style_size or settings.resolution)
    layers = settings.content_layer, settings.style_layers
    target = StyleTarget(classifier, pixels.to(classifier.device), *layers)
    side = settings.resolution  # images too small for the layers are refused now
    target.content(torch.zeros(1, len(pixels), side, side, device=classifier.device))
    return target


# ---- loss


def make_batch(part: Images, device: torch.device, which: np.ndarray) -> Tensor:
    """Look up images: pixels in [0, 1], (n, channels, height, width)."""
    return (part.batch(which, device) + 1) / 2


def apply(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Paint pixels in [0, 1], (n, channels, height, width)."""
    painted: Tensor = model(2 * pixels - 1)
    return (painted + 1) / 2


def total_loss(
    target: StyleTarget, weight: float, paint: Callable[[Tensor], Tensor], pixels: Tensor
) -> Tensor:
    """Return the mean loss of painted images; hidden states are computed in float32."""
    return target.losses(paint(pixels).float(), target.content(pixels)).total(weight).mean()


# ---- evaluate


def evaluate(run: Run, settings: Settings, target: StyleTarget, val: Images) -> dict[str, float]:
    """Evaluate the model on all validation images, and save pictures."""
    network = run.weights().eval()
    chunks = list(blocks(len(val), BLOCK))
    sums = torch.zeros(4, dtype=torch.float64)
    for i in range(run.accelerator.process_index, len(chunks), run.processes):
        pixels = make_batch(val, run.device, chunks[i])
        with torch.no_grad():
            parts = target.losses(apply(network, pixels), target.content(pixels))
        each = parts.total(settings.style_weight), parts.content, parts.style, parts.variation
        sums += torch.stack([part.sum() for part in each]).double().cpu()
    means = (run.sum(sums) / len(val)).tolist()
    if run.is_main:
        save_pictures(run, stylizer.StylizerPipeline(network), val)
    network.train()
    return dict(zip(("val_loss", "content", "style", "variation"), means, strict=True))


def save_pictures(run: Run, pipeline: stylizer.StylizerPipeline, val: Images) -> None:
    """Save held-out images over painted ones, and their progress."""
    some = np.unique(np.linspace(0, len(val) - 1, COLUMNS, dtype=int))
    images = val.batch(some, run.device)
    painted = 2 * torch.stack(pipeline(images, output_type="pt").images) - 1
    folder = run.folder.path
    image_grid.rows({"image": images, "painted": painted}, folder / "painted.png")
    gallery.save_samples(folder, run.progress.step, painted, columns=COLUMNS)


# ---- save


USAGE = """
from diffusers import DiffusionPipeline
from PIL import Image

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
pipeline(Image.open("picture.png")).images[0].save("painted.png")

import genkit

genkit.stylize("picture.png", model=model).save("painted.png")  # without running that code
"""


def save_model(
    run: Run,
    settings: Settings,
    target: StyleTarget,
    train: Images,
    val: Images,
    metrics: dict[str, float],
    path: Path,
) -> None:
    """Write the model as diffusers does, with its card."""
    network = run.weights().eval()
    vendoring.save_pipeline(stylizer.StylizerPipeline(network), path)
    network.train()
    card.write_card(
        path,
        run.folder.path,
        title="A stylizer of images",
        task="image-to-image",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} for {run.progress.step:,} steps to paint in the style of "
        f"{settings.style}.",
        usage=USAGE,
        figures=metrics,
        protocol=f"Means over all {len(val):,} validation images, {val.size[2]} x {val.size[1]}: "
        f"content is the squared error of hidden state {target.content_layer} of "
        f"{settings.extractor} over its variance, style that of Gram matrices of hidden states "
        f"{', '.join(map(str, target.style_layers))} and of the colours over their squares, "
        f"variation that of neighbouring pixels; val_loss is content + {settings.style_weight:g} "
        f"style + {style_target.VARIATION:g} variation.",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
