"""What travels with a model: its card, and the code of a class that is ours."""

from __future__ import annotations

import inspect
import json
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

CARD = """---
library_name: {library}
pipeline_tag: {task}
tags: [genkit]
---

# {title}

{about}

```python
{usage}
```

## Figures

{figures}

{protocol}

## How it was made

```
{command}
```

with {versions}.
"""


def card(
    title: str,
    task: str,
    about: str,
    usage: str,
    figures: dict[str, float],
    protocol: str,
    library: str = "transformers",
) -> str:
    """Write a model's card, in the Hub's format, for the recipe that is running.

    Args:
        title: a heading.
        task: the Hub's name for what the model does, such as "text-generation".
        about: a paragraph.
        usage: Python that loads and uses the model.
        figures: what was measured.
        protocol: how it was measured.
        library: which loads it, "transformers" or "diffusers".
    """
    table = "".join(f"| {name} | {value:.4f} |\n" for name, value in figures.items())
    packages = ("genkit", library, "accelerate", "torch")
    return CARD.format(
        title=title,
        task=task,
        library=library,
        about=about,
        usage=usage.strip(),
        figures=f"| figure | value |\n|---|---|\n{table}".strip(),
        protocol=protocol,
        command=f"accelerate launch recipes/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        versions=", ".join(f"{name} {version(name)}" for name in packages),
    )


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
        if inspect.getfile(type(component)) == str(family):
            index[name] = [family.stem, type(component).__name__]
            shutil.copyfile(family, folder / name / family.name)
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
