"""Decode an image file to an array of pixels, or raise an error that names the file."""

from __future__ import annotations

import functools
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from genkit.files import open_regular

MAX_BYTES = 1 << 26  # of a file, by default
MAX_PIXELS = 1 << 26  # of an image, by its header, before it is decoded, by default
MIN_SIDE = 8  # pixels
COMMON = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000")  # known by first bytes
FORMATS = (  # no EPS, for which Pillow runs a program, and no format without first bytes of its own
    *COMMON,
    *("PPM", "ICO", "CUR", "ICNS", "DDS", "DIB", "PCX", "PSD", "QOI", "SGI", "SUN", "BLP"),
    *("XBM", "XPM"),
)
TGA, TGA_NAMES = "TGA", (".tga", ".icb", ".vda", ".vst")  # which is read where the name says so
LAYERED = ("MPO", "PSD")  # the first frame is the picture; its other views, or layers, follow
GREY, COLOUR = ("1", "L", "LA", "La"), ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA")
ADVICE = {
    "CMYK": "it is for print: convert it to RGB",
    "I;16": "16-bit: convert it to 8 bits a channel",
    "I": "32-bit: convert it to 8 bits a channel",
    "F": "floating point: convert it to 8 bits a channel",
}


class ImageError(ValueError):
    """A file that is not an image, or not one that can be trained on."""


class UnsuitableError(ImageError):
    """An intact image that cannot be trained on as it is; `skip_corrupt` does not leave it out."""


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the image files that this Pillow reads."""
    kinds = {*FORMATS, TGA, "MPO"}
    found = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in found if kind in kinds)


def starts_like_image(path: Path) -> bool:
    """Return whether a file begins as one of the common formats does."""
    try:
        with open_regular(path) as file:
            start = file.read(16)
    except OSError:
        return False
    Image.init()
    accepts = [Image.OPEN[kind][1] for kind in COMMON]
    return any(accept is not None and accept(start) for accept in accepts)


def decode_image(
    data: bytes, name: str, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Decode an image file, upright, in mode L or RGB.

    Args:
        data: content of the file.
        name: name of the file, for errors.
        max_pixels, max_bytes: limits of the image and of its file; more is refused.

    Raises:
        ImageError: the file is empty, not an image, truncated, too large or too small.
        UnsuitableError: it is animated, partly transparent, or in a mode whose conversion would be
            a guess.
    """
    if not data:
        raise ImageError(f"{name} is empty")
    if len(data) > max_bytes:
        raise ImageError(
            f"{name} has {len(data):,} bytes, more than max_bytes={max_bytes}; raise it "
            "in load_images of genkit.data.images or a recipe"
        )
    formats = (*FORMATS, TGA) if name.lower().endswith(TGA_NAMES) else FORMATS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes, which are checked here
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _check_header(image, name, max_pixels)
                image.load()
                return to_grey_or_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no image that can be read") from None
    except MemoryError:
        raise ImageError(f"{name} cannot be decoded: it needs too much memory") from None
    except Exception as error:  # the readers of formats raise errors of any kind
        raise ImageError(f"{name} cannot be decoded: {error}") from None


def _check_header(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than max_pixels={max_pixels}; raise it "
            "in load_images of genkit.data.images or a recipe"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width} x {height}; a side must be {MIN_SIDE} pixels or more")
    # is_animated looks for a second frame alone; counting all of them could take minutes
    animated = getattr(image, "is_animated", False)  # of formats that may have several
    if animated and image.format not in LAYERED:
        raise UnsuitableError(f"{name} has several frames; save one of them as an image")
    deep = any(_is_deep(tile) for tile in getattr(image, "tile", ()))
    if deep or image.mode not in (*GREY, *COLOUR):
        advice = ADVICE.get("I;16" if deep else image.mode, "convert it to RGB or to grey")
        raise UnsuitableError(f"{name} is {image.mode}: {advice}")


def _is_deep(tile: Any) -> bool:
    """Whether a part of a file has more than 8 bits a value: Pillow's mode of colours is RGB then.

    The depth stands in the raw mode; of PPM, as the largest value; of SGI, in the decoder's name.
    """
    if tile.codec_name in ("ppm", "ppm_plain"):
        return isinstance(tile.args, tuple) and tile.args[-1] > 255
    orders = (";16B", ";16L", ";16N")
    return tile.codec_name == "SGI16" or any(order in str(tile.args) for order in orders)


def to_grey_or_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image to mode L or RGB, without loss.

    Args:
        name: of the image, for the message.

    Raises:
        UnsuitableError: it is partly transparent.
    """
    mode = "L" if image.mode in GREY else "RGB"
    if image.has_transparency_data:
        if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise UnsuitableError(f"{name} is partly transparent; lay it over a background")
        image = image.convert("RGBA")
    return image.convert(mode)


def image_to_array(image: Image.Image, resolution: int | None, channels: int) -> np.ndarray:
    """Return pixels as (channels, height, width), uint8.

    Args:
        resolution: side of the square: the image is scaled so that its shorter side has it, and
            cropped to the centre; None keeps the size.
        channels: 1 for grey, 3 for colour.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    if resolution:
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
