"""What the tabs share: models by name, one friendly line for an error, pictures as HTML."""

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

from genkit.app import guard, work
from genkit.app.finding import ModelIndex

if TYPE_CHECKING:
    import torch


LONGEST = 20_000  # characters of a text that is sent
MESSAGE = 1000  # characters of what went wrong
SEEDS = 2**53  # whole numbers that a browser tells apart
LIVE: dict[str, Any] = {  # of what follows a finger: only the last place matters
    "queue": False,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
VERBS = ("explain", "qa", "sampling", "latent", "denoising", "monitor")
_loading = threading.Lock()


def import_verbs() -> None:
    """Import what events use, which takes seconds; transformers' modules bear one thread alone."""
    with _loading:
        _import_verbs()


@functools.cache
def _import_verbs() -> None:
    for name in VERBS:
        importlib.import_module(f"genkit.{name}")
    work.watch()


def loaded(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """Load a model, or return it if it is loaded: one at a time, so that none is loaded twice."""
    with work.DESK.aside(), _loading:
        return load(model, **options)


def event(
    do: Callable[..., Any], shelf: ModelIndex, others: Sequence[Any] = ()
) -> Callable[..., Any]:
    """Make an event of a function: what cannot work is shown as a line in its first output.

    Args:
        do: called with the shelf and the event's inputs, as a job of whoever asks.
        others: what goes to the outputs beside the first then.
    """

    def safe(request: gr.Request, *inputs: Any) -> Any:
        scope = request.request.scope
        visitor = guard.address(scope), request.session_hash or ""
        queued = scope["path"].rstrip("/").endswith("/queue/join")
        heard = (lambda: work.DESK.is_heard(visitor)) if queued else scope[guard.HEARD]
        try:
            with work.DESK.job(visitor, heard):
                import_verbs()
                return do(shelf, *inputs)
        except BaseException as error:  # of a tokenizer's regular expression, too
            line = problem(_told(error))
            return (line, *others) if others else line

    return safe


def _told(error: BaseException) -> str:
    """Say what went wrong in one line; what nobody foresaw is printed as a whole, too."""
    text = " ".join(str(error).split())[:MESSAGE]
    if isinstance(error, ValueError | OSError | work.DroppedError):
        return text
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}"


def problem(text: str) -> str:
    """Write what went wrong."""
    return f'<p class="problem" role="alert">{html.escape(text)}</p>'


def hint(text: str) -> str:
    """Write what to do."""
    return f'<p class="hint">{text}</p>'


def limited(name: str, text: str) -> str:
    """Return a text that is not too long.

    Raises:
        ValueError: it is.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{name} has {len(text):,} characters; the most is {LONGEST:,}")
    return text


def chooser(names: Sequence[str], label: str = "Model") -> gr.Dropdown:
    """Make a choice among what the page was started with."""
    return gr.Dropdown(list(names), value=names[0] if names else None, label=label)


def seed_box(value: int = 0, label: str = "Seed") -> gr.Number:
    """Make a box for a seed."""
    return gr.Number(value, label=label, precision=0, minimum=0, maximum=SEEDS, min_width=90)


def canvas(name: str, value: str = "") -> gr.HTML:
    """Make a place for HTML, in the style of the page alone."""
    return gr.HTML(value, elem_id=name, apply_default_css=False)


def picture(image: torch.Tensor, caption: str = "", wide: int = 0) -> str:
    """Write an image as it is, pixel by pixel, with a caption.

    Args:
        image: in [-1, 1], (channels, height, width).
        wide: the width in the page; small images have at least 64.
    """
    from PIL import Image

    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    text = html.escape(caption)
    below = f"<figcaption>{text}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{text}" src="{data_address(file.getvalue())}" '
        f'style="width: {wide or max(64, image.shape[-1])}px">{below}</figure>'
    )


def data_address(png: bytes) -> str:
    """Write a PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def strip(pictures: Sequence[str]) -> str:
    """Lay pictures side by side, as many as fit."""
    return f'<div class="strip">{"".join(pictures)}</div>'
