"""The models and runs that a page shows: found once, at the start, by their files alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit.hub import download, kinds, model_files

TEXT, ANSWERS, IMAGES, RUNS = kinds.TEXT, kinds.ANSWERS, "images", "runs"
OF_RUN = (
    "run.json",
    "metrics.jsonl",
)  # as in genkit/training/folder.py, with which torch would come
WAY_OUT = "give the folder of a model or of a run, a folder of such folders, or a Hub id"


@dataclass(frozen=True)
class ModelEntry:
    """A folder, or a model on the Hub, and what can be done with it."""

    name: str  # to choose it by
    model: str  # folder or Hub id
    uses: frozenset[str]


@dataclass(frozen=True)
class ModelIndex:
    """All that can be chosen; nothing else can."""

    places: list[ModelEntry]

    def names(self, kind: str) -> list[str]:
        """Return what can be chosen of a kind."""
        return [place.name for place in self.places if kind in place.uses]

    def resolve(self, kind: str, name: Any) -> str:
        """Return the folder or Hub id of what was chosen.

        Raises:
            ValueError: it is none of `names`.
        """
        for place in self.places:
            if kind in place.uses and place.name == name:
                return place.model
        raise ValueError(f"model: {name!r:.80} is none that this page was started with")


def find(models: Sequence[str]) -> ModelIndex:
    """Look at what was named, without loading anything.

    Raises:
        ValueError: one is no model and no run, and holds none.
    """
    found: dict[str, frozenset[str]] = {}
    for model in models:
        found |= dict(_in_folder(Path(model)) if Path(model).is_dir() else _on_hub(model))
    last = [Path(model).name for model in found]
    return ModelIndex(
        [
            ModelEntry(name if last.count(name) == 1 else model, model, uses)
            for (model, uses), name in zip(found.items(), last, strict=True)
        ]
    )


def _in_folder(folder: Path) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield a folder if it is a model or a run, and otherwise such folders in it."""
    uses, problem = _look(folder)
    if uses:
        yield str(folder), uses
        return
    inside = [(child, _look(child)[0]) for child in sorted(folder.iterdir()) if child.is_dir()]
    if not any(uses for _, uses in inside):
        raise ValueError(f"models: {str(folder)!r} {problem}; {WAY_OUT}")
    yield from ((str(child), uses) for child, uses in inside if uses)


def _look(folder: Path) -> tuple[frozenset[str], str]:
    """Tell what a folder is for and, where that is nothing, why."""
    run = any((folder / name).exists() for name in OF_RUN)
    kind, problem = None, "holds no model and no run"
    if model_files.is_model(folder):
        kind, problem = _kind(folder)
        weights = any(any(folder.glob(f"{inner}*.safetensors")) for inner in ("", "*/"))
        if kind and not weights:
            kind, problem = None, "holds no weights in safetensors"
    return frozenset(({kind} if kind else set()) | ({RUNS} if run else set())), problem


def _kind(folder: Path) -> tuple[str | None, str]:
    """Tell what a saved model does in the page and, where that is nothing, why."""
    try:
        kind = kinds.kind_of(folder)
    except ValueError as error:
        return None, f"has no model that can be read ({error})"
    if kind in kinds.IMAGES:
        return IMAGES, ""
    if kind in (TEXT, ANSWERS):
        return kind, ""
    return None, f"holds a model of the kind {kind}, which the page has no use for"


def _on_hub(model: str) -> list[tuple[str, frozenset[str]]]:
    from genkit.qa import reader
    from genkit.text import language_model

    revision = {
        language_model.DEFAULT: language_model.REVISION,
        reader.DEFAULT: reader.REVISION,
    }.get(model)
    folder = download.fetch_settings(
        model, revision, argument="models", hint=f"Otherwise {WAY_OUT}"
    )
    kind, problem = _kind(folder)
    if kind is None:
        raise ValueError(f"models: {model!r} {problem}; {WAY_OUT}")
    return [(model, frozenset({kind}))]
