"""genkit: train, run, look inside, measure and share generative models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genkit.generation import generate as generate
    from genkit.generation import load as load

__version__ = "0.1.0"
__all__ = ["generate", "load"]

# Each verb is imported on first use, so that `import genkit` is quick.
_HOMES = {"generate": "genkit.generation", "load": "genkit.generation"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'genkit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
