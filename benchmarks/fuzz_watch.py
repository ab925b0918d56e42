"""Run an example in a fork of this process and watch it: memory, time, files, its answer.

The fork has imported everything already, so that an example takes a tenth of a second. Failures
are: more than 2 GiB, more than 30 s, a signal; a canary, code or a pickle of the example,
a program or a connection that is not allowed; a file outside that was opened or changed; a leaked
secret; an error that is no ValueError of one line.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import select
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MEMORY, SECONDS = 2 << 30, 30.0  # bytes and seconds that a process may take
SECRET = "the-secret-of-this-machine"
LONGEST = 4000  # characters of a line for a user
CODE = re.compile(r"custom code|remote code|trust_remote_code|Do you wish to run", re.IGNORECASE)
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOVES = ("os.rename", "os.link", "os.symlink")  # whose second path is the new one
CHANGES = (*MOVES, "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
STARTS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec")
CALLS = ("socket.connect", "socket.getaddrinfo")


@dataclass(frozen=True)
class Outcome:
    """The outcome of an example."""

    kind: str  # "result", "refusal" or "failure"
    text: str  # what it returned, the line of the refusal, or what is wrong
    memory: int = 0  # bytes, at most
    seconds: float = 0.0


class Refused(Exception):  # noqa: N818
    """Raised in a child for a refusal that is no ValueError, such as an exit with status 2."""


class World:
    """A folder that no example may touch, another in which it may write, and the canary.

    Args:
        home: an empty folder.
    """

    def __init__(self, home: Path) -> None:
        self.home, self.outside, self.scratch = home, home / "outside", home / "scratch"
        self.canary, self.output = home / "canary", home / "output"
        self.allowed = [str(self.scratch), str(self.output), "/dev/", "/proc/"]  # to write in
        self.outside.mkdir()
        self.scratch.mkdir(exist_ok=True)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._events = self._libc.inotify_init1(os.O_NONBLOCK)

    def guard(self, opened: bool = True) -> None:
        """From now on, record files outside that are changed or, with `opened`, opened."""
        for folder in (self.outside, *filter(Path.is_dir, self.outside.rglob("*"))):
            every = 0x002 | 0x004 | 0x040 | 0x080 | 0x100 | 0x200  # inotify(7)
            every |= 0x020 if opened else 0
            self._libc.inotify_add_watch(self._events, str(folder).encode(), every)

    def touched(self) -> list[str]:
        """Return names of files outside that were opened or changed since the last time."""
        names = []
        try:
            data = os.read(self._events, 1 << 16)
        except BlockingIOError:
            return []
        while data:
            _, mask, _, size = struct.unpack_from("iIII", data)
            name = data[16 : 16 + size].rstrip(b"\0").decode(errors="replace")
            if not mask & 0x40000000 or mask & 0x300:  # not folders that are listed
                names.append(name)
            data = data[16 + size :]
        return sorted(set(names))

    def clean(self) -> None:
        """Forget the last example."""
        self.touched()
        self.canary.unlink(missing_ok=True)
        shutil.rmtree(self.scratch)
        self.scratch.mkdir()


# ---------------------------------------------------------------------------------------------
# The child


def _audit(world: World, network: bool, seen: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that notes forbidden actions."""
    allowed = tuple(world.allowed)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _is_write(event, arguments):
            path = _written_path(event, arguments)
            if path and not path.startswith(allowed):
                seen.append(f"{event} of {path}")
        elif event == "exec" and str(world.home) in getattr(arguments[0], "co_filename", ""):
            seen.append(f"ran {arguments[0].co_filename}")
        elif event == "pickle.find_class":
            seen.append(f"unpickled {arguments[1:]}")
        elif (event in STARTS or event in CALLS) and not network:
            seen.append(f"{event} {arguments[:2]}")
            if event in CALLS:
                raise OSError("an example has no network")

    return hook


def _is_write(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool(set("wax+") & set(arguments[1] or "") or (arguments[2] or 0) & FLAGS)
    return event in CHANGES


def _written_path(event: str, arguments: tuple[Any, ...]) -> str:
    """Return the path that a file operation makes, changes or removes; "" for an open file."""
    number = event in MOVES
    name, home = arguments[number], "."
    if not isinstance(name, str | bytes | os.PathLike):
        return ""
    if event != "open" and isinstance(arguments[-1], int) and arguments[-1] >= 0:
        home = str(Path(f"/proc/self/fd/{arguments[-1]}").readlink())  # relative to a folder
    return os.path.abspath(os.path.join(home, os.fsdecode(name)))  # noqa: PTH100, PTH118


def _child(act: Callable[[], object], world: World, network: bool, pipe: int) -> None:
    os.setpgid(0, 0)
    quiet = os.open(world.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    seen: list[str] = []

    def load(*_: Any, **__: Any) -> None:
        seen.append("torch.load was called")
        raise OSError("an example has no pickles")

    torch.load = load
    sys.addaudithook(_audit(world, network, seen))
    try:
        kind, text = "result", str(act())
    except (ValueError, Refused) as error:
        ours = type(error) in (ValueError, Refused) or "genkit" in type(error).__module__
        kind = "refusal" if ours else "failure"
        text = str(error) if ours else f"{type(error).__name__}: {error}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        name = "/".join(Path(where.filename).parts[-2:])
        kind, text = "failure", f"{type(error).__name__} at {name}:{where.lineno}: {error}"
    if seen:
        kind, text = "failure", f"{'; '.join(dict.fromkeys(seen))} ({kind}: {text})"
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(pipe, json.dumps([kind, text[: 1 << 13]]).encode(errors="replace"))


# ---------------------------------------------------------------------------------------------
# The parent


def watch(
    act: Callable[[], object],
    world: World,
    kept: Path | None = None,
    *,
    network: bool = False,
    limit: float = SECONDS,
) -> Outcome:
    """Run something in a fork, and return its outcome.

    Args:
        act: what to run; what it returns is a result, a ValueError is a refusal.
        kept: a folder that it must leave as it is.
        network: whether it may connect, and start programs.
        limit: seconds that it may take.
    """
    before = None if kept is None else file_states(kept)
    gc.freeze()  # a collection would copy all pages that a fork shares
    started = time.monotonic()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _child(act, world, network, send)
        finally:
            os._exit(0)
    os.close(send)
    wrong = _wait(child, receive, started + limit, limit)
    message = os.read(receive, 1 << 17) if not wrong else b""
    os.close(receive)
    _, status, usage = os.wait4(child, 0)
    _end(child)
    seconds, memory = time.monotonic() - started, usage.ru_maxrss << 10
    kind, text = json.loads(message) if message else ("failure", wrong or _ended(status))
    if memory > MEMORY:
        kind, text = "failure", f"it took more than {MEMORY >> 30} GiB"
    problem = _problem(world, kind, text)
    if before is not None and problem is None and file_states(kept) != before:  # type: ignore[arg-type]
        problem = f"the folder was changed ({kind}: {text})"
    world.clean()
    return Outcome("failure" if problem else kind, problem or text, memory, seconds)


def _wait(child: int, pipe: int, end: float, limit: float) -> str | None:
    """Wait until a child has answered or ends; kill one that takes too much."""
    while True:
        if select.select([pipe], [], [], 0.02)[0]:
            return None
        pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
        problem = None
        if pages * resource.getpagesize() > MEMORY:
            problem = f"it took more than {MEMORY >> 30} GiB"
        if time.monotonic() > end:
            problem = f"it took more than {limit:g} s"
        if problem:
            os.kill(child, signal.SIGKILL)
            return problem


def _end(child: int) -> None:
    """End the processes that a child has started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def _ended(status: int) -> str:
    return f"it ended without an answer, with {os.waitstatus_to_exitcode(status)}"


def _problem(world: World, kind: str, text: str) -> str | None:
    """Return what is wrong with an answer, or with the actions before it."""
    printed = world.output.read_text(errors="replace") if world.output.exists() else ""
    touched = world.touched()
    if world.canary.exists():
        return f"the canary is there ({kind}: {text})"
    if touched:
        return f"opened or changed outside: {', '.join(touched)} ({kind}: {text})"
    if SECRET in text or SECRET in printed or "root:x:0" in text + printed:
        return f"a secret was leaked ({kind}: {text:.200})"
    if CODE.search(printed):
        return f"a warning of running code: {printed:.300}"
    if kind == "refusal" and len(text.splitlines()) != 1:
        return f"an error of {len(text.splitlines())} lines: {text:.300}"
    if kind == "refusal" and len(text) > LONGEST:
        return f"an error of {len(text):,} characters: {text:.100}"
    return None


def file_states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return each file's type, size and time of the last write: whether a folder has changed."""
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found
