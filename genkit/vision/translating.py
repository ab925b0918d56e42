"""genkit.translate: an image translated to others, such as a grey photograph to colour."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from genkit import console
from genkit.arguments import explain_names
from genkit.hub import kinds
from genkit.models import translation
from genkit.models.translation import TranslationPipeline
from genkit.notebook import as_png
from genkit.seeds import is_whole, row_seeds
from genkit.vision import image_grid
from genkit.vision.differentiable import ImageLike, read_image
from genkit.vision.translators import load_translation_model

AREA = 1 << 24  # pixels of the largest result

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Translated:
    """Translations of one image, and how they were made."""

    images: list[Image.Image] = field(repr=False)  # one for each seed
    condition: str  # what the model translates from
    seeds: list[int]  # translate(image, seed=seeds[i], …) gives images[i] again
    steps: int  # of the sampler; 1 of a model that draws nothing at random
    tiles: int  # in which the image was translated
    evaluations: int  # of the network, for each image
    seconds: float  # for all images
    model: str

    def __str__(self) -> str:
        width, height = self.images[0].size
        seeds = ", ".join(map(str, self.seeds[:8])) + (", …" if len(self.seeds) > 8 else "")
        tiles = f"{self.tiles} tiles, " if self.tiles > 1 else ""
        return (
            f"{len(self.images)} of {width} x {height} from {self.condition}, seeds {seeds}, "
            f"{self.steps} step{'s' * (self.steps > 1)}, {tiles}{self.evaluations} "
            f"evaluation{'s' * (self.evaluations > 1)} each, {self.seconds:.1f} s"
        )

    def save(self, path: str | Path) -> None:
        """Write all images side by side, completely or not at all.

        Raises:
            ValueError: the suffix is not that of a supported format.
        """
        image_grid.save_as(self._sheet(), path)

    def save_each(self, path: str | Path) -> list[Path]:
        """Write every image into a file of its own, and return these: a.png, a-2.png, a-3.png, …

        Raises:
            ValueError: the suffix is not that of a supported format.
        """
        file = Path(path)
        count = len(self.images)
        files = [file, *(file.with_stem(f"{file.stem}-{i}") for i in range(2, count + 1))]
        for image, own in zip(self.images, files, strict=True):
            image_grid.save_as(image, own)
        return files

    def _sheet(self) -> Image.Image:
        width, height = self.images[0].size
        sheet = Image.new(self.images[0].mode, (width * len(self.images), height))
        for i, image in enumerate(self.images):
            sheet.paste(image, (i * width, 0))
        return sheet

    def _repr_png_(self) -> bytes:
        return as_png(self.save)


# ---------------------------------------------------------------------------------------------
# The verb


@explain_names
def translate(
    image: ImageLike,
    *,
    model: str | Path | TranslationPipeline,
    seed: int | Sequence[int] | None = None,
    steps: int | None = None,
    mask: ImageLike | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> Translated:
    """Translate an image by a model of recipes/train_translation.py, once for each seed.

    What the model translates from was chosen in training: a photograph to colour, whose luminance
    is kept; a small image to enlarge; an image to complete where a mask is white; edges, white on
    black; or the first images of pairs. An image larger than those of training is translated in
    overlapping tiles of one noise, whose predictions are averaged at every step.

    Args:
        image: a path, a PIL image, a uint8 array, or a float tensor in [-1, 1] of the shape
            (channels, height, width).
        model: folder or Hub id, or what `genkit.load` returned.
        seed: of the image, or one for each of several; default: random.
        steps: of the sampler, each an evaluation of the network; default: 20.
        mask: an image, as `image`, white where a model for masked images is to fill it in.
        revision: branch, tag or commit on the Hub.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A record that prints, with the images.

    Raises:
        ValueError: an argument is invalid, or does not fit the model.

    Source: Saharia et al. 2022, https://arxiv.org/abs/2111.05826; Bar-Tal et al. 2023,
        https://arxiv.org/abs/2302.08113
    """
    given: Any = [seed] if seed is None or is_whole(seed) else seed
    count = len(given)
    if not count:
        raise ValueError("seed: there are none; give one at least")
    seeds = row_seeds(seed, count, "an image")
    kinds.check_loaded(model, takes=TranslationPipeline.__name__)
    if isinstance(model, TranslationPipeline):
        pipeline, name = model, getattr(model, "name", "")
    else:
        name = kinds.as_name(model)
        pipeline = load_translation_model(name, revision, device)
    steps = pipeline.check_steps(steps)
    condition = pipeline.prepare(
        _picture(image, "image"), None if mask is None else _picture(mask, "mask")
    )
    height, width = condition.shape[2:]
    if height * width > AREA:
        raise ValueError(f"image: the result would have {width} x {height} pixels, over {AREA:,}")
    started, images = time.perf_counter(), []
    for own in console.bar(seeds, "translating", count, " images", count == 1):
        noise = torch.Generator().manual_seed(own)
        (made,) = pipeline(condition, noise, steps, output_type="pt").images
        images.append(image_grid.to_picture(made))
    tiles = count_tiles(pipeline, height, width)
    seconds = time.perf_counter() - started
    kind = pipeline.condition
    return Translated(images, kind, seeds, steps, tiles, steps * tiles, seconds, str(name))


def count_tiles(pipeline: TranslationPipeline, height: int, width: int) -> int:
    """Return in how many tiles an image of this size is translated."""
    rows, columns = (
        len(translation.tile_starts(max(side, own), own))
        for side, own in zip((height, width), pipeline.tile, strict=True)
    )
    return rows * columns


def _picture(image: Any, argument: str) -> Image.Image:
    """Return an image of any kind as a picture.

    Raises:
        ValueError: it is no image.
    """
    return image_grid.to_picture((read_image(image, argument) + 1) / 2)
