"""The models and runs that a page shows: found once, at the start, by their files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT, ANSWERS, IMAGES, RUNS = "text", "answers", "images", "runs"
ENDINGS = {
    TEXT: ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
    ANSWERS: ("ForQuestionAnswering",),
}
PIPELINES = ("AutoencoderPipeline", "GANPipeline", "DDPMPipeline", "DenoisingPipeline")
OF_RUN = ("run.json", "metrics.jsonl")  # as in genkit/folder.py, with which torch would come
WAY_OUT = "give the folder of a model or of a run, a folder of such folders, or a Hub id"


@dataclass(frozen=True)
class Place:
    """A folder, or a model on the Hub, and what can be done with it."""

    name: str  # to choose it by
    model: str  # folder or Hub id
    kinds: frozenset[str]


@dataclass(frozen=True)
class Shelf:
    """All that can be chosen; nothing else can."""

    places: list[Place]

    def names(self, kind: str) -> list[str]:
        """Return what can be chosen of a kind."""
        return [place.name for place in self.places if kind in place.kinds]

    def pick(self, kind: str, name: Any) -> str:
        """Return the folder or Hub id of what was chosen.

        Raises:
            ValueError: it is none of `names`.
        """
        for place in self.places:
            if kind in place.kinds and place.name == name:
                return place.model
        raise ValueError(f"model: {name!r:.80} is none that this page was started with")


def find(models: Sequence[str]) -> Shelf:
    """Look at what was named, without loading anything.

    Raises:
        ValueError: one is no model and no run, and holds none.
    """
    found: dict[str, frozenset[str]] = {}
    for model in models:
        found |= dict(_in_folder(Path(model)) if Path(model).is_dir() else _on_hub(model))
    last = [Path(model).name for model in found]
    return Shelf(
        [
            Place(name if last.count(name) == 1 else model, model, kinds)
            for (model, kinds), name in zip(found.items(), last, strict=True)
        ]
    )


def _in_folder(folder: Path) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield a folder if it is a model or a run, and otherwise such folders in it."""
    kinds, problem = _look(folder)
    if kinds:
        yield str(folder), kinds
        return
    inside = [(child, _look(child)[0]) for child in sorted(folder.iterdir()) if child.is_dir()]
    if not any(kinds for _, kinds in inside):
        raise ValueError(f"models: {str(folder)!r} {problem}; {WAY_OUT}")
    yield from ((str(child), kinds) for child, kinds in inside if kinds)


def _look(folder: Path) -> tuple[frozenset[str], str]:
    """Tell what a folder is for and, where that is nothing, why."""
    run = any((folder / name).exists() for name in OF_RUN)
    kind, problem = None, "holds no model and no run"
    for name in ("model_index.json", "config.json"):
        if (folder / name).exists():
            kind, problem = _kind(folder / name)
            weights = any(any(folder.glob(f"{inner}*.safetensors")) for inner in ("", "*/"))
            if kind and not weights:
                kind, problem = None, "holds no weights in safetensors"
            break
    return frozenset(({kind} if kind else set()) | ({RUNS} if run else set())), problem


def _kind(file: Path) -> tuple[str | None, str]:
    """Tell what a saved model does by its config.json or model_index.json."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return None, f"has a {file.name} that cannot be read ({error})"
    if not isinstance(config, dict):
        return None, f"has a {file.name} that is no description of a model"
    if file.name == "config.json" and "pixels" in config:
        return IMAGES, ""
    # a class of a recipe is named with its file: ["gan", "GANPipeline"]
    named = config.get("_class_name") or config.get("architectures") or ["nothing known"]
    name = str(named[-1] if isinstance(named, list) else named)
    if name in PIPELINES:
        return IMAGES, ""
    for kind, endings in ENDINGS.items():
        if name.endswith(endings):
            return kind, ""
    return None, f"holds {name}, which the page has no use for"


def _on_hub(model: str) -> list[tuple[str, frozenset[str]]]:
    from huggingface_hub import hf_hub_download

    from genkit import language, qa

    revision = {language.DEFAULT: language.REVISION, qa.DEFAULT: qa.REVISION}.get(model)
    problem = ""
    for name in ("model_index.json", "config.json"):
        try:
            file = Path(hf_hub_download(model, name, revision=revision))
        except (OSError, ValueError) as error:
            problem = problem or f"is no folder, and the Hub gives none of that name ({error})"
            continue
        kind, problem = _kind(file)
        if kind:
            return [(model, frozenset({kind}))]
        break
    raise ValueError(f"models: {model!r} {problem}; {WAY_OUT}")
