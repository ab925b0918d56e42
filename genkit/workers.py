"""Image files decoded by several processes, in their order.

Threads would share Python's lock, which small images spend most of their time on. The processes
know nothing of the script that started them, so it needs no `__main__` guard; and they end when it
does, however it ends, because then their input does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import PIPE

import numpy as np

from genkit import pixels
from genkit.pixels import ImageError

FILES, BYTES = 256, 1 << 22  # of files handed over at a time, at most (and one file at least)
START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])  # so that genkit is the same there
from genkit import workers
workers.serve()
"""

File = tuple[str, bytes]  # its name in errors, and what is in it
Result = np.ndarray | ImageError  # (channels, height, width), uint8
Processes = queue.SimpleQueue[subprocess.Popen[bytes]]


def decode(
    files: Iterable[File], count: int, resolution: int | None, channels: int | None
) -> Generator[tuple[str, Result]]:
    """Yield the name of each file and its pixels, or why it has none.

    Args:
        count: how many files there are.
        resolution, channels: as `images.load` takes them.
    """
    if count <= FILES:  # sooner done than a process is started
        for name, data in files:
            yield name, _decode(name, data, resolution, channels)
        return
    size = min(os.cpu_count() or 1, -(-count // FILES))
    with contextlib.ExitStack() as stack:
        callers = stack.enter_context(ThreadPoolExecutor(size))  # each waits for one process
        free: Processes = queue.SimpleQueue()
        for _ in range(size):
            free.put(stack.enter_context(_worker(resolution, channels)))
        asked: deque[Future[list[tuple[str, Result]]]] = deque()
        for chunk in _chunks(files):
            asked.append(callers.submit(_ask, free, chunk))
            if len(asked) > size:  # no more is held in memory
                yield from asked.popleft().result()
        for answer in asked:
            yield from answer.result()


def _decode(name: str, data: bytes, resolution: int | None, channels: int | None) -> Result:
    try:
        image = pixels.decode(data, name)
    except ImageError as error:
        return error
    return pixels.array(image, resolution, channels or len(image.getbands()))


def _chunks(files: Iterable[File]) -> Iterator[list[File]]:
    chunk: list[File] = []
    size = 0
    for name, data in files:
        chunk.append((name, data))
        size += len(data)
        if len(chunk) == FILES or size >= BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# ---------------------------------------------------------------------------------------------
# Both ends of the pipe: a line of JSON, then bytes of the lengths that it tells


@contextlib.contextmanager
def _worker(resolution: int | None, channels: int | None) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-W", "ignore", "-c", START]
    command += [json.dumps(sys.path), json.dumps([resolution, channels])]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # one for each core would be idle
    process = subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE)
    try:
        yield process
    finally:
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()  # closes the pipes


def _ask(free: Processes, chunk: list[File]) -> list[tuple[str, Result]]:
    """Let the next free process decode a chunk."""
    process = free.get()
    to, back = process.stdin, process.stdout
    assert to and back, "both were made pipes"
    try:
        header = json.dumps([(name, len(data)) for name, data in chunk])
        to.write(header.encode() + b"\n" + b"".join(data for _, data in chunk))
        to.flush()
        results = [
            ImageError(told) if isinstance(told, str) else _array(back.read(math.prod(told)), told)
            for told in json.loads(back.readline())
        ]
    except (OSError, ValueError):  # of pipes; of JSON and arrays that are cut short
        raise ChildProcessError(
            f"images: a process that decoded {chunk[0][0]} or one of the {len(chunk) - 1} after it "
            "was ended; does the machine have memory enough?"
        ) from None
    finally:
        free.put(process)
    return list(zip([name for name, _ in chunk], results, strict=True))


def _array(data: bytes, shape: list[int]) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(shape)


def serve() -> None:
    """Decode what comes in until nothing more does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is told to the parent
    resolution, channels = json.loads(sys.argv[2])
    while header := sys.stdin.buffer.readline():
        results = [
            _decode(name, sys.stdin.buffer.read(length), resolution, channels)
            for name, length in json.loads(header)
        ]
        told = [str(r) if isinstance(r, ImageError) else r.shape for r in results]
        sys.stdout.buffer.write(json.dumps(told).encode() + b"\n")
        for result in results:
            if not isinstance(result, ImageError):
                sys.stdout.buffer.write(result.tobytes())
        sys.stdout.buffer.flush()
