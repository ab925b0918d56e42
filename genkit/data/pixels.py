"""One image file as an array of pixels, or an error that names the file."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_BYTES = 1 << 26  # of a file, by default
MAX_PIXELS = 1 << 26  # of a picture, by its header, before anything is decoded; as above
MIN_SIDE = 8  # pixels: less shows nothing
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # Pillow reads EPS by running a program
GREY, COLOUR = ("1", "L", "LA", "La"), ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA")
HOW = {
    "CMYK": "it is for print: convert it to RGB",
    "I;16": "16-bit: convert it to 8 bits a channel",
    "I": "32-bit: convert it to 8 bits a channel",
    "F": "floating point: convert it to 8 bits a channel",
}


class ImageError(ValueError):
    """A file that is no image, or none to train on."""


def decode(
    data: bytes, name: str, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Decode an image file, upright, in mode L or RGB.

    Args:
        data: what is in the file.
        name: what to call it in errors.
        max_pixels, max_bytes: of a picture and of its file; more is refused.

    Raises:
        ImageError: it is empty, no image, truncated, too large, too small, animated, partly
            transparent, or of a kind whose conversion would be a guess.
    """
    if not data:
        raise ImageError(f"{name} is empty")
    if len(data) > max_bytes:
        raise ImageError(
            f"{name} has {len(data):,} bytes; the most is {max_bytes:,}, unless max_bytes is larger"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_header(image, name, max_pixels)
                image.load()
                return _plain(ImageOps.exif_transpose(image), name)
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
            f"{name} has {width} x {height} pixels; the most is {max_pixels:,}, unless max_pixels "
            "is larger"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width} x {height}; a side must be {MIN_SIDE} pixels or more")
    # looks for a second frame alone, where counting all of them could take minutes
    animated = getattr(image, "is_animated", False)  # of formats that may have several
    if animated and image.format != "MPO":  # a photograph, followed by other views of it
        raise ImageError(f"{name} has several frames; save one of them as an image")
    # a 16-bit colour PNG says RGB, but not what it is read from
    read_as = " ".join(str(tile.args) for tile in getattr(image, "tile", ()))
    deep = any(order in read_as for order in (";16B", ";16L", ";16N"))
    if deep or image.mode not in (*GREY, *COLOUR):
        how = HOW.get("I;16" if deep else image.mode, "convert it to RGB or to grey")
        raise ImageError(f"{name} is {image.mode}: {how}")


def _plain(image: Image.Image, name: str) -> Image.Image:
    """Leave grey or red, green and blue."""
    mode = "L" if image.mode in GREY else "RGB"
    if image.has_transparency_data:
        if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ImageError(f"{name} is partly transparent; lay it over a background")
        image = image.convert("RGBA")
    return image.convert(mode)


def array(image: Image.Image, resolution: int | None, channels: int) -> np.ndarray:
    """Return pixels as (channels, height, width), uint8.

    Args:
        resolution: side of the square in the middle of the picture, which is scaled so that its
            shorter side has it; None leaves the size.
        channels: 1 for grey, 3 for colour.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    if resolution:
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
