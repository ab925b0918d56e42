"""An encoder with a span head, run by the stock model until something faster pays."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
from torch.export import Dim
from transformers import PreTrainedModel

from genkit import compiling, launch
from genkit.packing import pack


class StockEncoder(torch.nn.Module):
    """A stock model as a function of its weights and a batch of windows.

    Args of the call:
        weights: parameters and buffers by name.
        ids, mask: tokens, and 1 where there are any, (windows, tokens).
        types: which text each token is of, (windows, tokens); None if the model is not told.

    Returns logits of starts and ends, (windows, tokens) each.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = [model]  # in a list: not a submodule, its weights are arguments

    def forward(
        self,
        weights: dict[str, torch.Tensor],
        ids: torch.Tensor,
        mask: torch.Tensor,
        types: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the windows."""
        inputs = {"input_ids": ids, "attention_mask": mask}
        if types is not None:
            inputs["token_type_ids"] = types
        output = torch.func.functional_call(self._model[0], weights, (), inputs)
        return output.start_logits, output.end_logits


class Encoder:
    """Reads windows: by the stock model with packed matrices, then by a compiled one.

    That is read from the cache when so much time has been spent as reading it takes, and compiled
    when so much has been spent as compiling takes.

    Args:
        model: an encoder, in float32 and on a CPU if it is not to be left as it is.
        precision: of the matrix products; None leaves the model as it is.
        compiled: True compiles at once; None when it pays, which in float32 it hardly ever does;
            False never.
        typed: whether it is told which text a token is of.
    """

    def __init__(
        self, model: PreTrainedModel, precision: str | None, compiled: bool | None, typed: bool
    ) -> None:
        self._typed = typed
        self._stock, self._precision = model, precision
        self._compiled = False if compiled is None and precision == "float32" else compiled
        self._packed = pack(model, precision, head=False) if precision else model
        self._spent = 0.0
        self._due = compiling.READYING
        self._run: compiling.Compiled | None = None
        if compiled:
            self._improve(compile_now=True)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of starts and ends, (windows, tokens) each, for a model's inputs."""
        if self._compiled is None and self._spent > self._due:
            self._try_to_improve()
        if self._run:
            start, end = self._run([*self._weights, *inputs.values()])
            return start, end
        began = time.perf_counter()
        output = self._packed(**inputs)
        self._spent += time.perf_counter() - began
        return output.start_logits, output.end_logits

    def _try_to_improve(self) -> None:
        """Do what is due; a compiler that is not there, or fails, can be done without."""
        late, can = self._due == compiling.COMPILING, launch.can_compile()
        try:
            self._improve(compile_now=late and can)
        except (OSError, RuntimeError, ValueError) as error:
            warnings.warn(f"this model does not compile: {error}", stacklevel=3)
            self._compiled = False
        if late or not can:
            self._compiled = False
        self._due = compiling.COMPILING

    @torch.inference_mode(False)
    def _improve(self, compile_now: bool) -> None:
        """Use a compiled network if there is one, or one is to be made."""
        model = self._packed
        if self._precision == "int8":
            model = pack(self._stock, "int8", head=False, compiled=True)
        path = compiling.place(model, __name__, pack.__module__)
        path = path.with_stem(f"{path.stem}-typed") if self._typed else path
        weights = compiling.weights(model)
        if compile_now and not path.exists():
            _compile(model, weights, self._typed, path)
        if path.exists():
            self._run, self._packed = compiling.read(path), model
            self._weights = list(weights.values())


def _compile(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], typed: bool, path: Path
) -> None:
    """Compile an encoder for any number of windows of any length."""
    ids = torch.ones(3, 11, dtype=torch.int64)  # different, and neither special
    example = (weights, ids, ids.clone(), torch.zeros_like(ids) if typed else None)
    two = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = (dict.fromkeys(weights), two, two, two if typed else None)
    compiling.compile_ahead(StockEncoder(model), example, shapes, path, "this encoder")
