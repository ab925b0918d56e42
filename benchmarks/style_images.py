"""Images for style transfer, drawn or cut: three styles, and crops of photographs to train on.

    python benchmarks/style_images.py --photographs china.png flower.png --output images

writes waves.png, mosaic.png and hatching.png, and the folders train and held_out. Crops that are
held out come from the right of each photograph, which no crop to train on touches. Some crops have
their colours exchanged and other light, so that few photographs show more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 192  # of a style
CROP = 256  # side of the crops, in pixels
BORDER = 0.6  # part of a photograph's width, at its left, that is trained on
CROPS, DRAWN = 250, 150  # to train on: of each photograph, and pictures of shapes
BLUES = [(20, 38, 92), (36, 78, 150), (70, 130, 190), (150, 195, 215)]
YELLOWS = [(235, 215, 130), (240, 180, 60), (245, 240, 215)]
GLASS = [
    *((200, 40, 40), (240, 160, 40), (250, 220, 120), (30, 110, 120)),
    *((20, 60, 110), (240, 235, 220), (110, 30, 60), (70, 150, 90)),
]
INK, RUST, PAPER = (30, 28, 40), (150, 40, 30), (244, 236, 214)


def main() -> None:
    """Write styles and crops."""
    parser = argparse.ArgumentParser(description="Draw styles, and cut photographs to train on.")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=int, default=10, help="crops to compare on")
    parser.add_argument("--output", type=Path, default=Path("images"))
    words = parser.parse_args()
    for folder in ("train", "held_out"):
        (words.output / folder).mkdir(parents=True, exist_ok=True)
    for draw in (waves, mosaic, hatching):
        draw(np.random.default_rng(0)).save(words.output / f"{draw.__name__}.png")
    rng = np.random.default_rng(0)
    for i, path in enumerate(words.photographs):
        with Image.open(path) as photograph:
            picture = photograph.convert("RGB")
        border = round(BORDER * picture.width)
        left, right = (0, border), (border, picture.width)
        for k in range(i, words.held_out, len(words.photographs)):
            name = f"{path.stem}-{k:02d}.png"
            crop(picture, right, 0.9, rng).save(words.output / "held_out" / name)
        for k in range(CROPS):
            made = relight(crop(picture, left, 0.25, rng), rng)
            made.save(words.output / "train" / f"{path.stem}-{k:03d}.png")
    for k in range(DRAWN):
        shapes(rng).save(words.output / "train" / f"shapes-{k:03d}.png")


# ---------------------------------------------------------------------------------------------
# Styles


def waves(rng: np.random.Generator) -> Image.Image:
    """Draw strokes of a brush around whirls, blue with some yellow."""
    picture = Image.new("RGB", (SIDE, SIDE), (24, 44, 92))
    pen, centres = ImageDraw.Draw(picture), rng.uniform(0, SIDE, (6, 2))
    strengths = rng.choice([-1, 1], 6) * rng.uniform(0.6, 1.4, 6)
    colours = [*BLUES, *YELLOWS]
    for _ in range(1600):
        place = rng.uniform(-20, SIDE + 20, 2)
        near = np.hypot(*(place - centres).T).min() / SIDE
        level = rng.normal(5 - 10 * near if near < 0.2 else 1.7, 1.2)
        colour = np.array(colours[int(np.clip(level, 0, len(colours) - 1))])
        colour = np.clip(colour + rng.normal(0, 10, 3), 0, 255).astype(int)
        points = [tuple(place)]
        for _ in range(rng.integers(5, 14)):
            away = place - centres
            turned = np.stack([-away[:, 1], away[:, 0]], 1)
            pull = strengths[:, None] * turned / (np.square(away).sum(1) + 900)[:, None]
            place = place + 3 * pull.sum(0) / np.hypot(*pull.sum(0))
            points.append(tuple(place))
        pen.line(points, tuple(map(int, colour)), int(rng.integers(3, 8)), "curve")
    return picture


def mosaic(rng: np.random.Generator) -> Image.Image:
    """Draw coloured glass in lead."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    places = np.stack([rows.ravel(), columns.ravel()], 1)
    seeds = rng.uniform(0, SIDE, (110, 2))
    for _ in range(2):  # to the middle of each pane, so that they are even
        nearest = distances_to(seeds, places).argmin(1)
        seeds = np.stack([places[nearest == i].mean(0) for i in np.unique(nearest)])
    distances = distances_to(seeds, places)
    nearest, two = distances.argmin(1), np.partition(distances, 1)[:, :2]
    panes = np.array(GLASS)[rng.integers(0, len(GLASS), len(seeds))]
    panes = np.clip(panes + rng.normal(0, 14, panes.shape), 0, 255)
    values = panes[nearest]
    values[two[:, 1] - two[:, 0] < 2.6] = (22, 20, 24)
    picture = Image.fromarray(values.reshape(SIDE, SIDE, 3).astype(np.uint8))
    return picture.filter(ImageFilter.GaussianBlur(0.6))


def distances_to(seeds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the distance of each place, (n, 2), to each seed, (m, 2): (n, m)."""
    across, down = (np.subtract.outer(places[:, i], seeds[:, i]) for i in (0, 1))
    return np.hypot(across, down)


def hatching(rng: np.random.Generator) -> Image.Image:
    """Draw patches of crossed lines of ink on paper."""
    picture = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen = ImageDraw.Draw(picture)
    for _ in range(30):
        middle, gap = rng.uniform(0, SIDE, 2), rng.uniform(3, 7)
        angle = rng.choice([0.7, 2.4]) + rng.normal(0, 0.1)
        along, across = (
            np.array([np.cos(angle), np.sin(angle)]),
            np.array([-np.sin(angle), np.cos(angle)]),
        )
        length, lines = rng.uniform(30, 90), rng.integers(6, 18)
        for k in range(-lines, lines):
            half = length * rng.uniform(0.3, 0.5) * along
            centre = middle + k * gap * across
            colour = INK if rng.random() < 0.85 else RUST
            pen.line([tuple(centre - half), tuple(centre + half)], colour, 1 + (rng.random() < 0.4))
    return picture


# ---------------------------------------------------------------------------------------------
# Images to paint


def crop(
    picture: Image.Image, columns: tuple[int, int], least: float, rng: np.random.Generator
) -> Image.Image:
    """Cut a random square out of some columns.

    Args:
        least: side of the smallest square over that of the largest.
    """
    most = min(columns[1] - columns[0], picture.height)
    side = int(rng.integers(round(least * most), most + 1))
    left = int(rng.integers(columns[0], columns[1] - side + 1))
    top = int(rng.integers(0, picture.height - side + 1))
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((CROP, CROP), Image.Resampling.LANCZOS)


def relight(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirror an image, exchange its colours, change contrast and brightness; each at random."""
    values = np.asarray(picture, float) / 255
    if rng.random() < 0.5:
        values = values[:, ::-1]
    if rng.random() < 0.3:
        values = values[..., rng.permutation(3)]
    if rng.random() < 0.6:
        values = (values - 0.5) * rng.uniform(0.6, 1.3) + 0.5 + rng.uniform(-0.15, 0.15)
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))


def shapes(rng: np.random.Generator) -> Image.Image:
    """Draw shapes over smooth colours."""
    coarse = rng.integers(0, 256, (*rng.integers(2, 9, 2), 3), np.uint8)
    picture = Image.fromarray(coarse).resize((CROP, CROP), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 14)):
        left, top = rng.uniform(0, CROP, 2)
        width, height = rng.uniform(0.04, 0.45, 2) * CROP
        draw = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        draw((left, top, left + width, top + height), tuple(rng.integers(0, 256, 3).tolist()))
    return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))


if __name__ == "__main__":
    main()
