"""Matrix products of packed weights and the steps of decoders, by compiled kernels.

The kernels come with the package where it was installed with a C++ compiler (`native/`). They read
each weight once, in its packed form, and add up in one order: a row's result depends on nothing
but the row, whatever the batch and the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

with contextlib.suppress(ImportError):  # installed without a compiler
    from genkit.engine import _native

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
GROUP, PANEL = 32, 8  # inputs that share a scale; outputs that are computed together
BLOCK_BYTES = {"int8": PANEL * (2 + GROUP), "int4": PANEL * (2 + 2 + GROUP // 2)}


OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _share_threads() -> None:
    """Let the kernels run on the threads that torch has; on one thread where it has others."""
    suffix = {"darwin": "dylib"}.get(sys.platform, "so")
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        functions = (ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in OPENMP)
        _native.share_threads([function.value or 0 for function in functions])


def available() -> bool:
    """Whether the kernels were compiled when genkit was installed."""
    return "_native" in globals()


def target() -> str:
    """Return the instructions that the kernels use on this CPU."""
    return _native.target()


if available():
    _share_threads()


@dataclass(frozen=True)
class Choice:
    """How the kernels choose a text's next token.

    Args:
        noise: added to the logits, (texts, steps, vocabulary); None takes the most likely token.
        temperature: divides the logits.
        min_p: tokens less likely than this share of the likeliest one are not drawn; 0 keeps all.
        near: how far rounding may move a logit: where that could decide, no token is chosen.
        ends: tokens that end a text.
    """

    noise: torch.Tensor | None
    temperature: float
    min_p: float
    near: float
    ends: frozenset[int]

    def numbers(self, steps: int) -> list[float]:
        """Describe the choice to the kernels."""
        least = math.log(self.min_p) if self.min_p else -math.inf
        noise = 0 if self.noise is None else self.noise.data_ptr()
        return [steps, self.temperature, least, self.near, noise, *sorted(self.ends)]


@dataclass(frozen=True)
class Matrix:
    """A matrix as the kernels read it.

    Args:
        kind: "float32", "bfloat16", "int8" or "int4".
        shape: (outputs, inputs).
        weights: (outputs, inputs) of float32, (panels, inputs, PANEL) of bfloat16, or
            (panels, groups, bytes) of blocks.
        bias: (outputs,), float32, or None.
    """

    kind: str
    shape: tuple[int, int]
    weights: torch.Tensor
    bias: torch.Tensor | None = None

    def numbers(self) -> list[int]:
        """Describe the matrix to the kernels; it must outlive what they make of that."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return [KINDS[self.kind], *self.shape, self.weights.data_ptr(), bias]


NO_MATRIX = [0] * 5


def pack_matrix(weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> Matrix:
    """Pack a float32 matrix, (outputs, inputs); float32 is taken as it is."""
    outputs, inputs = weight.shape
    shape = (outputs, inputs)
    if kind == "float32":
        return Matrix(kind, shape, weight.contiguous(), bias)
    if kind == "bfloat16":
        return Matrix(kind, shape, _by_panel(weight.bfloat16()), bias)
    blocks = torch.empty(shape_of_blocks(shape, kind), dtype=torch.uint8)
    matrix = Matrix(kind, shape, blocks, bias)
    source = [weight.data_ptr(), *weight.stride(), torch.get_num_threads()]
    _native.quantize([*matrix.numbers(), *source])
    return matrix


def shape_of_blocks(shape: tuple[int, int], kind: str) -> tuple[int, int, int]:
    """Return (panels, groups, bytes) of a matrix, "int8" or "int4", of (outputs, inputs)."""
    return -(-shape[0] // PANEL), -(-shape[1] // GROUP), BLOCK_BYTES[kind]


def scales_of_blocks(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the scales, and in int4 the minima, of blocks: (panels, groups, numbers), float16."""
    return blocks.view(torch.float16)[..., : PANEL if kind == "int8" else 2 * PANEL]


def _by_panel(weight: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs) to (panels, inputs, PANEL), filled up with zeros."""
    room = weight.new_zeros(-len(weight) % PANEL, weight.shape[1])
    return torch.cat([weight, room]).unflatten(0, (-1, PANEL)).movedim(1, 2).contiguous()


def multiply(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """Multiply (…, inputs), float32, by a matrix, and add its bias."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], matrix.shape[0])
    rows = x.numel() // matrix.shape[1]
    threads = torch.get_num_threads()
    _native.multiply([*matrix.numbers(), x.data_ptr(), rows, y.data_ptr(), threads])
    return y


def embed(matrix: Matrix, ids: torch.Tensor) -> torch.Tensor:
    """Return rows of a matrix, (…, inputs), float32, by their numbers, (…,)."""
    ids = ids.contiguous()
    rows = torch.empty(*ids.shape, matrix.shape[1])
    _native.embed([*matrix.numbers(), ids.data_ptr(), ids.numel(), rows.data_ptr()])
    return rows


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows, (rows, inputs), float32, to 8 bits with one scale each, (rows,)."""
    x = x.contiguous()
    levels, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x))
    places = [x.data_ptr(), *x.shape, levels.data_ptr(), scales.data_ptr()]
    _native.round_rows([*places, torch.get_num_threads()])
    return levels, scales


def scale_sums(
    sums: torch.Tensor, by_row: torch.Tensor, by_output: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply sums of levels, (rows, outputs), int32, by both scales, and add a bias."""
    y = torch.empty(sums.shape)
    sources = [sums.data_ptr(), *sums.shape, by_row.data_ptr(), by_output.data_ptr()]
    where = [0 if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads()]
    _native.scale_sums([*sources, *where])
    return y


class NativeDecoder(nn.Module):
    """The step of a decoder, by the kernels.

    Args:
        numbers: what `read_decoder` of native/module.cpp reads, in its order.
        sources: everything that the numbers point to.
        width: of the states.
        vocabulary: the number of logits.
    """

    def __init__(
        self, numbers: list[float], sources: list[Any], width: int, vocabulary: int
    ) -> None:
        super().__init__()
        self._decoder, self._sources = _native.make_decoder(numbers), sources
        self._width, self._vocabulary = width, vocabulary

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        seen: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        kept: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do one step.

        Args:
            ids, positions, slots: new tokens, (texts, width); see `Stepper`.
            seen: which slots each attends to, its own included, (texts, width, slots), bool.
            keys, values: one (texts, heads, slots, size) a layer, written in place.
            kept: of how many of the last tokens logits are wanted.

        Returns:
            Logits, (texts, kept, vocabulary), and the last states, (texts, width, size).
        """
        texts, width = ids.shape
        logits = torch.empty(texts, kept, self._vocabulary)
        states = torch.empty(texts, width, self._width)
        inputs = [part.contiguous() for part in (ids, positions, slots, seen)]
        places = [part.data_ptr() for part in (*inputs, logits, states, *keys, *values)]
        numbers = [texts, width, seen.shape[2], kept, *places]
        _native.run(self._decoder, numbers, torch.get_num_threads())
        return logits, states

    def write(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        seen: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        steps: int,
        choice: Choice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do steps for as long as every text's next token is sure and ends no text.

        Args:
            logits: of the first tokens, (texts, vocabulary).
            positions, slots, seen, keys, values: of the first tokens, one a text; see the call.
            steps: at most so many; there must be room for them.

        Returns:
            The tokens, (steps, texts), and the logits before each and after the last,
            (steps + 1, texts, vocabulary).
        """
        texts = len(logits)
        tokens = torch.empty(steps, texts, dtype=torch.int64)
        rows = torch.empty(steps + 1, texts, self._vocabulary)
        rows[0] = logits
        states = torch.empty(texts, 1, self._width)
        inputs = [part.contiguous() for part in (tokens, positions, slots, seen)]
        places = [part.data_ptr() for part in (*inputs, rows, states, *keys, *values)]
        numbers = [texts, 1, seen.shape[2], 1, *places]
        threads = torch.get_num_threads()
        done = _native.write(self._decoder, numbers, choice.numbers(steps), threads)
        return tokens[:done], rows[: done + 1]
