"""Events of the page: each a job of the visitor who asks; errors are lines in its place."""

from __future__ import annotations

import importlib
import queue
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gradio as gr

from genkit.app import guard, jobs, parts
from genkit.app.model_index import ModelIndex

MESSAGE = 1000  # characters of an error message
PERIOD = 0.05  # seconds between two states of a result that grows
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


def import_verbs() -> None:
    """Import the modules that events use, which takes seconds, in one thread at a time.

    Imports of transformers' modules fail in several threads at once.
    """
    if _imported.is_set():
        return
    with _loading:
        for name in MODULES:
            importlib.import_module(f"genkit.{name}")
        if not _imported.is_set():
            jobs.pause_before_layers()
        _imported.set()


def load_once(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """Load a model by a function that keeps it; one at a time, so that none is loaded twice."""
    with jobs.QUEUE.aside(), _loading:
        return load(model, **options)


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


def make_stream(
    do: Callable[..., Iterator[Any]], index: ModelIndex, others: Sequence[Any] = ()
) -> Callable[..., Any]:
    """Make an event of a generator, which yields states of a result that grows.

    An error is shown as a line below the last state of the first output; the other outputs stay.
    The generator runs in a thread of its own, since gradio may continue one in any thread.

    Args:
        do: called with the index and the event's inputs, as a job of the visitor who asks.
        others: values for the other outputs if it fails before its first state.
    """

    def safe(request: gr.Request, *inputs: Any) -> Iterator[Any]:
        states: queue.SimpleQueue[Any] = queue.SimpleQueue()  # None ends them
        thread = threading.Thread(
            target=_fill, args=[states, request, do, index, inputs, others], daemon=True
        )
        thread.start()
        while True:
            waiting = [states.get()]
            while not states.empty():
                waiting.append(states.get())
            if shown := [state for state in waiting if state is not None]:
                yield shown[-1]
            if waiting[-1] is None:
                return
            time.sleep(PERIOD)

    return safe


def _fill(
    states: queue.SimpleQueue[Any],
    request: gr.Request,
    do: Callable[..., Iterator[Any]],
    index: ModelIndex,
    inputs: Sequence[Any],
    others: Sequence[Any],
) -> None:
    """Put the states of a job into a queue as they come, then None."""
    state: Any = ("", *others) if others else ""
    try:
        with _job(request, do):
            import_verbs()
            for state in do(index, *inputs):
                states.put(state)
    except BaseException as error:
        line = parts.problem(error_line(error, index))
        several = isinstance(state, tuple)
        states.put((state[0] + line, *state[1:]) if several else state + line)
    states.put(None)


def make_stop(do: Callable[..., Any]) -> Callable[[gr.Request], None]:
    """Make an event that ends what a visitor has started by the event of a function."""

    def stop(request: gr.Request) -> None:
        jobs.QUEUE.stop(_visitor(request), do.__name__)

    return stop


def _job(request: gr.Request, do: Callable[..., Any]) -> AbstractContextManager[None]:
    """Return the context of a job of the visitor who asks."""
    visitor, scope = _visitor(request), request.request.scope
    queued = scope["path"].rstrip("/").endswith("/queue/join")
    heard = (lambda: jobs.QUEUE.is_heard(visitor)) if queued else scope[guard.HEARD]
    return jobs.QUEUE.job(visitor, heard, do.__name__)


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
