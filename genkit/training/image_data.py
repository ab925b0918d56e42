"""Images of a run: the settings that every image recipe has, and the images that they name."""

from __future__ import annotations

from dataclasses import dataclass

from genkit.data import images, pixels, tables
from genkit.data.image_files import check_source
from genkit.data.images import Images
from genkit.data.order import Order
from genkit.training.run import Run
from genkit.training.settings import RunSettings, setting


@dataclass
class ImageSettings(RunSettings):
    """Settings of a recipe that trains on images."""

    images: str = setting("digits", "digits, a folder, a parquet file or a Hub id")
    val_images: str | None = setting(None, "other images to validate on")
    val_fraction: float = setting(
        0.1, "part of the images to validate on, if there are no others", above=0, below=1
    )
    resolution: int | None = setting(
        None, "scale and crop images to squares of this side", least=pixels.MIN_SIDE
    )
    channels: int | None = setting(
        None, "1 for grey, 3 for colour; as the first image has", choices=(1, 3)
    )
    skip_corrupt: bool = setting(False, "leave out unreadable files")
    allow_outside: bool = setting(False, "read images that a table or a link names elsewhere")
    max_pixels: int = setting(pixels.MAX_PIXELS, "largest image, in pixels", least=1)
    max_bytes: int = setting(pixels.MAX_BYTES, "largest file of an image, in bytes", least=1)
    table_memory: int = setting(
        tables.MEMORY, "MiB of the process that reads a table", least=tables.MIN_MEMORY
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        check_source(self.images)
        check_source(self.val_images, "val_images")


def load_for_run(
    run: Run, settings: ImageSettings, least_val: int = 1
) -> tuple[Images, Images, Order]:
    """Load the images that the settings name, once a machine, and log which files were left out.

    Args:
        least_val: images to validate on that the recipe needs.

    Returns:
        the images to train on, those to validate on, and the order in which the first are seen.

    Raises:
        ValueError: there are too few; see also `images.load_train_val`.
    """
    with run.accelerator.local_main_process_first():
        train, val = images.load_train_val(
            settings.images,
            settings.val_images,
            settings.val_fraction,
            settings.resolution,
            settings.channels,
            settings.skip_corrupt,
            allow_outside=settings.allow_outside,
            max_pixels=settings.max_pixels,
            max_bytes=settings.max_bytes,
            table_memory=settings.table_memory,
        )
    check_count(settings, len(train), len(val), least_val)
    for part in [train] if settings.val_images is None else [train, val]:
        for problem in part.skipped:
            run.log(f"skipped: {problem}")
        for note in part.notes:
            run.log(note)
    return train, val, Order(len(train), settings.seed)


def check_count(settings: ImageSettings, train: int, val: int, least: int) -> None:
    """Refuse fewer images to validate on than a recipe needs.

    Raises:
        ValueError: the message names the setting, and the number that would do.
    """
    if val >= least:
        return
    if settings.val_images is not None:
        raise ValueError(
            f"--val_images {settings.val_images} has {val} images; give {least} or more"
        )
    total = train + val
    fractions = [percent / 100 for percent in range(1, 100)]
    enough = (each for each in fractions if round(each * total) >= least)
    fraction = next(enough, 1.0)
    if total <= least or round(fraction * total) >= total:
        raise ValueError(f"--images {settings.images} has {total} images; give {least + 1} or more")
    raise ValueError(
        f"--val_fraction {settings.val_fraction} leaves {val} of {total} images to compare with, "
        f"fewer than {least}; give --val_fraction {fraction:g}"
    )
