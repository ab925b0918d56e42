"""genkit demo: train three small models in about three minutes, and open the page with them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any

from genkit import console

EXAMPLES = """\
  genkit demo                      # without data and network; again, it opens the page at once
  genkit demo --output-dir mine
"""
# Small networks that learn something within seconds on one core, and the fewest evaluations
MODELS = {
    "charlm": "--max_minutes 0.8 --evaluations 2 --compile no "
    "--depth 2 --context 128 --batch_size 8",
    "vae": "--max_minutes 0.3 --evaluations 2 --compile no --latent_dim 2 --nll_images 0",
    "diffusion": "--max_minutes 0.7 --evaluations 1 --conditional --eval_samples 100",
}
DONE = ".demo"  # marks a run that has ended
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")  # set where a browser has a screen, on Linux


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = "folder of the models (default: genkit-demo)"
    parser.add_argument("--output-dir", type=Path, default=Path("genkit-demo"), help=text)


def run(arguments: dict[str, Any]) -> None:
    """Train what is not there, show something of each model, then serve the page."""
    folder = arguments["output_dir"]
    train_models(folder, MODELS)
    show_models(folder)
    if importlib.util.find_spec("gradio") is None:
        print(f"For the page: pip install 'hf-genkit[app]', then genkit app {folder}")
        return
    from genkit.app import serve

    serve([str(folder)], port=0, ready=announce)


def train_models(folder: Path, models: dict[str, str]) -> None:
    """Train models by their recipes, each in a process of its own; those that stopped go on.

    Args:
        folder: of all models.
        models: flags by the name of the recipe.

    Raises:
        SystemExit: a run failed, and has said why.
    """
    for number, (name, flags) in enumerate(models.items(), 1):
        home = folder / name
        if (home / DONE).exists():
            continue
        console.say(f"{number} of {len(models)}: training {name}")
        words = [*flags.split(), "--output_dir", str(home)]
        words += ["--resume"] * (home / "run.json").exists() + ["--quiet"] * console.is_quiet()
        command = [sys.executable, "-m", "genkit", "train", name, *words]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(done.returncode)
        (home / DONE).touch()


def show_models(folder: Path) -> None:
    """Print a text, and write a grid of images of each model of images."""
    import genkit

    console.silence_libraries()
    within_context = 120
    text = genkit.generate(
        "The ", model=folder / "charlm", temperature=0.5, seed=1, max_new_tokens=within_context
    )
    print(f"A text:\n\n{text}\n")
    for name in ("vae", "diffusion"):
        grid = folder / f"{name}.png"
        genkit.sample(folder / name, 64, seed=0).save_grid(grid)
        print(f"Digits: {grid}")


def announce(address: str) -> None:
    """Print where the page is, and open it if there is a screen."""
    print(f"genkit is at {address} (Ctrl-C ends it)", flush=True)
    if sys.platform == "darwin" or any(os.environ.get(name) for name in DISPLAYS):
        webbrowser.open(address)
