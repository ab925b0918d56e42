"""Pairs of images: two folders whose images have the same names and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from genkit.data.image_files import list_images
from genkit.data.images import Images, load_images
from genkit.data.pixels import FORMATS
from genkit.hub import names

TURNED = (5, 6, 7, 8)  # orientations whose sides are swapped


def load_pairs(
    folders: list[str], resolution: int | None = None, channels: int | None = None, **options: Any
) -> tuple[Images, Images]:
    """Decode the images of two folders, or load them from the cache, row by row in pairs.

    Args:
        folders: of what is given, and of what to make of it.
        resolution: see `load_images`; both images of a pair are scaled and cropped alike.
        channels: of the second; default: as the first image has.
        options: see `load_images`.

    Raises:
        ValueError: the two hold other numbers, names or sizes of images.
    """
    check_pairs(folders)
    given = load_images(folders[0], resolution, **options)
    images = load_images(folders[1], resolution, channels, **options)
    return given, images


def check_folders(folders: list[str]) -> list[Path]:
    """Return the paths of folders.

    Raises:
        ValueError: one of them does not exist.
    """
    paths = [names.as_path(folder, "pairs") for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"--pairs: {str(path)!r} is no folder; give two folders of images")
    return paths


def check_pairs(folders: list[str]) -> None:
    """Refuse two folders whose images do not belong together.

    Raises:
        ValueError: an image lacks its partner, or the two have other sizes.
    """
    paths = check_folders(folders)
    found = [list_images(path) for path in paths]
    for path, files in zip(paths, found, strict=True):
        if not files:
            raise ValueError(f"--pairs: the folder {path} holds no image")
    first, second = (
        [file.relative_to(path).with_suffix("").as_posix() for file in files]
        for path, files in zip(paths, found, strict=True)
    )
    if first != second:
        alone = [*sorted(set(first) - set(second)), *sorted(set(second) - set(first))]
        what = f"without a partner: {', '.join(alone[:5])}" if alone else "the order differs"
        raise ValueError(
            f"--pairs: {paths[0]} holds {len(first)} images and {paths[1]} {len(second)}, {what}; "
            "give both images of a pair the same name"
        )
    for a, b in zip(*found, strict=True):
        if _size(a) != _size(b):
            sizes = [" x ".join(map(str, _size(file) or ["?"])) for file in (a, b)]
            raise ValueError(f"--pairs: {a} is {sizes[0]}, but its partner {b} is {sizes[1]}")


def _size(file: Path) -> tuple[int, ...] | None:
    """Return the width and height in an image's header, upright; None if it is unreadable."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
            return image.size[::-1] if turned else image.size
    except (OSError, SyntaxError, ValueError):  # decoding says what is wrong
        return None
