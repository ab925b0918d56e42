"""genkit.imagine: images from prompts, by any text-to-image pipeline of diffusers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from genkit import console, machine
from genkit.arguments import explain_names
from genkit.errors import panics_are_errors
from genkit.hub import kinds
from genkit.notebook import DrawnRecord
from genkit.seeds import is_whole, row_seeds
from genkit.vision import image_grid, text2image
from genkit.vision.text2image import DEFAULT, Source

AREA = 1 << 24  # pixels of the largest picture
Size = int | tuple[int, int]

# ---------------------------------------------------------------------------------------------
# The record


@dataclass(frozen=True)
class Picture(DrawnRecord):
    """One picture, and how it was generated."""

    prompt: str
    negative: str | None  # negative prompt
    image: Image.Image = field(repr=False)
    seed: int  # imagine(prompt, seed=seed, …) gives this picture again
    steps: int
    guidance: float | None  # None: the model has no such option
    scheduler: str
    evaluations: int  # of the network; guidance takes two for each step
    seconds: float
    model: str
    blanked: bool = False  # blacked out by the model's safety checker
    adapter: str | None = None  # name of the folder of what was added to the model

    def __str__(self) -> str:
        guided = "" if self.guidance is None else f" at guidance {self.guidance:g}"
        return (
            f"{self.prompt!r}: {self.image.width} x {self.image.height}, seed {self.seed}, "
            f"{self.steps} steps of {self.scheduler}{guided}, {self.evaluations} evaluations, "
            f"{self.seconds:.1f} s{', blanked by the safety checker' if self.blanked else ''}"
        )

    def save(self, path: str | Path) -> None:
        """Write the picture, completely or not at all.

        Raises:
            ValueError: the suffix is not that of a supported format.
        """
        image_grid.save_as(self.image, path)


# ---------------------------------------------------------------------------------------------
# The verb


@overload
def imagine(  # type: ignore[overload-overlap]  # a str is a Sequence[str], too
    prompt: str,
    *,
    model: str | Path = DEFAULT,
    seed: int | Sequence[int] | None = None,
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> Picture: ...
@overload
def imagine(
    prompt: Sequence[str],
    *,
    model: str | Path = DEFAULT,
    seed: int | Sequence[int] | None = None,
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> list[Picture]: ...
@explain_names
def imagine(
    prompt: str | Sequence[str],
    *,
    model: str | Path = DEFAULT,
    seed: int | Sequence[int] | None = None,
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> Picture | list[Picture]:
    """Generate an image from a prompt, or from each of several.

    Pictures are generated one by one, so that each depends on its own prompt and seed alone. Global
    random state is neither read nor changed. The model is loaded once, and kept until another is
    used: on a GPU in 16 bits, one network at a time if memory is short; on a CPU in 32 bits, or in
    16 if memory is short. A picture too large to decode at once is decoded in tiles.

    Args:
        prompt: one, or several.
        model: text-to-image pipeline of diffusers, as a folder or Hub id; default: Stable
            Diffusion 1.5.
        seed: one number, then picture i has seed + i; or one for each; default: random.
        negative: negative prompt, for what to avoid.
        steps: of the scheduler; default: as the pipeline has it.
        guidance: scale of classifier-free guidance, which takes a second evaluation for each step;
            1 or less for none; default: as the pipeline has it.
        size: (width, height) in pixels, or the side of a square; default: the model's own.
        adapter: adapter of the model, or new words for it, as `finetune_text2image` saves them: a
            folder or Hub id.
        revision: branch, tag or commit of the model on the Hub.
        trust_remote_code: run the code in the model's folder.
        device: "cpu", or a GPU as torch names it; default: the GPU, if there is one.

    Returns:
        A `Picture` for one prompt, a list of them for several.

    Raises:
        ValueError: an argument is invalid, or the model's files are unsafe.
    """
    prompts = _prompts(prompt)
    seeds = row_seeds(seed, len(prompts), "a prompt")
    where = machine.find_device(device)
    name = kinds.as_name(model)
    source = text2image.find_source(name, revision, trust_remote_code, adapter=adapter)
    options = resolve_options(source, negative, steps, guidance, size)
    pipeline = text2image.load_text2image(source, trust_remote_code, device)
    _tile(pipeline, machine.free_memory(where), *(options.size or source.default_size))
    one = len(prompts) == 1  # the bar of its steps is enough
    rows = console.bar(zip(prompts, seeds, strict=True), "generating", len(prompts), " images", one)
    pictures = [generate_picture(pipeline, source, text, own, options) for text, own in rows]
    return pictures[0] if isinstance(prompt, str) else pictures


def generate_picture(
    pipeline: DiffusionPipeline, source: Source, prompt: str, seed: int, options: ImagineOptions
) -> Picture:
    """Generate one picture, as `imagine` does.

    Args:
        pipeline: by `text2image.load_text2image`, or changed since.
        source: by `text2image.find_source`.
        options: the steps, and what else `imagine` takes.
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    with (
        machine.fork_random_state(),
        text2image.numpy_as_it_was(),
        panics_are_errors(),
        _count_evaluations(pipeline) as evaluated,
    ):
        # for schedulers that ignore the generator: other noise than the initial one
        torch.manual_seed(-1 - seed)
        result = pipeline(prompt, generator=generator, **_arguments(source, options))
    return Picture(
        prompt,
        options.negative,
        result.images[0],
        seed,
        options.steps,
        options.guidance,
        type(pipeline.scheduler).__name__,
        sum(evaluated),
        time.perf_counter() - started,
        source.name,
        blanked=any(result.get("nsfw_content_detected") or ()),
        adapter=None if source.adapter is None else source.adapter.name,
    )


@contextlib.contextmanager
def _count_evaluations(pipeline: DiffusionPipeline) -> Iterator[list[int]]:
    """Collect the number of rows of each call of the denoising network."""
    rows: list[int] = []
    networks = [part for name, part in pipeline.components.items() if _denoises(name)]
    hooks = [
        network.register_forward_hook(lambda _network, _inputs, output: rows.append(len(output[0])))
        for network in networks
    ]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _denoises(component: str) -> bool:
    return "unet" in component or "transformer" in component


def _tile(pipeline: DiffusionPipeline, free: int, width: int, height: int) -> None:
    vae = pipeline.components.get("vae")
    if getattr(vae, "use_tiling", None) is None:  # no VAE, or one without tiles
        return
    too_large = text2image.needs_tiles(width, height, free, vae.dtype.itemsize)
    (vae.enable_tiling if too_large else vae.disable_tiling)()


# ---------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class ImagineOptions:
    """Options of `imagine`, with the pipeline's own where none were given."""

    negative: str | None
    steps: int
    guidance: float | None
    size: tuple[int, int] | None  # width, height


def _prompts(prompt: Any) -> list[str]:
    if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
        raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r:.80}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one text")
    for i, text in enumerate(prompts):
        name = "prompt" if isinstance(prompt, str) else f"prompt[{i}]"
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} must be a text that is not empty, got {text!r:.80}")
    return prompts


def resolve_options(
    source: Source, negative: Any, steps: Any, guidance: Any, size: Any
) -> ImagineOptions:
    """Check options of `imagine` against the model's settings, before its weights are loaded.

    Raises:
        ValueError: an option is out of range, or the model does not have it.
    """
    if steps is None:
        steps = source.parameters["num_inference_steps"].default
    most = source.settings.get("scheduler", {}).get("num_train_timesteps", 1000)
    if not is_whole(steps) or not 1 <= steps <= most:
        raise ValueError(
            f"steps must be a whole number from 1 to {most}, the scheduler's training steps, "
            f"got {steps!r}"
        )
    if guidance is None:
        guidance = source.parameters[source.guidance].default
    elif (
        not isinstance(guidance, int | float | np.number)
        or isinstance(guidance, bool)
        or not 0 <= guidance < 1e4
    ):
        raise ValueError(f"guidance must be a number, 0 or more, got {guidance!r}")
    _check_negative(source, negative, guidance)
    checked = None if size is None else _check_size(source, size)
    return ImagineOptions(
        negative, int(steps), None if guidance is None else float(guidance), checked
    )


def _check_negative(source: Source, negative: Any, guidance: float | None) -> None:
    if negative is None:
        return
    if not isinstance(negative, str):
        raise ValueError(f"negative must be a text, got {negative!r:.80}")
    distilled = source.network.get("time_cond_proj_dim")  # guidance is an input of the network
    if "negative_prompt" not in source.parameters or distilled:
        raise ValueError(f"negative={negative!r:.80}: {source.name} takes no negative prompt")
    if guidance is not None and guidance <= 1:
        raise ValueError(
            f"negative={negative!r:.80} requires a guidance above 1, got guidance={guidance:g}"
        )


def _check_size(source: Source, size: Any) -> tuple[int, int]:
    sides = (size, size) if is_whole(size) else size
    if np.shape(sides) != (2,) or not all(is_whole(side) and side > 0 for side in sides):
        raise ValueError(f"size must be (width, height) in pixels, or a side, got {size!r:.80}")
    width, height = (int(side) for side in sides)
    step = source.multiple
    if width % step or height % step:
        near = tuple(max(step, round(side / step) * step) for side in (width, height))
        raise ValueError(
            f"size must be multiples of {step} pixels for {source.name}, got {size}; give {near}"
        )
    if width * height > AREA:
        raise ValueError(f"size must be at most {AREA:,} pixels, got {width} x {height}")
    return width, height


def _arguments(source: Source, options: ImagineOptions) -> dict[str, Any]:
    """Return options by the pipeline's own names."""
    width, height = options.size or (None, None)
    negative = options.negative
    if source.guidance == "true_cfg_scale" and (options.guidance or 0) > 1:
        negative = negative or ""  # without one, these pipelines do not apply guidance
    arguments = {
        "num_inference_steps": options.steps,
        source.guidance: options.guidance,
        "negative_prompt": negative,
        "width": width,
        "height": height,
    }
    return {name: value for name, value in arguments.items() if value is not None}
