"""Text-to-image pipelines of diffusers: found, looked at before they are loaded, and placed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import psutil
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from safetensors import safe_open

from genkit.hub import download, model_files, safe_configs, safe_weights, safety

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
REVISION = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
HINT = "Give the folder or the Hub id of a text-to-image pipeline in safetensors"
ROOM = 0.8  # of a memory that may be taken at once: there is more to keep than what is counted
FAULTS = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError)  # of files
DECODING = 6 << 10  # bytes a pixel that a decoder takes in 32 bits, at its widest

# ---------------------------------------------------------------------------------------------
# What a model says of itself, before its weights are loaded


@dataclass(frozen=True)
class Source:
    """A model whose files can be trusted, and its settings."""

    name: str
    folder: Path  # of the Hub's cache for an id, at a commit
    pipeline: type[DiffusionPipeline]
    settings: Mapping[str, Mapping[str, Any]] = field(compare=False)  # of each component
    absent: tuple[str, ...] = ()  # components that it was saved without

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What a call of the pipeline takes."""
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
        """How many times larger a side of the picture is than one of its latents."""
        return 2 ** (len(self.settings.get("vae", {}).get("block_out_channels", range(4))) - 1)

    @property
    def multiple(self) -> int:
        """What sides must be a multiple of: that factor times a patch's side."""
        latents = self.settings.get("vae", {}).get("latent_channels")
        packed = math.isqrt(self.network.get("in_channels", 1) // latents) if latents else 1
        return self.factor * max(packed, 1) * int(np.max(self.network.get("patch_size") or 1))

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height that the pipeline draws unless told, as far as its settings say."""
        side = self.factor * int(np.max(self.network.get("sample_size") or 128))
        return side, side


@functools.cache
def text_to_image() -> dict[str, type[DiffusionPipeline]]:
    """Return diffusers' pipelines that need words alone and one repository, by name."""
    known = {}
    for pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        takes = inspect.signature(pipeline.__call__).parameters.keys()
        guided = {"guidance_scale", "true_cfg_scale"} & takes
        needs_image = "Control" in pipeline.__name__
        is_film, spread = "num_frames" in takes, pipeline._load_connected_pipes
        if guided and not needs_image and not is_film and not spread:
            known[pipeline.__name__] = pipeline
    return known


def find_source(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find a model, and check its settings; of an id on the Hub, its weights are not fetched yet.

    Args:
        model: folder or Hub id.
        revision: a branch, tag or commit on the Hub.
        trust_remote_code: let its networks be of classes that it brings along.

    Raises:
        ValueError: there is none, it draws no pictures from words, or its files cannot be trusted.
    """
    if revision is None and model == DEFAULT and not Path(model).is_dir():
        revision = REVISION
    folder = download.fetch_settings(model, revision, hint=HINT)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model: {model!r} holds no pipeline; give a folder or a Hub id with a model_index.json"
        )
    with safety.opened(folder, weights=False, code=trust_remote_code) as private:
        index = safe_configs.read_index(private / "model_index.json")
        name = index.get("_class_name")
        parts = [part for part, kind in index.items() if _is_kind(kind)]
        settings = {part: _settings(private / part) for part in parts}
    pipeline = text_to_image().get(name) if isinstance(name, str) else None
    if pipeline is None:
        raise ValueError(
            f"model: {model!r} is a {name}, which is none of diffusers' text-to-image pipelines; "
            "give one of them, such as a StableDiffusionPipeline"
        )
    absent = tuple(part for part, kind in index.items() if kind == [None, None])
    for part in absent:
        if part in ("scheduler", "vae", "unet", "transformer", "tokenizer", "text_encoder"):
            raise ValueError(f"model: {model!r} lacks its {part}; give a whole one")
    return Source(model, folder, pipeline, settings, absent)


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
    """Where a pipeline runs, and in which precision."""

    device: str
    dtype: torch.dtype
    offload: bool = False  # networks lie in the machine's memory, and come to the GPU one at a time


def choose_placement(
    parameters: int, memory: int, gpu: int | None, bfloat16: bool = True
) -> Placement:
    """Choose where a pipeline runs.

    Args:
        parameters: of all its networks.
        memory: bytes free in the machine's memory.
        gpu: bytes free on the GPU; None where there is none.
        bfloat16: whether the GPU computes in it; without, float16.
    """
    if gpu is None:
        fits = 4 * parameters <= ROOM * memory
        return Placement("cpu", torch.float32 if fits else torch.bfloat16)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    return Placement("cuda", dtype, offload=2 * parameters > ROOM * gpu)


def needs_tiles(width: int, height: int, free: int, itemsize: int = 4) -> bool:
    """Whether a picture is too large to decode at once.

    Args:
        width, height: in pixels.
        free: bytes of memory.
        itemsize: bytes of a number.
    """
    return width * height * DECODING * itemsize // 4 > ROOM * free


def free_memory() -> int:
    """Bytes free in the machine's memory."""
    return int(psutil.virtual_memory().available)


def free_gpu() -> int | None:
    """Bytes free on the GPU; None where there is none."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def load_text2image(source: Source, trust_remote_code: bool = False) -> DiffusionPipeline:
    """Load a pipeline where it runs best; the last one is kept, and reused.

    Args:
        source: what `find` returned.
        trust_remote_code: run code that its networks bring along.

    Raises:
        ValueError: files are missing, damaged, or not such as can be trusted.
    """
    on_hub = not Path(source.name).is_dir()  # where a commit never changes
    return _load(
        source, 0 if on_hub else model_files.last_written(source.folder), trust_remote_code
    )


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)
def _load(source: Source, written: int, trust_remote_code: bool) -> DiffusionPipeline:
    _load.cache_clear()  # the model before makes room for this one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    options = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    if not Path(source.name).is_dir():
        _download(source, options)
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    with safety.opened(source.folder, code=trust_remote_code) as private:
        held = {part: _count(private / part) for part in source.settings}
        placement = choose_placement(sum(held.values()), free_memory(), free_gpu(), bfloat16)
        devices = range(torch.cuda.device_count())
        with _no_bars(), numpy_as_it_was(), torch.random.fork_rng(devices):
            pipeline = source.pipeline.from_pretrained(
                private, dtype=placement.dtype, **options, **dict.fromkeys(source.absent)
            )
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                _check_whole(name, part, held[name])
                safe_weights.check_loaded(part)
    pipeline.set_progress_bar_config(desc="denoising", unit=" steps", delay=2, leave=False)
    if placement.offload:
        pipeline.enable_model_cpu_offload()
        return pipeline
    return pipeline.to(placement.device)


def _download(source: Source, options: dict[str, Any]) -> None:
    """Fetch the weights of a model on the Hub, into the cache."""
    try:  # the folder's name is that of its commit
        source.pipeline.download(source.name, revision=source.folder.name, **options)
    except FAULTS as error:
        raise ValueError(f"model: cannot load {source.name!r}: {error} {HINT}") from error


def _check_whole(name: str, part: torch.nn.Module, held: int) -> None:
    """Refuse a component that has more numbers than its files: the rest was drawn at random."""
    numbers = sum(parameter.numel() for parameter in part.parameters())
    if numbers > held:
        raise ValueError(
            f"the weights of its {name} lack {numbers - held:,} of {numbers:,} numbers"
        )


def _count(folder: Path) -> int:
    """Count the parameters of a component by the heads of its files."""
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
    """Let diffusers' schedulers turn tensors into arrays, of which NumPy 2 complains to torch."""
    with warnings.catch_warnings():
        message = "__array__ implementation doesn't accept a copy keyword"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Show no bars of diffusers and transformers: loading is short, or a download."""
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
