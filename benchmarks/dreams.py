"""Seconds of a dream of 512 x 512 pixels: four octaves of ten steps; and of the image of a unit.

    python benchmarks/dreams.py --model FOLDER --image PHOTOGRAPH --threads 2

FOLDER is an image classifier, such as what tools write for EfficientNet-Lite0. The photograph is
cropped to its middle square and resized. With --output the pictures are written, to be looked at.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps

import genkit


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of an image classifier")
    parser.add_argument("--image", required=True, help="file of a photograph")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="folder for the pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = genkit.load(arguments.model)
    with Image.open(arguments.image) as photograph:
        image = ImageOps.fit(photograph.convert("RGB"), (arguments.side, arguments.side))
    start = time.process_time()
    record = genkit.dream(image, model=model)
    middle = time.process_time()
    units = genkit.visualize(model, target=0, size=128)
    spent = middle - start, time.process_time() - middle
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{arguments.threads} threads, {model.name}, at most {peak:.1f} GiB")
    print(f"{record}, {spent[0]:.1f} s of CPU time")
    print(f"{units}, {spent[1]:.1f} s of CPU time")
    if arguments.output:
        record.save(Path(arguments.output, "dream.png"))
        units.save(Path(arguments.output, "unit.png"))


if __name__ == "__main__":
    main()
