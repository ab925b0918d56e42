"""What the processes of a run do together: divide work, add up, and send each other plain data.

Messages are JSON and numpy's own format for arrays: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import TypeVar

import accelerate
import numpy as np
import torch

T = TypeVar("T")


class Processes:
    """The processes of a run, one or many, seen from one of them."""

    def __init__(self, accelerator: accelerate.Accelerator) -> None:
        self.accelerator = accelerator
        self.device = accelerator.device
        self.processes = accelerator.num_processes
        self.is_main = accelerator.is_main_process

    def check_divides(self, batch_size: int, accumulation: int) -> None:
        """Refuse a batch that does not divide into equal parts of all processes.

        Raises:
            ValueError: naming the next larger batch that does.
        """
        parts = self.processes * accumulation
        if batch_size % parts:
            raise ValueError(
                f"batch_size: {batch_size} rows do not divide among {self.processes} processes "
                f"times {accumulation} gradient_accumulation; {-(-batch_size // parts) * parts} "
                "would"
            )

    def check_held_out(self, count: int, what: str) -> None:
        """Refuse fewer rows to validate on than there are processes.

        Raises:
            ValueError: naming the rows by `what`.
        """
        if count < self.processes:
            raise ValueError(
                f"--val_fraction leaves {count} {what} for {self.processes} processes; give more"
            )

    def shard(self, count: int) -> range:
        """Return this process's contiguous part of `count` items."""
        index = self.accelerator.process_index
        return range(count * index // self.processes, count * (index + 1) // self.processes)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a few numbers, (n,), over all processes.

        They travel as bytes and are added up on the CPU: not every device has float64.
        """
        if self.processes == 1:
            return values
        mine = values.cpu().view(torch.uint8).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, mine)
        return torch.stack([part.cpu().view(values.dtype) for part in parts]).sum(0)

    def on_main_process(self, work: Callable[[], T]) -> T | None:
        """Do something on the main process and return its result there; None elsewhere.

        Raises:
            ValueError: it failed on the main process; raised on every process.
        """
        problem, result = "", None
        if self.is_main:
            try:
                result = work()
            except (ValueError, OSError) as error:
                problem = str(error)
        failed = torch.tensor([float(bool(problem))])
        if self.sum(failed).item():
            raise ValueError(problem or "the main process stopped; its message says why")
        return result

    def broadcast(self, message: T) -> T:
        """Return the main process's message, of JSON's types, on every process."""
        if self.processes == 1:
            return message
        written = json.dumps(message).encode() if self.is_main else b""
        length = torch.tensor([len(written)], device=self.device)
        torch.distributed.broadcast(length, src=0)
        buffer = self._to_tensor(written, int(length))
        torch.distributed.broadcast(buffer, src=0)
        return json.loads(_to_bytes(buffer))

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, of JSON's types, on every process in their order."""
        if self.processes == 1:
            return items
        parts = self._gather_bytes(json.dumps(items).encode())
        return [item for part in parts for item in json.loads(part)]

    def gather_arrays(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Return arrays of which each process has some rows with those of all, in their order."""
        if self.processes == 1:
            return list(arrays)
        file = io.BytesIO()
        for array in arrays:
            np.save(file, array, allow_pickle=False)
        parts = [io.BytesIO(part) for part in self._gather_bytes(file.getvalue())]
        return [
            np.concatenate([np.load(part, allow_pickle=False) for part in parts]) for _ in arrays
        ]

    def have_equal(self, text: str) -> bool:
        """Whether a text is the same on every process, by 48 bits of its hash."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        number = torch.tensor([int(digest[:12], 16)])  # int64, whose sums are exact
        return self.sum(number).item() == self.processes * number.item()

    def _gather_bytes(self, written: bytes) -> list[bytes]:
        """Return what each process has written, on every process."""
        length = torch.tensor([len(written)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.processes)]
        torch.distributed.all_gather(lengths, length)
        longest = int(max(lengths))
        buffers = [self._to_tensor(b"", longest) for _ in range(self.processes)]
        torch.distributed.all_gather(buffers, self._to_tensor(written, longest))
        return [_to_bytes(b)[: int(n)] for b, n in zip(buffers, lengths, strict=True)]

    def _to_tensor(self, written: bytes, length: int) -> torch.Tensor:
        """Return bytes as a tensor, (length,), uint8, with zeros at its end."""
        padded = np.zeros(length, np.uint8)
        padded[: len(written)] = np.frombuffer(written, np.uint8)
        return torch.from_numpy(padded).to(self.device)


def _to_bytes(buffer: torch.Tensor) -> bytes:
    return buffer.cpu().numpy().tobytes()
