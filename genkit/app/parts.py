"""Code shared by the tabs: models by name, errors as one line, images as HTML."""

from __future__ import annotations

import base64
import functools
import html
import importlib
import io
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from genkit.app import guard, jobs
from genkit.app.model_index import ModelIndex

if TYPE_CHECKING:
    import torch


LONGEST = 20_000  # characters of a text that is sent
MESSAGE = 1000  # characters of an error message
SEEDS = 2**53  # up to which a browser represents every whole number
LIVE: dict[str, Any] = {  # of events that follow a drag: only the last position matters
    "queue": False,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
MODULES = (
    *("text.explain", "text.generation", "text.alternatives", "text.pages", "qa.answering"),
    *("vision.sampling", "vision.latent", "vision.denoising", "metrics.collapse"),
)
_loading = threading.Lock()


def import_verbs() -> None:
    """Import the modules that events use, which takes seconds, in one thread at a time.

    Imports of transformers' modules fail in several threads at once.
    """
    with _loading:
        _import_verbs()


@functools.cache
def _import_verbs() -> None:
    for name in MODULES:
        importlib.import_module(f"genkit.{name}")
    jobs.pause_before_layers()


def load_once(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """Load a model by a function that keeps it; one at a time, so that none is loaded twice."""
    with jobs.QUEUE.aside(), _loading:
        return load(model, **options)


def make_event(
    do: Callable[..., Any], index: ModelIndex, others: Sequence[Any] = ()
) -> Callable[..., Any]:
    """Make an event of a function; an error is shown as a line in the event's first output.

    Args:
        do: called with the index and the event's inputs, as a job of the visitor who asks.
        others: values for the other outputs in case of an error.
    """

    def safe(request: gr.Request, *inputs: Any) -> Any:
        scope = request.request.scope
        visitor = guard.address(scope), request.session_hash or ""
        queued = scope["path"].rstrip("/").endswith("/queue/join")
        heard = (lambda: jobs.QUEUE.is_heard(visitor)) if queued else scope[guard.HEARD]
        try:
            with jobs.QUEUE.job(visitor, heard):
                import_verbs()
                return do(index, *inputs)
        except BaseException as error:  # a tokenizer's regular expression may panic
            line = problem(_error_line(error))
            return (line, *others) if others else line

    return safe


def _error_line(error: BaseException) -> str:
    """Write an error in one line; an unexpected one is also printed with its traceback."""
    text = " ".join(str(error).split())[:MESSAGE]
    if isinstance(error, ValueError | OSError | jobs.DroppedError):
        return text
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}"


def problem(text: str) -> str:
    """Format an error message."""
    return f'<p class="problem" role="alert">{html.escape(text)}</p>'


def hint(text: str) -> str:
    """Format a hint."""
    return f'<p class="hint">{text}</p>'


def check_length(name: str, text: str) -> str:
    """Return a text that is not too long.

    Raises:
        ValueError: it is too long.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{name} has {len(text):,} characters; the most is {LONGEST:,}")
    return text


def chooser(names: Sequence[str], label: str = "Model") -> gr.Dropdown:
    """Make a menu of models or runs."""
    return gr.Dropdown(list(names), value=names[0] if names else None, label=label)


def seed_box(value: int = 0, label: str = "Seed") -> gr.Number:
    """Make a box for a seed."""
    return gr.Number(value, label=label, precision=0, minimum=0, maximum=SEEDS, min_width=90)


def canvas(name: str, value: str = "") -> gr.HTML:
    """Make a component for HTML, in the page's own style."""
    return gr.HTML(value, elem_id=name, apply_default_css=False)


def picture(image: torch.Tensor, caption: str = "", wide: int = 0) -> str:
    """Format an image, pixel by pixel, with a caption.

    Args:
        image: in [-1, 1], (channels, height, width).
        wide: its width in the page, in pixels (default: its own, at least 64).
    """
    from PIL import Image

    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    text = html.escape(caption)
    below = f"<figcaption>{text}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{text}" src="{data_url(file.getvalue())}" '
        f'style="width: {wide or max(64, image.shape[-1])}px">{below}</figure>'
    )


def data_url(png: bytes) -> str:
    """Return a data URL that holds a PNG."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def strip(pictures: Sequence[str]) -> str:
    """Lay images side by side, as many as fit."""
    return f'<div class="strip">{"".join(pictures)}</div>'
