"""Stock networks compiled ahead of time, with the weights as arguments: once for each shape."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from genkit import console, files, machine
from genkit.engine import private_ops

READYING, COMPILING = 1.5, 20.0  # about how many seconds it takes to be ready, and to compile
UNRELATED = (  # settings that change no code; architectures and dtype come with the first save
    "_name_or_path", "transformers_version", "id2label", "label2id", "calibration",
    "architectures", "dtype",
)  # fmt: skip


def named_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name: the first arguments of what is compiled."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


def cache_path(model: PreTrainedModel, *modules: str) -> Path:
    """Return the path of a compiled network, named by a hash of all that it depends on.

    Args:
        modules: names of modules whose code is compiled, or chooses what is compiled.
    """
    config = model.config.to_dict()
    for name in UNRELATED:
        config.pop(name, None)
    facts = [
        type(model).__qualname__,
        config,
        model.config._attn_implementation,
        [(n, str(w.dtype), list(w.shape)) for n, w in named_weights(model).items()],
        [(name, type(layer).__qualname__) for name, layer in model.named_modules()],
        [getattr(layer, "precision", "") for layer in model.modules()],
        [inspect.getsource(sys.modules[name]) for name in (type(model).__module__, *modules)],
        [inspect.getsource(sys.modules[name]) for name in (__name__, private_ops.__name__)],
        [torch.__version__, transformers.__version__, platform.python_version()],
        [platform.machine(), _cpu(), torch.get_num_threads()],
    ]
    key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
    return files.cache_folder() / "compiled" / f"{key}.pt2"


def _cpu() -> list[str]:
    """Return the features of this CPU, all of which compiled code may use."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(("flags", "Features"))} or set(lines))


def compile_ahead(
    program: torch.nn.Module,
    example: tuple[Any, ...],
    shapes: tuple[Any, ...],
    path: Path,
    what: str,
) -> None:
    """Compile a network for inputs of any size, and put it into the cache whole.

    Args:
        program: a module whose forward takes weights and inputs.
        example: its arguments, of sizes that are all different and none special.
        shapes: which dimensions may change, as torch.export takes them.
        what: is compiled, for the message.
    """
    console.say(f"compiling {what}, once: about {COMPILING:.0f} s")
    start = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)  # torch of torch
        exported = torch.export.export(program, example, dynamic_shapes=shapes, strict=False)
        with files.written_whole(path, shared=True) as scratch:
            private_ops.compile_to_file(exported, scratch)
    console.say(f"compiled {what} in {time.perf_counter() - start:.0f} s")


class CompileSchedule:
    """When a stock network is replaced by a faster one: once it has cost as much as that takes.

    Getting ready (packing matrices, reading a compiled network from the cache) takes about
    `READYING` seconds, and compiling a network about `COMPILING`. Each is done when so much time
    has been spent on the stock network: short work never waits for it, and no work takes more than
    twice as long as it must.

    Args:
        compiled: None improves when it pays; True, which is done at once, and False never do.
        what: is compiled, for the warning.
    """

    def __init__(self, compiled: bool | None, what: str) -> None:
        self._waiting, self._what = compiled is None, what
        self._spent, self._ready = 0.0, False

    def add(self, seconds: float) -> None:
        """Count time spent on the stock network."""
        self._spent += seconds

    def improve_if_due(self, improve: Callable[[bool], None]) -> None:
        """Do what is due, if anything; without a compiler, or if it fails, the network stays.

        Args:
            improve: replaces the network, and compiles one for it if its argument is true and the
                cache has none.
        """
        if not self._waiting or self._spent <= (COMPILING if self._ready else READYING):
            return
        late, can = self._spent > COMPILING, machine.can_compile(machine.CPU)
        try:
            improve(late and can)
        except (OSError, RuntimeError, ValueError) as error:
            warnings.warn(f"{self._what} does not compile: {error}", stacklevel=3)
            self._waiting = False
        self._ready = True
        if late or not can:
            self._waiting = False


def weights_version(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return a value that changes when weights are changed, replaced or moved."""
    return tuple((id(p), p._version, p.device) for p in model.parameters())
