"""Components and HTML of all tabs, and checks of what their fields hold."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

if TYPE_CHECKING:
    import torch


LONGEST = 20_000  # characters of a text that is sent
SEEDS = 2**53  # up to which a browser represents every whole number


def problem(text: str) -> str:
    """Format an error message."""
    return f'<p class="problem" role="alert">{html.escape(text)}</p>'


def hint(text: str) -> str:
    """Format a hint."""
    return f'<p class="hint">{text}</p>'


def waiting(text: str) -> str:
    """Format a line while there is no result."""
    return f'<p class="hint busy" role="status">{html.escape(text)} …</p>'


# ---------------------------------------------------------------------------------------------
# What fields hold, as the browser sends it


def check_length(name: str, text: Any) -> str:
    """Return a text that is not too long.

    Raises:
        ValueError: it is no text, or too long.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {text!r:.100}")
    if len(text) > LONGEST:
        raise ValueError(f"{name} has {len(text):,} characters; the most is {LONGEST:,}")
    return text


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """Return a number within its bounds, both of which are allowed.

    Raises:
        ValueError: it is none.
    """
    bounds = f"a number from {low:,} to {high:,}"
    if value is None or value == "":
        raise ValueError(f"{name} is empty; give {bounds}")
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name} must be {bounds}, got {value!r:.100}")
    return value


def check_count(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number within its bounds, both of which are allowed.

    Raises:
        ValueError: it is none.
    """
    found = check_number(name, value, low, high)
    if found != int(found):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(found)


def check_seed(value: Any, name: str = "Seed") -> int:
    """Return a seed.

    Raises:
        ValueError: it is none.
    """
    return check_count(name, value, 0, SEEDS)


# ---------------------------------------------------------------------------------------------
# Components


def chooser(names: Sequence[str], label: str = "Model") -> gr.Dropdown:
    """Make a menu of models or runs."""
    return gr.Dropdown(list(names), value=names[0] if names else None, label=label)


def seed_box(value: int = 0, label: str = "Seed") -> gr.Number:
    """Make a box for a seed."""
    return gr.Number(value, label=label, precision=0, minimum=0, maximum=SEEDS, min_width=90)


def canvas(name: str, value: str = "", **options: Any) -> gr.HTML:
    """Make a component for HTML, in the page's own style."""
    return gr.HTML(value, elem_id=name, apply_default_css=False, **options)


def busy(name: str, text: str) -> str:
    """Return JavaScript that shows a line until there is a result, and scrolls to it."""
    return f"() => genkit.begin({json.dumps('#' + name)}, {json.dumps(text)})"


def loading(outputs: int) -> str:
    """Return JavaScript that says in the first of the outputs which model loads, and empties all.

    Its input is the model's name.
    """
    return f"(model) => [genkit.loading(model), ...Array({outputs - 1}).fill('')]"


def add_copy(selector: str, file: str) -> None:
    """Build buttons that copy a text of the page, and save it as a file.

    Args:
        selector: CSS, of the element that holds the text.
        file: the name that the browser saves it by.
    """
    for label, call in (("Copy", "copy"), ("Download", "save")):
        button = gr.Button(label, size="sm", scale=0, min_width=90)
        arguments = json.dumps([selector, file])
        button.click(None, js=f"() => genkit.{call}(...{arguments})", api_name=False)


def add_download(name: str, file: str) -> None:
    """Build a button that saves the images of a canvas as one PNG."""
    button = gr.Button("Download", size="sm", scale=0, min_width=90)
    arguments = json.dumps([f"#{name}", file])
    button.click(None, js=f"() => genkit.saveImages(...{arguments})", api_name=False)


# ---------------------------------------------------------------------------------------------
# Images


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
