"""Training runs corrupted by small changes, then resumed, or started anew in the same folder.

An example is a list of changes and whether the run is resumed. The run may continue, or be
refused in one line; files that a user has put into its folder stay, byte by byte. A refusal changes
nothing, and a run in the folder is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401  looks for fonts once, before it is watched
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the first fork
from builders import Bomb, listing  # type: ignore[import-not-found]
from hypothesis import strategies as st

from benchmarks.fuzz_changes import (
    CANNOT,
    CODE,
    SPELLINGS,
    Change,
    change_file,
    change_header,
    edit_json,
    paths,
    rewrite_json,
)
from benchmarks.fuzz_watch import SECRET, Outcome, Refused, World, watch
from genkit.training import checkpoints
from genkit.training import run as training  # noqa: F401

Example = dict[str, Any]  # "resume" and "changes"
Listing = dict[str, bytes | str]
RECIPE = Path(__file__).parent.parent / "recipes/train_charlm.py"
STEPS, SAVED = 13, (4, 8, 12)  # the last checkpoint is taken away, so that a step is left to do
WORDS = "--depth 1 --width 32 --heads 2 --context 32 --batch_size 4 --compile no --ema 0.9"
WORDS += " --mixed_precision no --save_steps 4 --evaluations 3"

ODD: list[Any] = [None, True, [], {}, "", "x", -1, 2.5, 10**12, 1 << 63, 10**400, "../x", "é\u2028"]
ODD += [{"@deep": 1000}, {"@repeat": ["x", 100_000]}, "NaN", "@outside/out"]
FOREIGN = ["notes.txt", "checkpoints/step-00000010.bak", "checkpoints/notes", "checkpoints/step-x"]
FOREIGN += ["samples/step-9.md", "samples/step-00000010 (copy).md", "samples/mine.png", "a/b/c.txt"]
FOREIGN += ["checkpoints/step-00000009/mine.txt", "checkpoints/.writing-mine"]
FOREIGN += ["checkpoints/step--1", "checkpoints/step-٣", "model.safetensors.bak", ".lock.mine"]
FOREIGN += [
    "samples/step-٣.md",
    "checkpoints/step-99999999999999999999",
    "config.json.old",
    "own.py",
]
LINES = ["3", "null", "[]", "{}", '{"step": "x"}', '{"step": -1}', '{"step": 1e999}', "\0", "{"]
LINES += ['{"step": 5, "loss": NaN}', '{"step": null, "loss": 1}', "[" * 5000, '{"step": 2.5}']
SPOILT = ["delete", "empty", "cut", "append", "flip", "fifo", "socket", "folder", "link out"]
SPOILT += ["link itself", "link missing", "secret", "link in"]
HEADS = ["longer", "huge", "empty", "dtype", "shape", "missing", "extra", "nan", "inf", "rename"]


def _seal(file: Path) -> None:
    """Write a checkpoint's manifest anew, so that it fits its files."""
    home = file.parent
    manifest = {
        each.name: {
            "bytes": each.stat().st_size,
            "sha256": hashlib.sha256(each.read_bytes()).hexdigest(),
        }
        for each in (home / checkpoints.TENSORS, home / checkpoints.STATE)
    }
    (home / checkpoints.MANIFEST).write_text(json.dumps(manifest))


def change(folder: Path, made: Change, world: World) -> None:
    """Make one change of a run's folder."""
    kind, name, *options = made
    file = folder / name
    if kind in ("set", "spell", "spoil", "head", "line") and (
        file.is_symlink() or not file.is_file()
    ):
        raise FileNotFoundError(file)
    if kind == "set":
        edit_json(file, options[0], options[1], world)
    elif kind == "spell":
        rewrite_json(file, options[0])
    elif kind == "spoil":
        change_file(file, options[0], options[1], world)
    elif kind == "head":
        change_header(file, options[0], options[1])
    elif kind == "line":
        lines = file.read_text().splitlines()
        lines.insert(options[1] % (len(lines) + 1), options[0])
        file.write_text("\n".join(lines) + "\n")
    elif kind == "mine":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(CODE.format(canary=str(world.canary)))
    elif kind == "without":
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif kind == "pickle":
        file.unlink(missing_ok=True)  # it may be a link by now
        file.write_bytes(pickle.dumps(Bomb(world.canary)))
    if kind in ("set", "head") and name.startswith("checkpoints") and "manifest" not in name:
        _seal(file)  # or it would be refused before it is read


class Runs:
    """The part of the fuzzer that corrupts training runs.

    Args:
        home: an empty folder.
    """

    def __init__(self, home: Path) -> None:
        torch.set_num_threads(1)
        self.world, self.whole = World(home), home / "whole"
        for name in ("out", "out.json", "out.jsonl", "out.md", "out.safetensors"):
            (self.world.outside / name).write_text(json.dumps({SECRET: 0}))
        self.text = home / "text.txt"
        self.text.write_text("".join(random.Random(0).choices("abcdefgh \n", k=5_000)))
        self.world.allowed.append(str(self.whole))
        made = watch(lambda: self.train(self.whole, False), self.world)
        assert made.kind == "result", made.text
        self.world.allowed.remove(str(self.whole))
        shutil.rmtree(self.whole / f"checkpoints/step-{STEPS:08d}")
        self.strategy, self.seeds = strategy(self.whole), SEEDS
        self.world.guard(opened=False)  # a run may have its files on another disk
        self.world.clean()

    def train(self, folder: Path, resume: bool) -> str:
        """Run the recipe, as a user does; a refusal is one line and the status 2."""
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # threads would wait for each other
        sys.argv = [str(RECIPE), "--output_dir", str(folder), "--max_steps", str(STEPS)]
        sys.argv += ["--text", str(self.text), *WORDS.split(), *(["--resume"] if resume else [])]
        status = 0
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        printed = self.world.output.read_text(errors="replace")
        lines = [line for line in printed.splitlines() if line.startswith("error:")]
        if status == 0:
            return "the run went on" if resume else "a run was started"
        if status != 2 or len(lines) != 1 or "Traceback" in printed:
            raise RuntimeError(f"the recipe ended with {status}: {printed[-300:]}")
        raise Refused(lines[0])

    def run(self, example: Example) -> Outcome | None:
        """Corrupt a run and resume it; None if the changes cannot be made together."""
        folder = self.world.home / "scratch/case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole, folder)
        try:
            for made in example["changes"]:
                change(folder, made, self.world)
        except CANNOT:
            return None
        before = listing(folder)
        mine = set(before) - set(listing(self.whole))
        resume, whole = bool(example["resume"]), checkpoints_left(folder)
        outcome = watch(lambda: self._train_and_compare(folder, resume, before, mine), self.world)
        if outcome.kind == "result" and not (resume and whole):
            lost = "no checkpoint can be read, and yet" if resume else "there was a run, and yet"
            return Outcome("failure", f"{lost} {outcome.text}", outcome.memory, outcome.seconds)
        return outcome

    def _train_and_compare(
        self, folder: Path, resume: bool, before: Listing, mine: set[str]
    ) -> str:
        """Train, and look for lost files: in the fork, as the scratch folder goes with it."""
        try:
            text = self.train(folder, resume)
        except Refused:
            _check_same(before, listing(folder), set(before))
            raise
        _check_same(before, listing(folder), mine)
        return text


def checkpoints_left(folder: Path) -> bool:
    """Whether any of a run's own checkpoints is undamaged."""
    own = [folder / f"checkpoints/step-{step:08d}" for step in SAVED]
    return any(
        checkpoint.is_dir() and all(f.is_file() for f in checkpoint.iterdir())
        and checkpoints.find_damage(checkpoint) is None
        for checkpoint in own
    )  # fmt: skip


def _check_same(before: Listing, after: Listing, names: set[str]) -> None:
    """Fail if one of some files is lost or changed."""
    lost = sorted(n for n in names if before[n] != after.get(n) and not n.endswith(".lock"))
    if lost:
        raise RuntimeError(f"lost or changed: {', '.join(lost)}")


# ---------------------------------------------------------------------------------------------
# Drawing examples


def strategy(whole: Path) -> st.SearchStrategy[Example]:
    """Draw examples: three of four are resumed."""
    files = sorted(str(f.relative_to(whole)) for f in whole.rglob("*") if f.is_file())
    files = [name for name in files if not name.endswith(".lock")]
    tables = [name for name in files if name.endswith(".json")]
    inside = [name for name in files if name.startswith(("checkpoints", "run.json", "metrics"))]
    weights = [name for name in files if name.endswith(".safetensors")]
    number = st.integers(0, 1 << 16)
    draws: list[st.SearchStrategy[Any]] = [
        st.sampled_from(tables).flatmap(lambda name: _of_json(whole, name)),
        st.sampled_from(tables).flatmap(lambda name: _of_json(whole, name)),
        st.tuples(st.just("spell"), st.sampled_from(tables), st.sampled_from(SPELLINGS)),
        st.tuples(st.just("spoil"), st.sampled_from(inside), st.sampled_from(SPOILT), number),
        st.tuples(st.just("spoil"), st.sampled_from(files), st.sampled_from(SPOILT), number),
        st.tuples(st.just("head"), st.sampled_from(weights), st.sampled_from(HEADS), number),
        st.tuples(st.just("line"), st.just("metrics.jsonl"), st.sampled_from(LINES), number),
        st.tuples(st.just("mine"), st.sampled_from(FOREIGN)),
        st.tuples(st.just("without"), st.sampled_from([*inside, "checkpoints", "samples"])),
        st.tuples(st.just("pickle"), st.sampled_from(files)),
    ]
    changes = st.lists(st.one_of(draws).map(list), min_size=1, max_size=4)
    resume = st.sampled_from([True, True, True, False])
    return st.fixed_dictionaries({"resume": resume, "changes": changes})


def _of_json(whole: Path, name: str) -> st.SearchStrategy[Any]:
    keys = [list(path) for path in paths(json.loads((whole / name).read_text()))] or [[]]
    values = st.sampled_from([*ODD, "@delete"])
    return st.tuples(st.just("set"), st.just(name), st.sampled_from(keys), values)


def _seed(resume: bool, *changes: Change) -> Example:
    return {"resume": resume, "changes": list(changes)}


# Examples that failed in the past
LAST = f"checkpoints/step-{SAVED[-1]:08d}"
SEEDS: list[Example] = [_seed(True), _seed(False)]
SEEDS += [_seed(True, ["mine", name]) for name in FOREIGN]
SEEDS += [_seed(True, ["line", "metrics.jsonl", line, 3]) for line in LINES]
SEEDS += [_seed(True, ["spoil", "run.json", how, 99]) for how in SPOILT]
SEEDS += [
    _seed(resume, ["without", name])
    for name in ("run.json", "metrics.jsonl", "checkpoints", "samples", LAST)
    for resume in (True, False)
]
SEEDS += [_seed(False, ["without", "run.json"], ["without", "metrics.jsonl"])]
SEEDS += [
    _seed(False, *[["without", name] for name in ("run.json", "metrics.jsonl", "checkpoints")])
]
for _file in (checkpoints.TENSORS, checkpoints.STATE, checkpoints.MANIFEST):
    SEEDS += [_seed(True, ["spoil", f"{LAST}/{_file}", how, 7]) for how in ("flip", "fifo", "cut")]
SEEDS += [
    _seed(True, *[["spoil", f"checkpoints/step-{step:08d}/{checkpoints.STATE}", how, 7]
                  for step in SAVED])
    for how in ("flip", "delete", "link missing", "link itself")
]  # fmt: skip
SEEDS += [
    _seed(True, ["head", f"{LAST}/{checkpoints.TENSORS}", how, 3])
    for how in ("nan", "shape", "dtype", "missing", "rename")
]
