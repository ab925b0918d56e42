"""A denoising network in half precision, or compiled with its weights laid out once."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

ROWS = 64  # the batch size of a compiled network
MIN_ROWS_TO_COMPILE = 8  # smaller batches are not padded to ROWS, but run uncompiled
DTYPES = ("float32", "bfloat16")


class UNetRunner:
    """Runs a UNet2DModel in a given precision, compiled or not.

    Args:
        unet: on any device.
        dtype: of the network's products, one of `DTYPES`.
        compiled: compile it at the first call of enough rows, its weights laid out for it; MNIST's
            network gains a twentieth, as its convolutions run at the processor's rate anyway.
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
        """Return the network's prediction for noisy images at timesteps (n,)."""
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
        """Run in batches of ROWS, the last row repeated to fill the last batch."""
        count = len(seen)
        rows = torch.arange(-(-count // ROWS) * ROWS).clamp(max=count - 1).view(-1, ROWS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache")
            predictions = [
                self._compiled(
                    seen[part].contiguous(),
                    times[part].contiguous(),
                    None if labels is None else labels[part],
                )
                for part in rows
            ]
        return torch.cat(predictions)[:count]


def get_runner(unet: torch.nn.Module, dtype: str = "float32", compiled: bool = False) -> UNetRunner:
    """Return a runner of a network; compiled ones are cached."""
    return _compiled(unet, dtype) if compiled else UNetRunner(unet, dtype, False)


@functools.lru_cache(maxsize=4)
def _compiled(unet: torch.nn.Module, dtype: str) -> UNetRunner:
    return UNetRunner(unet, dtype, True)
