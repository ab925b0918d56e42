"""Images from words with a known answer: do scenes of digits show what their captions say?

    python -m genkit.data.scenes --digits mnist/train.parquet --test_digits mnist/test.parquet
    accelerate launch recipes/train_text2image.py --images scenes/train.parquet
    python benchmarks/scenes.py --model runs/text2image --digits mnist/train.parquet
    python benchmarks/scenes.py --model runs/text2image … --guidance 1 2 4 --count 200

The judge is a small classifier of the four cells of a scene. It is trained here, on digits in
random colours, and its own accuracy on real scenes is printed: no model can be seen to do better.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genkit.data import scenes
from genkit.data.images import load_images
from genkit.data.scenes import CELL, CELLS, COLOURS, DIGITS, KINDS, Description, Item
from genkit.models.text_diffusion import GUIDANCE, STEPS
from genkit.vision import image_grid, text2image

NOTHING = len(DIGITS)  # the class of an empty cell
ROWS = 100
NOISE = 0.15  # most of what is added to cells that the judge learns from
SHOWN = (  # of the picture: prompts and seeds of each
    "a green five",
    "a red three left of a blue seven",
    "a yellow nine above a green two",
    "a blue one right of a red eight",
    "three red fours",
)
SEEDS = 8
Figures = dict[str, float]

# ---- the judge


class Judge(torch.nn.Sequential):
    """A classifier of cells, (n, 3, CELL, CELL) in [-1, 1]: a digit, or `NOTHING`."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(),
            torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Flatten(), torch.nn.Linear(64 * (CELL // 4) ** 2, NOTHING + 1),
        )  # fmt: skip


def train_judge(digits: Mapping[int, np.ndarray], steps: int) -> Judge:
    """Train on digits in random colours, shifted and noisy, and on empty cells."""
    torch.manual_seed(0)
    rng, judge = np.random.default_rng(7), Judge()
    cells = np.concatenate([digits[digit] for digit in range(NOTHING)])
    labels = np.concatenate([np.full(len(digits[digit]), digit) for digit in range(NOTHING)])
    tints = np.array(list(COLOURS.values())) / 255
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    for step in range(steps):
        which = rng.integers(len(cells), size=128)
        empty = rng.random(128) < 1 / (NOTHING + 1)
        ink = cells[which] / 255 * ~empty[:, None, None]
        ink = np.roll(ink, rng.integers(-1, 2, 2), (1, 2))
        batch = 2 * ink[:, None] * tints[rng.integers(len(tints), size=128)][:, :, None, None] - 1
        batch += NOISE * rng.random((128, 1, 1, 1)) * rng.standard_normal(batch.shape)
        target = torch.from_numpy(np.where(empty, NOTHING, labels[which]))
        loss = F.cross_entropy(judge(torch.from_numpy(batch).float().clamp(-1, 1)), target)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def read_scenes(judge: Judge, images: torch.Tensor) -> list[dict[int, Item]]:
    """Return what the judge sees in images, (n, 3, height, width) in [-1, 1]: items by cell."""
    cut = images.unfold(2, CELL, CELL).unfold(3, CELL, CELL)  # (n, 3, 2, 2, CELL, CELL)
    cells = cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, CELL, CELL)
    classes = torch.cat([judge(part).argmax(1) for part in cells.split(1000)])
    tints = F.normalize(torch.tensor(list(COLOURS.values())).float(), dim=1)
    colours = ((cells + 1).sum((2, 3)) @ tints.T).argmax(1)  # nearest by direction
    names, found = list(COLOURS), []
    for own, tinted in zip(classes.view(-1, CELLS), colours.view(-1, CELLS), strict=True):
        some = [(i, int(own[i]), names[tinted[i]]) for i in range(CELLS) if own[i] != NOTHING]
        found.append({cell: Item(digit, colour) for cell, digit, colour in some})
    return found


def marks(description: Description, scene: Mapping[int, Item]) -> dict[str, bool]:
    """Return what of a description a scene shows."""
    asked = [description.item] * description.count
    both = asked + ([description.other] if description.other else []), list(scene.values())
    grey = {cell: Item(item.digit, "red") for cell, item in scene.items()}
    return {
        "count": len(both[0]) == len(both[1]),
        "digits": equal_bags(*[[item.digit for item in items] for items in both]),
        "colours": equal_bags(*[[item.colour for item in items] for items in both]),
        "order": without_colours(description).is_shown(grey),
        "all": description.is_shown(scene),
    }


def equal_bags(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists have the same elements, in any order."""
    return sorted(first) == sorted(second)


def without_colours(description: Description) -> Description:
    """Return a description with all in red."""
    other = description.other and Item(description.other.digit, "red")
    item = Item(description.item.digit, "red")
    return Description(item, description.count, description.relation, other)


def figures(captions: list[str], seen: list[dict[int, Item]]) -> dict[str, Figures]:
    """Return the parts of scenes that are right, by kind, and over all."""
    asked = [scenes.parse_caption(caption) for caption in captions]
    rows = [(each.kind, marks(each, scene)) for each, scene in zip(asked, seen, strict=True)]
    table: dict[str, Figures] = {}
    for kind in (*KINDS, "every"):
        some = [right for own, right in rows if kind in (own, "every")]
        if some:
            names = some[0]
            table[kind] = {name: float(np.mean([row[name] for row in some])) for name in names}
            table[kind] |= {"scenes": len(some)}
    return table


# ---- the model


def draw(
    pipeline: Any, captions: list[str], guidance: float, steps: int, seed: int = 0
) -> torch.Tensor:
    """Draw a scene of each caption, with the seeds `seed` and up, in [-1, 1]."""
    made = []
    for start in range(0, len(captions), ROWS):
        some = captions[start : start + ROWS]
        own = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        options = {"guidance_scale": guidance, "num_inference_steps": steps, "output_type": "pt"}
        made.append(pipeline(some, generator=own, **options).images * 2 - 1)
    return torch.cat(made)


def measure(
    model: Path,
    data: Path,
    digits: str,
    count: int,
    guidance: list[float],
    steps: int,
    judge_steps: int,
) -> None:
    """Print the figures as JSON, and write scenes.png."""
    judge = train_judge(scenes.read_digits(digits, None)[0], judge_steps)
    pipeline = text2image.load_text2image(text2image.find_source(str(model)), device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {}
    for part in ("test", "unseen"):
        found = load_images(data / f"{part}.parquet", label_column="text")
        assert found.labels is not None, "write_scenes writes captions"
        which = np.arange(min(count, len(found)))
        captions = [found.names[label] for label in found.labels[which]]
        real = figures(captions, read_scenes(judge, found.batch(which)))
        report[part] = {"real scenes": real}
        for scale in guidance:
            started = time.process_time()
            drawn = draw(pipeline, captions, scale, steps)
            seconds = time.process_time() - started
            report[part][f"guidance {scale:g}"] = figures(captions, read_scenes(judge, drawn))
            right = report[part][f"guidance {scale:g}"]
            print(part, f"guidance {scale:g}:", json.dumps(right), f"{seconds:.0f} CPU s")
    Path("scenes.json").write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
    rows = {text: draw(pipeline, [text] * SEEDS, guidance[0], steps) for text in SHOWN}
    image_grid.rows(rows, Path("scenes.png"))


def main() -> None:
    """Measure a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("scenes"))
    parser.add_argument("--digits", required=True, help="labelled images that the judge learns")
    parser.add_argument("--count", type=int, default=1000, help="captions of each part")
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--judge_steps", type=int, default=3000)
    measure(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
