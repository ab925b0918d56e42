"""genkit: train, run, look inside, measure and share generative models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genkit.evaluation import evaluate as evaluate
    from genkit.explain import alternatives as alternatives
    from genkit.explain import beam_tree as beam_tree
    from genkit.explain import next_tokens as next_tokens
    from genkit.explain import temperature_series as temperature_series
    from genkit.generation import generate as generate
    from genkit.generation import stream as stream
    from genkit.imagining import imagine as imagine
    from genkit.loading import load as load
    from genkit.metrics.perplexity import perplexity as perplexity
    from genkit.qa import answer as answer
    from genkit.rescoring import correct as correct
    from genkit.rescoring import rescore as rescore
    from genkit.sampling import sample as sample
    from genkit.sharing import push as push

__version__ = "0.1.0"

# Each verb is imported on first use, so that `import genkit` is quick.
_HOMES = {
    "generate": "genkit.generation",
    "stream": "genkit.generation",
    "load": "genkit.loading",
    "next_tokens": "genkit.explain",
    "temperature_series": "genkit.explain",
    "beam_tree": "genkit.explain",
    "alternatives": "genkit.explain",
    "answer": "genkit.qa",
    "imagine": "genkit.imagining",
    "push": "genkit.sharing",
    "perplexity": "genkit.metrics.perplexity",
    "evaluate": "genkit.evaluation",
    "rescore": "genkit.rescoring",
    "correct": "genkit.rescoring",
    "sample": "genkit.sampling",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'genkit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
