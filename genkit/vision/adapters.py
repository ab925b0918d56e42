"""Adapters of text-to-image pipelines, and new words for them, added to a loaded pipeline.

Of a file of weights that a stranger may have written, the weights are read, and of its notes one
number: peft's settings, which diffusers would take from these notes, can name modules to import.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from genkit.hub import safe_weights, safety
from genkit.models import text2image_tuning as tuning

NOTES = "lora_adapter_metadata"  # diffusers' name for peft's settings, in the header of a file
# settings of peft without which the weights would mean something else
UNREAD = ("alpha_pattern", "use_rslora", "use_dora", "lora_bias")
LAYER = re.compile(r"[\w.-]+")  # names of layers, which diffusers makes patterns of


def add_adapter(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Add an adapter to a pipeline, or new words, as plain diffusers does.

    Raises:
        ValueError: the files are unsafe, or of another pipeline.
    """
    with safety.opened(folder, argument="adapter") as private:
        if (private / tuning.ADAPTER).exists():
            pipeline.load_lora_weights(read_adapter(private / tuning.ADAPTER))
            if not pipeline.get_list_adapters():
                raise ValueError("adapter: its layers are not those of the model; give its own")
        for encoder, file in tuning.EMBEDDINGS.items():
            if (private / file).exists():
                _add_words(pipeline, encoder, private / file)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                safe_weights.check_loaded(part)


def read_adapter(file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an adapter, scaled so that W + B A is what it was trained for.

    Raises:
        ValueError: it has names that no layers have, or settings that are not supported.
    """
    state = load_file(file)
    odd = [name for name in state if LAYER.fullmatch(name) is None]
    if odd:
        raise ValueError(f"{file} has weights of the name {odd[0]!r:.80}, which no layer has")
    notes = _read_notes(file)
    for name in [name for name in notes if name.rpartition(".")[2] in UNREAD]:
        if notes[name]:
            raise ValueError(f"{file} was saved with {name} = {notes[name]!r:.80}; save it without")
    for name in [name for name in state if "lora_B" in name]:
        part = name.partition(".")[0]
        alpha, rank = notes.get(f"{part}.lora_alpha"), state[name].shape[1]
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            state[name] = state[name] * (alpha / rank)
    return state


def _read_notes(file: Path) -> dict[str, Any]:
    """Return peft's settings of an adapter by "component.setting"; none if there are none."""
    with safe_open(file, "pt") as opened:
        written = (opened.metadata() or {}).get(NOTES, "{}")
    try:
        notes = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its {NOTES} is not JSON ({error})") from error
    return notes if isinstance(notes, dict) else {}


def _add_words(pipeline: DiffusionPipeline, encoder: str, file: Path) -> None:
    """Add a new word to a text encoder of a pipeline."""
    parts = {"text_encoder": encoder, "tokenizer": tuning.tokenizer_of(encoder)}
    own = {part: pipeline.components.get(name) for part, name in parts.items()}
    if None in own.values():
        raise ValueError(f"adapter: {file} is for a pipeline with a {encoder}; this one has none")
    state, most = load_file(file), own["tokenizer"].model_max_length
    for word, rows in state.items():
        if rows.ndim > 2 or (rows.ndim == 2 and len(rows) > most):
            raise ValueError(
                f"{file}: the word {word!r:.80} has embeddings of the shape {tuple(rows.shape)}; "
                f"the text encoder reads {most} in a row"
            )
    pipeline.load_textual_inversion(state, **own)
