"""Tiny saved models of every kind to corrupt, and the uses of each."""

from __future__ import annotations

import contextlib
import io
import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import app_models  # type: ignore[import-not-found]
import builders  # type: ignore[import-not-found]
import torch
from safetensors.torch import load_file, save_file

import genkit
from benchmarks.fuzz_watch import SECRET, Refused
from genkit import cli
from genkit.hub import kinds, safety, staging, vendoring
from genkit.metrics.features import load_extractor
from genkit.models import classifier, lm
from genkit.models.gan import GANPipeline, Generator
from genkit.qa import model

# ---------------------------------------------------------------------------------------------
# Folders


def sharded(folder: Path) -> None:
    """A language model whose weights are in two files, with an index."""
    app_models.language(folder)
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts |= {"model-00002-of-00002.safetensors": names[1::2]}
    for file, kept in parts.items():
        save_file({name: tensors[name] for name in kept}, folder / file, {"format": "pt"})
    index = {name: file for file, kept in parts.items() for name in kept}
    table = {"metadata": {"total_size": whole.stat().st_size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    whole.unlink()


def image_classifier(folder: Path) -> None:
    """An image classifier."""
    classifier.save_classifier(
        classifier.make_model("abc", (1, 8, 8), depth=1, width=4), (1, 8, 8), folder
    )


def two_weights(folder: Path) -> None:
    """A GAN with averaged and raw weights."""
    for variant in (None, "raw"):
        generator = Generator((1, 8, 8), 3, widths=(8,), patch=4).eval()
        if variant is None:
            vendoring.save_pipeline(GANPipeline(generator), folder)
        else:
            generator.save_pretrained(folder / "generator", variant=variant)


def pictures(folder: Path) -> None:
    """A tiny Stable Diffusion."""
    builders.stable_diffusion().save_pretrained(folder)


MAKE: dict[str, Callable[[Path], None]] = {
    "text": app_models.language,
    "sharded": sharded,
    "answers": app_models.reader,
    "classifier": image_classifier,
    "autoencoder": builders.tiny_autoencoder,
    "gan": two_weights,
    "diffusion": builders.tiny_denoiser("epsilon"),
    "class_conditional": builders.tiny_denoiser("v", 4, "cosine"),
    "pixels": builders.tiny_pixels,
    "pictures": pictures,
}


def make(folder: Path) -> None:
    """Write all kinds into a folder."""
    for name, save in MAKE.items():
        torch.manual_seed(0)
        save(folder / name)


# ---------------------------------------------------------------------------------------------
# Uses


def _finite(values: Any) -> None:
    """Fail if a value is not finite."""
    if not bool(torch.as_tensor(values).isfinite().all()):
        raise ArithmeticError("the result is not finite")


def _generate(folder: Path) -> object:
    made = genkit.generate("The ", model=folder, max_new_tokens=4, seed=1)
    _finite([made.score, *made.log_probabilities])
    return made


def _score(folder: Path) -> object:
    scored = genkit.perplexity("some text", model=folder)
    _finite(float(scored.perplexity))
    return scored


def _answer(folder: Path) -> object:
    found = genkit.answer("Where?", "The alpha is omega.", model=folder)
    _finite(found.score)
    return found


def _sample(folder: Path) -> object:
    drawn = genkit.sample(folder, 2, seed=1, **_sample_options(folder))
    _finite(drawn.images)
    return f"{len(drawn.images)} images"


def _sample_options(folder: Path) -> dict[str, Any]:
    """Return few steps for diffusion models, and a label for class-conditional ones."""
    options: dict[str, Any] = {"steps": 2} if (folder / "unet").exists() else {}
    return options | ({"label": 1} if folder.name in ("class_conditional", "autoencoder") else {})


def _extract_features(folder: Path) -> object:
    features, classes = load_extractor(folder)(torch.linspace(-1, 1, 256).view(4, 1, 8, 8))
    _finite(features)
    return f"features of {tuple(features.shape)}, classes {classes.tolist()}"


def _imagine(folder: Path) -> object:
    drawn = genkit.imagine("a cat", model=folder, steps=2, seed=1)
    return f"{drawn.image.size} of {drawn.steps} steps"


def _load(folder: Path) -> object:
    return type(genkit.load(folder)).__name__


def _command(*words: str) -> Callable[[Path], object]:
    """Return a use that runs the genkit command on a folder."""

    def run(folder: Path) -> object:
        out, errors, status = io.StringIO(), io.StringIO(), 0
        here = contextlib.chdir(os.environ["TMPDIR"])
        with here, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                cli.main([word.replace("FOLDER", str(folder)) for word in words])
            except SystemExit as stop:
                status = int(stop.code or 0)
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("error:")]
        if status == 0:
            return out.getvalue()
        if status != 2 or len(lines) != 1 or "Traceback" in errors.getvalue():
            raise RuntimeError(f"the command ended with {status}: {errors.getvalue()[-300:]}")
        raise Refused(lines[0])

    return run


def _stage(folder: Path) -> object:
    """Stage the copy that a push would send, and check its files."""
    kinds.kind_of(folder, "folder")
    safety.check(folder, argument="folder")
    staged = Path(os.environ["TMPDIR"]) / "staged"
    staged.mkdir()
    staging.stage(folder, staged, "user/name")
    ours = Path(genkit.__file__).parent / "models"
    for file in staged.rglob("*"):
        if file.suffix == ".py" and file.read_bytes() != (ours / file.name).read_bytes():
            raise RuntimeError(f"{file.name} would be pushed")
        if file.is_file() and SECRET.encode() in file.read_bytes():
            raise RuntimeError(f"{file.name} holds a secret")
    return "staged"


def _push(folder: Path) -> object:
    """Push to the Hub on loopback; a refusal leaves nothing there."""
    name = f"user/m{os.getpid()}"
    there = f"{os.environ['HF_ENDPOINT']}/api/models/{name}"
    try:
        return genkit.push(folder, name)
    except ValueError as error:
        with contextlib.suppress(OSError), urllib.request.urlopen(there):
            raise RuntimeError(f"a refused push has made a repository: {error}") from None
        raise


PUSH = "push"  # the one use that may connect and start programs
LANGUAGE = {
    "generate": _generate,
    "perplexity": _score,
    "init_from": lambda folder: type(lm.load_lm(str(folder))[0]).__name__,
    "command": _command("generate", "The ", "--model", "FOLDER", "--max-new-tokens", "3"),
}
SAMPLE = ("sample", "FOLDER", "-n", "1", "--json")
DRAWING = {"sample": _sample, "command": _command(*SAMPLE)}
CONDITIONAL = DRAWING | {"command": _command(*SAMPLE, "--label", "1")}
OF_KIND: dict[str, dict[str, Callable[[Path], object]]] = {
    "text": LANGUAGE,
    "sharded": LANGUAGE,
    "answers": {
        "answer": _answer,
        "init_from": lambda folder: type(model.load_extractor(str(folder))[0]).__name__,
        "command": _command("answer", "Where?", "--context", __file__, "--model", "FOLDER"),
    },
    "classifier": {"features": _extract_features},
    "class_conditional": CONDITIONAL,
    "autoencoder": CONDITIONAL,
    "pictures": {"imagine": _imagine},
}
EVERY = {"load": _load, "stage": _stage, PUSH: _push}
USES = {kind: OF_KIND.get(kind, DRAWING) | EVERY for kind in MAKE}
del USES["pictures"]["load"]  # genkit.imagine alone loads them
