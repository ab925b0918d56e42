"""Pipelines with the one file of code that they need beside them: they load without genkit."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from genkit.hub import kinds

# files of genkit that hold classes of pipelines
MODELS = Path(__file__).parent.parent / "models"
FAMILIES = tuple(name[0] for name in kinds.PIPELINES if isinstance(name, tuple))


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Save a pipeline in diffusers' layout, with the file of its class.

    Where there is no genkit, `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`
    loads it by that file; genkit's own loaders never run it.
    """
    pipeline.save_pretrained(folder)
    family = Path(inspect.getfile(type(pipeline)))
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index["_class_name"] = [family.stem, type(pipeline).__name__]
    shutil.copyfile(family, folder / family.name)
    for name, component in pipeline.components.items():
        if component is not None and inspect.getfile(type(component)) == str(family):
            index[name] = [family.stem, type(component).__name__]
            shutil.copyfile(family, folder / name / family.name)
        elif index[name] == ["transformers", "TokenizersBackend"]:
            index[name] = ["transformers", "PreTrainedTokenizerFast"]  # its name in transformers 4
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_index(folder: Path) -> dict[str, Any]:
    """Return the components of a pipeline; none for any other model."""
    file = folder / "model_index.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def vendor(folder: Path) -> None:
    """Put the files of genkit's own classes beside a pipeline, as genkit has them now."""
    for part, kind in read_index(folder).items():
        if isinstance(kind, list) and kind[0] in FAMILIES:
            home = folder if part == "_class_name" else folder / part
            shutil.copyfile(MODELS / f"{kind[0]}.py", home / f"{kind[0]}.py")
