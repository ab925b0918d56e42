"""What a model is trained to translate: images with their conditions, made from them or given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from genkit.data.images import Images, split_images
from genkit.data.order import Order
from genkit.data.pairs import load_pairs
from genkit.models import translation_losses
from genkit.models.translation import FACTOR
from genkit.training.image_data import ImageSettings, check_count, load_for_run
from genkit.training.run import Run


@dataclass(frozen=True)
class Translations:
    """Images, and what they are translated from.

    Args:
        images: the results.
        kind: of the condition, one of `translation.CONDITIONS`.
        given: the conditions of pairs.
    """

    images: Images
    kind: str
    given: Images | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self, which: np.ndarray, u: torch.Tensor, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up images and conditions, (len(which), channels, height, width) each, in [-1, 1].

        Args:
            u: uniform random numbers, (len(which), translation_losses.UNIFORMS).
        """
        images = self.images.batch(which, device)
        if self.given is not None:
            return images, self.given.batch(which, device)
        return images, translation_losses.make_condition(images, self.kind, u.to(device))

    @property
    def condition_channels(self) -> int:
        """Channels of the conditions."""
        return self.batch(np.arange(1), torch.zeros(1, translation_losses.UNIFORMS))[1].shape[1]

    @property
    def sha256(self) -> str:
        """Hash of the images, of pairs of both."""
        return self.images.sha256 + (f" {self.given.sha256}" if self.given is not None else "")


def load_translations(
    run: Run, settings: ImageSettings, kind: str, folders: list[str] | None
) -> tuple[Translations, Translations, Order]:
    """Load images to train and to validate on, and the order in which the first are seen.

    Args:
        kind: of the condition.
        folders: of pairs.

    Raises:
        ValueError: the images do not fit the condition; see also `load_for_run` and `load_pairs`.
    """
    if folders is None:
        train, val, order = load_for_run(run, settings)
        check_condition(kind, train.size)
        return Translations(train, kind), Translations(val, kind), order
    with run.accelerator.local_main_process_first():
        limits = {name: getattr(settings, name) for name in ("max_pixels", "max_bytes")}
        limits["allow_outside"] = settings.allow_outside
        both = load_pairs(folders, settings.resolution, settings.channels, **limits)
    split = [split_images(part, None, settings.val_fraction) for part in both]
    (given, given_val), (train, val) = split  # the same rows, as the two have as many
    check_count(settings, len(train), len(val), 1)
    first, second = Translations(train, kind, given), Translations(val, kind, given_val)
    return first, second, Order(len(train), settings.seed)


def check_condition(kind: str, size: tuple[int, int, int]) -> None:
    """Refuse images that a condition cannot be made of.

    Raises:
        ValueError: the message names the setting that would do.
    """
    channels, height, width = size
    if kind == "grey" and channels == 1:
        raise ValueError("--condition grey requires images in colour, and these are grey")
    if kind == "low" and (height % FACTOR or width % FACTOR):
        raise ValueError(
            f"--condition low requires sides that are multiples of {FACTOR}, got {width} x "
            f"{height}; give --resolution {-(-max(height, width) // FACTOR) * FACTOR}"
        )
