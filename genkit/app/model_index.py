"""The models and runs that the page offers: found once, at its start, by their files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genkit.hub import download, kinds, model_files, names

TEXT, ANSWERS, CLASSIFIER = kinds.TEXT, kinds.ANSWERS, kinds.CLASSIFIER
IMAGES, RUNS = "images", "runs"
CHAT = "chat"  # of a language model with a chat template
# as in genkit/training/folder.py, whose import would bring torch
RUN_FILES = ("run.json", "metrics.jsonl")
WAY_OUT = "give the folder of a model or of a run, a folder of such folders, or a Hub id"


@dataclass(frozen=True)
class ModelEntry:
    """A folder, or a model on the Hub, and the tabs that can use it."""

    name: str  # in the page's menus
    model: str  # folder or Hub id
    uses: frozenset[str]


@dataclass(frozen=True)
class ModelIndex:
    """All models and runs that can be chosen in the page."""

    entries: list[ModelEntry]

    def names(self, kind: str) -> list[str]:
        """Return the names of a kind that can be chosen."""
        return [entry.name for entry in self.entries if kind in entry.uses]

    def resolve(self, kind: str, name: Any) -> str:
        """Return the folder or Hub id of a name.

        Raises:
            ValueError: it is not one of `names(kind)`.
        """
        for entry in self.entries:
            if kind in entry.uses and entry.name == name:
                return entry.model
        raise ValueError(f"model: {name!r:.80} is not one that this page was started with")


def find_models(models: Sequence[str]) -> ModelIndex:
    """Find models and runs, without loading anything.

    Args:
        models: folders of models, of runs, or of such folders; or Hub ids.

    Raises:
        ValueError: one of them is no model and no run, and holds none.
    """
    found: dict[str, tuple[str, frozenset[str]]] = {}  # by absolute path
    for model in models:
        models_here = _in_folder(Path(model)) if names.is_folder(model) else _on_hub(model)
        for name, uses in models_here:
            found.setdefault(str(Path(name).absolute()), (name, uses))
    shown = _short_names(list(found))
    return ModelIndex(
        [
            ModelEntry(name, model, uses)
            for (model, uses), name in zip(found.values(), shown, strict=True)
        ]
    )


def _short_names(paths: Sequence[str]) -> list[str]:
    """Return as many last parts of each path as tell it from the others."""
    ends = [
        ["/".join(Path(path).parts[-count:]) for count in range(1, len(Path(path).parts) + 1)]
        for path in paths
    ]
    known = Counter(end for own in ends for end in own)
    return [next((end for end in own if known[end] == 1), own[-1]) for own in ends]


def _in_folder(folder: Path) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield a folder and its uses if it is a model or a run, otherwise such folders in it."""
    uses, problem = _folder_uses(folder)
    if uses:
        yield str(folder), uses
        return
    inside = [
        (child, _folder_uses(child)[0]) for child in sorted(folder.iterdir()) if child.is_dir()
    ]
    if not any(uses for _, uses in inside):
        raise ValueError(f"models: {str(folder)!r} {problem}; {WAY_OUT}")
    yield from ((str(child), uses) for child, uses in inside if uses)


def _folder_uses(folder: Path) -> tuple[frozenset[str], str]:
    """Return the tabs that can use a folder and, if there are none, why."""
    run = any((folder / name).exists() for name in RUN_FILES)
    kind, problem = None, "holds no model and no run"
    if model_files.is_model(folder):
        kind, problem = _model_use(folder)
        weights = any(any(folder.glob(f"{inner}*.safetensors")) for inner in ("", "*/"))
        if kind and not weights:
            kind, problem = None, "holds no weights in safetensors"
    chats = kind == TEXT and model_files.has_chat_template(folder)
    uses = ((kind, kind is not None), (CHAT, chats), (RUNS, run))
    return frozenset(str(use) for use, applies in uses if applies), problem


def _model_use(folder: Path) -> tuple[str | None, str]:
    """Return the tab that can use a saved model and, if there is none, why."""
    try:
        kind = kinds.kind_of(folder)
    except ValueError as error:
        return None, f"holds no model that can be read ({error})"
    if kind in kinds.ON_PAGE:
        return IMAGES if kind in kinds.IMAGES else kind, ""
    return None, f"holds a model of the kind {kind}, which the page does not support"


def _on_hub(model: str) -> list[tuple[str, frozenset[str]]]:
    from genkit.qa import reader
    from genkit.text import language_model

    revision = {
        language_model.DEFAULT: language_model.REVISION,
        reader.DEFAULT: reader.REVISION,
    }.get(model)
    folder = download.fetch_settings(
        model, revision, argument="models", hint=f"Train one, or {WAY_OUT}"
    )
    kind, problem = _model_use(folder)
    if kind is None:
        raise ValueError(f"models: {model!r} {problem}; {WAY_OUT}")
    # whether it has a template is seen when it is loaded: the file may not have been fetched yet
    return [(model, frozenset({kind, CHAT} if kind == TEXT else {kind}))]
