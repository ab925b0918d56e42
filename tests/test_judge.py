import dataclasses
import importlib.util
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoImageProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

import genkit
from genkit.data import images
from genkit.data.images import Images, proportional_labels
from genkit.hub import vendoring
from genkit.metrics import features
from genkit.metrics.features import Features, extract_cached, load_extractor
from genkit.metrics.fidelity import frechet_distance
from genkit.metrics.judge import Judge, compute_figures, half_sample_margins
from genkit.models import gan
from genkit.models.autoencoder import Autoencoder, AutoencoderPipeline
from genkit.models.gan import GANPipeline
from genkit.vision import evaluation
from genkit.vision.sampling import draw_samples

DIGITS = images.load_images("digits")
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


def save(model: torch.nn.Module, folder: Path, **preprocessing) -> Path:
    model.save_pretrained(folder)
    told = json.dumps(PREPROCESSING | preprocessing)
    (folder / "preprocessor_config.json").write_text(told)
    return folder


def make_resnet(names: list[str], channels: int = 1, seed: int = 0) -> ResNetForImageClassification:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNetForImageClassification(
            ResNetConfig(
                num_channels=channels,
                embedding_size=16,
                hidden_sizes=[16, 24],
                depths=[1, 1],
                layer_type="basic",
                id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
            )
        ).eval()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A classifier of digits that knows them."""
    model, rng = make_resnet(DIGITS.names).train(), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        which = rng.integers(len(DIGITS), size=128)
        logits = model(pixel_values=DIGITS.batch(which)).logits
        F.cross_entropy(logits, DIGITS.classes(which)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return save(model.eval(), tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def judge(classifier) -> Judge:
    return Judge("digits", extractor=classifier)


def digits(start: int, stop: int) -> torch.Tensor:
    return DIGITS.batch(np.arange(start, stop))


def noisy(images: torch.Tensor, amount: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + amount * noise).clamp(-1, 1)


# ---- extractors


def test_features_are_what_the_head_reads(classifier):
    extractor = load_extractor(classifier)
    found, classes = extractor(digits(0, 20))
    model = ResNetForImageClassification.from_pretrained(classifier).eval()
    processor = AutoImageProcessor.from_pretrained(classifier)
    pictures = [Image.fromarray(DIGITS.pixels[i, 0]) for i in range(20)]
    with torch.inference_mode():
        stock = processor(pictures, return_tensors="pt").pixel_values
        assert torch.allclose(model.resnet(stock).pooler_output.flatten(1), found, atol=1e-5)
        assert torch.equal(model(stock).logits.argmax(-1), classes)
    assert (classes == DIGITS.classes(np.arange(20))).double().mean() > 0.9
    assert extractor.names == DIGITS.names


def test_a_transformer_for_larger_colour_images(tmp_path):
    config = ViTConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        id2label={0: "cat", 1: "dog"},
    )
    model = ViTForImageClassification(config).eval()
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    told = {"size": {"height": 16, "width": 16}, "image_mean": mean, "image_std": std}
    extractor = load_extractor(save(model, tmp_path, **told))
    found, classes = extractor(digits(0, 3))
    pictures = [Image.fromarray(DIGITS.pixels[i, 0]).convert("RGB") for i in range(3)]
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(
        pictures, return_tensors="pt"
    ).pixel_values
    with torch.inference_mode():
        states = model.vit(pixels).last_hidden_state[:, 0]
        assert torch.allclose(states, found, atol=1e-5)
        assert torch.equal(model(pixels).logits.argmax(-1), classes)


@pytest.mark.parametrize(
    ("preprocessing", "size"),
    [
        ({"size": 20}, (20, 20)),
        ({"size": {"shortest_edge": 24}}, (24, 24)),
        ({"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": 20}, (20, 20)),
        ({"do_resize": False}, (8, 8)),
    ],
)
def test_the_size_is_what_the_processor_says(preprocessing, size, tmp_path):
    folder = save(make_resnet(["a"]), tmp_path, **preprocessing)
    assert load_extractor(folder).input_size((1, 8, 8)) == size


def test_the_hash_is_of_all_that_changes_features(tmp_path):
    def fingerprint(name, seed=0, **preprocessing):
        folder = save(make_resnet(["a", "b"], seed=seed), tmp_path / name, **preprocessing)
        return load_extractor(folder).sha256

    assert fingerprint("one") == fingerprint("elsewhere")
    others = [fingerprint("seed", seed=1), fingerprint("mean", image_mean=[0.4])]
    others.append(fingerprint("size", size={"height": 9, "width": 9}))
    others.append(fingerprint("raw", do_rescale=False))
    assert len({fingerprint("one"), *others}) == 5


def test_real_images_are_looked_at_once(classifier, monkeypatch, tmp_path):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    some = DIGITS.take(np.arange(50))
    extractor = load_extractor(classifier)
    seen = extract_cached(some, extractor)
    assert len(list(tmp_path.iterdir())) == 1

    def again(*_):
        raise AssertionError("looked again")

    with monkeypatch.context() as patch:
        patch.setattr(features, "extract", again)
        kept = extract_cached(some, load_extractor(classifier))
        assert np.array_equal(kept.features, seen.features)
        assert np.array_equal(kept.classes, seen.classes)
        for other in (DIGITS.take(np.arange(1, 51)), DIGITS.take(np.arange(49, -1, -1))):
            with pytest.raises(AssertionError, match="looked again"):
                extract_cached(other, extractor)
    backwards = extract_cached(DIGITS.take(np.arange(49, -1, -1)), extractor)
    assert np.allclose(backwards.features[::-1], seen.features, atol=1e-5)


# ---- the figures


def test_judge_gives_held_out_images_the_baseline(judge):
    """The images that made the baseline, judged as generated ones: every figure is its baseline."""
    record = judge.judge(judge.held_out_images)
    assert len(record.figures) == 10
    for figure in record.figures.values():
        assert figure.value == pytest.approx(figure.baseline, rel=1e-4, abs=1e-6)
    assert record.figures["precision"].value > 0.8
    assert record.figures["label accuracy"].value > 0.9
    assert record.figures["copies by pixels"].baseline == pytest.approx(0.01, abs=0.003)


def test_figures_are_of_features_of_the_halves(judge):
    fakes = noisy(digits(0, 300), 0.2)
    record = judge.judge(fakes)
    rounded = ((fakes + 1) * 127.5).round() / 127.5 - 1
    fake = judge.extractor(rounded)[0]
    real = judge.extractor(judge.real_images.batch(np.arange(len(judge.real))))[0]
    expected = frechet_distance(real, fake)
    assert record.figures["Frechet distance"].value == pytest.approx(expected, rel=1e-4)
    shares = np.array(list(record.classes.values()))
    assert shares.sum(0) == pytest.approx(1)
    histogram = np.abs(shares[:, 0] - shares[:, 1]).sum() / 2
    assert record.figures["class histogram"].value == pytest.approx(histogram)


def test_the_noisier_the_worse(judge):
    clean = digits(0, 200)
    records = [judge.judge(noisy(clean, amount)).figures for amount in (0, 0.3, 0.6, 1.2)]
    for name, sign in [
        ("Frechet distance", 1),
        ("precision", -1),
        ("density", -1),
        ("coverage", -1),
    ]:
        values = [sign * figures[name].value for figures in records]
        assert values == sorted(values), name
    worst = records[-1]["Frechet distance"]
    assert worst.value - worst.margin > worst.baseline


def test_one_digit_alone_has_no_recall(judge):
    ones = DIGITS.take(np.flatnonzero(DIGITS.labels == 1))
    record = judge.judge(ones)
    assert record.figures["precision"].value > 0.8
    assert record.figures["coverage"].value < 0.3
    assert record.figures["class histogram"].value > 0.8
    assert re.search(r"classes most off \(real\): 1 [\d.]+% \(", str(record))


def test_copies_are_found(judge):
    copies = judge.real_images.take(np.arange(90)).batch(np.arange(90))
    others = judge.held_out_images.batch(np.arange(100, 210))
    record = judge.judge(torch.cat([others, copies]))
    for space in ("features", "pixels"):
        assert record.figures[f"copies by {space}"].value == pytest.approx(0.45, abs=0.03)
    assert record.nearest[110:] == list(range(90))
    assert max(record.distances[110:]) < 1e-3 * np.median(record.distances[:110])


def test_training_images_may_be_others(classifier):
    order = np.random.default_rng(1).permutation(len(DIGITS))
    train, test = DIGITS.take(order[:900]), DIGITS.take(order[900:])
    judge = Judge(test, extractor=classifier, train=train)
    found = judge.judge(train.take(np.arange(50))).figures
    assert found["copies by pixels"].value == 1
    assert found["copies by pixels"].baseline < 0.03
    with pytest.raises(
        ValueError, match=r"train: .* of the data's images are among those of train"
    ):
        Judge(test, extractor=classifier, train="digits")


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_margins_cover_what_new_draws_would_give(shift):
    """As far as they go new draws spread; where the two sides are the same, not as far."""
    rng = np.random.default_rng(0)
    values, widths = [], []
    for _ in range(60):
        real, fake = (
            Features(rng.normal(size=(200, 4)), rng.integers(3, size=200)) for _ in range(2)
        )
        fake = dataclasses.replace(fake, features=fake.features + shift)
        values.append(compute_figures(real, fake, ["a", "b", "c"], 5))
        widths.append(half_sample_margins(real, fake, ["a", "b", "c"], 5, 0))
    for name in values[0]:
        drawn, told = (np.array([each[name] for each in rows]) for rows in (values, widths))
        assert (np.abs(drawn - drawn.mean()) <= told).mean() > 0.8, name
        if shift and name != "class histogram":  # whose two sides are the same
            assert 0.75 < told.mean() / (1.96 * drawn.std()) < 1.35, name


def test_judge_matches_labels_by_name(judge):
    """The accuracy is of names, in whatever order the classes of images are numbered."""
    fakes, truth = digits(0, 200), DIGITS.labels[:200]
    right = judge.judge(fakes, truth).figures["label accuracy"]
    assert right.value > 0.9
    assert judge.judge(fakes, torch.from_numpy(truth)).figures["label accuracy"] == right
    wrong = judge.judge(fakes, (truth + 1) % 10).figures["label accuracy"]
    assert wrong.value < 0.1 < 0.9 < wrong.baseline
    backwards = Images(DIGITS.pixels, 9 - DIGITS.labels, DIGITS.names[::-1], np.arange(200), "sha")
    assert judge.judge(backwards).figures["label accuracy"] == right
    strange = dataclasses.replace(backwards, names=[f"no. {i}" for i in range(10)])
    record = judge.judge(strange)
    assert "label accuracy" not in record.figures
    assert any("classes are not the extractor's" in warning for warning in record.warnings)


def test_where_images_lie_does_not_matter(judge, classifier, tmp_path):
    """A tensor, images and a folder of files; by the verb or a judge."""
    fakes = noisy(digits(0, 120), 0.3)
    expected = judge.judge(fakes)
    for i, image in enumerate(((fakes[:, 0] + 1) * 127.5).round().byte().numpy()):
        Image.fromarray(image).save(tmp_path / f"{i:04}.png")
    for given in (fakes, tmp_path, str(tmp_path), images.load_images(tmp_path)):
        record = genkit.evaluate(given, "digits", extractor=classifier)
        assert record.figures == expected.figures
        assert record.distances == expected.distances
    some = genkit.evaluate(fakes, DIGITS, extractor=judge.extractor, count=50)
    assert some.figures == judge.judge(fakes[:50]).figures != expected.figures


def test_a_verdict_is_the_same_again_and_changes_no_random_state(judge):
    state, numpys, pythons = (
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )
    fakes = noisy(digits(0, 60), 0.3)
    assert judge.judge(fakes) == judge.judge(fakes)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpys
    assert random.getstate() == pythons


def test_evaluation_prints_its_protocol(judge):
    options = {"weights": "EMA", "sampler": "DDIM", "evaluations": 50, "seed": 3}
    record = judge.judge(noisy(digits(0, 60), 0.3), name="runs/some", **options)
    text = str(record)
    for name, figure in record.figures.items():
        row = rf"^{name} +{figure.value:.4f} +{figure.margin:.4f} +{figure.baseline:.4f}$"
        assert re.search(row, text, re.MULTILINE), name
    parts = ["60 of runs/some", "DDIM", "50 evaluation", "EMA weights", "seed 3", "899 of digits"]
    parts += [judge.data.sha256[:12], judge.extractor.sha256[:12], "24 features", "k 5"]
    assert not [part for part in parts if part not in text]
    assert "60 images are few for 24 features (2,000 suffice)" in text
    json.dumps(dataclasses.asdict(record))
    assert "singular covariance of 24" in str(judge.judge(digits(0, 20)))
    assert "baseline is of 898 real images for 1,797" in str(judge.judge(DIGITS))


# ---- saved models


def save_autoencoder(folder: Path, labels: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = Autoencoder((1, 8, 8), 4, widths=(32,), variational=True, labels=labels)
    vendoring.save_pipeline(AutoencoderPipeline(vae.eval()), folder)
    return folder


def test_evaluate_samples_a_saved_autoencoder(judge, classifier, tmp_path):
    folder = save_autoencoder(tmp_path)
    record = genkit.evaluate(
        folder, "digits", extractor=classifier, count=40, seed=0, weights="raw"
    )
    protocol = record.protocol
    assert (protocol.count, protocol.seed, protocol.evaluations) == (40, 0, 1)
    assert "one sample of the prior" in str(record)
    assert "raw weights" in str(record)
    pipeline = genkit.models.autoencoder.load_autoencoder(folder)
    drawn = judge.judge(draw_samples(pipeline, range(40))).figures
    rebuilt = record.figures["reconstruction error"]
    assert record.figures == drawn | {"reconstruction error": rebuilt}
    real = judge.held_out_images.batch(np.arange(40))
    errors = (pipeline.reconstruct(real) - real).square().flatten(1).mean(1)
    assert rebuilt.value == pytest.approx(errors.mean().item(), rel=1e-6)
    assert "label accuracy" not in record.figures


def test_evaluate_samples_classes_as_in_the_data(classifier, tmp_path):
    folder = save_autoencoder(tmp_path, labels=10)
    record = genkit.evaluate(folder, "digits", extractor=classifier, count=40)
    assert 0 <= record.figures["label accuracy"].value <= 1
    threes = genkit.evaluate(folder, "digits", extractor=classifier, count=40, labels=[3] * 40)
    seen = threes.classes["3"][0]
    assert threes.figures["label accuracy"].value == pytest.approx(seen)
    whole = genkit.evaluate(folder, DIGITS.take(np.arange(40)), extractor=classifier)
    assert whole.protocol.count == 20


def save_gan(folder: Path, labels: int = 0) -> Path:
    """A GAN whose raw weights differ from the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator, raw = (
            gan.Generator((1, 8, 8), 4, widths=(8,), patch=4, labels=labels) for _ in range(2)
        )
    vendoring.save_pipeline(GANPipeline(generator.eval()), folder)
    raw.save_pretrained(folder / "generator", variant=gan.RAW)
    return folder


@pytest.mark.parametrize("weights", [None, "averaged", "raw"])
def test_evaluate_samples_a_saved_gan(judge, classifier, tmp_path, weights):
    folder = save_gan(tmp_path)
    given = {"extractor": classifier, "count": 40, "weights": weights}
    record = genkit.evaluate(folder, "digits", **given)
    drawn = {
        kind: draw_samples(gan.load_gan(folder, kind), range(40)) for kind in ("averaged", "raw")
    }
    assert (drawn["averaged"] - drawn["raw"]).abs().max() > 0.01
    assert record.figures == judge.judge(drawn[weights or "averaged"]).figures
    assert "reconstruction error" not in record.figures
    protocol = record.protocol
    assert (protocol.count, protocol.seed, protocol.evaluations) == (40, 0, 1)
    assert "one sample of noise" in str(record)
    assert re.findall(r"(\w+) weights", str(record)) == ([weights] if weights else [])


def test_evaluate_samples_a_conditional_gan_by_classes_of_the_data(judge, classifier, tmp_path):
    folder = save_gan(tmp_path, labels=10)
    record = genkit.evaluate(folder, "digits", extractor=classifier, count=40)
    labels = proportional_labels(judge.real_images, 40)
    expected = judge.judge(draw_samples(gan.load_gan(folder), range(40), labels), labels)
    assert "label accuracy" in record.figures and record.figures == expected.figures


def test_evaluate_takes_labels_with_unlabelled_data(judge, classifier, tmp_path):
    plain = dataclasses.replace(DIGITS, labels=None, names=[])
    wanted = {"extractor": classifier, "count": 40, "labels": [3] * 40}
    record = genkit.evaluate(save_gan(tmp_path / "gan", labels=10), plain, **wanted)
    assert record.protocol.count == 40 and "no label accuracy" in str(record)
    # an autoencoder would have to rebuild them by class
    folder = save_autoencoder(tmp_path / "vae", labels=10)
    with pytest.raises(ValueError, match="labels: these images have no"):
        genkit.evaluate(folder, plain, **wanted)


def test_weights_that_a_gan_does_not_have_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "Judge", None)  # looks at all real images
    with pytest.raises(ValueError, match="weights must be one of averaged, raw, got 'EMA'"):
        genkit.evaluate(save_gan(tmp_path), extractor="nobody/nothing", weights="EMA")


def test_options_of_a_family_are_passed_on(tmp_path):
    pipeline = gan.load_gan(save_gan(tmp_path))
    whole, cut, middle = (
        draw_samples(pipeline, range(2, 7), None, {"truncation": t}) for t in (None, 0.5, 0)
    )
    assert torch.equal(whole, draw_samples(pipeline, range(2, 7)))
    assert (middle == middle[:1]).all()
    assert 0 < cut.std(0).mean() < whole.std(0).mean()


def test_labels_are_in_the_proportions_of_the_data():
    few = DIGITS.take(np.flatnonzero(DIGITS.labels < 3))
    parts = np.bincount(DIGITS.labels)[:3] / len(few)
    for count in (1, 7, 100, len(few), 1000):
        found = np.bincount(proportional_labels(few, count), minlength=3)
        assert found.sum() == count
        assert np.abs(found - parts * count).max() <= 1
    assert (
        np.bincount(proportional_labels(few, len(few))).tolist()
        == (parts * len(few)).round().tolist()
    )


def test_an_image_depends_on_its_seed_alone(tmp_path, monkeypatch):
    pipeline = genkit.models.autoencoder.load_autoencoder(save_autoencoder(tmp_path))
    many = draw_samples(pipeline, range(5, 14))
    assert many.shape == (9, 1, 8, 8)
    assert many.unique(dim=0).shape == many.shape
    assert torch.allclose(draw_samples(pipeline, range(8, 11)), many[3:6], atol=1e-6)
    monkeypatch.setattr(evaluation, "BATCH", 2)
    assert torch.allclose(draw_samples(pipeline, range(5, 14)), many, atol=1e-6)


# ---- what cannot work


def colour(count: int) -> torch.Tensor:
    return digits(0, count).repeat(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        (torch.zeros(0, 1, 8, 8), None, r"images must be floats, .* \(0, 1, 8, 8\)"),
        (torch.zeros(20, 8, 8), None, r"images must be floats, .* \(20, 8, 8\)"),
        (
            torch.zeros(20, 1, 8, 8, dtype=torch.uint8),
            None,
            "images must be floats, .* torch.uint8",
        ),
        (digits(0, 20) * math.nan, None, r"images\[0\] must be in \[-1, 1\], got values from nan"),
        (255 * digits(0, 20), None, r"images\[0\] must be in \[-1, 1\], .* from -255 to 223"),
        (colour(20), None, r"images must have .*\(1, 8, 8\).* got \(3, 8, 8\)"),
        (digits(0, 11), None, "images must be at least 12 for k=5, got 11"),
        (digits(0, 20), [0] * 19, r"labels must be 20 integers, .* the shape \(19,\)"),
        (digits(0, 20), [0.5] * 20, "labels must be 20 integers, .* got float32"),
        (digits(0, 20), [0] * 19 + [10], r"labels\[19\] must be one of 10 classes, 0 to 9, got 10"),
        (digits(0, 20), [-1] * 20, r"labels\[0\] .* got -1"),
    ],
)
def test_bad_images_are_named(judge, given, labels, message):
    with pytest.raises(ValueError, match=message):
        judge.judge(given, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be 1 or more, got 0"),
        ({"count": 21}, "count must be at most 20, got 21"),
        ({"k": 0}, "k must be 1 or more, got 0"),
        ({"k": 10}, "images must be at least 22 for k=10, got 20"),
        ({"real_count": 1798}, "real_count must be 1 to 1,797, got 1798"),
        ({"real_count": 20}, "data: half of the real images must be .* k=5, got 10"),
        ({"data": "nowhere 🙈"}, "images: 'nowhere 🙈' is no folder"),
        (
            {"train": images.load_images("digits", resolution=16)},
            r"train must have .* got \(1, 16, 16\)",
        ),
    ],
)
def test_bad_options_are_named(classifier, options, message):
    with pytest.raises(ValueError, match=message):
        genkit.evaluate(digits(0, 20), **{"extractor": classifier} | options)


def test_folders_that_are_no_classifier_are_refused(classifier, tmp_path):
    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            load_extractor(folder)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "extractor: .*empty' holds no weights in safetensors")
    refused("nobody/nothing", "extractor: cannot load 'nobody/nothing'")
    text = GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0)
    )
    refused(save(text, tmp_path / "text"), "extractor: cannot load .*text")
    backbone = ResNetModel(make_resnet(["a", "b"]).config)
    refused(
        save(backbone, tmp_path / "backbone"), "extractor: .*backbone.* lack .*classifier.1.bias"
    )
    bare = save(make_resnet(["a"]), tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    refused(bare, "extractor: cannot load .*bare")
    pickled = save(make_resnet(["a"]), tmp_path / "pickled")
    torch.save(make_resnet(["a"]).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused(pickled, "extractor: .*pickled' holds no weights in safetensors")
    sharded = save(make_resnet(["a"]), tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    index = {"weight_map": {"classifier.1.bias": "../bare/model.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "names a shard outside its folder")
    with pytest.raises(ValueError, match="takes 1 channels, got images of 3"):
        load_extractor(classifier)(colour(2))


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="it is here")
def test_inception_says_what_it_needs():
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        genkit.evaluate(digits(0, 20), extractor="inception")


@pytest.mark.hub
def test_inception_sees_2048_features():
    pytest.importorskip("torch_fidelity")
    record = Judge("digits", extractor="inception", real_count=60).judge(digits(0, 40))
    assert record.protocol.features == 2048
    assert not record.classes


def test_the_verb_is_not_the_package():
    import evaluate

    assert callable(genkit.evaluate)
    assert genkit.evaluate is not evaluate
    assert genkit.evaluate.__module__ == "genkit.vision.evaluation"
