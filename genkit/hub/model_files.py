"""The files of a saved model, by the names that transformers and diffusers give them; no pickles.

Patterns are those of `fnmatch` and of the Hub's client.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

SETTINGS = ("*.json",)
WEIGHTS = ("*.safetensors",)
MODEL = (*SETTINGS, *WEIGHTS, "*.txt", "*.model", "*.jinja")  # with vocabularies and templates
ROOTS = ("model_index.json", "config.json")  # one of which every model has, at its top
# of what was trained of a text-to-image pipeline, which needs that pipeline
ADAPTERS = (
    *("pytorch_lora_weights.safetensors", "learned_embeds.safetensors"),
    "learned_embeds_2.safetensors",
)
# of models whose matrices genkit packed: what quantization_config calls that, and their weights,
# under a name by which transformers finds none
PACKED, PACKED_WEIGHTS = "genkit", "model.genkit.safetensors"
# whose exact names loaders read
LOADED = re.compile(
    r"(config|generation_config|model_index|scheduler_config|(video_)?preprocessor_config"
    r"|processor_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab|chat_template|table)\.json|(vocab|merges)\.txt|\w[\w.-]*\.(model|jinja)"
    r"|(diffusion_pytorch_)?model(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.safetensors"
    r"|\w[\w.-]*\.safetensors\.index(\.\w+)?\.json"
)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a saved model, by its names alone."""
    return any((folder / name).exists() for name in ROOTS)


def has_chat_template(folder: Path) -> bool:
    """Whether a saved tokenizer has a chat template, by its files alone."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def is_loaded(name: str) -> bool:
    """Whether loaders read a file of this name."""
    return LOADED.fullmatch(name) is not None or name in ADAPTERS


def last_written(folder: Path) -> int:
    """Return when a model, or a component of it, was last written, in nanoseconds.

    A model that was loaded earlier is stale when this has changed.
    """
    patterns = (*MODEL, "*.py")
    inner = [f"[!.]*/{pattern}" for pattern in patterns]  # no component is hidden
    found = (file for pattern in (*patterns, *inner) for file in folder.glob(pattern))
    return max((file.lstat().st_mtime_ns for file in found), default=0)
