"""Text-to-image pipelines of diffusers: their settings, checks before loading, and loading."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from safetensors import safe_open

from genkit import console, machine
from genkit.hub import download, kinds, model_files, names, safe_configs, safe_weights, safety
from genkit.models.text_diffusion import TextDiffusionPipeline
from genkit.vision import adapters

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
REVISION = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
HINT = "Give the folder or the Hub id of a text-to-image pipeline in safetensors"
ROOM = 0.8  # part of free memory that weights may take: activations need the rest
FAULTS = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError)  # of files
DECODING = 6 << 10  # bytes for each pixel that a decoder needs in 32 bits, at its widest layer

# ---------------------------------------------------------------------------------------------
# Settings of a model, before its weights are loaded


@dataclass(frozen=True)
class Source:
    """A model with safe files, and its settings."""

    name: str
    folder: Path  # for a Hub id that of the cache, at a commit
    pipeline: type[DiffusionPipeline]
    settings: Mapping[str, Mapping[str, Any]] = field(compare=False)  # of each component
    absent: tuple[str, ...] = ()  # optional components that it was saved without
    adapter: Path | None = None  # folder of weights that are added to its own

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the pipeline's call."""
        return inspect.signature(self.pipeline.__call__).parameters

    @property
    def guidance(self) -> str:
        """The pipeline's name for classifier-free guidance.

        Where there are two names, `guidance_scale` is an input of a distilled network.
        """
        return "true_cfg_scale" if "true_cfg_scale" in self.parameters else "guidance_scale"

    @property
    def network(self) -> Mapping[str, Any]:
        """Settings of the network that denoises."""
        return self.settings.get("unet") or self.settings.get("transformer") or {}

    @property
    def factor(self) -> int:
        """Downsampling factor of the VAE: side of the picture over side of its latents."""
        if self.pipeline is TextDiffusionPipeline:  # which has none
            return 1
        return 2 ** (len(self.settings.get("vae", {}).get("block_out_channels", range(4))) - 1)

    @property
    def multiple(self) -> int:
        """Number that sides must be a multiple of: that factor times the patch size."""
        if self.pipeline is TextDiffusionPipeline:  # whose network halves the picture itself
            return 2 ** (len(self.network.get("block_out_channels", (1,))) - 1)
        latents = self.settings.get("vae", {}).get("latent_channels")
        packed = math.isqrt(self.network.get("in_channels", 1) // latents) if latents else 1
        return self.factor * max(packed, 1) * int(np.max(self.network.get("patch_size") or 1))

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height that the pipeline generates by default, by its settings."""
        size = self.network.get("sample_size") or 128
        if self.pipeline is TextDiffusionPipeline and isinstance(size, list):
            return size[1], size[0]
        side = self.factor * int(np.max(size))
        return side, side


@functools.cache
def text_to_image() -> dict[str, type[DiffusionPipeline]]:
    """Return diffusers' pipelines that need only a prompt and one repository, by name."""
    pipelines = {}
    for pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        takes = inspect.signature(pipeline.__call__).parameters.keys()
        guided = {"guidance_scale", "true_cfg_scale"} & takes
        needs_image = "Control" in pipeline.__name__
        is_film, spread = "num_frames" in takes, pipeline._load_connected_pipes
        if guided and not needs_image and not is_film and not spread:
            pipelines[pipeline.__name__] = pipeline
    return pipelines


def find_source(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    argument: str = "model",
    adapter: str | Path | None = None,
) -> Source:
    """Find a model and check its settings, without fetching its weights.

    Args:
        model: folder or Hub id.
        revision: a branch, tag or commit on the Hub.
        trust_remote_code: accept networks whose classes are in its folder.
        argument: the name of the model's argument, for messages.
        adapter: folder or Hub id of an adapter of the model, or of new words for it.

    Raises:
        ValueError: there is no such model, it is of another kind, or its files are unsafe.
    """
    if revision is None and model == DEFAULT and not names.is_folder(model):
        revision = REVISION
    folder = download.fetch_settings(model, revision, argument=argument, hint=HINT)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{argument}: {model!r} holds no pipeline; give a folder or a Hub id with a "
            "model_index.json"
        )
    with safety.opened(folder, argument=argument, weights=False, code=trust_remote_code) as private:
        index = safe_configs.read_index(private / "model_index.json")
        name = index.get("_class_name")
        parts = [part for part, kind in index.items() if _is_kind(kind)]
        settings = {part: _settings(private / part) for part in parts}
    own = isinstance(name, list) and kinds.PIPELINES.get(tuple(name)) == kinds.TEXT_TO_IMAGE
    pipeline = TextDiffusionPipeline if own else text_to_image().get(str(name))
    if pipeline is None:
        raise ValueError(
            f"{argument}: {model!r} is a {name}; give a text-to-image pipeline of diffusers, "
            "such as a StableDiffusionPipeline, or the output folder of train_text2image"
        )
    absent = tuple(part for part, kind in index.items() if kind == [None, None])
    for part in absent:
        if part in ("scheduler", "vae", "unet", "transformer", "tokenizer", "text_encoder"):
            raise ValueError(f"{argument}: {model!r} lacks its {part}; give a complete one")
    added = None if adapter is None else download.fetch_adapter(adapter)
    return Source(model, folder, pipeline, settings, absent, added)


def _is_kind(value: Any) -> bool:
    """Whether a value of a model_index.json names a library and a class."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value)


def _settings(folder: Path) -> Mapping[str, Any]:
    for name in ("config.json", "scheduler_config.json"):
        if (folder / name).is_file():
            return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    return {}


# ---------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True)
class Placement:
    """Device and precision of a pipeline."""

    device: torch.device
    dtype: torch.dtype
    offload: bool = False  # networks stay in main memory, and move to the GPU one at a time


def choose_placement(
    parameters: int,
    device: torch.device,
    free: int,
    half: torch.dtype = torch.bfloat16,
    own_memory: bool = True,
) -> Placement:
    """Choose the precision of a pipeline, and whether all of it fits on its device.

    Args:
        parameters: of all its networks.
        device: of the pipeline.
        free: bytes of the device's memory.
        half: the type of 16 bits.
        own_memory: whether the device has memory besides main memory.
    """
    if machine.kind(device) == "cpu":
        fits = 4 * parameters <= ROOM * free
        return Placement(device, torch.float32 if fits else half)
    return Placement(device, half, offload=own_memory and 2 * parameters > ROOM * free)


def needs_tiles(width: int, height: int, free: int, itemsize: int = 4) -> bool:
    """Return whether a picture is too large to decode at once.

    Args:
        width, height: in pixels.
        free: bytes of memory.
        itemsize: bytes of a number of the decoder.
    """
    return width * height * DECODING * itemsize // 4 > ROOM * free


def load_text2image(
    source: Source, trust_remote_code: bool = False, device: str | None = None
) -> DiffusionPipeline:
    """Load a pipeline onto a device; the last one is cached.

    Args:
        source: by `find_source`.
        trust_remote_code: run the code in its folder.
        device: see `machine.find_device`.

    Raises:
        ValueError: files are missing, damaged or unsafe.
    """
    on_hub = not Path(source.name).is_dir()  # the files of a commit never change
    written = 0 if on_hub else model_files.last_written(source.folder)
    if source.adapter is not None:
        written = max(written, model_files.last_written(source.adapter))
    return _load(source, written, trust_remote_code, machine.find_device(device))


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)
def _load(
    source: Source, written: int, trust_remote_code: bool, device: torch.device
) -> DiffusionPipeline:
    _load.cache_clear()  # the model before makes room for this one
    machine.empty_cache(device)
    placement = None

    def choose_type(parameters: int) -> torch.dtype:
        nonlocal placement
        placement = _place(parameters, device)
        return placement.dtype

    pipeline = read_pipeline(source, choose_type, trust_remote_code)
    assert placement, "read_pipeline asks for the type"
    if source.adapter is not None:
        adapters.add_adapter(pipeline, source.adapter)
    if placement.offload:
        pipeline.enable_model_cpu_offload(device=placement.device)
        return pipeline
    return pipeline.to(placement.device)


def read_pipeline(
    source: Source, choose_type: Callable[[int], torch.dtype], trust_remote_code: bool = False
) -> DiffusionPipeline:
    """Load a pipeline into main memory, and keep no reference to it.

    Args:
        source: by `find_source`.
        choose_type: returns the type of its numbers; called with how many they are.
        trust_remote_code: run the code in its folder.

    Raises:
        ValueError: files are missing, damaged or unsafe.
    """
    options = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    if not Path(source.name).is_dir():
        _download(source, options)
    with safety.opened(source.folder, code=trust_remote_code) as private:
        held = {part: _count(private / part) for part in source.settings}
        dtype = choose_type(sum(held.values()))
        with _no_bars(), numpy_as_it_was(), machine.fork_random_state():
            pipeline = source.pipeline.from_pretrained(
                private, dtype=dtype, **options, **dict.fromkeys(source.absent)
            )
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                _check_whole(name, part, held[name])
                safe_weights.check_loaded(part)
    pipeline.progress_bar = _make_bar
    return pipeline


def draw_latents(
    pipeline: DiffusionPipeline, prompt: str, seed: int, steps: int, size: int
) -> torch.Tensor:
    """Draw a square picture, and return its latents as the denoiser takes them, (1, …)."""
    options = {"num_inference_steps": steps, "width": size, "height": size}
    generator = torch.Generator().manual_seed(seed)
    with machine.fork_random_state(), numpy_as_it_was():
        torch.manual_seed(-1 - seed)  # for schedulers that ignore the generator
        drawn = pipeline(prompt, generator=generator, output_type="latent", **options)
    latents: torch.Tensor = drawn.images
    return latents


def _place(parameters: int, device: torch.device) -> Placement:
    free, half = machine.free_memory(device), machine.half_precision(device)
    return choose_placement(parameters, device, free, half, machine.has_own_memory(device))


def _make_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
    """Return the bar of a pipeline's steps, in place of its own."""
    return console.bar(iterable, "denoising", total, " steps")


def _download(source: Source, options: dict[str, Any]) -> None:
    """Download the weights of a model on the Hub into the cache."""
    if source.pipeline is TextDiffusionPipeline:  # diffusers would ask for the code in its folder
        download.fetch(source.name, source.folder.name, hint=HINT)
        return
    try:  # the folder's name is that of its commit
        source.pipeline.download(source.name, revision=source.folder.name, **options)
    except FAULTS as error:
        raise ValueError(f"model: cannot load {source.name!r}: {error} {HINT}") from error


def _check_whole(name: str, part: torch.nn.Module, held: int) -> None:
    """Refuse a component with more parameters than its files: the others would be random."""
    numbers = sum(parameter.numel() for parameter in part.parameters())
    if numbers > held:
        raise ValueError(
            f"the weights of its {name} lack {numbers - held:,} of {numbers:,} numbers"
        )


def _count(folder: Path) -> int:
    """Count the parameters of a component by the headers of its files."""
    weights = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
    total = 0
    for file in folder.glob("*.safetensors"):
        if weights.fullmatch(file.name):
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
                total += sum(math.prod(tensors.get_slice(k).get_shape()) for k in names)
    return total


@contextlib.contextmanager
def numpy_as_it_was() -> Iterator[None]:
    """Ignore NumPy 2's warning that diffusers' schedulers turn tensors into arrays."""
    with warnings.catch_warnings():
        message = "__array__ implementation doesn't accept a copy keyword"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Hide progress bars of diffusers and transformers: loading is short."""
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
