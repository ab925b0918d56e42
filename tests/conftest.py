import contextlib
import hashlib
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from genkit.training import checkpoints

ROOT = Path(__file__).parent.parent
SHAPE = "--depth 1 --width 32 --heads 2 --context 32"
SHORT = ("--batch_size", "4", "--compile", "no")
TINY = (*SHAPE.split(), *SHORT)
ACCELERATE = [str(Path(sys.executable).parent / "accelerate"), "launch"]


def pytest_configure(config: pytest.Config) -> None:
    """No network, but with -m hub: before anything reads this variable; and no time limits."""
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("patient")
    if config.getoption("markexpr") != "hub":
        os.environ["HF_HUB_OFFLINE"] = "1"
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


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up text of short words: enough to learn spelling from in a few steps."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 6))) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choices(words, k=4000)) + "\n")
    return path


Train = Callable[..., subprocess.CompletedProcess[str]]


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
def trained(train: Train, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: 40 steps, three evaluations."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    length = ("--max_steps", "40", "--evaluations", "3")
    done = train(*TINY, *length, "--text", text_file, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@contextlib.contextmanager
def recipe_module(recipe: str, *arguments: str | Path) -> Iterator[Any]:
    """Import a recipe under a command line."""
    path = ROOT / "recipes" / f"{recipe}.py"
    spec = importlib.util.spec_from_file_location(recipe, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, recipe, module)
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        spec.loader.exec_module(module)
        yield module


def benchmark(name: str) -> ModuleType:
    """Import a benchmark."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # dataclasses look it up
        spec.loader.exec_module(module)
    return module


def run_here(recipe: str, *arguments: str | Path) -> None:
    """Run a recipe in this process: the seconds that a launch takes are saved."""
    with recipe_module(recipe, *arguments) as module:
        module.main()


@contextlib.contextmanager
def full_disk(limit: int = 0) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def listing(folder: Path) -> dict[str, bytes | str]:
    """Return all that lies in a folder: the bytes of files, and where links lead."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else "no file"
    return found


# a run of one weight, of a step in 10 ms, that ends by a signal
STEPPING = """
import sys, time, torch
from genkit.training import optim
from genkit.training.settings import RunSettings
from genkit.training.run import Run

told = RunSettings(
    output_dir=sys.argv[1], batch_size=4, max_minutes=60.0, ema=0.0, mixed_precision="no",
    compile=False, save_minutes=60.0,
)
with Run(told) as run:
    network = torch.nn.Linear(1, 1)
    run.network("model", network, [torch.optim.SGD(network.parameters(), lr=0.1)])
    run.restore()
    start = time.monotonic()
    try:
        for _ in run.steps():
            time.sleep(0.01)
            run.backward(network(torch.ones(2, 1)).square().mean())
            run.update()
    finally:
        lost = time.monotonic() - start - run.progress.seconds
        if run.is_main:
            run.folder.write("lost", str(lost))
"""


def wait_for_steps(folder: Path, running: subprocess.Popen, steps: int) -> None:
    """Wait until a run has made so many steps more."""
    log = folder / "metrics.jsonl"

    def count() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    until = count() + steps
    while count() < until:
        assert running.poll() is None, "the run ended by itself"
        time.sleep(0.01)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, but for the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights_of(folder: Path) -> tuple[str, bytes, str]:
    """Name and bytes of the last checkpoint, and the hash of the published model."""
    last, problems = checkpoints.newest(folder / "checkpoints")
    assert last is not None and problems == []
    published = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    model = hashlib.sha256(published[0].read_bytes()).hexdigest()
    return last.name, (last / checkpoints.TENSORS).read_bytes(), model


# a port for each process of the tests, which may launch at the same time
PORT = 29500 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
TWO = ("--multi_gpu", "--num_processes", "2", "--main_process_port", str(PORT))
ON_CPU = {"ACCELERATE_USE_CPU": "1"}
