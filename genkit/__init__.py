"""genkit: train, run, look inside, measure and share generative models.

The verbs (`genkit.generate`, `sample`, `answer`, ...) are the front door. Behind it, from the
bottom up; a package imports from those above it in this list:

- `files`, `errors`, `machine`, `seeds`, `plots`: files written whole, clean errors, this machine
- `hub`: what is trusted, downloaded, staged and pushed; model cards
- `data`: texts, corpora, tokenizers, images, questions: what goes in
- `models`: networks and their losses, a family a file
- `engine`: what makes a network fast on this machine: packed, quantised, run by kernels
- `text`: generate, explain, score, correct, compare, attack
- `metrics`: figures with their protocol
- `tabular`: sample, fill, encode and judge tables, find their unlikely rows
- `qa`: answers from a text
- `vision`: sample, imagine, walk a latent space, look inside diffusion, differentiate by pixels
- `training`: the run that every recipe shares
- `recipes`: one file for each family of models: the settings, the loop, the evaluation
- `commands`, `app`: the `genkit` command and the page
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genkit.attacking import attack as attack
    from genkit.hub.pushing import push as push
    from genkit.loading import load as load
    from genkit.qa.answering import answer as answer
    from genkit.tabular.anomalies import anomalies as anomalies
    from genkit.tabular.features import features as features
    from genkit.tabular.filling import fill as fill
    from genkit.tabular.sampling import sample_table as sample_table
    from genkit.text.alternatives import alternatives as alternatives
    from genkit.text.comparison import compare as compare
    from genkit.text.correction import correct as correct
    from genkit.text.explain import beam_tree as beam_tree
    from genkit.text.explain import next_tokens as next_tokens
    from genkit.text.explain import temperature_series as temperature_series
    from genkit.text.generation import generate as generate
    from genkit.text.generation import stream as stream
    from genkit.text.perplexity import perplexity as perplexity
    from genkit.text.rescoring import rescore as rescore
    from genkit.text.saving import save as save
    from genkit.text.search_errors import search_errors as search_errors
    from genkit.vision.attribution import attribute as attribute
    from genkit.vision.dreams import dream as dream
    from genkit.vision.evaluation import evaluate as evaluate
    from genkit.vision.filters import visualize as visualize
    from genkit.vision.imagining import imagine as imagine
    from genkit.vision.sampling import sample as sample
    from genkit.vision.style import stylize as stylize
    from genkit.vision.translating import translate as translate

__version__ = "0.1.0"

# Each verb is imported on first use, so that `import genkit` is quick.
_HOMES = {
    "generate": "genkit.text.generation",
    "stream": "genkit.text.generation",
    "load": "genkit.loading",
    "next_tokens": "genkit.text.explain",
    "temperature_series": "genkit.text.explain",
    "beam_tree": "genkit.text.explain",
    "alternatives": "genkit.text.alternatives",
    "answer": "genkit.qa.answering",
    "imagine": "genkit.vision.imagining",
    "push": "genkit.hub.pushing",
    "save": "genkit.text.saving",
    "perplexity": "genkit.text.perplexity",
    "compare": "genkit.text.comparison",
    "search_errors": "genkit.text.search_errors",
    "attack": "genkit.attacking",
    "attribute": "genkit.vision.attribution",
    "dream": "genkit.vision.dreams",
    "visualize": "genkit.vision.filters",
    "evaluate": "genkit.vision.evaluation",
    "rescore": "genkit.text.rescoring",
    "correct": "genkit.text.correction",
    "sample": "genkit.vision.sampling",
    "sample_table": "genkit.tabular.sampling",
    "fill": "genkit.tabular.filling",
    "features": "genkit.tabular.features",
    "anomalies": "genkit.tabular.anomalies",
    "stylize": "genkit.vision.style",
    "translate": "genkit.vision.translating",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'genkit' has no attribute {name!r}")
    import importlib

    from genkit import garbage

    with garbage.paused():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
