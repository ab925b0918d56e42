"""Draw the pictures of the README from four short runs.

    genkit train charlm --max_steps 600 --evaluations 2 --compile no
    genkit train vae --max_steps 800 --latent_dim 2 --nll_images 0 --evaluations 2 --compile no
    genkit train diffusion --max_steps 1500 --conditional --evaluations 1 --eval_samples 100 \\
        --compile no
    genkit train gan --max_steps 1500 --evaluations 24 --eval_samples 100 --compile no
    python benchmarks/pictures.py --runs runs --output docs/images

These are the commands with which the pictures in docs/images were made.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

import genkit
from genkit.models import autoencoder, denoisers
from genkit.text import pages
from genkit.vision import denoising, image_grid, latent

COLUMNS, LINES = 24, 10  # characters of the text: all within the model's context
FONT = 20
PAPER, INK, GREY = (255, 255, 255), (20, 20, 20), (120, 120, 120)
DIGITS = 6  # rows and columns of digits
SIDE, GAP = 10, 10  # digits along a side of the plane; pixels between digits
SHOWN, COLUMN = 9, [0, 3, 4, 5, 6]  # moments of a denoising trajectory, and those that are drawn
ENLARGED, APART = 56, 2  # pixels of a digit in the samples of a run, and between them
FRAMES, COLOURS = 24, 16
FRAME, LAST = 250, 2000  # milliseconds


def main() -> None:
    """Draw all four."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the README.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the four runs")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--seed", type=int, default=2, help="of the text")
    words = parser.parse_args()
    words.output.mkdir(parents=True, exist_ok=True)
    draw_text(words.runs / "charlm", words.output / "text.png", words.seed)
    draw_plane(words.runs / "vae", words.output / "plane.png")
    draw_denoising(words.runs / "diffusion", words.output / "denoising.png")
    draw_film(words.runs / "gan", words.output / "gan.gif")


def draw_text(folder: Path, path: Path, seed: int) -> None:
    """Write a text on the colours of its characters' probabilities, as `genkit explain` does."""
    record = genkit.generate(
        "The ", model=str(folder), temperature=0.6, seed=seed, max_new_tokens=COLUMNS * LINES
    )
    spans = genkit.alternatives(record, model=str(folder)).spans
    letters = [(letter, None) for letter in record.prompt]
    coloured = [(letter, pages.colour(span.probability)) for span in spans for letter in span.text]
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    font = ImageFont.truetype(str(file), FONT)
    width, height = round(font.getlength("m")), round(1.4 * FONT)
    picture = Image.new("RGB", (COLUMNS * width, LINES * height), PAPER)
    pen, column, line = ImageDraw.Draw(picture), 0, 0
    for letter, colour in [*letters, *coloured]:
        if column == COLUMNS:
            column, line = 0, line + 1
        if line == LINES:
            break
        left, top = column * width, line * height
        if colour is not None:
            pen.rectangle((left, top, left + width - 1, top + height - 3), colour)
        shown = "↵" if letter == "\n" else letter
        ink = GREY if colour is None or letter == "\n" else INK
        pen.text((left + width // 2, top + height // 2), shown, ink, font, anchor="mm")
        column, line = (0, line + 1) if letter == "\n" else (column + 1, line)
    picture.save(path, optimize=True)


def draw_plane(folder: Path, path: Path) -> None:
    """Decode a plane of the latent space."""
    plane = latent.plane(autoencoder.load_autoencoder(folder), side=SIDE)
    image_grid.grid(plane.images, path, SIDE, GAP)


def draw_denoising(folder: Path, path: Path) -> None:
    """Draw a digit a row, from noise on the left to the image on the right."""
    pipeline, rows = denoisers.load_diffusion(folder), []
    for label in range(DIGITS):
        way = denoising.denoising_trajectory(pipeline, label, label, shown=SHOWN)
        rows.append(torch.cat([way.mixed[COLUMN], way.image[None]]))
    image_grid.grid(torch.cat(rows).clamp(-1, 1), path, DIGITS, GAP)


def draw_film(folder: Path, path: Path) -> None:
    """Show the same seeds at every evaluation of a run."""
    side, bar = DIGITS * (ENLARGED + GAP) + GAP, 2 * FONT
    files = sorted((folder / "samples").glob("step-*.png"))[-FRAMES:]
    reel = Image.new("RGB", (side, len(files) * (side + bar)), PAPER)
    pen, font = ImageDraw.Draw(reel), ImageFont.load_default(FONT)
    for i, file in enumerate(files):
        top = i * (side + bar)
        name = f"step {int(file.stem.removeprefix('step-')):,}"
        pen.text((side // 2, top + bar // 2), name, INK, font, anchor="mm")
        with Image.open(file) as picture:
            for row, column in itertools.product(range(DIGITS), repeat=2):
                left, upper = (APART + x * (ENLARGED + APART) for x in (column, row))
                digit = picture.crop((left, upper, left + ENLARGED, upper + ENLARGED))
                x, y = (GAP + x * (ENLARGED + GAP) for x in (column, row))
                reel.paste(digit.convert("RGB"), (x, top + bar + y))
    reel = reel.quantize(COLOURS, dither=Image.Dither.NONE)  # frames that share colours are smaller
    tops = range(0, reel.height, side + bar)
    first, *rest = (reel.crop((0, top, side, top + side + bar)) for top in tops)
    times = [FRAME] * len(rest) + [LAST]
    first.save(path, save_all=True, append_images=rest, duration=times, loop=0, optimize=True)


if __name__ == "__main__":
    main()
