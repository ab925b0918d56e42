"""Records show themselves in notebooks."""

import pytest
import torch
from PIL import Image

from genkit.hub.pushing import Pushed
from genkit.metrics.judge import Evaluation
from genkit.qa.answering import Answer
from genkit.text.alternatives import Alternatives, Choice, Option, TokenSpan
from genkit.text.correction import Correction
from genkit.text.explain import BeamTree, NextTokens, TemperatureSeries, TemperatureText
from genkit.text.generation import Generation
from genkit.text.perplexity import Perplexity
from genkit.text.rescoring import Ranked
from genkit.vision.denoising import DenoisingTrajectory, Inversion, LossByTime, NoisingTrajectory
from genkit.vision.imagining import Picture
from genkit.vision.inpainting import Inpainting
from genkit.vision.latent import Interpolation, Plane, Scatter, Shift, Truncation
from genkit.vision.projection import Projection
from genkit.vision.sampling import Samples

TEXTS = (
    *(Alternatives, Answer, BeamTree, Correction, Evaluation, Generation, NextTokens, Perplexity),
    *(Pushed, Ranked, TemperatureSeries, TemperatureText),
)
PICTURES = (
    *(DenoisingTrajectory, Inpainting, Interpolation, Inversion, LossByTime, NoisingTrajectory),
    *(Picture, Plane, Projection, Samples, Scatter, Shift, Truncation),
)
WRITTEN = Generation("a <b>", " & \n c", [1], [-1.0], -1.0, "length", 1)


@pytest.mark.parametrize("record", TEXTS)
def test_records_of_text_show_html(record):
    assert hasattr(record, "_repr_html_") and not hasattr(record, "_repr_png_")


@pytest.mark.parametrize("record", PICTURES)
def test_records_of_pictures_show_them(record):
    assert hasattr(record, "_repr_png_") and not hasattr(record, "_repr_html_")


def test_a_text_is_escaped_and_keeps_its_lines():
    shown = WRITTEN._repr_html_()
    assert "a &lt;b&gt; &amp; \n c" in shown and "pre-wrap" in shown


def test_an_answer_is_marked_in_its_sentence():
    context = "First. It is <here> & there."
    whole = (0, len(context))
    record = Answer("Where?", "<here>", 1.0, 13, 19, whole, None, None, context)
    assert record._repr_html_() == "<p>It is <mark>&lt;here&gt;</mark> &amp; there.</p>"


def test_alternatives_are_a_page_in_a_frame():
    choice = Choice(1, "<x>", -1.0, 1, [Option(1, "<x>", -1.0)])
    shown = Alternatives("a", [TokenSpan("<x>", [choice])])._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and shown.count("<") == 2


def test_pictures_are_png():
    images = torch.zeros(2, 1, 8, 8)
    samples = Samples(images, [0, 1], None, None, None, None, 1, 0.1, "model")
    picture = Picture("a", None, Image.new("RGB", (8, 8)), 0, 1, None, "ddim", 1, 0.1, "model")
    row = Truncation(images[None], [None])
    for record in (samples, picture, row):
        assert record._repr_png_().startswith(b"\x89PNG\r\n")
