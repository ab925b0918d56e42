"""Seconds that `import genkit` and every `genkit … --help` take, the median of ten.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from genkit import cli


def main() -> None:
    genkit = str(Path(sys.executable).parent / "genkit")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import genkit": [sys.executable, "-c", "import genkit"],
        "genkit --help": [genkit, "--help"],
    }
    commands |= {f"genkit {name} --help": [genkit, name, "--help"] for name in cli.COMMANDS}
    words = ("train", "charlm", "--help")  # imports the recipe, whose preset chooses the defaults
    commands[" ".join(("genkit", *words))] = [genkit, *words]
    for name, command in commands.items():
        print(f"{name:26} {statistics.median(seconds(command) for _ in range(10)):.3f} s")


def seconds(command: list[str]) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
