"""Decode image files in several processes, in order.

Threads would wait for Python's lock, which small images hold most of the time. The processes do not
import the script that started them, so it needs no `__main__` guard; and they end when it does,
however it ends, because then their input ends. They have a limit of memory and of time, so that a
file made to exhaust either, or to crash a decoder, is an image error like any other.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from subprocess import PIPE
from typing import IO, Any

import numpy as np
from PIL import Image

from genkit.data import pixels
from genkit.data.pixels import ImageError, UnsuitableError

FILES, BYTES = 256, 1 << 22  # sent to a process at a time, at most (and one file at least)
PIXELS = 1 << 26  # bytes of results sent back at a time, at most (and one result at least)
SECONDS = 10  # of CPU time for a file of up to pixels.MAX_PIXELS
MIB = 512  # of memory, and BYTES_A_PIXEL more for each of max_pixels
BYTES_A_PIXEL = 20
CRASHES = {signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE}
ERRORS = {kind.__name__: kind for kind in (ImageError, UnsuitableError)}
START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])  # so that genkit is the same there
from genkit.data import workers
workers.serve_decoder()
"""

File = tuple[str, bytes]  # name, for errors, and content
Result = np.ndarray | ImageError  # (channels, height, width), uint8


@dataclass(frozen=True)
class DecodeOptions:
    """How files are decoded; see `images.load_images`."""

    resolution: int | None = None
    channels: int | None = None
    max_pixels: int = pixels.MAX_PIXELS
    max_bytes: int = pixels.MAX_BYTES


def decode_files(
    files: Iterable[File], count: int, options: DecodeOptions
) -> Generator[tuple[str, Result]]:
    """Yield the name of each file with its pixels, or with the error of decoding it.

    Args:
        count: number of files.
    """
    size = min(os.cpu_count() or 1, -(-count // FILES))
    with contextlib.ExitStack() as stack:
        callers = stack.enter_context(ThreadPoolExecutor(size))  # each waits for one process
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(size):
            free.put(stack.enter_context(contextlib.closing(_Worker(options))))
        pending: deque[Future[tuple[list[tuple[str, Result]], list[File]]]] = deque()
        for chunk in itertools.chain(_chunks(files), [[]]):
            if chunk:
                pending.append(callers.submit(_decode_chunk, free, chunk))
            while len(pending) > (size if chunk else 0):  # so that memory stays small
                done, rest = pending.popleft().result()
                if rest:
                    pending.appendleft(callers.submit(_decode_chunk, free, rest))
                yield from done


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


def _decode_chunk(
    free: queue.SimpleQueue[_Worker], chunk: list[File]
) -> tuple[list[tuple[str, Result]], list[File]]:
    """Decode a chunk in the next free process, file by file if it crashed at one of them.

    Returns:
        Results of the first files, and the files that are left.
    """
    worker = free.get()
    try:
        results = worker.decode(chunk) or _decode_one_by_one(worker, chunk)
    finally:
        free.put(worker)
    names = [name for name, _ in chunk]
    return list(zip(names, results, strict=False)), chunk[len(results) :]


def _decode_one_by_one(worker: _Worker, chunk: list[File]) -> list[Result]:
    results: list[Result] = []
    size = 0
    for name, data in chunk:
        if size <= PIXELS:
            why = f"it crashes the decoder, or takes longer than {SECONDS} s"
            crash = ImageError(f"{name} cannot be decoded: {why}")
            results += worker.decode([(name, data)]) or [crash]
            size += _count_bytes(results[-1])
    return results


def _count_bytes(result: Result) -> int:
    return result.nbytes if isinstance(result, np.ndarray) else 0


# ---------------------------------------------------------------------------------------------
# Both ends of the pipe: a line of JSON with lengths or shapes, then the bytes


class _Worker:
    """A process that decodes files; it is started anew when it crashes."""

    def __init__(self, options: DecodeOptions) -> None:
        command = [sys.executable, "-P", "-W", "ignore", "-c", START]
        self.command = [*command, json.dumps(sys.path), json.dumps(asdict(options))]
        self._start()

    def _start(self) -> None:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # one for each core would be idle
        self._process = subprocess.Popen(self.command, env=environment, stdin=PIPE, stdout=PIPE)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # of what was not sent yet
                pipe.close()
        self._process.wait()

    def decode(self, chunk: list[File]) -> list[Result] | None:
        """Decode the first files, one at least; None if it crashed, and was started anew.

        Raises:
            ChildProcessError: the process ended for another reason.
        """
        to, back = self._process.stdin, self._process.stdout
        assert to and back, "both were made pipes"
        try:
            header = json.dumps([(name, len(data)) for name, data in chunk])
            to.write(header.encode() + b"\n" + b"".join(data for _, data in chunk))
            to.flush()
            return [_read_result(back, report) for report in json.loads(back.readline())]
        except (OSError, ValueError):  # of a broken pipe; of JSON and arrays that are cut short
            self.close()
            if -self._process.returncode not in CRASHES:
                raise ChildProcessError(
                    f"images: a process that decoded {chunk[0][0]} or one of the {len(chunk) - 1} "
                    "after it was killed; the machine may have too little memory"
                ) from None
        self._start()
        return None


def _read_result(pipe: IO[bytes], report: list[Any]) -> Result:
    """Read an image of the shape that a decoder reports, or the error that it reports instead."""
    if report[0] in ERRORS:
        return ERRORS[report[0]](report[1])
    return np.frombuffer(pipe.read(math.prod(report)), np.uint8).reshape(report)


def serve_decoder() -> None:
    """Decode files from the input until it ends; the main program of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    options = DecodeOptions(**json.loads(sys.argv[2]))
    most = (MIB << 20) + BYTES_A_PIXEL * options.max_pixels
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = options.max_pixels
    while header := sys.stdin.buffer.readline():
        files = [(name, sys.stdin.buffer.read(length)) for name, length in json.loads(header)]
        results: list[Result] = []
        size = 0
        for name, data in files:
            results.append(_decode_file(name, data, options))
            size += _count_bytes(results[-1])
            if size > PIXELS:
                break
        signal.setitimer(signal.ITIMER_PROF, 0)
        reports = [_report(result) for result in results]
        sys.stdout.buffer.write(json.dumps(reports).encode() + b"\n")
        for result in results:
            if not isinstance(result, ImageError):
                sys.stdout.buffer.write(result.tobytes())
        sys.stdout.buffer.flush()


def _report(result: Result) -> list[Any]:
    if isinstance(result, ImageError):
        return [type(result).__name__, str(result)]
    return list(result.shape)


def _decode_file(name: str, data: bytes, options: DecodeOptions) -> Result:
    seconds = SECONDS * max(1, options.max_pixels / pixels.MAX_PIXELS)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
    try:
        image = pixels.decode_image(data, name, options.max_pixels, options.max_bytes)
        return pixels.image_to_array(
            image, options.resolution, options.channels or len(image.getbands())
        )
    except ImageError as error:
        return error
    except MemoryError:
        return ImageError(f"{name} cannot be decoded: it needs too much memory")
