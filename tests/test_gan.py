"""Generators and discriminators: their shapes, their conditioning, and their pipeline."""

import math

import numpy as np
import pytest
import torch

from genkit.hub import vendoring
from genkit.models import gan, gan_losses

SIZES = [(1, 28, 28), (3, 32, 32), (2, 8, 16)]


def small(**settings):
    torch.manual_seed(0)
    return gan.Generator(**{"image_size": (1, 8, 8), "latent_dim": 6, "widths": (8, 4)} | settings)


def noise(count, size=6, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


# ---- networks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {"network": "residual", "patch": 2, "widths": (8, 4), "blocks": 2},
        {"network": "residual", "patch": 4, "widths": (8,)},
        {"network": "dcgan", "widths": (8, 6, 4)},
        {"network": "dcgan", "widths": (8, 4), "kernels": (5, 5), "normalize": True},
        {"network": "dcgan", "widths": (8, 6, 4), "kernels": (5, 5), "growth": "nearest"}
        | {"tail": (4,), "slope": 0.3},
    ],
)
def test_generators_make_any_size_and_channel_count(size, settings):
    generator = gan.Generator(image_size=size, latent_dim=6, **settings)
    images = generator(noise(3))
    assert images.shape == (3, *size) and images.abs().max() <= 1
    assert images.std(0).mean() > 0  # the noise matters
    images.sum().backward()
    dead = [name for name, parameter in generator.named_parameters() if parameter.grad is None]
    assert dead == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {"network": "residual", "patch": 2, "widths": (4, 8)},
        {"network": "dcgan", "widths": (4, 8), "strides": (2, 2), "pool": "max"},
        {"network": "dcgan", "widths": (4, 8, 8), "strides": (2, 2, 1), "kernel": 5}
        | {"normalize": True, "dropout": 0.4},
    ],
)
@pytest.mark.parametrize("spectral", [False, True])
def test_discriminators_score_any_size_and_channel_count(size, settings, spectral):
    discriminator = gan.Discriminator(image_size=size, spectral=spectral, **settings)
    scores, classes = discriminator(torch.randn(3, *size))
    assert scores.shape == (3,) and classes is None
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_the_course_networks_are_built_as_it_says():
    """Layers as shapes: the Keras course's pair, and the one with an auxiliary classifier."""
    generator = gan.Generator(
        image_size=(1, 28, 28), latent_dim=128, network="dcgan", widths=(128, 128, 128)
    )
    shapes = [tuple(p.shape) for p in generator.parameters() if p.ndim > 1]
    wanted = [(7 * 7 * 128, 128), (128, 128, 4, 4), (128, 128, 4, 4), (128, 1, 7, 7)]
    assert shapes == wanted
    scorer = gan.Discriminator((1, 28, 28), "dcgan", (64, 128), pool="max")
    shapes = [tuple(p.shape) for p in scorer.parameters() if p.ndim > 1]
    assert shapes == [(64, 1, 3, 3), (128, 64, 3, 3), (1, 128)]
    generator = gan.Generator(
        image_size=(1, 28, 28),
        latent_dim=100,
        network="dcgan",
        widths=(256, 128, 64),
        tail=(32,),
        kernels=(5, 5),
        growth="nearest",
        labels=10,
        conditioning="embedding_product",
    )
    shapes = [tuple(p.shape) for p in generator.parameters() if p.ndim > 1]
    wanted = [(10, 100), (7 * 7 * 256, 100)]
    wanted += [(256, 128, 5, 5), (128, 64, 5, 5), (64, 32, 5, 5), (32, 1, 5, 5)]
    assert shapes == wanted
    scorer = gan.Discriminator(
        (1, 28, 28), "dcgan", (64, 128, 256, 512), 10, "auxiliary", strides=(2, 2, 2, 1), kernel=5
    )
    shapes = [tuple(p.shape) for p in scorer.parameters() if p.ndim > 1]
    wanted = [(64, 1, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (512, 256, 5, 5)]
    assert shapes == [*wanted, (1, 512 * 4 * 4), (10, 512 * 4 * 4)]


def test_residual_blocks_start_as_nothing():
    block = gan.Residual(4, 0.2)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_initialize_weights_draws_the_given_distribution():
    generator = small(network="dcgan", image_size=(1, 32, 32), widths=(64, 32, 16))
    gan_losses.initialize_weights(generator, 0.02)
    weights = torch.cat([p.flatten() for p in generator.parameters() if p.ndim > 1])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert all((p == 0).all() for p in generator.parameters() if p.ndim == 1)
    gan_losses.initialize_weights(generator, None)
    bound = math.sqrt(6 / (6 + 64 * 64))  # Glorot: of the fans in and out
    assert bound * 0.98 < generator.first.weight.abs().max() <= bound


def test_spectral_normalisation_keeps_the_largest_singular_value_at_one():
    torch.manual_seed(0)
    scorer = gan.Discriminator((1, 8, 8), "residual", (8,), patch=2, spectral=True)
    for _ in range(50):  # of power iteration
        scorer(torch.randn(4, 1, 8, 8))
    scorer.eval()
    for layer in (scorer.body.first, scorer.score):
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert largest.item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: gan.Generator((1, 30, 30), widths=(8, 4), patch=4),
            ["resolution", "8", "30 x 30"],
        ),
        (
            lambda: gan.Generator((1, 28, 20), network="dcgan", widths=(8, 8, 8, 8)),
            ["24", "20 x 28"],
        ),
        (lambda: gan.Discriminator((1, 30, 30), widths=(8,), patch=4), ["resolution", "28"]),
        (lambda: gan.Generator(network="style"), ["network", "'style'", "residual"]),
        (
            lambda: gan.Generator(conditioning="projection"),
            ["conditioning", "'projection'", "product"],
        ),
        (
            lambda: gan.Discriminator(conditioning="embedding_product"),
            ["conditioning", "'embedding_product'", "auxiliary"],
        ),
        (lambda: gan.Discriminator(pool="mean"), ["pool", "'mean'", "flatten"]),
        (lambda: gan.Generator(growth="shuffle"), ["growth", "'shuffle'", "nearest"]),
    ],
)
def test_networks_that_cannot_be_built_are_refused_by_name(build, words):
    with pytest.raises(ValueError) as caught:
        build()
    for word in words:
        assert word in str(caught.value)


# ---- classes


@pytest.mark.parametrize("conditioning", gan.GENERATOR_CONDITIONING)
def test_conditional_generator_depends_on_the_class(conditioning):
    generator = small(labels=3, conditioning=conditioning)
    latents = noise(1).expand(3, -1)
    images = generator(latents, torch.arange(3))
    assert (images[0] - images[1]).abs().max() > 1e-3
    again = generator(latents, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(again[2], images[0])


def test_the_product_is_of_noise_and_the_classs_vector():
    generator = small(labels=3, conditioning="embedding_product")
    plain = small()
    plain.load_state_dict({n: v for n, v in generator.state_dict().items() if n != "table.weight"})
    labels = torch.tensor([0, 2, 1])
    wanted = plain(noise(3) * generator.table.weight[labels])
    torch.testing.assert_close(generator(noise(3), labels), wanted)


def test_projection_adds_the_product_with_the_classs_vector():
    torch.manual_seed(0)
    scorer = gan.Discriminator((1, 8, 8), widths=(4,), patch=4, labels=3, conditioning="projection")
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([2, 0, 1])
    plain = scorer.score(scorer.features(images)).squeeze(1)
    torch.testing.assert_close(scorer(images, labels)[0], plain)  # at first
    torch.nn.init.normal_(scorer.table.weight)
    wanted = plain + (scorer.table.weight[labels] * scorer.features(images)).sum(1)
    torch.testing.assert_close(scorer(images, labels)[0], wanted)


def test_concatenation_shows_a_map_for_each_class():
    torch.manual_seed(0)
    scorer = gan.Discriminator((1, 8, 8), widths=(4,), patch=4, labels=3, conditioning="concat")
    plain = gan.Discriminator((4, 8, 8), widths=(4,), patch=4)
    plain.load_state_dict(scorer.state_dict())
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([2, 0])
    maps = torch.zeros(2, 3, 8, 8)
    maps[0, 2], maps[1, 0] = 1, 1
    torch.testing.assert_close(scorer(images, labels)[0], plain(torch.cat([images, maps], 1))[0])


def test_auxiliary_discriminator_predicts_the_class_and_ignores_labels():
    scorer = gan.Discriminator((1, 8, 8), widths=(4,), patch=4, labels=3, conditioning="auxiliary")
    images = torch.randn(2, 1, 8, 8)
    scores, classes = scorer(images, torch.tensor([0, 1]))
    assert classes.shape == (2, 3)
    torch.testing.assert_close(scorer(images, torch.tensor([2, 2])), (scores, classes))


# ---- pipeline


def seeds(count, start=0):
    return [torch.Generator().manual_seed(start + i) for i in range(count)]


def test_an_image_depends_on_its_seed_alone():
    pipeline = gan.GANPipeline(small(labels=3).eval())
    labels = [0, 1, 2, 0, 1]
    whole = pipeline(5, seeds(5), labels, output_type="pt").images
    for i in range(5):
        alone = pipeline(1, seeds(1, i), labels[i : i + 1], output_type="pt").images[0]
        torch.testing.assert_close(alone, whole[i], rtol=0, atol=1e-6)


def test_images_come_as_asked_for():
    pipeline = gan.GANPipeline(small().eval())
    tensor = pipeline(2, seeds(2), output_type="pt").images
    array = pipeline(2, seeds(2), output_type="np").images
    pictures = pipeline(2, seeds(2)).images
    assert tensor.shape == (2, 1, 8, 8) and array.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(array[..., 0], tensor[:, 0].numpy())
    np.testing.assert_allclose(np.asarray(pictures[1]) / 255, tensor[1, 0].numpy(), atol=0.5 / 255)
    torch.testing.assert_close(pipeline.decode(noise(2)) / 2 + 0.5, small()(noise(2)) / 2 + 0.5)
    assert torch.equal(pipeline(2, seeds(2), output_type="pt", return_dict=False)[0], tensor)


def test_truncation_keeps_ranks_and_gives_the_truncated_distribution():
    drawn = noise(20_000, 1)
    for limit in (0.1, 0.5, 2.0):
        cut = gan.truncate(drawn, limit)
        assert cut.abs().max() <= limit and torch.equal(cut.argsort(0), drawn.argsort(0))
        # the variance of a truncated normal distribution
        density = math.exp(-(limit**2) / 2) / math.sqrt(2 * math.pi)
        wanted = 1 - 2 * limit * density / math.erf(limit / math.sqrt(2))
        assert cut.var().item() == pytest.approx(wanted, rel=0.03)
    assert (gan.truncate(drawn, 0.0) == 0).all()
    torch.testing.assert_close(gan.truncate(drawn, 20.0), drawn, rtol=0, atol=1e-5)
    extremes = torch.tensor([[-40.0, -6.0, 0.0, 6.0, 40.0]])
    assert gan.truncate(extremes, 1.0).isfinite().all()


def test_truncated_images_are_more_alike():
    pipeline = gan.GANPipeline(small().eval())
    spread = [
        pipeline(64, seeds(64), truncation=limit, output_type="pt").images.std(0).mean().item()
        for limit in (0.0, 0.3, 1.0, None)
    ]
    assert spread[0] < 1e-6 and spread == sorted(spread)


def test_a_saved_pipeline_holds_both_kinds_of_weights(tmp_path):
    averaged, raw = small(labels=3).eval(), small(labels=3).eval()
    with torch.no_grad():
        raw.first.weight.mul_(1.5)
    vendoring.save_pipeline(gan.GANPipeline(averaged), tmp_path)
    raw.save_pretrained(tmp_path / "generator", variant=gan.RAW)
    for weights, network in (("averaged", averaged), ("raw", raw)):
        loaded = gan.load_gan(tmp_path, weights)
        wanted = network(noise(2), torch.tensor([0, 1]))
        torch.testing.assert_close(loaded.decode(noise(2), [0, 1]), wanted, rtol=0, atol=1e-6)
    assert not loaded.generator.training


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_kind_of_network_survives_saving(tmp_path, spectral, normalize):
    generator = small(network="dcgan", spectral=spectral, normalize=normalize)
    generator(noise(8))  # moves running averages and singular vectors
    vendoring.save_pipeline(gan.GANPipeline(generator.eval()), tmp_path)
    again = gan.load_gan(tmp_path).decode(noise(2))
    torch.testing.assert_close(again, generator(noise(2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), ["model", "train_gan"]),
        (lambda folder: (folder / "model_index.json").write_text("{}"), ["_class_name"]),
        (
            lambda folder: (folder / "model_index.json").write_text(
                '{"_class_name": ["autoencoder", "AutoencoderPipeline"]}'
            ),
            ["AutoencoderPipeline"],
        ),
        (
            lambda folder: (folder / "generator" / "a.safetensors.index.json").write_text("{}"),
            ["several files"],
        ),
        (
            lambda folder: next(folder.glob("generator/*.safetensors")).unlink(),
            ["averaged weights"],
        ),
    ],
)
def test_what_is_no_gan_is_refused(tmp_path, spoil, words):
    vendoring.save_pipeline(gan.GANPipeline(small()), tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError) as caught:
        gan.load_gan(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_raw_weights_that_are_not_there_are_refused(tmp_path):
    vendoring.save_pipeline(gan.GANPipeline(small()), tmp_path)
    with pytest.raises(ValueError, match=r"model: .*raw weights"):
        gan.load_gan(tmp_path, "raw")
    with pytest.raises(ValueError, match="weights must be one of averaged, raw, got 'ema'"):
        gan.load_gan(tmp_path, "ema")


@pytest.mark.parametrize(
    ("settings", "call", "words"),
    [
        ({}, {"labels": [0]}, ["labels", "unconditional"]),
        ({"labels": 3}, {}, ["labels", "3 classes"]),
        ({"labels": 3}, {"labels": [3]}, ["labels", "0 to 2", "[3]"]),
        ({"labels": 3}, {"labels": [-1]}, ["labels", "0 to 2"]),
        ({"labels": 3}, {"labels": [0.5]}, ["labels"]),
        ({"labels": 3}, {"labels": [0, 1]}, ["labels must be 1"]),
        ({}, {"truncation": -1.0}, ["truncation", "-1.0"]),
        ({}, {"generator": seeds(2)}, ["generator", "list of 1"]),
    ],
)
def test_calls_that_cannot_work_are_refused_by_name(settings, call, words):
    pipeline = gan.GANPipeline(small(**settings))
    with pytest.raises(ValueError) as caught:
        pipeline(1, **call)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("height", "width", "advice"), [(27, 48, 24), (48, 27, 24), (48, 9, 8)])
def test_advice_on_resolution_looks_at_both_sides(height, width, advice):
    """Squares of the shorter side, as `--resolution` makes them, which then fit."""
    for network in (gan.Generator, gan.Discriminator):
        with pytest.raises(ValueError, match=rf"{width} x {height}; give .* {advice} or 48, or"):
            network(image_size=(1, height, width), widths=(8, 8), patch=4)
        network(image_size=(1, advice, advice), widths=(8, 8), patch=4)
