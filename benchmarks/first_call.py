"""Seconds from the start of a process, and from `import genkit`, to the first token and after it.

    python benchmarks/first_call.py --model path/to/SmolLM2-135M-Instruct

Each precision in a process of its own, and the floor beside it: a process that imports torch and
the class of the model from transformers, then reads the bytes of the weights. All take turns, a
few times; the least of each is printed, in seconds of the clock and of the processor. Nothing is
kept between processes but the files of the model, which the system has read before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import genkit

FLOOR = """
import json, sys, time
began = time.time()
import torch
import transformers.models.{0}.modeling_{0}
imported = time.time()
buffer = bytearray(1 << 24)
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.readinto(buffer):
        pass
print(json.dumps([began, time.time(), time.process_time(), imported - began]))
"""
CODE = """
import json, sys, time
began = time.time()
import genkit
folder, quantize, dtype, tokens = json.loads(sys.argv[1])
language = genkit.load(folder, quantize=quantize, dtype=dtype)
pieces = genkit.stream("The first", model=language, strategy="greedy", max_new_tokens=tokens)
next(pieces)
first, used = time.time(), time.process_time()
written = sum(1 for _ in pieces)
print(json.dumps([began, first, used, written / (time.time() - first)]))
"""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a decoder, in one file")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    folder, tokens = Path(arguments.model), arguments.tokens
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    with tempfile.TemporaryDirectory() as scratch:
        programs = {"floor": [FLOOR.format(kind), str(folder / "model.safetensors")]}
        for precision in ("float32", "bfloat16", "int8", "int4"):
            quantized = precision.startswith("int")
            how = [precision, None] if quantized else [None, precision]
            programs[precision] = [CODE, json.dumps([str(folder), *how, tokens])]
            if quantized:
                saved = f"{scratch}/{precision}"
                genkit.save(genkit.load(folder, quantize=precision, device="cpu"), saved)
                programs[f"{precision}, saved"] = [CODE, json.dumps([saved, None, None, tokens])]
        runs: dict[str, list[list[float]]] = {name: [] for name in programs}
        for _ in range(arguments.repeat):
            for name, program in programs.items():
                runs[name].append(in_a_process(program))
    report(runs)


def in_a_process(program: list[str]) -> list[float]:
    """Return seconds from the start, from the import, and of the processor; then a figure more."""
    start = time.time()
    words = [sys.executable, "-c", *program]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    began, first, used, more = json.loads(done.stdout)
    return [first - start, first - began, used, more]


def report(runs: dict[str, list[list[float]]]) -> None:
    """Print the least of each."""
    for name, rows in runs.items():
        whole, own, used, _ = map(min, zip(*rows, strict=True))
        most = max(row[3] for row in rows)
        if name == "floor":
            imports = min(row[3] for row in rows)
            print(f"{name:12} {own:.2f} s ({used:.2f} s of the processor), imports {imports:.2f} s")
        else:
            print(
                f"{name:12} first token {own:.2f} s after `import genkit` ({used:.2f} s of the "
                f"processor), {whole:.2f} s after the start; then {most:.0f} tokens a second"
            )


if __name__ == "__main__":
    main()
