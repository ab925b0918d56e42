"""How low the validation loss gets in how many minutes of training, with the recipe's own presets.

    python benchmarks/charlm.py --text tinyshakespeare.txt --minutes 0.5 4 10
    python benchmarks/charlm.py --text tinyshakespeare.txt --steps 2500      # on a GPU

Compilation and evaluation are not training: their seconds are printed apart. For scale, nanoGPT's
CPU recipe reaches 1.88 and its GPU recipe 1.4697 after 5,000 steps, by its own README.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "train_charlm.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--minutes", type=float, nargs="*", default=[])
    parser.add_argument("--steps", type=int, nargs="*", default=[])
    parser.add_argument("--target", type=float, default=1.47, help="report when it is reached")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("recipe_arguments", nargs="*", help="after --, flags for the recipe")
    arguments = parser.parse_args()
    lengths = [["--max_minutes", str(m)] for m in arguments.minutes]
    lengths += [["--max_steps", str(s)] for s in arguments.steps]
    for length in lengths:
        for seed in arguments.seeds:
            words = ["--text", arguments.text, *length, "--seed", str(seed)]
            measure(words + arguments.recipe_arguments, arguments.target)


def measure(words: list[str], target: float) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        start = time.monotonic()
        command = [sys.executable, str(RECIPE), *words, "--output_dir", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall = time.monotonic() - start
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        settings = json.loads((folder / "run.json").read_text())["settings"]
        context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    evaluated = [line for line in log if "val_loss" in line]
    best, last = min(evaluated, key=lambda line: line["val_loss"]), log[-1]
    compiled = re.search(r"compiled in (\d+) s", done.stderr)
    characters = last["step"] * settings["batch_size"] * context
    print(
        f"{' '.join(words[2:])}: val_loss {best['val_loss']:.4f}, at the end "
        f"{evaluated[-1]['val_loss']:.4f}; {last['step']} steps in {last['seconds']:.0f} s, "
        f"{characters / last['seconds']:,.0f} characters/s; compiled in "
        f"{compiled[1] if compiled else 0} s; {wall:.0f} s in all"
    )
    reached = next((line for line in evaluated if line["val_loss"] <= target), None)
    if reached:
        print(
            f"  {target} reached by step {reached['step']}, {reached['seconds']:.0f} s", flush=True
        )


if __name__ == "__main__":
    main()
