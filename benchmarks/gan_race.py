"""How long the clipped critic with 100 steps takes to its end, and `modern` to the same distance.

    python benchmarks/gan_race.py --mnist mnist --extractor runs/classifier

The first run is the preset ac_wgan with its 25,000 generator steps: hours on a GPU, days on a CPU
(`--steps` for fewer). Both are class-conditional, and evaluated by the recipe at 100 moments on the
test images; the second stops where its distance is first no larger than the first's at its end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent.parent / "recipes" / "train_gan.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--extractor", required=True)
    parser.add_argument("--steps", type=int, default=25_000, help="of ac_wgan's generator")
    parser.add_argument("--minutes", type=float, default=20.0, help="of modern, at most")
    arguments = parser.parse_args()
    slow = evaluate_run(arguments, "ac_wgan", ["--max_steps", str(arguments.steps)])
    goal = slow[-1]["distance"]
    print_entry(f"ac_wgan, {arguments.steps:,} steps", slow[-1])
    quick = evaluate_run(
        arguments, "modern", ["--conditional", "--max_minutes", str(arguments.minutes)]
    )
    reached = next((entry for entry in quick if entry["distance"] <= goal), None)
    if reached is None:
        print_entry("modern did not get there", quick[-1])
    else:
        print_entry("modern, as near", reached)
        print(f"{slow[-1]['seconds'] / reached['seconds']:.1f} times as long")


def evaluate_run(
    arguments: argparse.Namespace, preset: str, words: list[str]
) -> list[dict[str, Any]]:
    """Train, and return what its evaluations say."""
    parts = [arguments.mnist / f"{part}-00000-of-00001.parquet" for part in ("train", "test")]
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, str(RECIPE), "--preset", preset, "--output_dir", work + "/run"]
        command += ["--images", str(parts[0]), "--val_images", str(parts[1]), *words]
        command += ["--extractor", arguments.extractor, "--evaluations", "100"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        log = (Path(work) / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, log) if "distance" in entry]


def print_entry(name: str, entry: dict[str, Any]) -> None:
    figures = [f"{key} {entry[key]:.4f}" for key in ("distance", "coverage", "label_accuracy")]
    print(f"{name}: {entry['seconds']:,.0f} s  {'  '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
