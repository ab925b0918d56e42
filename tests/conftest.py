import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# no network but with -m hub: set before huggingface_hub, which reads it once, is imported
if "hub" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # which inherits it
    os.environ["HF_HUB_OFFLINE"] = "1"

from builders import ACCELERATE, ROOT, TINY, Train, run_here


def pytest_configure(config: pytest.Config) -> None:
    """No time limits of hypothesis; a core for each process of the tests."""
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("patient")
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):  # threads that share a core wait for each other
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that no process of the tests is left alone with it."""
    long = ("test_hub", "test_recipes", "test_processes", "test_generation", "test_readme")
    items.sort(key=lambda item: item.path.stem not in long)


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of the tests' own."""
    os.environ["GENKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def event_loops() -> Iterator[None]:
    """Close the event loops that gradio makes for each page, and never closes, at the end.

    Otherwise the test in which one of them is collected as garbage fails.
    """
    made, make = [], asyncio.new_event_loop

    def make_and_keep() -> asyncio.AbstractEventLoop:
        made.append(make())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", make_and_keep)
        yield
    for loop in made:
        if not loop.is_running():
            loop.close()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up text of short words: enough to learn spelling from in a few steps."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 6))) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choices(words, k=4000)) + "\n")
    return path


@pytest.fixture(scope="session")
def train() -> Train:
    """Launch a recipe as a user does."""

    def launch(
        *arguments: str | Path,
        recipe: str = "train_charlm",
        launcher: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = [*ACCELERATE, *launcher, f"recipes/{recipe}.py", *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )

    return launch


@pytest.fixture(scope="session")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: 40 steps, three evaluations."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    length = ("--max_steps", "40", "--evaluations", "3")
    run_here("train_charlm", *TINY, *length, "--text", text_file, "--output_dir", folder)
    return folder


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """Find the folder of a model with real weights, or skip the test."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("GENKIT_MODELS", "no-such-folder"), name)
        if not folder.is_dir():
            pytest.skip(f"set GENKIT_MODELS to a folder that has {name}/")
        return folder

    return find
