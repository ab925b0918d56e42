"""Scenes of coloured digits with captions whose truth can be checked.

    python -m genkit.data.scenes --digits mnist/train.parquet --test_digits mnist/test.parquet

A scene has a digit or nothing in each of its four cells. Its caption says how many digits there
are, which, in what colours, and of two different ones where: "a red three left of a blue seven".
Some captions are not drawn for training, and some pairs of digits never meet there.
"""

from __future__ import annotations

import argparse
import io
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from genkit import console
from genkit.data.images import load_images, split_images
from genkit.errors import clean_errors
from genkit.files import written_whole

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (255, 40, 40), "green": (40, 220, 40), "blue": (70, 90, 255)}
COLOURS |= {"yellow": (240, 230, 40)}
COUNTS = {"two": 2, "three": 3, "four": 4}
# the cells of the first and of the second digit; cells are numbered row by row
PLACES = {
    "left of": ((0, 1), (2, 3)),
    "right of": ((1, 0), (3, 2)),
    "above": ((0, 2), (1, 3)),
    "below": ((2, 0), (3, 1)),
}
CELLS, CELL, INK = 4, 12, 10  # cells; side of a cell and longest side of a digit, in pixels
UNSEEN_SUM = 7  # last digit of the sum of two digits that never meet in training
HELD_OUT = 10  # of so many captions, one is not drawn for training
KINDS, SHARES = ("one", "pair", "several"), (0.15, 0.7, 0.15)

# ---------------------------------------------------------------------------------------------
# Captions


@dataclass(frozen=True)
class Item:
    """A digit in a colour."""

    digit: int
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {DIGITS[self.digit]}"


@dataclass(frozen=True)
class Description:
    """What a caption says: one item, several of the same, or two with their order.

    Args:
        item: the first, or all.
        count: how many of it there are.
        relation: of the first to the other, a key of `PLACES`; None if there is no other.
        other: the second item.
    """

    item: Item
    count: int = 1
    relation: str | None = None
    other: Item | None = None

    def __str__(self) -> str:
        if self.other is not None:
            return f"a {self.item} {self.relation} a {self.other}"
        if self.count == 1:
            return f"a {self.item}"
        words = {number: word for word, number in COUNTS.items()}
        plural = "es" if self.item.digit == 6 else "s"
        return f"{words[self.count]} {self.item}{plural}"

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.other is not None:
            return "pair"
        return "one" if self.count == 1 else "several"

    @property
    def unseen(self) -> bool:
        """Whether its two digits never meet in training."""
        other = self.other
        return other is not None and (self.item.digit + other.digit) % 10 == UNSEEN_SUM

    @property
    def held_out(self) -> bool:
        """Whether no scene is drawn of it for training."""
        return self.unseen or zlib.crc32(str(self).encode()) % HELD_OUT == 0

    def is_shown(self, scene: Mapping[int, Item]) -> bool:
        """Whether a scene, items by cell, shows this and nothing else."""
        if self.other is None:
            return len(scene) == self.count and set(scene.values()) == {self.item}
        pair = [self.item, self.other]
        places = PLACES[self.relation or ""]
        return len(scene) == 2 and any([scene.get(i) for i in place] == pair for place in places)


_ITEM = f"({'|'.join(COLOURS)}) ({'|'.join(DIGITS)})"
_PAIR = re.compile(f"a {_ITEM} ({'|'.join(PLACES)}) a {_ITEM}")
_SAME = re.compile(f"(a|{'|'.join(COUNTS)}) {_ITEM}(?:s|es)?")


def parse_caption(caption: str) -> Description:
    """Read a caption of a scene.

    Raises:
        ValueError: it is none.
    """
    if pair := _PAIR.fullmatch(caption):
        colour, digit, relation, *second = pair.groups()
        other = Item(DIGITS.index(second[1]), second[0])
        read = Description(Item(DIGITS.index(digit), colour), 1, relation, other)
    elif same := _SAME.fullmatch(caption):
        count, colour, digit = same.groups()
        read = Description(Item(DIGITS.index(digit), colour), COUNTS.get(count, 1))
    else:
        read = None
    if read is None or str(read) != caption:
        raise ValueError(f"caption must be that of a scene, got {caption!r:.80}")
    return read


def draw_description(rng: np.random.Generator) -> Description:
    """Draw what a scene is to show."""
    kind = rng.choice(KINDS, p=SHARES)
    colours = list(COLOURS)
    items = [Item(int(rng.integers(10)), colours[rng.integers(len(colours))]) for _ in range(2)]
    if kind == "pair":
        return Description(items[0], 1, list(PLACES)[rng.integers(len(PLACES))], items[1])
    return Description(items[0], 1 if kind == "one" else int(rng.integers(2, CELLS + 1)))


# ---------------------------------------------------------------------------------------------
# Scenes


def place_items(description: Description, rng: np.random.Generator) -> dict[int, Item]:
    """Choose cells in which a description is true: items by cell."""
    if description.other is None:
        cells = rng.permutation(CELLS)[: description.count]
        return {int(cell): description.item for cell in cells}
    places = PLACES[description.relation or ""]
    first, second = places[rng.integers(len(places))]
    return {first: description.item, second: description.other}


def draw_scene(
    scene: Mapping[int, Item], digits: Mapping[int, np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Draw a scene, (2 * CELL, 2 * CELL, 3), uint8.

    Args:
        scene: items by cell.
        digits: grey images of each digit, (n, CELL, CELL), uint8, by `fit_digit`.
    """
    canvas = np.zeros((2 * CELL, 2 * CELL, 3), np.uint8)
    for cell, item in scene.items():
        own = digits[item.digit]
        ink = own[rng.integers(len(own)), :, :, None] / 255
        top, left = CELL * (cell // 2), CELL * (cell % 2)
        coloured = np.round(ink * COLOURS[item.colour])
        canvas[top : top + CELL, left : left + CELL] = coloured.astype(np.uint8)
    return canvas


def fit_digit(image: np.ndarray) -> np.ndarray:
    """Return a digit as large as fits into the middle of a cell, (CELL, CELL), uint8.

    Args:
        image: white on black, (height, width), uint8.
    """
    rows, columns = (np.flatnonzero((image > image.max() / 4).any(axis)) for axis in (1, 0))
    cut = Image.fromarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = INK / max(cut.size)
    sides = [max(1, round(side * scale)) for side in cut.size]
    cut = cut.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
    cell = Image.new("L", (CELL, CELL))
    cell.paste(cut, ((CELL - sides[0]) // 2, (CELL - sides[1]) // 2))
    return np.asarray(cell)


def read_digits(source: str, test_source: str | None) -> list[dict[int, np.ndarray]]:
    """Read digits to train and to test with, as `draw_scene` takes them.

    Args:
        source: labelled images of digits, white on black; see `load_images`.
        test_source: others to test with; None: a tenth of the same.

    Raises:
        ValueError: their labels are not the ten digits; see also `load_images`.
    """
    found = load_images(source, channels=1)
    others = None if test_source is None else load_images(test_source, channels=1)
    if found.count_classes() != len(DIGITS):
        raise ValueError(f"--digits {source} has {found.count_classes()} classes; give 10 digits")
    parts = []
    for part in split_images(found, others, 0.1):
        labels = part.classes(np.arange(len(part))).numpy()
        cells = np.stack([fit_digit(image) for image in part.pixels[part.rows, 0]])
        parts.append({digit: cells[labels == digit] for digit in range(len(DIGITS))})
    return parts


def draw_scenes(
    descriptions: Iterable[Description], digits: Mapping[int, np.ndarray], rng: np.random.Generator
) -> tuple[list[np.ndarray], list[str]]:
    """Draw a scene of each description; return images and captions."""
    images, captions = [], []
    for description in descriptions:
        images.append(draw_scene(place_items(description, rng), digits, rng))
        captions.append(str(description))
    return images, captions


def draw_descriptions(part: str, count: int, rng: np.random.Generator) -> list[Description]:
    """Draw descriptions of a part: "train", "test" (held out) or "unseen" (pairs of digits)."""
    fits = {
        "train": lambda drawn: not drawn.held_out,
        "test": lambda drawn: drawn.held_out and not drawn.unseen,
        "unseen": lambda drawn: drawn.unseen,
    }
    found: list[Description] = []
    while len(found) < count:
        drawn = draw_description(rng)
        if fits[part](drawn):
            found.append(drawn)
    return found


def write_scenes(
    output: Path,
    digits: str = "digits",
    test_digits: str | None = None,
    count: int = 50_000,
    test_count: int = 1000,
    seed: int = 0,
) -> None:
    """Write train.parquet, test.parquet and unseen.parquet, with the columns image and text.

    Args:
        output: folder.
        digits, test_digits: see `read_digits`; the first are in train.parquet alone.
        count, test_count: scenes of the first file, and of each of the others.
        seed: of all that is drawn.

    Raises:
        ValueError: see `read_digits`.
    """
    train, test = read_digits(digits, test_digits)
    output.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(("train", "test", "unseen")):
        rng = np.random.default_rng((seed, number))
        own, total = (train, count) if part == "train" else (test, test_count)
        images, captions = draw_scenes(draw_descriptions(part, total, rng), own, rng)
        table = pa.table({"image": [_cell(image) for image in images], "text": captions})
        with written_whole(output / f"{part}.parquet") as scratch:
            pq.write_table(table, scratch)
        console.say(f"{total:,} scenes in {output / f'{part}.parquet'}")


def _cell(image: np.ndarray) -> dict[str, Any]:
    """Return an image as a cell of a table."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


def main() -> None:
    """Write scenes."""
    parser = argparse.ArgumentParser(
        prog="python -m genkit.data.scenes", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("scenes"), help="folder; %(default)s")
    parser.add_argument("--digits", default="digits", help="labelled images; %(default)s")
    parser.add_argument("--test_digits", help="other ones for tests; a tenth of the same")
    parser.add_argument("--count", type=int, default=50_000, help="to train on; %(default)s")
    parser.add_argument("--test_count", type=int, default=1000, help="of each test; %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    write_scenes(**vars(parser.parse_args()))


if __name__ == "__main__":
    with clean_errors():
        main()
