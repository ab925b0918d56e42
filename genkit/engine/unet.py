"""A denoising network in half precision, or compiled with its weights laid out once."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

ROWS = 64  # that a compiled network takes, always
MIN_ROWS_TO_COMPILE = 8  # fewer rows are asked for without the others
DTYPES = ("float32", "bfloat16")


class UNetRunner:
    """Asks a UNet2DModel, in the precision and by the means that were asked for.

    Args:
        unet: on any device.
        dtype: of the network's products, one of `DTYPES`.
        compiled: compile it at the first call of enough rows, its weights laid out for it; MNIST's
            network gains a tenth in float32, nothing in bfloat16.
    """

    def __init__(self, unet: torch.nn.Module, dtype: str, compiled: bool) -> None:
        self._unet, self._half = unet, dtype == "bfloat16"
        options: dict[str, Any] = {"freezing": True}
        compiler = (
            torch.compile(self._predict, options=options, dynamic=False) if compiled else None
        )
        self._compiled: Any = compiler

    def __call__(
        self, seen: torch.Tensor, times: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Return what the network tells of noisy images at given times, (n,)."""
        if self._compiled is not None and len(seen) >= MIN_ROWS_TO_COMPILE:
            return self._by_rows(seen, times, labels)
        return self._predict(seen, times, labels)

    def _predict(
        self, seen: torch.Tensor, times: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        with torch.autocast(seen.device.type, torch.bfloat16, enabled=self._half):
            return self._unet(seen, times, class_labels=labels).sample.float()

    def _by_rows(
        self, seen: torch.Tensor, times: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Ask for so many rows at a time as the network was compiled for; the last are repeated."""
        count = len(seen)
        rows = torch.arange(-(-count // ROWS) * ROWS).clamp(max=count - 1).view(-1, ROWS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache")
            told = [
                self._compiled(
                    seen[part].contiguous(),
                    times[part].contiguous(),
                    None if labels is None else labels[part],
                )
                for part in rows
            ]
        return torch.cat(told)[:count]


def network(unet: torch.nn.Module, dtype: str = "float32", compiled: bool = False) -> UNetRunner:
    """Return what asks a network; it is compiled once, and the last of those are kept."""
    return _compiled(unet, dtype) if compiled else UNetRunner(unet, dtype, False)


@functools.lru_cache(maxsize=4)
def _compiled(unet: torch.nn.Module, dtype: str) -> UNetRunner:
    return UNetRunner(unet, dtype, True)
