"""A model's card in the Hub's format: what it is, how to use it, figures with their protocol."""

from __future__ import annotations

import json
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from genkit import __version__
from genkit.hub import gallery, names, privacy

FILE = "README.md"
RUN_FILE = "run.json"  # settings of the run, and hashes of its data
# which recipes draw beside a model
PICTURES = (
    *("loss.png", "progress.png", "progress.gif", "reconstructions.png", "latents.png"),
    *("plane.png", "loss_by_time.png", "completions.png", "confusion.png", "mistakes.png"),
    *("calibration.png", "painted.png", "translations.png", "columns.png"),
)
CARD = """---
{metadata}
---

# {title}

{about}

```python
model = {model}

{usage}
```

## Figures

{figures}

{protocol}

{guarantee}{curves}## Intended use and limits

{limits}

## How it was made

```bash
{command}
```

with {versions}; `pip install hf-genkit` installs genkit.
"""
# of a language model; prompt: a text, or a list of messages
TEXT_USAGE = """
from transformers import pipeline

prompt = {prompt!r}
print(pipeline("text-generation", model)(prompt))

import genkit  # the same text for the same seed, at any batch size

print(genkit.generate(prompt, model=model, seed=1))
"""
# of an encoder-decoder; prompt: a text
SEQ2SEQ_USAGE = """
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

source = {prompt!r}
tokenizer = AutoTokenizer.from_pretrained(model)
network = AutoModelForSeq2SeqLM.from_pretrained(model)
written = network.generate(**tokenizer(source, return_tensors="pt"))[0]
print(tokenizer.decode(written, skip_special_tokens=True))

import genkit

print(genkit.generate(source, model=model, strategy="beam"))
"""
# of a pipeline of genkit's own; labels: "" or an argument, such as ", labels=[0, 1, 2, 3]"
PIPELINE_USAGE = """
import torch
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
pipeline(4, seeds{labels}).images[0].save("sample.png")

import genkit

pipeline = genkit.load(model)  # the same, without running that code
"""
# after the model's name, where it is on a branch: any code can load the folder
BRANCH = """

from huggingface_hub import snapshot_download

model = snapshot_download(model, revision={revision})"""
_LINES = re.escape(BRANCH).replace(re.escape("{revision}"), ".*")
NAMED = re.compile(f'^model = ".*"({_LINES})?$', re.M)
# what a task's models are for, and what nobody should expect of them
LIMITS = {
    "text-generation": "For learning, play and drafts that somebody reads. It writes what is like "
    "the text that it was trained on, with that text's errors and prejudices; it knows no facts, "
    "and may repeat passages of it word for word.",
    "text2text-generation": "For texts like those it was trained on, which it turns into what is "
    "like their targets, errors and prejudices included; it knows no facts, and an output may be "
    "fluent and wrong. Somebody should read what it writes.",
    "text-classification": "For scoring answers as those would whose preferences it learned, and "
    "for aligning language models. It knows nothing of texts unlike those, and a model that is "
    "aligned with it for long finds what it overlooks.",
    "question-answering": "For finding passages that a reader then checks. It marks a stretch of "
    "the text that is given, and knows nothing besides; where the text has no answer it may mark "
    "one all the same, and its confidence holds for questions like those it was measured on.",
    "image-classification": "For images like those it was trained on, which it puts into one of "
    "its classes, whatever they show. Not for decisions about people.",
    # tables, for which the Hub has no name
    "other": "For synthetic rows, missing values and unlikely rows of tables like the "
    "one that it was trained on, with its errors and its bias. Synthetic rows may come close to "
    "rows of training, which are not private by this alone; an unlikely row is not a wrong one. "
    "Not for decisions about people.",
    "image-to-image": "For learning and play: it makes of any image what it was trained to make, "
    "best at the size and for the kind of images that it was trained on. What it adds is a guess.",
    "text-to-image": "For pictures that somebody looks at before they are used. It has the "
    "prejudices and the limits of the pipeline that it was made from, and may come close to single "
    "images that it was trained on.",
    "unconditional-image-generation": "For learning, and for images like those it was trained on: "
    "it draws nothing else, may leave out kinds that were rare among them, and may come close to "
    "single ones of them.",
}


def card(
    folder: Path,
    *,
    title: str,
    task: str,
    about: str,
    usage: str,
    figures: dict[str, float],
    protocol: str,
    data: str,
    license: str | None = None,
    library: str = "transformers",
    prompt: str | list[dict[str, str]] | None = None,
    base_model: str | None = None,
    guarantee: str = "",
) -> str:
    """Write a model's card for the recipe that is running.

    Args:
        folder: of the run, whose curves and last samples it shows.
        title: a heading.
        task: the Hub's name for what the model does, such as "text-generation".
        about: a paragraph.
        usage: Python that loads the model by the name `model` and uses it.
        figures: what was measured.
        protocol: how it was measured.
        data: what it was trained on: a file's name, or the id of a dataset on the Hub.
        license: the Hub's name of the license; default: unknown.
        library: which loads it, "transformers" or "diffusers".
        prompt: text that a language model knows, or a chat, for examples.
        base_model: the model that it was made from, or is an adapter of; named if it is on the Hub.
        guarantee: a section on what is promised about the training data.
    """
    packages = (library, "accelerate", "torch")
    paths = [*sys.argv[1:], data, *_settings(folder)]
    about, usage, protocol, data = (
        privacy.base_names(text, paths) for text in (about, usage, protocol, data)
    )
    words = shlex.join(privacy.base_names(word, paths) for word in sys.argv[1:])
    table = "".join(f"| {name} | {value:.4f} |\n" for name, value in figures.items())
    return CARD.format(
        metadata=_metadata(
            title, task, figures, protocol, data, license, library, prompt, base_model
        ),
        title=title,
        about=about,
        model=json.dumps(folder.resolve().name, ensure_ascii=False),
        usage=usage.strip(),
        figures=f"| figure | value |\n|---|---|\n{table}".strip(),
        protocol=protocol,
        guarantee=f"{guarantee}\n" if guarantee else "",
        curves=_curves(folder),
        limits=LIMITS[task],
        command=f"accelerate launch recipes/{Path(sys.argv[0]).name} {words}",
        versions=", ".join(
            [f"genkit {__version__}", *(f"{name} {version(name)}" for name in packages)]
        ),
    )


def write_card(
    folder: Path, run: Path, *, protocol: str, precision: str = "float32", **parts: Any
) -> None:
    """Write the card of a run's model, with seed, weights, licence and hashes from run.json.

    Args:
        folder: of the model.
        run: the run's folder.
        protocol: how the figures were measured, in sentences; those on weights, data and seed
            are added.
        precision: number format in which the figures were measured.
        parts: the other arguments of `card`.
    """
    record = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    settings = record["settings"]
    weights = "averaged" if settings["ema"] else "raw"
    hashes = "".join(f"{name} {value}, " for name, value in record["facts"].items())
    protocol += f" Evaluated with {weights} weights in {precision}; {hashes}seed "
    protocol += f"{settings['seed']}."
    text = card(run, protocol=protocol, license=settings["license"], **parts)
    (folder / FILE).write_text(text, encoding="utf-8")


def _settings(folder: Path) -> list[str]:
    """Return the texts among the settings of a run, which may be paths."""
    record = folder / RUN_FILE
    if not record.exists():
        return []
    settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    return [value for value in settings.values() if isinstance(value, str)]


def _metadata(
    title: str,
    task: str,
    figures: dict[str, float],
    protocol: str,
    data: str,
    license: str | None,
    library: str,
    prompt: str | list[dict[str, str]] | None,
    base_model: str | None,
) -> str:
    """Write the head that the Hub reads, in YAML."""
    on_hub = names.is_dataset_id(data)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data if on_hub else "other",
            dataset_name=Path(data).name,
            metric_type=name,
            metric_name=name,
            metric_value=value,
            metric_args={"protocol": protocol},
        )
        for name, value in figures.items()
    ]
    kind = "text" if isinstance(prompt, str) else "messages"
    head: Any = ModelCardData(
        license=license or "unknown",
        library_name=library,
        pipeline_tag=task,
        tags=["genkit"],
        datasets=[data] if on_hub else None,
        base_model=base_model if base_model and not names.is_folder(base_model) else None,
        model_name=title,
        eval_results=results,
        widget=[{kind: prompt}] if prompt else None,  # the Hub shows it, and so does our page
    )
    return head.to_yaml(line_break="\n")


def example_prompt(folder: Path) -> str | None:
    """Return the prompt that the card of a model gives as an example, if there is one."""
    try:
        widget = ModelCard.load(folder / FILE, ignore_metadata_errors=True).data.get("widget")
    except Exception:  # there is none, or it is not one of ours, and may be anything
        return None
    first = widget[0] if isinstance(widget, list) and widget else None
    found = first.get("text") if isinstance(first, dict) else None
    return found if isinstance(found, str) else None


def _curves(folder: Path) -> str:
    """Show training curves and the last samples, as far as a run has drawn them."""
    parts = []
    if (folder / "loss.png").exists():
        parts.append("## Training\n\n![curves of training](loss.png)\n")
    drawn = gallery.list_samples(folder)
    if drawn and drawn[-1].suffix == ".md":
        parts.append(f"## Samples\n\n{_lowered(drawn[-1].read_text(encoding='utf-8'))}")
    elif drawn:
        parts.append(f"## Samples\n\n![samples](samples/{drawn[-1].name})\n")
    return "".join(f"{part}\n" for part in parts)


def _lowered(text: str) -> str:
    """Put headings of a page two levels down."""
    return re.sub(r"^(#+ )", r"##\1", text, flags=re.MULTILINE)


def plain(title: str) -> str:
    """Write a card for a model that came without one."""
    head: Any = ModelCardData(license="unknown", tags=["genkit"])
    return f"---\n{head.to_yaml()}\n---\n\n# {title}\n"


def listed(text: str, names: list[str]) -> str:
    """Return a card that lists the files that are pushed with it."""
    head = text.partition("\n## Files\n")[0].rstrip()
    lines = "".join(f"- {name}\n" for name in sorted({FILE, *names}))
    return f"{head}\n\n## Files\n\n{lines}"


def renamed(text: str, model: str, revision: str | None = None) -> str:
    """Return a card whose code loads the model by its name on the Hub.

    Args:
        revision: the branch that it is on; None for the default one.
    """
    code = f"model = {json.dumps(model)}"
    if revision is not None:
        code += BRANCH.format(revision=json.dumps(revision))
    return NAMED.sub(lambda _: code, text, count=1)
