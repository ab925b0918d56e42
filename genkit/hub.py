"""What travels with a model: its card."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

CARD = """---
library_name: transformers
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
    title: str, task: str, about: str, usage: str, figures: dict[str, float], protocol: str
) -> str:
    """Write a model's card, in the Hub's format, for the recipe that is running.

    Args:
        title: a heading.
        task: the Hub's name for what the model does, such as "text-generation".
        about: a paragraph.
        usage: Python that loads and uses the model.
        figures: what was measured.
        protocol: how it was measured.
    """
    table = "".join(f"| {name} | {value:.4f} |\n" for name, value in figures.items())
    packages = ("genkit", "transformers", "accelerate", "torch")
    return CARD.format(
        title=title,
        task=task,
        about=about,
        usage=usage.strip(),
        figures=f"| figure | value |\n|---|---|\n{table}".strip(),
        protocol=protocol,
        command=f"accelerate launch recipes/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        versions=", ".join(f"{name} {version(name)}" for name in packages),
    )
