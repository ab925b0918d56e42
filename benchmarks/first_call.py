"""Seconds of the first short call of a process, and of loading a compiled step from the cache.

    python benchmarks/first_call.py --tokenizer FOLDER_OF_GPT2S_TOKENIZER

GPT-2's configuration with random weights. Every figure is the best of several fresh processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import genkit
from genkit.text.language_model import LanguageModel
folder, compile, tokens = json.loads(sys.argv[1])
language = genkit.load(folder, compile=compile)
start = time.perf_counter()
language.stepper
ready = time.perf_counter() - start
genkit.generate(" the" * 32, model=language, strategy="greedy", max_new_tokens=tokens)
print(json.dumps([ready, time.perf_counter() - start]))
"""


def in_a_process(folder: str, compile: bool | None, tokens: int) -> tuple[float, float]:
    """Return the seconds until the model is ready, and until the first call has returned."""
    words = [sys.executable, "-c", CODE, json.dumps([folder, compile, tokens])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    ready, whole = json.loads(done.stdout.splitlines()[-1])
    return ready, whole


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of GPT-2's tokenizer")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        model = GPT2LMHeadModel(GPT2Config())
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
        GPT2TokenizerFast.from_pretrained(arguments.tokenizer).save_pretrained(folder)
        (Path(folder) / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "GPT2TokenizerFast"}'
        )
        start = time.perf_counter()
        ready, _ = in_a_process(folder, True, 1)
        print(f"first process with compile=True: ready in {ready:.1f} s (compiled, if not cached)")
        ready = min(in_a_process(folder, True, 1)[0] for _ in range(arguments.repeat))
        print(f"second process with compile=True: ready in {ready:.2f} s")
        for tokens in (1, 8, 16, 31):
            seconds = {
                choice: min(
                    in_a_process(folder, choice, tokens)[1] for _ in range(arguments.repeat)
                )
                for choice in (None, False)
            }
            ratio = seconds[None] / seconds[False]
            print(
                f"first call of {tokens:2} tokens: {seconds[None]:.3f} s, plain eager "
                f"{seconds[False]:.3f} s, {ratio:.2f} times as long"
            )
        print(f"({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
