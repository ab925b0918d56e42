"""genkit.attack: inputs that are changed a little, so that a model is wrong about them.

The attack is that of the model's kind: of image classifiers, of classifiers of texts, or of readers
of answers.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit import machine
from genkit.data import pixels, tables
from genkit.hub import download, kinds

if TYPE_CHECKING:
    from genkit.qa.attacks import AttackedAnswer
    from genkit.text.attacks import AttackedText
    from genkit.vision.attacks import Attacked
    from genkit.vision.robustness import Robustness

IMAGE, DATA = (
    ("genkit.vision.attacks", "attack_image"),
    (
        "genkit.vision.robustness",
        "measure_robustness",
    ),
)
TEXT, ANSWER = ("genkit.text.attacks", "attack_text"), ("genkit.qa.attacks", "attack_answer")
ATTACKS = {kinds.CLASSIFIER: IMAGE, kinds.TEXT_CLASSIFIER: TEXT, kinds.ANSWERS: ANSWER}
LOADED = {"Classifier": IMAGE, "TextClassifier": TEXT, "Reader": ANSWER}


def attack(
    given: Any = None, *, model: Any, revision: str | None = None, **options: Any
) -> Attacked | AttackedText | AttackedAnswer | Robustness:
    """Change an input a little, so that a model is wrong about it.

    Args:
        given: an image, as `genkit.attribute` takes it; images with labels (a folder, a table, the
            id of a Hub dataset, or `Images`), all of which are attacked; or a text. Of a model that
            answers questions, give question= and context= instead.
        model: folder or Hub id of an image classifier, of a classifier of texts, or of a model for
            question answering; or what `genkit.load` returned.
        revision: a branch, tag or commit on the Hub.
        options: of the attack, by the kind of the model: see
            `genkit.vision.attacks.attack_image`, `genkit.vision.robustness.measure_robustness`,
            `genkit.text.attacks.attack_text`, and `genkit.qa.attacks.attack_answer`.

    Returns:
        A record that prints: of an image, a text, an answer, or of the accuracy over a data set.

    Raises:
        ValueError: an argument is invalid, or the model is of another kind.
    """
    machine.find_device(options.get("device"))
    module, name = find_attack(given, model, revision)
    verb = getattr(importlib.import_module(module), name)
    options |= {"model": model, "revision": revision}
    if name == ANSWER[1] and given is not None:
        options = {"context": given} | options
        return verb(**options)
    return verb(**options) if name == ANSWER[1] else verb(given, **options)


def find_attack(given: Any, model: Any, revision: str | None = None) -> tuple[str, str]:
    """Return the module and the name of the attack on a model; see `attack`.

    Raises:
        ValueError: there is no such model, or none on models of its kind.
    """
    found = LOADED.get(type(model).__name__)
    if found is None:
        name = kinds.as_name(model)
        kind = kinds.kind_of(download.fetch_settings(name, revision))
        found = ATTACKS.get(kind)
        if found is None:
            raise ValueError(f"model: cannot attack {name!r}: it is {kinds.TAKEN[kind]}")
    return DATA if found == IMAGE and _is_data_set(given) else found


def _is_data_set(given: Any) -> bool:
    """Whether what was given are images with labels, not one image."""
    if not isinstance(given, str | os.PathLike):
        return type(given).__name__ == "Images"
    path = Path(given).expanduser()
    if path.suffix.lower() in pixels.suffixes():
        return False
    return not path.is_file() or path.suffix.lower() in tables.KINDS
