"""Events of the page: each a job of the visitor who asks; errors are lines in its place."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import re
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gradio as gr

from genkit.app import guard, jobs, parts
from genkit.app.model_index import ModelIndex

MESSAGE = 1000  # characters of an error message
PERIOD = 0.05  # seconds between two states of a result that grows
SOON = 0.3  # seconds of loading that need no words
# events read values as the browser sends them: gradio's own checks name no field, and know only the
# choices of the model before
EVENT: dict[str, Any] = {"preprocess": False, "show_progress": "hidden"}
# of events that follow a drag: only the last position matters
LIVE: dict[str, Any] = {**EVENT, "queue": False, "trigger_mode": "always_last"}
MODULES = (
    *("text.explain", "text.generation", "text.alternatives", "text.pages", "qa.answering"),
    *("vision.sampling", "vision.latent", "vision.denoising", "metrics.collapse"),
    *("vision.attribution", "vision.attacks"),
)
# arguments of verbs by the labels of their fields
LABELS = {
    "prompt": "Prompt",
    "question": "Question",
    "context": "Text",
    "seed": "Seed",
    "label": "Class",
    "max_new_tokens": "Tokens",
    "temperature": "Temperature",
    "top_p": "Top-p",
    "top_k": "Top-k",
    "beams": "Beams",
    "strategy": "Strategy",
    "scheduler": "Scheduler",
    "steps": "Steps",
    "guidance": "Guidance",
    "target": "Class",
    "method": "Method",
}
# a path from the top of a file system, in quotes or up to a space; no part of an address
PATH = re.compile(r"(?<=')/[^']+(?=')|(?<=\")/[^\"]+(?=\")|(?<![\w.:/~-])/[^\s/'\"]+/[^\s'\":;,]+")
_loading, _imported = threading.Lock(), threading.Event()
_seconds: dict[str, float] = {}  # that a model took to load when it was last loaded


def import_verbs() -> None:
    """Import the modules that events use, which takes seconds, in one thread at a time.

    Imports of transformers' modules fail in several threads at once.
    """
    if _imported.is_set():
        return
    jobs.QUEUE.tell("The page is starting")
    with _loading:
        for name in MODULES:
            importlib.import_module(f"genkit.{name}")
        if not _imported.is_set():
            jobs.pause_before_layers()
        _imported.set()


def load_once(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """Load a model by a function that keeps it; one at a time, so that none is loaded twice."""
    last = f", which took {_seconds[model]:.1f} s last time" if model in _seconds else ""
    with jobs.QUEUE.telling(f"Loading {model}{last}", SOON), jobs.QUEUE.aside(), _loading:
        start = time.monotonic()
        loaded = load(model, **options)
        seconds = time.monotonic() - start
    if seconds > SOON:  # less than that, and it was kept
        _seconds[model] = seconds
    return loaded


# ---------------------------------------------------------------------------------------------
# Events


def make_event(
    do: Callable[..., Any], index: ModelIndex, others: Sequence[Any] = (), *, verbs: bool = True
) -> Callable[..., Any]:
    """Make an event of a function; an error is shown as a line in the event's first output.

    Args:
        do: called with the index and the event's inputs, as a job of the visitor who asks.
        others: values for the other outputs in case of an error.
        verbs: whether it waits until all verbs are imported.
    """

    def safe(request: gr.Request, *inputs: Any) -> Any:
        try:
            with _job(request, do):
                if verbs:
                    import_verbs()
                return do(index, *inputs)
        except BaseException as error:  # a tokenizer's regular expression may panic
            line = parts.problem(error_line(error, index))
            return (line, *others) if others else line

    return safe


def make_job(
    do: Callable[..., Any], index: ModelIndex, others: Sequence[Any] = ()
) -> Callable[..., AsyncIterator[Any]]:
    """Make a queued event of a function; its first output says meanwhile what it waits for.

    Args:
        do: called with the index and the event's inputs, as a job of the visitor who asks.
        others: values for the other outputs while it waits, and in case of an error.
    """

    @functools.wraps(do)
    def states(*given: Any) -> Iterator[Any]:
        yield do(*given)

    return make_stream(states, index, others)


def make_stream(
    do: Callable[..., Iterator[Any]],
    index: ModelIndex,
    others: Sequence[Any] = (),
    shown: Callable[..., str] = lambda *_: "",
) -> Callable[..., AsyncIterator[Any]]:
    """Make a queued event of a generator, which yields states of a result that grows.

    What it waits for, and an error, are lines below the last state of the first output; the other
    outputs stay. The generator runs in a thread of its own.

    Args:
        do: called with the index and the event's inputs, as a job of the visitor who asks.
        others: values for the other outputs before its first state.
        shown: returns, of the inputs, what the first output holds before its first state.
    """

    async def safe(request: gr.Request, *inputs: Any) -> AsyncIterator[Any]:
        states: asyncio.Queue[Any] = asyncio.Queue()  # None ends them
        loop = asyncio.get_running_loop()

        def put(state: Any) -> None:
            loop.call_soon_threadsafe(states.put_nowait, state)

        first = (shown(*inputs), *others) if others else shown(*inputs)
        arguments = [put, first, request, do, index, inputs]
        threading.Thread(target=_fill, args=arguments, daemon=True).start()
        while True:
            waiting = [await states.get()]
            while not states.empty():
                waiting.append(states.get_nowait())
            if found := [state for state in waiting if state is not None]:
                yield found[-1]
            if waiting[-1] is None:
                return
            await asyncio.sleep(PERIOD)

    return safe


def _fill(
    put: Callable[[Any], object],
    state: Any,
    request: gr.Request,
    do: Callable[..., Iterator[Any]],
    index: ModelIndex,
    inputs: Sequence[Any],
) -> None:
    """Put the states of a job into a queue as they come, then None."""

    def tell(text: str) -> None:
        put(_with_line(state, parts.waiting(hide_paths(text, index))))

    with contextlib.suppress(RuntimeError):  # the page has ended
        try:
            with _job(request, do, tell):
                import_verbs()
                for state in do(index, *inputs):
                    put(state)
        except BaseException as error:
            put(_with_line(state, parts.problem(error_line(error, index))))
        put(None)


def _with_line(state: Any, line: str) -> Any:
    """Add a line to the first output."""
    return (state[0] + line, *state[1:]) if isinstance(state, tuple) else state + line


def make_stop(do: Callable[..., Any]) -> Callable[[gr.Request], None]:
    """Make an event that ends what a visitor has started by the event of a function."""

    def stop(request: gr.Request) -> None:
        jobs.QUEUE.stop(_visitor(request), do.__name__)

    return stop


def _job(
    request: gr.Request, do: Callable[..., Any], tell: Callable[[str], object] = jobs.no_one
) -> AbstractContextManager[None]:
    """Return the context of a job of the visitor who asks."""
    visitor, scope = _visitor(request), request.request.scope
    queued = scope["path"].rstrip("/").endswith("/queue/join")
    heard = (lambda: jobs.QUEUE.is_heard(visitor)) if queued else scope[guard.HEARD]
    return jobs.QUEUE.job(visitor, heard, do.__name__, tell)


def _visitor(request: gr.Request) -> jobs.Visitor:
    return guard.address(request.request.scope), request.session_hash or ""


# ---------------------------------------------------------------------------------------------
# Errors


def error_line(error: BaseException, index: ModelIndex) -> str:
    """Write an error in one line; an unexpected one is also printed with its traceback."""
    text = hide_paths(" ".join(str(error).split()), index)
    if isinstance(error, ValueError | OSError | jobs.DroppedError):
        return re.sub(r"\A\w+", lambda name: LABELS.get(name[0], name[0]), text)[:MESSAGE]
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}"[:MESSAGE]


def hide_paths(text: str, index: ModelIndex) -> str:
    """Write models by their names in the page, and other files by their base names."""
    folders = {entry.model: entry.name for entry in index.entries if Path(entry.model).is_dir()}
    folders |= {str(Path(model).resolve()): name for model, name in folders.items()}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, folders[folder])
    return PATH.sub(lambda path: Path(path[0]).name, text)
