import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHAPE = "--depth 1 --width 32 --heads 2 --context 32"
SHORT = ("--batch_size", "4", "--compile", "no")
TINY = (*SHAPE.split(), *SHORT)
ACCELERATE = [str(Path(sys.executable).parent / "accelerate"), "launch"]


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of the tests' own, and no network: before anything reads these variables."""
    os.environ["GENKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"


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
    """Launch the recipe as a user does."""

    def launch(
        *arguments: str | Path, launcher: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [*ACCELERATE, *launcher, "recipes/train_charlm.py", *map(str, arguments)]
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
