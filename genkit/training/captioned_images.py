"""Images with captions for a pipeline that draws from words, encoded once ahead of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genkit import console
from genkit.data import images, tables
from genkit.data.image_files import DIGITS
from genkit.data.images import Images
from genkit.data.order import Order
from genkit.files import cache_folder, written_whole
from genkit.hub import names
from genkit.models import text2image_tuning as tuning
from genkit.models.diffusion_losses import stratified_quantiles
from genkit.training.image_data import ImageSettings
from genkit.training.run import Run


@dataclass(frozen=True)
class Captioned:
    """Images with captions; several may have the same."""

    images: Images
    captions: list[str]  # each once
    which: np.ndarray  # (images,): the caption of each image

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sha256(self) -> str:
        """Of the images and their captions."""
        content = [self.images.sha256, self.captions, self.which.tolist()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def take(self, rows: np.ndarray) -> Captioned:
        """Return some of the images."""
        return Captioned(self.images.take(rows), self.captions, self.which[rows])


def check_captions(source: str, prompt: str | None, caption_column: str | None) -> None:
    """Refuse images without captions, and those with two, before any long work.

    Args:
        source: of the images.
        prompt: the caption of all images.
        caption_column: the column of captions, if the source is a table.

    Raises:
        ValueError: naming the argument that would do.
    """
    if (prompt is None) == (caption_column is None):
        raise ValueError(
            f"--prompt {prompt} and --caption_column {caption_column}: give one of them, the "
            "caption of all images, or the name of the column with the caption of each"
        )
    if prompt is not None and not prompt.strip():
        raise ValueError(f"--prompt is {prompt!r}; give a text that says what the images show")
    path = names.as_path(source, "images")
    table = tables.is_saved_dataset(path) or (path.is_file() and tables.find_kind(path))
    here = path.is_dir() or source == DIGITS
    if caption_column is not None and here and not table:
        raise ValueError(
            f"--caption_column {caption_column}: --images {source} has no columns; give a table"
        )


def load_captioned(
    run: Run,
    settings: ImageSettings,
    prompt: str | None,
    image_column: str,
    caption_column: str | None,
) -> Captioned:
    """Load images with their captions, once a machine, and log which files were left out.

    Args:
        prompt, caption_column: see `check_captions`.
        image_column: of a table.

    Raises:
        ValueError: there is no such column, or an image has no caption; see also `load_images`.
    """
    with run.accelerator.local_main_process_first():
        found = images.load_images(
            settings.images,
            settings.resolution,
            settings.channels,
            settings.skip_corrupt,
            image_column,
            caption_column or "",
            allow_outside=settings.allow_outside,
            max_pixels=settings.max_pixels,
            max_bytes=settings.max_bytes,
            table_memory=settings.table_memory,
        )
    for line in (*(f"skipped: {problem}" for problem in found.skipped), *found.notes):
        run.log(line)
    if caption_column is None:
        assert prompt is not None, "checked"
        return Captioned(found, [prompt], np.zeros(len(found), np.int64))
    if found.labels is None:
        raise ValueError(
            f"--caption_column {caption_column}: {settings.images} has no such column; give the "
            "name of the one with captions"
        )
    for number, caption in enumerate(found.names):
        if not caption.strip():
            row = int((found.labels == number).argmax())
            raise ValueError(
                f"--caption_column {caption_column}: the caption of row {row} is empty; write one, "
                "or leave the row out"
            )
    return Captioned(found, found.names, found.labels)


def split(data: Captioned, val_fraction: float) -> tuple[Captioned, Captioned]:
    """Return captioned images to train on, and some to validate on; see `images.split_images`."""
    train, val = images.split_images(data.images, None, val_fraction)
    return data.take(train.rows), data.take(val.rows)


# ---------------------------------------------------------------------------------------------
# Encoded


@dataclass(frozen=True)
class Encoded:
    """Latents and prompts of captioned images, in main memory."""

    latents: Tensor  # (images, channels, height, width)
    which: np.ndarray  # (images,): the caption of each image
    prompts: tuple[Tensor, ...]  # (captions, …) each: what `Tuner` takes

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def size(self) -> tuple[int, ...]:
        """Channels, height and width of the latents."""
        return tuple(self.latents.shape[1:])

    def prompts_of(self, rows: np.ndarray, dropped: Tensor) -> tuple[Tensor, ...]:
        """Look up the prompts of images.

        Args:
            rows: images, (n,).
            dropped: which of them get the last prompt, (n,).
        """
        which = torch.from_numpy(self.which[rows]).masked_fill(dropped, -1)
        return tuple(part[which] for part in self.prompts)

    def take(self, rows: np.ndarray) -> Encoded:
        """Return some of the images."""
        return Encoded(self.latents[torch.from_numpy(rows)], self.which[rows], self.prompts)

    @property
    def megabytes(self) -> float:
        """Of main memory that it takes."""
        return sum(part.nbytes for part in (self.latents, *self.prompts)) / 1e6


def encode_latents(run: Run, pipeline: Any, part: Images) -> Tensor:
    """Return the latents of images, in main memory, (n, …), the same at any number of processes."""

    def encode(row: int) -> list[Tensor]:
        return [tuning.encode_images(pipeline, part.batch(np.array([row]), run.device))]

    return _share(run, encode, len(part), "encoding", "images")[0]


def encode_prompts(
    run: Run, pipeline: Any, tuner: tuning.Tuner, captions: Sequence[str], argument: str
) -> tuple[Tensor, ...]:
    """Return what a tuner takes of captions and, last, of no words, (captions + 1, …) each.

    Where no text encoder is trained, they are encoded, the same at any number of processes.

    Args:
        argument: where the captions are from, for messages.

    Raises:
        ValueError: a caption is longer than a text encoder reads.
    """
    ids = tuning.tokenize(pipeline, [*captions, ""], argument)
    if len(tuner.encoders):
        return ids
    encoders = tuning.text_encoders(pipeline)

    @torch.no_grad()
    def encode(row: int) -> Sequence[Tensor]:
        one = [part[row : row + 1].to(run.device) for part in ids]
        return tuning.encode_prompts(encoders, one)

    prompts = _share(run, encode, len(ids[0]), "encoding", "captions")
    if pipeline.config.get("force_zeros_for_empty_prompt"):  # as it draws with guidance
        for part in prompts:
            part[-1] = 0
    return prompts


def draw_latents(run: Run, draw: Callable[[int], Tensor], count: int, content: list[Any]) -> Tensor:
    """Draw the latents of images of the seeds 0 and up, and keep them in the cache.

    Args:
        draw: returns those of one seed, (1, …).
        content: what says all that they depend on.

    Returns:
        Latents in main memory, (count, …).
    """
    identity = json.dumps([*content, count, run.device.type])
    path = cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"
    if run.sum(torch.tensor([float(path.exists())])).item() == run.processes:
        return load_file(path)["latents"]
    (latents,) = _share(run, lambda seed: [draw(seed)], count, "drawing", "images")
    if not run.settings.dry_run:
        with written_whole(path, shared=True) as scratch:
            save_file({"latents": latents.contiguous()}, scratch)
    return latents


def _share(
    run: Run, make: Callable[[int], Sequence[Tensor]], count: int, doing: str, unit: str
) -> tuple[Tensor, ...]:
    """Make rows one by one, shared out among the processes, and return all on every process.

    Args:
        make: returns tensors of a row, (1, …) each.
    """
    shared = count >= run.processes  # one without a row would not know its shape
    mine = run.shard(count) if shared else range(count)
    rows = [
        [part.float().cpu().numpy() for part in make(row)]
        for row in console.bar(mine, doing, len(mine), f" {unit}")
    ]
    arrays = [np.concatenate(part) for part in zip(*rows, strict=True)]
    return tuple(map(torch.from_numpy, run.gather_arrays(*arrays) if shared else arrays))


# ---------------------------------------------------------------------------------------------
# Batches

# latents and noise, (n, channels, height, width), timesteps, (n,), and prompts, (n, …) each
Batch = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]


class Batches:
    """What the steps of a run learn from: the same for a row at any number of processes.

    Args:
        parts: images to learn and, if there are, those that the pipeline is to go on drawing.
        seed: of the run.
        cond_dropout: part of the prompts that are replaced by the last one, of no words.
        timesteps: of training.
    """

    def __init__(
        self, parts: Sequence[Encoded], seed: int, cond_dropout: float, timesteps: int
    ) -> None:
        self.parts, self.seed = parts, seed
        self.cond_dropout, self.timesteps = cond_dropout, timesteps
        self.orders = [Order(len(part), seed) for part in parts]

    def take(self, run: Run, number: int, rows: np.ndarray) -> Batch:
        """Look up images and draw random numbers.

        Args:
            number: of the part.
            rows: positions in the endless order, as `Run.rows` yields them.
        """
        part, (_, which) = self.parts[number], self.orders[number](rows)
        slots = torch.from_numpy(rows - run.first_row)
        words = np.random.SeedSequence((self.seed, run.turn, number))
        generator = torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0]))
        count = run.batch_size
        noise = torch.randn(count, *part.size, generator=generator)[slots]
        shuffled = torch.randperm(count, generator=generator)
        u = torch.rand(1, generator=generator)
        timesteps = (stratified_quantiles(shuffled, u)[slots] * self.timesteps).long()
        dropped = torch.rand(count, generator=generator)[slots] < self.cond_dropout
        prompts = tuple(each.to(run.device) for each in part.prompts_of(which, dropped))
        latents = part.latents[torch.from_numpy(which)]
        return latents.to(run.device), noise.to(run.device), timesteps.to(run.device), prompts


def repeat_image(
    part: Encoded, row: int, times: int, timesteps: int, device: torch.device
) -> Batch:
    """Return a batch of one image, at evenly spaced timesteps and with noise of its own.

    It is the same for an image whatever else is measured.

    Args:
        times: rows of the batch.
        timesteps: of training.
    """
    generator = torch.Generator().manual_seed(row)
    noise = torch.randn(times, *part.size, generator=generator)
    spaced = ((torch.arange(times) + 0.5) / times * timesteps).long()
    dropped = torch.zeros(times, dtype=torch.bool)
    prompts = tuple(each.to(device) for each in part.prompts_of(np.full(times, row), dropped))
    latents = part.latents[row].expand(noise.shape)
    return latents.to(device), noise.to(device), spaced.to(device), prompts
