"""genkit doctor: versions, devices, what is fast here, caches, and a test of a few seconds."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genkit import __version__, console, files
from genkit.commands.cache import describe, format_bytes, shorten

EXAMPLES = """\
  genkit doctor          # its output belongs into reports of faults
  genkit doctor --quick  # without the test
"""
LIBRARIES = (
    "torch", "transformers", "diffusers", "accelerate", "datasets", "tokenizers", "safetensors",
    "huggingface_hub", "numpy",
)  # fmt: skip
EXTRAS = ("gradio", "peft", "gguf", "opacus", "sacrebleu", "vaderSentiment", "tensorboard")
TEXT = "a rose is a rose is a rose. " * 8
STEPS = 40  # of the test's training
WIDTH = 11  # characters of a row's name


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--quick", action="store_true", help="leave out the test")


def run(arguments: dict[str, Any]) -> None:
    """Print what there is, then train, save, read and draw.

    Raises:
        SystemExit: the test failed.
    """
    console.silence_libraries()
    for name, text in describe_machine():
        print(f"{name:{WIDTH}} {text}", flush=True)
    if arguments["quick"]:
        return
    start, fault = time.monotonic(), find_fault()
    seconds = time.monotonic() - start
    print(f"{'test':{WIDTH}} {fault or 'passed: trained, saved, read, drew'}, {seconds:.1f} s")
    if fault:
        raise SystemExit(1)


# ---------------------------------------------------------------------------------------------
# What there is


def describe_machine() -> Iterator[tuple[str, str]]:
    """Yield the rows of the report: their names and texts, without names of machine and user."""
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "genkit", f"{__version__}, Python {platform.python_version()}, {system}"
    yield "libraries", ", ".join(map(describe_version, LIBRARIES))
    yield "extras", ", ".join(map(describe_version, EXTRAS))
    yield from _describe_devices()
    yield "cache", f"{shorten(files.cache_folder())}: {describe(files.list_cached())}"
    from huggingface_hub.constants import HF_HUB_CACHE

    hub = Path(HF_HUB_CACHE)
    blobs = [path for path in hub.rglob("*") if path.is_file() and not path.is_symlink()]
    yield "Hub's cache", f"{shorten(hub)}: {describe(blobs)}"


def describe_version(name: str) -> str:
    """Return the name of a library with its version, or that it is not there."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} not installed"


def _describe_devices() -> Iterator[tuple[str, str]]:
    from genkit import machine
    from genkit.engine import kernels

    device = machine.find_device()
    memory = format_bytes(machine.free_memory(device))
    there = ", ".join(machine.list_devices())
    yield "devices", f"{there}; {device} is used, with {memory} free; {os.cpu_count()} cores"
    fast = "faster than float32" if machine.fast_bf16(device) else "not known to be faster"
    yield "bfloat16", f"{fast} on {device}"
    without = "no: install genkit where there is a C++ compiler, for faster texts on a CPU"
    yield "kernels", kernels.target() if kernels.available() else without
    missing = "no: a C++ compiler or Python's headers are missing"
    yield "compiler", "yes" if machine.can_compile(device) else missing


# ---------------------------------------------------------------------------------------------
# The test


def find_fault() -> str | None:
    """Train a tiny model, save it, read it and draw from it; return what is wrong, if anything."""
    try:
        with files.scratch_folder() as folder:
            first, last = train_tiny_model(folder)
            if not last < first / 2:
                return f"failed: the loss went from {first:.2f} to {last:.2f} in {STEPS} steps"
            return compare_draws(folder)
    except Exception as error:  # whatever it is, it belongs into the report
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"


def train_tiny_model(folder: Path) -> tuple[float, float]:
    """Train a character model for a second and save it; return its first and its last loss."""
    import torch

    from genkit import machine
    from genkit.data import characters
    from genkit.models import lm

    tokenizer = characters.make_tokenizer("".join(sorted(set(TEXT))))
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with machine.fork_random_state():
        torch.manual_seed(0)
        model = lm.make_model("llama", len(tokenizer), ids.shape[1], 1, 32, 2, 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(STEPS):
        loss = lm.loss(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    lm.save_tokenizer(tokenizer, folder)
    return losses[0], losses[-1]


def compare_draws(folder: Path) -> str | None:
    """Read a model and draw from it; return what is wrong, if anything."""
    from genkit.text.generation import generate
    from genkit.text.language_model import load_language_model

    language = load_language_model(str(folder))  # on the device that genkit would choose
    options: dict[str, Any] = {"model": language, "temperature": 1.0, "max_new_tokens": 32}
    alone = generate("a ", seed=1, **options)
    again = generate("a ", seed=1, **options)
    batch = generate(["a rose ", "a "], seed=[0, 1], **options)
    if alone.text != again.text:
        return "failed: the same seed gave two texts"
    return None if alone.text == batch[1].text else "failed: a text depends on its batch"
