"""Run the blocks of the course's chapters, and write their outputs and pictures into docs/.

    python benchmarks/course.py --folder runs/course
    python benchmarks/course.py --folder runs/course --chapters vae diffusion

Below a block, the line `<!-- output -->` asks for its standard output. A model that is there is not
trained again, so that a chapter can be repeated in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from genkit import __version__

DOCS = Path(__file__).parents[1] / "docs"
CHAPTERS = (
    "language-models", "gans", "sampling", "transformers", "autoencoders", "vae", "diffusion",
    "derivatives", "privacy",
)  # fmt: skip
PICTURES = {
    "course_gan": "runs/gan/progress.png",
    "course_collapsed": "collapsed.png",
    "course_alignment": "runs/aligned/loss.png",
    "course_reconstructions": "runs/autoencoder/reconstructions.png",
    "course_plane": "runs/vae/plane.png",
    "course_threes": "threes.png",
    "course_denoising": "denoising.png",
    "course_grad_cam": "why.png",
    "course_private": "private.png",
}
PIECE = re.compile(r"^```(\w*)\n(.*?)^```$(\n\n<!-- output -->\n```\n.*?^```$)?", re.M | re.S)
WIDEST = 900  # pixels of a picture
LIBRARIES = ("torch", "transformers", "diffusers", "scikit-learn")


def run_chapter(page: str) -> str:
    """Return a page with the outputs of its blocks, which are run in this folder."""
    names: dict[str, Any] = {"__name__": "__main__"}

    def run_block(found: re.Match[str]) -> str:
        kind, code, shown = found.groups()
        if not kind:
            return found[0]
        printed = run_python(code, names) if kind == "python" else run_shell(code)
        block = f"```{kind}\n{code}```"
        return f"{block}\n\n<!-- output -->\n```\n{printed}\n```" if shown else block

    return PIECE.sub(run_block, page)


def run_python(code: str, names: dict[str, Any]) -> str:
    """Run Python in a namespace; return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return tidy(printed.getvalue())


def run_shell(code: str) -> str:
    """Run the commands of a block, but for models that are there; return what they print."""
    printed = ""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["genkit"] or "course.txt" in words or is_trained(words):
            continue
        print(line, file=sys.stderr)
        command = [sys.executable, "-m", "genkit.cli", *words[1:]]
        printed += subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return tidy(printed)


def is_trained(words: list[str]) -> bool:
    """Whether a command trains a model that is there."""
    if words[1] != "train":
        return False
    name = {"align": "aligned"}.get(words[2], words[2])
    given = words[words.index("--output_dir") + 1] if "--output_dir" in words else f"runs/{name}"
    return Path(given, "README.md").is_file()


def tidy(printed: str) -> str:
    """Return text without empty lines around it, and without spaces at the ends of lines."""
    return "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n")


def copy_picture(source: Path, name: str) -> None:
    """Write a picture into docs/images, no wider than a page."""
    picture = Image.open(source).convert("RGB")
    picture.thumbnail((WIDEST, WIDEST))
    few_colours = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    few_colours.save(DOCS / "images" / f"{name}.png", optimize=True)


def describe_versions() -> str:
    """Return with what the outputs were made, and when."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    made = f"genkit {__version__}, {', '.join(versions)}, Python {platform.python_version()}"
    return f"The outputs are of {datetime.date.today()}: {made}, on one core of a CPU."


def main() -> None:
    """Run the chapters."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/course"))
    parser.add_argument("--chapters", nargs="+", default=CHAPTERS, choices=CHAPTERS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(arguments.folder):
        for chapter in arguments.chapters:
            file = DOCS / "course" / f"{chapter}.md"
            file.write_text(run_chapter(file.read_text(encoding="utf-8")), encoding="utf-8")
            for name, source in PICTURES.items():
                if f"{name}.png" in file.read_text(encoding="utf-8"):
                    copy_picture(Path(source), name)
    index = DOCS / "course" / "index.md"
    start = index.read_text(encoding="utf-8").partition("<!-- versions -->")[0]
    index.write_text(f"{start}<!-- versions -->\n{describe_versions()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
