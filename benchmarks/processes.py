"""Train the same run at one and at several processes, and compare the losses step by step.

python benchmarks/processes.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "train_charlm.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("recipe_arguments", nargs="*", help="after --, flags for the recipe")
    arguments = parser.parse_args()
    losses = {}
    with tempfile.TemporaryDirectory() as work:
        for processes in arguments.processes:
            folder = Path(work) / str(processes)
            train(folder, processes, arguments.steps, arguments.recipe_arguments)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            losses[processes] = [json.loads(line)["loss"] for line in lines]
    first, *others = arguments.processes
    for other in others:
        gaps = [abs(a - b) for a, b in zip(losses[first], losses[other], strict=True)]
        print(
            f"{first} and {other} processes: largest difference of the loss over {len(gaps)} steps "
            f"{max(gaps):.1e} (loss {losses[first][0]:.4f} to {losses[first][-1]:.4f})"
        )


def train(folder: Path, processes: int, steps: int, more: list[str]) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if processes > 1:
        launcher += ["--multi_gpu", "--num_processes", str(processes)]
    command = [*launcher, str(RECIPE), "--output_dir", str(folder), "--max_steps", str(steps)]
    command += ["--evaluations", "1", "--compile", "no", *more]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)


if __name__ == "__main__":
    main()
