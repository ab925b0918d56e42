"""Small models and runs to show in the page, and the page itself, served by a process."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_autoencoder, tiny_denoiser, tiny_gan, tiny_pixels
from classifiers import make_classifier
from readers import pointer

import genkit
from genkit.data import characters
from genkit.hub import vendoring
from genkit.models import lm
from genkit.models.autoencoder import Autoencoder, AutoencoderPipeline
from genkit.text.language_model import load_language_model

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
TEMPLATE = (  # of characters that the model knows
    "{% for message in messages %}{{ message.role }}<{{ message.content }}>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant<{% endif %}"
)
LETTERS = "\n abcdefghijklmnopqrstuvwxyzT<>&"
BASELINE = {"distance": 1.0, "entropy": 1.0, "duplicates": 0.01, "spread": 1.0, "coverage": 0.97}
GOOD = BASELINE | {"distance": 50.0, "coverage": 0.5}
BAD = {"distance": 90.0, "entropy": 0.1, "duplicates": 0.9, "spread": 0.05, "coverage": 0.005}


def language(folder: Path, context: int = 64, template: str | None = None, depth: int = 1) -> None:
    tokenizer = characters.make_tokenizer(LETTERS)
    tokenizer.chat_template = template
    model = lm.make_model("llama", len(tokenizer), context, depth, 32, 2, 0.0)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4)  # that something is likely
    model.save_pretrained(folder)
    lm.save_tokenizer(tokenizer, folder)


def long_seed(model: Path, content: str, **options: object) -> int:
    """The seed, of the first twenty, of the longest reply to a message."""
    chats = [[{"role": "user", "content": content}]] * 20
    loaded = load_language_model(model)
    records = genkit.generate(chats, model=loaded, seed=0, **options)
    return max(range(20), key=lambda seed: len(records[seed].tokens))


def talks(folder: Path) -> None:
    language(folder, 1024, TEMPLATE)


def talks_slowly(folder: Path) -> None:
    """A model whose replies are seen while they are written."""
    language(folder, 1024, TEMPLATE, depth=128)


def reader(folder: Path) -> None:
    made = pointer()
    made.model.save_pretrained(folder)
    lm.save_tokenizer(made.tokenizer, folder)


def classifier(folder: Path) -> None:
    made = make_classifier("ResNet", 32)
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)


def two_latents(folder: Path) -> None:
    model = Autoencoder((1, 8, 8), 2, widths=(16,), variational=True).eval()
    model.fit_prior(torch.randn(50, 2) * 2 + 1)
    vendoring.save_pipeline(AutoencoderPipeline(model), folder)


def write_log(folder: Path, log: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    (folder / "metrics.jsonl").write_text(lines)


def sample(folder: Path, step: int, text: str) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    (folder / f"samples/step-{step:08d}.md").write_text(text)


def training(folder: Path) -> None:
    log = [{"step": i, "seconds": i / 10, "loss": 3 / i, "grad_norm": 1.0} for i in range(1, 41)]
    for entry in log[9::10]:
        entry["val_loss"] = entry["loss"] + 0.1
    write_log(folder, log)
    sample(folder, 30, "the first text")


def game(folder: Path) -> None:
    log: list[dict] = [
        {"step": i, "discriminator_loss": 1.3, "generator_loss": 0.7} for i in range(1, 301)
    ]
    for entry in log:
        entry["generator_grad_norm"] = 1.0
    for step, figures in ((100, GOOD), (200, GOOD), (300, BAD)):
        log[step - 1] |= figures
    write_log(folder, log)
    settings = {"settings": {"loss": "non_saturating"}, "facts": {}}
    (folder / "run.json").write_text(json.dumps(settings))


MAKE = {
    "language": language,
    "talks": talks,
    "talks_slowly": talks_slowly,
    "reader": reader,
    "classifier": classifier,
    "two_latents": two_latents,
    "autoencoder": tiny_autoencoder,
    "gan": tiny_gan,
    "class_conditional": tiny_denoiser("v", 4, "cosine"),
    "pixels": tiny_pixels,
    "training": training,
    "game": game,
}


def make(folder: Path) -> Path:
    """Write all of them into a folder."""
    with torch.random.fork_rng():
        for name, save in MAKE.items():
            torch.manual_seed(0)
            save(folder / name)
    return folder


SERVE = "import json, sys; from genkit.app import serve; serve(**json.loads(sys.argv[1]))"


@contextlib.contextmanager
def served(models: list[str], **options: object) -> Iterator[str]:
    """Serve the page from a process; yield its address."""
    with served_by(models, **options) as (address, _):
        yield address


@contextlib.contextmanager
def served_by(models: list[str], **options: object) -> Iterator[tuple[str, int]]:
    """Serve the page from a process; yield its address and the process."""
    arguments = json.dumps({"models": models, "port": 0, **options})
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "genkit is at" in line, "the page did not start"
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def ask(
    address: str, data: object = None, *, method: str | None = None, **headers: str
) -> tuple[int, str, dict]:
    """Send a request; return status, text and headers."""
    body = data if isinstance(data, bytes | None) else json.dumps(data).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named.setdefault("Content-Type", "application/json")
    request = urllib.request.Request(address, body, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=100) as answer:
            return answer.status, answer.read().decode(errors="replace"), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace"), dict(error.headers)


def browser() -> str | None:
    """Where a browser is, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def started_browser() -> Iterator[Any]:
    """Start a browser; the test is skipped if there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = browser()
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as drive:
        started = drive.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield started
        started.close()
