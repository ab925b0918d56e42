"""A denoising network as it runs fastest on a CPU: compiled, with its weights laid out once."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import torch

from genkit import launch

ROWS = 64  # that a compiled network takes, always
WORTH = 8  # fewer rows are asked for without the others
COMPILING = 45.0  # about how many seconds it takes to compile
DTYPES = ("float32", "bfloat16")


class Quick:
    """Asks a UNet2DModel, by something faster once that pays.

    Args:
        unet: on any device.
        dtype: of the network's products, one of `DTYPES`.
        compiled: True compiles at the first call; None when calls have taken as long as that takes;
            False never. On a GPU it is never.
    """

    def __init__(self, unet: torch.nn.Module, dtype: str, compiled: bool | None) -> None:
        self._unet = unet
        self._half = dtype == "bfloat16"
        self._wanted = compiled if next(unet.parameters()).device.type == "cpu" else False
        self._spent = 0.0
        self._compiled: Any = None

    def __call__(
        self, seen: torch.Tensor, times: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Return what the network tells of noisy images at given times, (n,)."""
        due = self._spent > COMPILING and launch.can_compile()
        if self._compiled is None and (self._wanted or (self._wanted is None and due)):
            self._compiled = torch.compile(self._ask, options={"freezing": True}, dynamic=False)
        if self._compiled is not None and len(seen) >= WORTH:
            return self._by_rows(seen, times, labels)
        started = time.perf_counter()
        told = self._ask(seen, times, labels)
        self._spent += time.perf_counter() - started
        return told

    def _ask(
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


@functools.lru_cache(maxsize=4)
def network(unet: torch.nn.Module, dtype: str = "float32", compiled: bool | None = None) -> Quick:
    """Return what asks a network; the last are kept, so that what is compiled is compiled once."""
    return Quick(unet, dtype, compiled)
