"""The fuzzer's watch sees every action that is forbidden to examples."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.fuzz_watch import SECRET, World, watch

pytestmark = pytest.mark.slow


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    (made.outside / "file.txt").write_text(SECRET)
    made.guard()
    return made


def refuse(text: str):
    raise ValueError(text)


def spend() -> str:
    return str(len(bytearray(b"x") * (3 << 30)))


def run_code(world: World) -> None:
    exec(compile("pass", str(world.home / "own.py"), "exec"))


WRONG = {
    "the canary": lambda world: world.canary.touch(),
    "opened or changed outside": lambda world: len((world.outside / "file.txt").read_text()),
    "open of": lambda world: (world.home / "new.txt").write_text("x"),
    "os.mkdir of": lambda world: (world.home / "new").mkdir(),
    "os.rename of": lambda world: world.output.rename(world.home / "moved"),
    "ran ": run_code,
    "unpickled": lambda world: pickle.loads(pickle.dumps(Path("x"))),  # noqa: S301
    "torch.load": lambda world: torch.load(world.scratch / "x"),
    "subprocess.Popen": lambda world: subprocess.run(["true"]),
    "socket.getaddrinfo": lambda world: socket.create_connection(("127.0.0.1", 9)),
    "a secret": lambda world: SECRET,
    "an error of 2 lines": lambda world: refuse("one\ntwo"),
    "an error of 5,000 characters": lambda world: refuse("x" * 5000),
    "KeyError": lambda world: {}["x"],
    "JSONDecodeError": lambda world: json.loads("{"),
    "KeyboardInterrupt": lambda world: (_ for _ in ()).throw(KeyboardInterrupt()),
    "more than 1 s": lambda world: time.sleep(9),
    "more than 2 GiB": lambda world: spend(),
    "with -6": lambda world: os.abort(),
    "a warning of running code": lambda world: print("Do you wish to run the custom code?"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_seen(world, what):
    limit = 60.0 if "GiB" in what else 1.0
    outcome = watch(lambda: WRONG[what](world), world, limit=limit)
    assert outcome.kind == "failure" and what in outcome.text


def test_what_is_right_is_no_failure(world):
    made = watch(lambda: (world.scratch / "x").write_text("x"), world, world.outside)
    assert (made.kind, made.text) == ("result", "1")
    assert watch(lambda: refuse("model: no"), world).kind == "refusal"
    assert world.touched() == [] and list(world.scratch.iterdir()) == []


def test_a_folder_that_was_changed_is_seen(world):
    kept = world.scratch / "model"
    kept.mkdir()
    outcome = watch(lambda: (kept / "x").touch(), world, kept)
    assert outcome.kind == "failure" and "the folder was changed" in outcome.text
