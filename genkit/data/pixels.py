"""Decode an image file to an array of pixels, or raise an error that names the file."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_BYTES = 1 << 26  # of a file, by default
MAX_PIXELS = 1 << 26  # of an image, by its header, before it is decoded, by default
MIN_SIDE = 8  # pixels
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # no EPS, for which Pillow runs a program
GREY, COLOUR = ("1", "L", "LA", "La"), ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA")
ADVICE = {
    "CMYK": "it is for print: convert it to RGB",
    "I;16": "16-bit: convert it to 8 bits a channel",
    "I": "32-bit: convert it to 8 bits a channel",
    "F": "floating point: convert it to 8 bits a channel",
}


class ImageError(ValueError):
    """A file that is not an image, or not one to train on."""


def decode_image(
    data: bytes, name: str, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Decode an image file, upright, in mode L or RGB.

    Args:
        data: content of the file.
        name: name of the file, for errors.
        max_pixels, max_bytes: limits of the image and of its file; more is refused.

    Raises:
        ImageError: the file is empty, not an image, truncated, too large, too small, animated,
            partly transparent, or in a mode whose conversion would be a guess.
    """
    if not data:
        raise ImageError(f"{name} is empty")
    if len(data) > max_bytes:
        raise ImageError(
            f"{name} has {len(data):,} bytes, more than max_bytes={max_bytes}; raise it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes, which are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_header(image, name, max_pixels)
                image.load()
                return _to_grey_or_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no image ({', '.join(FORMATS)})") from None
    except MemoryError:
        raise ImageError(f"{name} cannot be decoded: it needs too much memory") from None
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from None


def _check_header(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than max_pixels={max_pixels}; raise it"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width} x {height}; a side must be {MIN_SIDE} pixels or more")
    # is_animated looks for a second frame alone; counting all of them could take minutes
    animated = getattr(image, "is_animated", False)  # of formats that may have several
    if animated and image.format != "MPO":  # a photograph, followed by other views of it
        raise ImageError(f"{name} has several frames; save one of them as an image")
    # Pillow gives a 16-bit colour PNG the mode RGB; its depth stands in the raw mode
    raw_modes = " ".join(str(tile.args) for tile in getattr(image, "tile", ()))
    deep = any(order in raw_modes for order in (";16B", ";16L", ";16N"))
    if deep or image.mode not in (*GREY, *COLOUR):
        advice = ADVICE.get("I;16" if deep else image.mode, "convert it to RGB or to grey")
        raise ImageError(f"{name} is {image.mode}: {advice}")


def _to_grey_or_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image to mode L or RGB, without loss."""
    mode = "L" if image.mode in GREY else "RGB"
    if image.has_transparency_data:
        if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ImageError(f"{name} is partly transparent; lay it over a background")
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
