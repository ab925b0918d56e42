"""Images side by side in one picture, pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels of the images, between them
SIDE = 56  # pixels that an image should have at least: smaller ones are enlarged
FONT = 18
Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 40, 40)


def grid(images: torch.Tensor, path: Path, columns: int | None = None, gap: int = GAP) -> None:
    """Lay images out in rows.

    Args:
        images: in [-1, 1], (n, channels, height, width).
        path: the PNG to write.
        columns: images in a row; as many as make a square unless given.
        gap: pixels between images; 0 for a seamless picture.
    """
    save(_sheet(_pixels(images), columns or math.ceil(math.sqrt(len(images))), gap), path)


def rows(named: Mapping[str, torch.Tensor], path: Path) -> None:
    """Lay out a row of images for each name, which is written before it.

    Args:
        named: images in [-1, 1], (n, channels, height, width) each, to be compared by columns.
        path: the PNG to write.
    """
    strips = [_sheet(_pixels(images), len(images), GAP) for images in named.values()]
    _stack(list(named), strips, path)


def _stack(names: Sequence[str], strips: Sequence[Image.Image], path: Path) -> None:
    font = ImageFont.load_default(FONT)
    margin = math.ceil(max(font.getlength(name) for name in names)) + FONT
    width, height = strips[0].size
    picture = Image.new("RGB", (margin + width, height * len(strips)), PAPER)
    pen = ImageDraw.Draw(picture)
    for i, (name, strip) in enumerate(zip(names, strips, strict=True)):
        picture.paste(strip, (margin, i * height))
        place = (margin - FONT // 2, i * height + height // 2)
        pen.text(place, name, INK, font, anchor="rm")
    save(picture, path)


def progress(grids: Sequence[Path], path: Path, side: int) -> None:
    """Stack the first rows of pictures that `grid` wrote through training, the earliest on top.

    Args:
        grids: pictures of `side` rows each.
        path: the PNG to write.
    """
    strips = []
    for file in grids:
        with Image.open(file) as picture:
            strips.append(picture.crop((0, 0, picture.width, (picture.height - 1) // side)))
    names = [str(int(file.stem.rpartition("-")[2])) for file in grids]
    _stack([f"step {name}" for name in names], strips, path)


def save(picture: Image.Image, path: Path) -> None:
    """Write the picture whole or not at all."""
    scratch = path.with_name(f".{path.name}.writing")
    picture.save(scratch, "png")
    scratch.replace(path)


def _pixels(images: torch.Tensor) -> np.ndarray:
    """Return (n, height, width, 3) uint8, enlarged by whole pixels if the images are small."""
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    values = levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    times = max(1, math.ceil(SIDE / max(values.shape[1:3])))
    return values.repeat(times, 1).repeat(times, 2)


def _sheet(values: np.ndarray, columns: int, gap: int) -> Image.Image:
    count, height, width, _ = values.shape
    shape = (-(-count // columns) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = np.full(shape, PAPER, np.uint8)
    for i, value in enumerate(values):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = value
    return Image.fromarray(sheet)
