"""Grids of images: pictures of rows and columns, progress pictures, and films."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from genkit import files
from genkit.data.order import blocks

GAP = 2  # pixels of the images, between them
LEGIBLE = 84  # smallest side of an image above a caption, in pixels
SIDE = 56  # smallest side of an image, in pixels: smaller ones are enlarged
FONT, SMALL = 18, 14
COLOURS = 64  # of a film
FRAME, LAST = 400, 2000  # milliseconds
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)
INK: Colour = (40, 40, 40)


def grid(images: torch.Tensor, path: Path, columns: int | None = None, gap: int = GAP) -> None:
    """Lay images out in rows.

    Args:
        images: in [-1, 1], (n, channels, height, width).
        path: the PNG to write.
        columns: images in a row; default: as many as make a square.
        gap: pixels between images; 0 for a seamless picture.
    """
    save(_sheet(_pixels(images), columns or math.ceil(math.sqrt(len(images))), gap), path)


def rows(
    named: Mapping[str, torch.Tensor | Sequence[str]], path: Path, columns: int | None = None
) -> None:
    """Lay out a row of images, or of words, for each name, which stands before it.

    Args:
        named: images in [-1, 1], (n, channels, height, width), whose columns belong together; or n
            words, which stand under the images before them.
        path: the PNG to write.
        columns: images in a row, after which all rows continue below; default: all.
    """
    count = len(next(iter(named.values())))
    names, strips = [], list[Image.Image]()
    for which in blocks(count, columns or count):
        for name, row in named.items():
            names.append(name)
            if isinstance(row, torch.Tensor):
                strips.append(_sheet(_pixels(row[which]), len(which), GAP))
            else:
                strips.append(_words([row[i] for i in which], strips[-1].width))
    _stack(names, strips, path)


def _stack(names: Sequence[str], strips: Sequence[Image.Image], path: Path) -> None:
    font = ImageFont.load_default(FONT)
    margin = math.ceil(max(font.getlength(name) for name in names)) + FONT
    width, height = max(s.width for s in strips), sum(s.height for s in strips)
    picture, top = Image.new("RGB", (margin + width, height), PAPER), 0
    pen = ImageDraw.Draw(picture)
    for name, strip in zip(names, strips, strict=True):
        picture.paste(strip, (margin, top))
        position = (margin - FONT // 2, top + strip.height // 2)
        pen.text(position, name, INK, font, anchor="rm")
        top += strip.height
    save(picture, path)


def progress(grids: Sequence[Path], names: Sequence[str], path: Path, side: int) -> None:
    """Stack the first rows of grids that were written in training, the earliest on top.

    Args:
        grids: pictures by `grid`.
        names: texts before each.
        path: the PNG to write.
        side: rows of each grid.
    """
    strips = []
    for file in grids:
        picture = _open(file)
        strips.append(picture.crop((0, 0, picture.width, (picture.height - 1) // side)))
    _stack(names, strips, path)


def film(grids: Sequence[Path], names: Sequence[str], path: Path) -> None:
    """Show grids that were written in training one after the other, in a loop.

    Args:
        grids: pictures of one size, the earliest first.
        names: texts above each.
        path: the GIF to write.
    """
    font, sheets = ImageFont.load_default(FONT), [_open(file) for file in grids]
    width, height = sheets[0].width, sheets[0].height + 2 * FONT
    reel = Image.new("RGB", (width, height * len(sheets)), PAPER)
    pen = ImageDraw.Draw(reel)
    for i, (name, sheet) in enumerate(zip(names, sheets, strict=True)):
        pen.text((width // 2, i * height + FONT), name, INK, font, anchor="mm")
        reel.paste(sheet, (0, i * height + 2 * FONT))
    # frames that share their colours are smaller; so are those without dither
    reel = reel.quantize(COLOURS, dither=Image.Dither.NONE)
    first, *rest = (
        reel.crop((0, top, width, top + height)) for top in range(0, reel.height, height)
    )
    times = [FRAME] * len(rest) + [LAST]
    save(first, path, "gif", save_all=True, append_images=rest, duration=times, loop=0)


def _open(file: Path) -> Image.Image:
    """Read a picture that `grid` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's own, by format and damage
        raise ValueError(f"{file} is damaged ({error}); delete it, then go on") from error


def captioned(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Lay images of one size out in rows, each with its caption below; small ones are enlarged."""
    side = max(images[0].size)
    times = math.ceil(LEGIBLE / side)
    strips = []
    for which in blocks(len(images), columns):
        values = np.stack([np.asarray(images[i].convert("RGB")) for i in which])
        sheet = _sheet(values.repeat(times, 1).repeat(times, 2), columns, GAP)
        strips += [sheet, _words([captions[i] for i in which], sheet.width, columns)]
    picture, top = Image.new("RGB", (strips[0].width, sum(s.height for s in strips)), PAPER), 0
    for strip in strips:
        picture.paste(strip, (0, top))
        top += strip.height
    return picture


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """Return pixels in [0, 1], (1 or 3, height, width), as a picture of 256 levels."""
    levels = (255 * pixels.detach().float().cpu()).round().clamp(0, 255).byte().numpy()
    return Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))


def save_as(picture: Image.Image, path: str | Path) -> None:
    """Write a picture in the format that the file's name ends in, completely or not at all.

    Raises:
        ValueError: that is none of the supported ones.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"path: {str(path)!r} must end in one of {', '.join(FORMATS)}")
    save(picture, Path(path), kind)


def save(picture: Image.Image, path: Path, kind: str = "png", **options: Any) -> None:
    """Write a picture completely or not at all."""
    with files.written_whole(path) as scratch:
        picture.save(scratch, kind, **options)


def _pixels(images: torch.Tensor) -> np.ndarray:
    """Return (n, height, width, 3) uint8; small images are enlarged by a whole factor."""
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


def _words(words: Sequence[str], width: int, columns: int | None = None) -> Image.Image:
    """Write a word under each image of a sheet of this width."""
    side = (width - GAP) // (columns or len(words))
    strip = Image.new("RGB", (width, 2 * SMALL), PAPER)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(SMALL)
    for i, word in enumerate(words):
        while font.getlength(word) > side:
            word = f"{word[:-2]}…"
        pen.text(((GAP + side) // 2 + i * side, SMALL), word, INK, font, anchor="mm")
    return strip
