"""A minute of the fuzzer: nothing gets through what it spoils, and what it must see it sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "benchmarks/fuzz.py"
pytestmark = pytest.mark.slow


def fuzz(part: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FUZZ), "--part", part, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=3000)


@pytest.mark.parametrize("part", ["folders", "runs", "requests"])
def test_nothing_gets_through(part):
    done = fuzz(part, "--seconds", "60")
    assert done.returncode == 0, done.stdout
    assert f"{part}: " in done.stdout and " 0 failures" in done.stdout


def test_a_change_that_must_be_refused_is_made():
    """An example that spoils nothing is a result, one that takes a tensor away is refused."""
    for changes, kind in (([], "result"), ([["head", "model.safetensors", "nan", 1]], "refusal")):
        example = json.dumps({"kind": "text", "use": "generate", "changes": changes})
        done = fuzz("folders", "--example", example)
        assert f"kind='{kind}'" in done.stdout, done.stdout
