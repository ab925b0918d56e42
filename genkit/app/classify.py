"""The tab of image classifiers: what they see, which pixels say so, and how to fool them."""

from __future__ import annotations

import base64
import binascii
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from genkit.app import chapters, code, events, jobs, model_index, parts
from genkit.app.model_index import ModelIndex

if TYPE_CHECKING:
    from PIL import Image

    from genkit.vision.differentiable import DifferentiableClassifier

TOP = 5  # classes in the table
BEST = "the most probable"
METHODS = ("grad_cam", "saliency", "smooth_grad", "integrated_gradients", "occlusion")
STRENGTHS = 32  # levels of 255 by which a pixel may change, at most
PASSES = 100  # of the network, that a map or an attack takes
PREFIX = "data:image/"
FILE = "image.png"  # in the code: the page does not know what the image is called
DROP_JS = (Path(__file__).parent / "drop.js").read_text(encoding="utf-8")
DROP = (
    '<div class="drop" role="button" tabindex="0" aria-label="Drop an image, or click">'
    '<img alt="the image that was given" src="${value}"><span>Drop an image, or click</span></div>'
)
HINT = (
    "No image classifier was named. Train one with "
    "<code>genkit train classifier</code>, then start the page with its folder."
)


def tab(index: ModelIndex) -> None:
    """Build the tab."""
    chapters.add_help(
        "See which pixels speak for a class, and which changes fool the model.", "derivatives"
    )
    names = index.names(model_index.CLASSIFIER)
    if not names:
        parts.canvas("no-classifier", parts.hint(HINT))
        return
    with gr.Row():
        with gr.Column(min_width=260):
            image = gr.HTML(
                "", html_template=DROP, js_on_load=DROP_JS, elem_id="drop", apply_default_css=False
            )
        with gr.Column(min_width=260):
            model = parts.chooser(names)
            target = gr.Textbox(BEST, label="Class", max_length=200)
            method = gr.Dropdown(METHODS, value=METHODS[0], label="Method")
            explain = gr.Button("Show what speaks for it", variant="primary")
            epsilon = gr.Slider(1, STRENGTHS, 8, step=1, label="Epsilon, of 255 levels")
            fool = gr.Button("Fool the model")
            parts.add_download("classified", "classified.png")
    shown = parts.canvas("classified")
    classify = events.make_job(_classify, index)
    gr.on(
        [image.input, model.change],
        classify, [model, image], shown, api_name="classify", **events.EVENT,
    )  # fmt: skip
    for button, do, options, name in (
        (explain, _explain, [target, method], "attribute"),
        (fool, _fool, [target, epsilon], "attack"),
    ):
        button.click(None, None, shown, js=parts.busy("classified", "Computing"), api_name=False)
        event = events.make_job(do, index)
        button.click(event, [model, image, *options], shown, api_name=name, **events.EVENT)


def load_classifier(index: ModelIndex, name: str) -> DifferentiableClassifier:
    """Load a model by its name in the page."""
    from genkit.vision import differentiable

    return events.load_once(
        differentiable.load_differentiable, index.resolve(model_index.CLASSIFIER, name)
    )


def read_data_url(value: Any) -> Image.Image:
    """Decode the image that the browser sends.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    from genkit.data.pixels import decode_image

    if not isinstance(value, str) or not value:
        raise ValueError("drop an image, or choose one, first")
    start, _, data = value.partition(";base64,")
    try:
        if not start.startswith(PREFIX):
            raise ValueError
        content = base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        raise ValueError(f"Image must be a data URL of an image, got {value!r:.40}") from None
    return decode_image(content, "the image")


# ---------------------------------------------------------------------------------------------
# Events


def _classify(index: ModelIndex, name: str, given: Any) -> str:
    """Show the most probable classes."""
    import torch

    if not given:
        return ""
    classifier, image = load_classifier(index, name), read_data_url(given)
    jobs.QUEUE.claim(1, "evaluations")
    with classifier.frozen(), torch.no_grad():
        probabilities = classifier(classifier.pixels(image)[None])[0].softmax(0)
    best = probabilities.topk(min(TOP, len(probabilities)))
    rows = "".join(
        f"<tr><td>{html.escape(classifier.names[i])}</td><td>{share:.1%}</td></tr>"
        for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    return f'<div class="answer"><table><tbody>{rows}</tbody></table></div>'


def _explain(index: ModelIndex, name: str, given: Any, target: Any, method: Any) -> str:
    """Show the map of a class over the image."""
    from genkit.vision.attribution import attribute

    classifier, image = load_classifier(index, name), read_data_url(given)
    jobs.QUEUE.claim(PASSES, "evaluations")
    options: dict[str, Any] = {"method": method, "target": _target(target)}
    record = attribute(image, model=classifier.classifier, **options)
    again = code.format_code("attribute", FILE, {"model": name, **options})
    return _sheet(record.save, str(record)) + again


def _fool(index: ModelIndex, name: str, given: Any, target: Any, epsilon: Any) -> str:
    """Show an image that the model takes for another class."""
    from genkit.vision.attacks import attack_image

    classifier, image = load_classifier(index, name), read_data_url(given)
    strength = parts.check_count("Epsilon", epsilon, 1, STRENGTHS) / 255
    jobs.QUEUE.claim(PASSES, "evaluations")
    options: dict[str, Any] = {"epsilon": strength, "target": _target(target)}
    record = attack_image(image, model=classifier.classifier, **options)
    again = code.format_code("attack", FILE, {"model": name, **options})
    return _sheet(record.save_comparison, str(record)) + again


def _target(given: Any) -> str | None:
    """Return the class that is asked for; None for the most probable one."""
    named = parts.check_length("Class", given).strip()
    return None if named in ("", BEST) else named


def _sheet(save: Any, caption: str) -> str:
    """Show the picture that a record saves."""
    from genkit.notebook import as_png

    picture = parts.data_url(as_png(save))
    text = html.escape(caption)
    return (
        f'<figure><img class="sheet" alt="{text}" src="{picture}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
