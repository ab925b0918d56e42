"""Errors of every tab name a model that was removed, and no path of this machine."""

import base64
import shutil

import pytest
from app_models import MAKE

pytest.importorskip("gradio")

from genkit.app import answer, chat, classify, events, images, model_index, runs, write

KINDS = (
    "language",
    "talks",
    "reader",
    "classifier",
    "class_conditional",
    "two_latents",
    "training",
)
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
IMAGE = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
EVENTS = {
    write._redraw: ("language", "The ", 1.0),
    write._write: ("language", "The ", "sample", 1.0, 5, 0, 0.9, 0, 4),
    write._beams: ("language", "The ", "beam", 5, 4),
    answer._answer: ("reader", "who?", "the fox"),
    images._configure: ("two_latents", ""),
    images._draw_samples: ("class_conditional", "1", 0, 2, "dpm++", 3, 1.0),
    images._slide: ("two_latents", None, 0, 0.5, 0.5),
    images._walk: ("two_latents", None, 0, 1, 4),
    images._denoise: ("class_conditional", "1", 0, "dpm++", 3, 1.0),
    classify._classify: ("classifier", IMAGE),
    classify._explain: ("classifier", IMAGE, "", "saliency"),
    classify._fool: ("classifier", IMAGE, "", 8),
    runs._refresh: ("training", "linear", ""),
}


@pytest.fixture(scope="module")
def removed(tmp_path_factory):
    """Models that are in the page's menus, and no longer on the disk."""
    folder = tmp_path_factory.mktemp("models")
    for name in KINDS:
        MAKE[name](folder / name)
    index = model_index.find_models([str(folder)])
    for name in KINDS:
        shutil.rmtree(folder / name)
    return index


def line_of(error: BaseException, removed: model_index.ModelIndex) -> str:
    line = events.error_line(error, removed)
    folder = removed.entries[0].model.rpartition("/")[0]
    assert folder in removed.entries[0].model and folder not in line and "/tmp" not in line
    return line


@pytest.mark.parametrize("do", EVENTS, ids=lambda do: do.__name__)
def test_an_error_names_a_removed_model_and_no_path(removed, do):
    with pytest.raises(ValueError) as raised:
        tuple(do(removed, *EVENTS[do]))
    assert EVENTS[do][0] in line_of(raised.value, removed)


def test_an_error_of_a_chat_names_a_removed_model_and_no_path(removed):
    with pytest.raises(ValueError) as raised:
        tuple(chat._send(removed, "hello", "talks", [], "", 0, 5, 0.7, 0.9))
    assert "talks" in line_of(raised.value, removed)
