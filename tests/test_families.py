"""The table of all families: its figures, and rows that hold for one way to take them only."""

import json

import numpy as np
import pytest
import torch
from builders import benchmark
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from genkit.data import images
from genkit.hub import vendoring
from genkit.metrics.features import Classifier, extract_cached
from genkit.models import gan

families = benchmark("families")
DIGITS = images.load_images("digits")
PREPROCESSING = {
    "size": {"height": 8, "width": 8},
    "do_resize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


@pytest.fixture(scope="module")
def extractor():
    names = dict(enumerate(DIGITS.names))
    shape = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(num_channels=1, id2label=names, **shape)
        model = ResNetForImageClassification(config).eval()
    return Classifier(model, ViTImageProcessorPil(**PREPROCESSING), "tiny")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GAN that is told classes, whose raw weights lie beside the averaged."""
    folder = tmp_path_factory.mktemp("families") / "gan"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, raw = (gan.Generator((1, 8, 8), 4, widths=(8,), patch=4, labels=10) for _ in range(2))
    vendoring.save_pipeline(gan.GANPipeline(one.eval()), folder)
    raw.save_pretrained(folder / "generator", variant=gan.RAW)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 12.5}) + "\n")
    return folder


def test_labels_are_in_the_datas_proportions_wherever_they_are_cut():
    labels = families.spread(DIGITS, 1000)
    real = np.bincount(DIGITS.classes(np.arange(len(DIGITS))).numpy()) / len(DIGITS)
    assert np.abs(np.bincount(labels) / 1000 - real).max() < 2e-3
    assert np.abs(np.bincount(labels[:500]) / 500 - real).max() < 0.05


def test_real_images_are_at_no_distance_from_themselves(extractor):
    real = extract_cached(DIGITS, extractor)
    found = families.figures(real, real, 10)
    assert found["distance"] == pytest.approx(0, abs=1e-4)
    assert found["coverage"] == found["precision"] == 1
    assert 0 <= found["entropy"] <= 1


def test_raw_weights_are_not_counted(model):
    generator = gan.load_gan(model).generator
    assert families.count_parameters(model) == sum(p.numel() for p in generator.parameters())


def test_a_row_is_kept_for_one_protocol(model, extractor):
    real = extract_cached(DIGITS, extractor)
    found = families.row("gan", model, 60, DIGITS, real, extractor)
    assert found.keys() == set(families.COLUMNS)
    assert (found["images"], found["evaluations"], found["training s"]) == (60, 1, 12.5)
    kept = json.loads((model / "families.json").read_text())
    kept["figures"]["distance"] = 1234.0
    (model / "families.json").write_text(json.dumps(kept))
    assert families.row("gan", model, 60, DIGITS, real, extractor)["distance"] == 1234
    assert families.row("gan", model, 50, DIGITS, real, extractor)["distance"] < 1234
