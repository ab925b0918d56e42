"""Seconds from the start of a process, and from `import genkit`, to the first token and after it.

    python benchmarks/first_call.py --model path/to/SmolLM2-135M-Instruct

Each precision in a process of its own, a few times; the least is printed. Nothing is kept between
processes but the files of the model, which the system has read before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

CODE = """
import json, sys, time
began = time.time()
import genkit
folder, quantize, dtype, tokens = json.loads(sys.argv[1])
language = genkit.load(folder, quantize=quantize, dtype=dtype)
pieces = genkit.stream("The first", model=language, strategy="greedy", max_new_tokens=tokens)
next(pieces)
first = time.time()
written = sum(1 for _ in pieces)
print(json.dumps([began, first, written / (time.time() - first)]))
"""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a decoder")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    for precision in ("float32", "bfloat16", "int8", "int4"):
        quantized = precision.startswith("int")
        how = [precision, None] if quantized else [None, precision]
        runs = [
            in_a_process([arguments.model, *how, arguments.tokens]) for _ in range(arguments.repeat)
        ]
        whole, own, rate = min(runs)
        print(
            f"{precision:9} first token {whole:.2f} s after the start, {own:.2f} s after "
            f"`import genkit`; then {rate:.0f} tokens a second"
        )


def in_a_process(what: list[object]) -> tuple[float, float, float]:
    """Return seconds from the start, and from the import, to the first token; then the rate."""
    start = time.time()
    words = [sys.executable, "-c", CODE, json.dumps(what)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    began, first, rate = json.loads(done.stdout)
    return first - start, first - began, rate


if __name__ == "__main__":
    main()
