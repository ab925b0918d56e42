"""Dreams and images of units: what is raised, what stays, and what does not depend on the rest."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import genkit
from genkit import cli
from genkit.metrics.features import Classifier
from genkit.vision import dreams, filters
from genkit.vision.differentiable import load_differentiable

SIDE = 48
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}
TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "image_size": SIDE,
    "patch_size": 8,
}
WINDOWS = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
NETWORKS = {
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, layer_type="basic", num_labels=4, **STAGES),
    ),
    "convnext": (ConvNextForImageClassification, ConvNextConfig(num_labels=4, **STAGES)),
    "vit": (ViTForImageClassification, ViTConfig(num_labels=4, **TOKENS)),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(num_labels=4, **TOKENS)),
    "swin": (
        SwinForImageClassification,
        SwinConfig(num_labels=4, image_size=SIDE, patch_size=4, **WINDOWS),
    ),
}
NAMES = {0: "daisy", 1: "tabby, tabby cat", 2: "volcano", 3: "castle"}
SHORT = {"octaves": 2, "steps": 2, "jitter": 4}


def make_classifier(network: str = "resnet", side: int = SIDE) -> Classifier:
    build, config = NETWORKS[network]
    config.id2label = NAMES
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(config).eval()
    processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.25],
    )
    return Classifier(model, processor, network)


@pytest.fixture(scope="module")
def resnet() -> Classifier:
    return make_classifier()


def photo(height: int = 60, width: int = 83, channels: int = 3) -> np.ndarray:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.asarray(levels)


# ---- dreams


@pytest.mark.parametrize("network", NETWORKS)
def test_a_dream_raises_the_activation_at_the_image_s_own_size(network):
    record = genkit.dream(photo(), model=make_classifier(network), step_size=0.005, **SHORT)
    assert record.after > record.before
    assert record.image.size == (83, 60)
    assert str(record).startswith(f"dream of {record.layer}: 83 x 60, 2 octaves of 2 steps")


def test_a_guide_raises_the_match_with_its_features(resnet):
    options = {"model": resnet, "guide": photo(40, 40), "step_size": 0.005}
    record = genkit.dream(photo(), **options, **SHORT)
    assert record.guided and record.after > record.before
    assert np.asarray(record.image).tolist() != pixels_of(
        genkit.dream(photo(), model=resnet, step_size=0.005, **SHORT)
    )


def pixels_of(record: dreams.Dream) -> list:
    return np.asarray(record.image).tolist()


def test_the_match_is_that_of_the_best_place_of_the_guide_for_each_place(resnet, monkeypatch):
    classifier = load_differentiable(resnet)
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    features = dreams._features(classifier, 1, photo(40, 40))
    found = dreams.one_map(classifier, pixels, 1)
    rows = found.as_map(found.state)[0].flatten(1).T
    expected = (rows @ features).max(1).values.mean() / len(features)
    for rows_at_once in (dreams.ROWS, 7):
        monkeypatch.setattr(dreams, "ROWS", rows_at_once)
        match, _ = dreams._Goal(classifier, 1, features)(pixels)
        torch.testing.assert_close(match, expected)


def test_a_dream_depends_on_its_seed_alone_and_reads_no_global_state(resnet):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = genkit.dream(photo(), model=resnet, seed=3, **SHORT)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert pixels_of(genkit.dream(photo(), model=resnet, seed=3, **SHORT)) == pixels_of(first)
    assert pixels_of(genkit.dream(photo(), model=resnet, seed=4, **SHORT)) != pixels_of(first)


def test_no_steps_give_the_image_back(resnet):
    record = genkit.dream(photo(), model=resnet, steps=0, octaves=2)
    assert pixels_of(record) == photo().tolist()
    assert record.after == record.before


def test_a_grey_image_stays_grey(resnet):
    record = genkit.dream(photo(channels=1), model=resnet, **SHORT)
    assert record.image.mode == "L" and record.after > record.before
    assert np.asarray(record.image).tolist() != photo(channels=1)[..., 0].tolist()


def test_the_model_is_left_as_it_was(resnet):
    resnet.model.train()
    weights = {name: value.clone() for name, value in resnet.model.state_dict().items()}
    genkit.dream(photo(), model=resnet, **SHORT)
    genkit.visualize(resnet, unit=0, steps=1)
    assert resnet.model.training and all(p.requires_grad for p in resnet.model.parameters())
    assert all(p.grad is None for p in resnet.model.parameters())
    assert all(torch.equal(weights[name], v) for name, v in resnet.model.state_dict().items())
    resnet.model.eval()


def test_octaves_end_at_the_image_s_size_and_grow_by_their_factor(resnet):
    sizes = dreams.octave_sizes(load_differentiable(resnet), torch.zeros(1, 3, 128, 256), 4, 1.5)
    assert sizes == [(38, 76), (57, 114), (85, 171), (128, 256)]


def test_a_larger_image_is_shrunk_to_the_size_and_a_smaller_one_kept(resnet):
    record = genkit.dream(photo(90, 120), model=resnet, size=60, octaves=1, steps=1)
    assert record.image.size == (60, 45)
    record = genkit.dream(photo(40, 50), model=resnet, size=60, octaves=1, steps=1)
    assert record.image.size == (50, 40)


def test_a_step_is_as_large_as_it_says_and_follows_the_image_when_it_is_rolled():
    class Sum:
        def __call__(self, pixels):
            return (pixels**3).sum(), ""

    pixels = 0.4 + 0.2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = dreams.take_step(Sum(), pixels, [0, 0], 0.01)
    assert (changed - pixels).abs().mean() == pytest.approx(0.01, rel=1e-4)
    # a shift by whole cells of the gradient's pyramid
    shifted = dreams.take_step(Sum(), pixels, [8, 4], 0.01)
    torch.testing.assert_close(
        shifted[..., 8:-8, 8:-8], changed[..., 8:-8, 8:-8], rtol=0, atol=0.02
    )


def test_levels_of_a_gradient_are_equally_strong_whatever_they_were():
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    wave = torch.linspace(-3, 3, 64).sin().expand(1, 1, 64, 64)
    strong, weak = (dreams.equalize(noise + wave * factor) for factor in (1000, 0.001))
    for made in (strong, weak):
        coarse = dreams.resize(made, (16, 16)).std()
        assert 0.5 < coarse < 3
    zero = torch.zeros(1, 3, 8, 8)
    assert torch.equal(dreams.equalize(zero), zero)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"octaves": 0}, "octaves must be a whole number from 1 to 20, got 0"),
        (
            {"octaves": 4},
            "octaves: the first of 4 has 30 x 22 pixels.*at least; give 2, or a large",
        ),
        ({"octave_scale": 1.0}, "octave_scale must be a number from 1.05 to 4, got 1.0"),
        ({"steps": -1}, "steps must be a whole number from 0"),
        ({"steps": True}, "steps must be a whole number from 0"),
        ({"step_size": 0.0}, "step_size must be a number"),
        ({"step_size": float("nan")}, "step_size must be a number"),
        ({"step_size": 2}, "step_size must be a number from 1e-05 to 1, got 2"),
        ({"jitter": 1.5}, "jitter must be a whole number"),
        ({"size": 4}, "size must be a whole number from 8"),
        ({"size": 40, "octaves": 1}, "image: 40 x 29 pixels; the shorter side must have 32"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"layer": 9, "octaves": 1}, "layer must be 0 to 4, or a module, got 9"),
        (
            {"layer": "resnet.encodr", "octaves": 1},
            "no module 'resnet.encodr'; the nearest: resnet",
        ),
        ({"guide": "no.png", "octaves": 1}, "guide: 'no.png'"),
        ({"num_octaves": 3}, "num_octaves is called octaves here"),
    ],
)
def test_what_cannot_be_dreamed_is_named(resnet, options, message):
    with pytest.raises(ValueError, match=message):
        genkit.dream(photo(), model=resnet, **options)


def test_an_image_too_large_is_refused(resnet, monkeypatch):
    monkeypatch.setattr(dreams, "AREA", 4000)
    with pytest.raises(ValueError, match="83 x 60 are more than 4,000 pixels; give size="):
        genkit.dream(photo(), model=resnet)


# ---- units


@pytest.mark.parametrize("network", NETWORKS)
def test_images_raise_channels_and_classes(network):
    model = make_classifier(network)
    for options in ({"unit": [5, 6], "layer": 1}, {"target": ["tabby cat", 3]}):
        record = genkit.visualize(model, steps=12, **options)
        assert all(unit.after > unit.before for unit in record.units)
        assert [unit.image.size for unit in record.units] == [(SIDE, SIDE)] * 2
    assert [unit.name for unit in record.units] == ["tabby, tabby cat", "castle"]


def test_a_unit_in_a_list_equals_it_alone(resnet):
    options = {"layer": 2, "steps": 3}
    together = genkit.visualize(resnet, unit=[1, 4, 7], seed=5, **options)
    alone = genkit.visualize(resnet, unit=4, seed=6, **options)
    assert alone.units[0] == together.units[1]
    other = genkit.visualize(resnet, unit=4, seed=7, **options)
    assert other.units[0].image != alone.units[0].image


def test_without_a_unit_six_channels_of_four_layers_are_drawn(resnet, tmp_path):
    record = genkit.visualize(resnet, steps=1, size=32)
    assert record.columns == 6 and len(record.units) == 24
    names = [f"hidden state {layer} of 4, channel 0" for layer in (1, 2, 3, 4)]
    assert [unit.name for unit in record.units[::6]] == names
    record.save(tmp_path / "units.jpg")
    with Image.open(tmp_path / "units.jpg") as picture:
        assert picture.format == "JPEG" and picture.width > 6 * 84
    with pytest.raises(ValueError, match=r"must end in one of \.png"):
        record.save(tmp_path / "units.txt")


def test_grey_images_have_one_channel_and_a_module_can_be_named(resnet):
    record = genkit.visualize(resnet, layer="resnet.embedder", unit=3, grey=True, steps=2)
    assert record.units[0].image.mode == "L"
    assert record.units[0].caption == "embedder: 3"


def test_an_image_of_no_spectrum_is_grey_and_transformations_stay_in_range():
    flat = filters.to_pixels(torch.zeros(2, 3, 9, 5, 2), 9)
    assert torch.equal(flat, torch.full((2, 3, 9, 9), 0.5))
    pixels = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    moved = filters.transform(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape and moved.min() >= 0 and moved.max() <= 1
    assert not torch.equal(moved, pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": 99}, "unit must be 0 to 23 in hidden state 3 of 4, got 99"),
        ({"unit": "3"}, "unit must be 0 to 23"),
        ({"unit": []}, "unit is an empty list"),
        ({"target": "daisi"}, "no class 'daisi'; it has 4, the nearest: daisy"),
        ({"target": 4}, "target must be 0 to 3, got 4"),
        ({"target": 1, "unit": 1}, "leave unit and layer out"),
        ({"layer": "resnet.encoder.x"}, "the nearest: resnet.encoder"),
        ({"layer": 8, "unit": 0}, "layer must be 0 to 4"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"size": 16}, "size must be 32 or more for resnet, got 16"),
        ({"unit": [1, 2], "seed": [1]}, "seed: 1 seeds for 2 units"),
        ({"n_steps": 4}, "n_steps is called steps here"),
    ],
)
def test_what_cannot_be_drawn_is_named(resnet, options, message):
    with pytest.raises(ValueError, match=message):
        genkit.visualize(resnet, **options)


# ---- commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, path = make_classifier(), tmp_path_factory.mktemp("model")
    made.model.save_pretrained(path)
    made.processor.save_pretrained(path)
    return path


def test_commands_write_pictures_and_print_records(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo()).save("photo.png")
    words = ["--model", str(folder), "--octaves", "2", "--steps", "1", "--layer", "2", "--json"]
    cli.main(["dream", "photo.png", *words])
    record = json.loads(capsys.readouterr().out)
    assert (record["layer"], record["output"]) == ("hidden state 2 of 4", "dream.png")
    with Image.open("dream.png") as picture:
        assert picture.size == (83, 60)
    cli.main(["visualize", str(folder), "--target", "daisy", "--target", "3", "--steps", "1"])
    assert "daisy: " in capsys.readouterr().out
    cli.main(["visualize", str(folder), "--layer", "1", "--unit", "3", "--steps", "1", "--grey"])
    assert "hidden state 1 of 4, channel 3: " in capsys.readouterr().out
    with Image.open("units.png") as picture:
        assert picture.width >= 84
