"""Stock networks compiled ahead of time: once a shape of model, with the weights as arguments."""

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

from genkit import files

READYING, COMPILING = 1.5, 20.0  # about how many seconds it takes to be ready, and to compile

Compiled = Callable[[list[torch.Tensor]], list[torch.Tensor]]  # weights, then inputs, flat


def named_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name: the first arguments of what is compiled."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


def cache_path(model: PreTrainedModel, *modules: str) -> Path:
    """Where a compiled network is kept: named by all it depends on, shapes, code, versions, CPU.

    Args:
        modules: names of those whose code is compiled, or chooses what is.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "id2label", "label2id", "calibration"):
        config.pop(name, None)
    facts = [
        type(model).__qualname__,
        config,
        model.config._attn_implementation,
        [(n, str(w.dtype), list(w.shape)) for n, w in named_weights(model).items()],
        [(name, type(layer).__qualname__) for name, layer in model.named_modules()],
        [getattr(layer, "precision", "") for layer in model.modules()],
        [inspect.getsource(sys.modules[name]) for name in (type(model).__module__, *modules)],
        inspect.getsource(sys.modules[__name__]),
        [torch.__version__, transformers.__version__, platform.python_version()],
        [platform.machine(), _cpu(), torch.get_num_threads()],
    ]
    key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
    return files.cache_folder() / "compiled" / f"{key}.pt2"


def _cpu() -> list[str]:
    """What this CPU can do: compiled code uses all of it."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(("flags", "Features"))} or set(lines))


def compile_ahead(
    program: torch.nn.Module,
    example: tuple[Any, ...],
    shapes: tuple[Any, ...],
    path: Path,
    what: str,
    **options: Any,
) -> None:
    """Compile a network for inputs of any size, and put it into the cache whole.

    Args:
        program: a function of weights and inputs.
        example: its arguments, of sizes that are all different and none special.
        shapes: which dimensions may change, as torch.export takes them.
        what: is compiled, for the message.
        options: for torch's compiler.
    """
    print(f"genkit: compiling {what}, once …", file=sys.stderr, end=" ", flush=True)
    start = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)  # torch of torch
        exported = torch.export.export(program, example, dynamic_shapes=shapes, strict=False)
        with files.written_whole(path, shared=True) as scratch:
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(scratch), inductor_configs=options
            )
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


def read_compiled(path: Path) -> Compiled:
    """Read a compiled network from the cache."""
    # called without torch's wrapper, which takes a millisecond to flatten the arguments
    return torch._inductor.aoti_load_package(str(path)).loader.boxed_run
