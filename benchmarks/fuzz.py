"""Corrupt saved folders, runs and requests at random, and check that nothing gets through.

    python benchmarks/fuzz.py --part folders --count 10000 --seed 0
    python benchmarks/fuzz.py --part runs --count 2000
    python benchmarks/fuzz.py --part requests --count 2000
    python benchmarks/fuzz.py --part folders --seconds 60       # for a minute
    python benchmarks/fuzz.py --part folders --example '{"kind": …}'   # one of those printed

Examples that failed in the past come first, then those that hypothesis draws. Every example runs in
a fork that is watched (see fuzz_watch.py): its answer must be a result or one line. The first
failure of each kind is made smaller by leaving changes out, and printed. To use two cores, run two
commands with different seeds. A Hub on loopback stands in for the real one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent
BATCH = 200  # examples that hypothesis draws at a time
Example = dict[str, Any]


class Part(Protocol):
    """What is corrupted: folders, runs or requests."""

    seeds: list[Example]
    strategy: Any

    def run(self, example: Example) -> Any:
        """Return the outcome of an example, or None if it cannot be made."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("folders", "runs", "requests"), required=True)
    parser.add_argument("--count", type=int, default=10**9, help="examples beside past failures")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--example", help="run only this one, as it was printed")
    parser.add_argument("--no_seeds", action="store_true", help="skip past failures")
    arguments = parser.parse_args()
    if arguments.count == 10**9 and arguments.seconds == float("inf"):
        arguments.count = 1000
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        home = Path(name).resolve()
        _environment(home)
        with _part(arguments.part, home) as part:
            if arguments.example:
                print(part.run(json.loads(arguments.example)))
                return
            tally = Tally(part, arguments.part)
            given = [] if arguments.no_seeds else part.seeds
            end = time.monotonic() + arguments.seconds
            for example in given:
                tally.add(example)
            _draw_examples(tally, arguments.count, arguments.seed, end)
    print(tally)
    sys.exit(bool(tally.failures))


def _environment(home: Path) -> None:
    """Direct all files below one folder, and use one thread."""
    os.environ |= {
        "GENKIT_CACHE": str(home / "scratch/cache"),
        "TMPDIR": str(home / "scratch"),
        "MPLCONFIGDIR": str(home / "scratch/matplotlib"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.dont_write_bytecode = True
    tempfile.tempdir = str(home / "scratch")


def _draw_examples(tally: Tally, count: int, seed: int, end: float) -> None:
    """Draw examples and run them, until there are enough or the time is over."""
    import hypothesis

    done = 0
    while done < count and time.monotonic() < end:
        batch = min(BATCH, count - done)

        @hypothesis.settings(
            max_examples=batch,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.seed(seed * 1_000_003 + done)
        @hypothesis.given(tally.part.strategy)
        def one(example: Example) -> None:
            if time.monotonic() < end:
                tally.add(example)

        one()
        done += batch


class Tally:
    """The outcomes of the examples so far."""

    def __init__(self, part: Part, name: str) -> None:
        self.part, self.name, self.started = part, name, time.monotonic()
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.memory, self.longest = 0, 0.0

    def add(self, example: Example) -> None:
        """Run an example, and print it if its kind of failure is new."""
        outcome = self.part.run(example)
        if outcome is None:
            return
        self.counts[outcome.kind] += 1
        self.memory = max(self.memory, outcome.memory)
        self.longest = max(self.longest, outcome.seconds)
        if outcome.kind != "failure":
            return
        kind = _failure_kind(outcome.text)
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            small = self._shrink(example, kind)
            print(f"FAILED: {outcome.text:.400}\n  --part {self.name} --example", end=" ")
            print(f"'{json.dumps(small)}'", flush=True)

    def _shrink(self, example: Example, kind: str) -> Example:
        """Leave out changes, or headers, as long as the example fails in the same way."""
        name = "changes" if "changes" in example else "headers"
        for i in range(len(example[name])):
            fewer = example | {name: example[name][:i] + example[name][i + 1 :]}
            outcome = self.part.run(fewer)
            if outcome and outcome.kind == "failure" and _failure_kind(outcome.text) == kind:
                return self._shrink(fewer, kind)
        return example

    def __str__(self) -> str:
        seconds, total = time.monotonic() - self.started, sum(self.counts.values())
        kinds = ", ".join(f"{count} times: {kind}" for kind, count in self.failures.most_common())
        return (
            f"{self.name}: {total:,} examples in {seconds:,.0f} s, {self.counts['result']:,} "
            f"results, {self.counts['refusal']:,} refusals of one line, "
            f"{self.counts['failure']:,} failures; at most {self.memory / (1 << 20):,.0f} MiB and "
            f"{self.longest:.1f} s" + (f"\n{kinds}" if kinds else "")
        )


def _failure_kind(text: str) -> str:
    """Return what failures of one kind have in common."""
    return re.sub(r"\(.*|'.*|[\d,.]+|/\S+", "", text.splitlines()[0] if text else "")[:60].strip()


# ---------------------------------------------------------------------------------------------
# Parts, which import what they need in the environment above


def _part(name: str, home: Path) -> Any:
    return {"folders": _folders, "runs": _runs, "requests": _requests}[name](home)


@contextlib.contextmanager
def _folders(home: Path) -> Iterator[Part]:
    hub, variables = _start_hub(home / "scratch/hf")
    os.environ |= variables
    import torch

    from benchmarks import fuzz_folders, fuzz_models, fuzz_watch

    torch.set_num_threads(1)
    try:
        world = fuzz_watch.World(home)
        (home / "models").mkdir()
        fuzz_models.make(home / "models")
        fuzz_folders.outside(world)
        _warm(fuzz_models, home / "models")
        world.guard()
        world.clean()
        yield fuzz_folders.Folders(world)
    finally:
        os.kill(hub, signal.SIGKILL)
        os.waitpid(hub, 0)


def _warm(models: Any, folder: Path) -> None:
    """Use everything once in this process, so that forks have it imported."""
    for kind, uses in models.USES.items():
        for name, use in uses.items():
            if name not in (models.PUSH, "stage"):
                with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # noqa: PTH123
                    use(folder / kind)


def _start_hub(cache: Path) -> tuple[int, dict[str, str]]:
    """Start a Hub on loopback; return its process and the environment of its clients."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        import hub_server  # type: ignore[import-not-found]

        with hub_server.serve() as hub:
            os.write(send, json.dumps(hub.environment(cache)).encode())
            signal.pause()
    os.close(send)
    variables = json.loads(os.read(receive, 1 << 16))
    os.close(receive)
    return child, variables


@contextlib.contextmanager
def _runs(home: Path) -> Iterator[Part]:
    from benchmarks import fuzz_runs

    yield fuzz_runs.Runs(home)


@contextlib.contextmanager
def _requests(home: Path) -> Iterator[Part]:
    from benchmarks import fuzz_requests

    with fuzz_requests.serving(home) as part:
        yield part


if __name__ == "__main__":
    main()
