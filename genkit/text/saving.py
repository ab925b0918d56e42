"""genkit.save: a loaded language model as a folder, such as one that was quantised."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from genkit import files
from genkit.engine.quantized import is_quantized, precision_of
from genkit.engine.quantized_files import write_quantized
from genkit.hub import kinds, names
from genkit.models.lm import save_tokenizer
from genkit.notebook import TextRecord
from genkit.text.language_model import LanguageModel


@dataclass(frozen=True)
class Saved(TextRecord):
    """A model that was saved."""

    folder: str
    precision: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.folder}: {self.precision}, {self.bytes / 1e6:,.1f} MB"


def save(model: LanguageModel, folder: str | Path) -> Saved:
    """Save a loaded language model: a quantised one as it is, any other as transformers does.

    A quantised one is loaded by genkit alone, where its kernels were compiled: it is not quantised
    again, and gives the same texts, bit for bit. The folder is written whole or not at all.

    Args:
        model: that `genkit.load` returned.
        folder: to be made; there must be nothing of this name.

    Returns:
        Where the model is, and its size.

    Raises:
        ValueError: the model cannot be saved, or the folder exists.
        WriteError: the disk refused; nothing is left.
    """
    kinds.check_loaded(model, takes="LanguageModel")
    if not isinstance(model, LanguageModel):
        raise ValueError(f"model must be loaded by genkit.load, got a {type(model).__name__}")
    path = check_folder(folder)
    quantised = is_quantized(model.model)
    if model.precision.startswith("int") and not quantised:
        raise ValueError(
            f"model: it was quantised to {model.precision} without the compiled kernels, and is "
            "saved where genkit was installed with a C++ compiler"
        )
    with files.folder_written_whole(path) as scratch:
        if quantised:
            write_quantized(model.model, scratch)
        else:
            model.model.save_pretrained(scratch)
        if type(model.tokenizer) is PreTrainedTokenizerFast:
            save_tokenizer(model.tokenizer, scratch)
        else:
            model.tokenizer.save_pretrained(scratch)
        size = sum(file.stat().st_size for file in scratch.iterdir())
    return Saved(str(folder), precision_of(model.model), size)


def check_folder(folder: str | Path, argument: str = "folder") -> Path:
    """Refuse the name of a folder that cannot be made, or exists.

    Args:
        argument: the name of its argument, for messages.

    Raises:
        ValueError: it is such a name.
    """
    path = names.as_path(os.fspath(folder), argument)
    if os.path.lexists(path):
        raise ValueError(f"{argument}: {str(folder)!r} exists; give the name of a new folder")
    return path
