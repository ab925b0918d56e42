"""Style transfer by optimising pixels, and its losses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import genkit
from genkit import cli
from genkit.metrics.features import Classifier
from genkit.models import style_losses
from genkit.models.stylizer import Stylizer, StylizerPipeline
from genkit.vision import style_target
from genkit.vision.differentiable import DifferentiableClassifier, load_differentiable
from genkit.vision.style_target import StyleTarget

FAST = {"steps": 4, "scales": 1, "device": "cpu"}


def processor(side: int) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5] * 3)


@pytest.fixture(scope="module")
def resnet():
    shape = {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(num_channels=3, layer_type="basic", **shape)
        model = ResNetForImageClassification(config).eval()
    return Classifier(model, processor(32), "resnet")


@pytest.fixture(scope="module")
def vit():
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=32, patch_size=8, intermediate_size=16, num_labels=2, **shape)
    return Classifier(ViTForImageClassification(config).eval(), processor(32), "vit")


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Smooth colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def maps(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 5, 6, 7, generator=torch.Generator().manual_seed(seed))


# ---- losses


def test_gram_matrix_of_a_constant_map_is_its_outer_product():
    value = torch.tensor([1.0, -2.0, 3.0])
    gram = style_losses.gram_matrix(value[None, :, None, None].expand(1, 3, 4, 5))
    assert torch.allclose(gram[0], value[:, None] * value[None])


def test_gram_matrix_ignores_where_features_are():
    features = maps()
    shuffled = features.flatten(2)[:, :, torch.randperm(42)].unflatten(2, (6, 7))
    expected = style_losses.gram_matrix(features)
    assert torch.allclose(style_losses.gram_matrix(shuffled), expected, atol=1e-6)
    tiled = features.repeat(1, 1, 2, 3)
    assert torch.allclose(style_losses.gram_matrix(tiled), expected, atol=1e-6)


def test_losses_are_zero_of_the_target_itself_and_relative_to_it():
    features, other = maps(0), maps(1)
    grams = style_losses.gram_matrix(features), style_losses.gram_matrix(other)
    assert style_losses.content_loss(features, features).eq(0).all()
    assert style_losses.style_loss(grams[0], grams[0]).eq(0).all()
    for loss, pair in (
        (style_losses.content_loss, (features, other)),
        (style_losses.style_loss, grams),
    ):
        scaled = loss(7 * pair[0], 7 * pair[1])
        assert torch.allclose(scaled, loss(*pair), rtol=1e-4) and (scaled > 0).all()


def test_a_mean_of_the_target_has_a_content_loss_of_one():
    features = maps()
    flat = features.mean((2, 3), keepdim=True).expand_as(features)
    assert torch.allclose(style_losses.content_loss(flat, features), torch.ones(2))


def test_total_variation_of_a_ramp_is_its_squared_slope():
    ramp = torch.arange(6.0).mul(0.1).expand(1, 3, 4, 6)
    assert torch.allclose(style_losses.total_variation(ramp), torch.tensor([0.01]))
    assert style_losses.total_variation(torch.ones(1, 3, 4, 4)).item() == 0


def test_smooth_activations_sum_to_one_and_ignore_a_common_level():
    smooth = style_losses.smooth_activations(maps(), 2.0)
    assert torch.allclose(smooth.sum(1), torch.ones(2, 6, 7))
    assert torch.allclose(style_losses.smooth_activations(maps() + 3, 2.0), smooth, atol=1e-6)


def test_colour_features_of_the_style_are_standard():
    style = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    gram = style_losses.gram_matrix(style_losses.colour_features(style, style))[0]
    assert torch.allclose(gram[3], torch.tensor([0.0, 0.0, 0.0, 1.0]), atol=1e-5)
    assert torch.allclose(gram.diag(), torch.ones(4), atol=0.05)


# ---- target


def test_style_target_is_met_by_the_style_and_rows_do_not_depend_on_each_other(resnet):
    classifier = DifferentiableClassifier(resnet)
    pixels = style_target.read_pixels(picture(1), 3, "style")
    other = style_target.read_pixels(picture(2), 3, "image")
    with classifier.frozen(), torch.no_grad():
        target = StyleTarget(classifier, pixels)
        batch = torch.stack([pixels, other])
        losses = target.losses(batch, target.content(batch))
        alone = target.losses(other[None], target.content(other[None]))
    assert losses.style[0] < 1e-8 < losses.style[1]
    assert losses.content.abs().max() < 1e-8
    assert torch.allclose(losses.total(3.0)[1:], alone.total(3.0), rtol=1e-5)


def test_default_layers_are_the_last_of_each_resolution(resnet):
    classifier = DifferentiableClassifier(resnet)
    with classifier.frozen():
        pixels = style_target.read_pixels(picture(1, 96, 96), 3, "style")
        target = StyleTarget(classifier, pixels)
        states = target._states(pixels[None], "style")
    sizes = [state.shape[2] for state in states]
    last = [sizes.index(size) + sizes.count(size) - 1 for size in dict.fromkeys(sizes)]
    assert target.style_layers == last
    assert target.content_layer == target.style_layers[2]


@pytest.mark.real
def test_default_layers_of_an_efficientnet(real_model):
    classifier = load_differentiable(real_model("efficientnet"))
    with classifier.frozen():
        target = StyleTarget(classifier, torch.full((3, 64, 64), 0.5))
    assert (target.content_layer, target.style_layers) == (5, [1, 3, 5, 11])


# ---- the verb


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_losses_fall_and_the_style_comes_nearer(resnet, optimizer):
    options = {"optimizer": optimizer, "steps": 15, "scales": 1}
    made = genkit.stylize(picture(1), style=picture(2), model=resnet, **options)
    assert made.image.size == (48, 40)
    assert made.losses["loss"][-1] < 0.7 * made.losses["loss"][0]
    assert made.losses["style"][-1] < made.losses["style"][0]
    assert {len(values) for values in made.losses.values()} == {15}
    assert f"optimizer {optimizer}" in str(made) and "48 x 40" in str(made)


def test_scales_start_small_and_end_at_the_size(resnet):
    made = genkit.stylize(
        picture(1), style=picture(2), model=resnet, steps=3, scales=2, size=64, frames=4
    )
    assert made.image.size == (64, 53) and len(made.losses["loss"]) == 6
    assert len(made.frames) == 4 and made.frames[-1].tobytes() == made.image.tobytes()


def test_global_random_state_and_the_model_are_left_alone(resnet):
    before, weights = torch.get_rng_state(), [p.requires_grad for p in resnet.model.parameters()]
    torch.manual_seed(1)
    first = genkit.stylize(picture(1), style=picture(2), model=resnet, start="noise", **FAST)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = genkit.stylize(picture(1), style=picture(2), model=resnet, start="noise", **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.image.tobytes() == again.image.tobytes()
    other = genkit.stylize(
        picture(1), style=picture(2), model=resnet, start="noise", seed=1, **FAST
    )
    assert other.image.tobytes() != first.image.tobytes()
    assert [p.requires_grad for p in resnet.model.parameters()] == weights
    torch.set_rng_state(before)


def test_an_earlier_result_goes_on(resnet):
    options = {"style": picture(2), "model": resnet, "scales": 1, "optimizer": "adam"}
    first = genkit.stylize(picture(1), steps=10, **options)
    more = genkit.stylize(picture(1), steps=1, start=first.image, **options)
    assert more.losses["loss"][0] < first.losses["loss"][-2]


def test_animation_has_the_frames_and_pictures_are_saved(resnet, tmp_path):
    made = genkit.stylize(picture(1), style=picture(2), model=resnet, frames=3, **FAST)
    made.save(tmp_path / "painted.png")
    made.save_animation(tmp_path / "film.gif")
    with Image.open(tmp_path / "painted.png") as saved:
        assert saved.tobytes() == made.image.tobytes()
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.size == (48, 40)
    with pytest.raises(ValueError, match=r"animation.*film.png.*\.gif"):
        made.save_animation(tmp_path / "film.png")
    with pytest.raises(ValueError, match="frames"):
        genkit.stylize(picture(1), style=picture(2), model=resnet, **FAST).save_animation("a.gif")


def test_a_grey_image_is_painted_in_the_colours_of_the_style(resnet):
    made = genkit.stylize(picture(1).convert("L"), style=picture(2), model=resnet, **FAST)
    assert made.image.mode == "RGB"


def test_a_stylizer_paints_in_one_pass_at_any_size():
    with torch.random.fork_rng():
        pipeline = StylizerPipeline(Stylizer(3, (4, 8), 1).eval())
    pipeline.name = "wave"
    made = genkit.stylize(picture(1, 51, 37), model=pipeline)
    assert made.image.size == (51, 37) and made.losses == {}
    assert genkit.stylize(picture(1), model=pipeline, size=24).image.size == (24, 20)
    with pytest.raises(ValueError, match=r"steps=3 .*stylizer"):
        genkit.stylize(picture(1), model=pipeline, steps=3)


# ---- what cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": None}, "style is required"),
        ({"style": picture(2, 3, 3), "scales": 1}, "style: 3 x 3 pixels are too few"),
        ({"scales": 4}, "too few"),
        ({"style_layers": [9]}, "style_layers.*9.*0 to"),
        ({"style_layers": []}, "style_layers is empty"),
        ({"content_layer": -9}, "content_layer.*-9.*0 to"),
        ({"style_weight": -1}, "style_weight.*-1"),
        ({"style_weight": float("nan")}, "style_weight.*nan"),
        ({"steps": 0}, "steps.*0"),
        ({"scales": 0}, "scales.*0"),
        ({"frames": -1}, "frames.*-1"),
        ({"optimizer": "sgd"}, "optimizer.*sgd"),
        ({"size": 4}, "size.*4"),
        ({"seed": -1}, "seed.*-1"),
        ({"style": "no/such.png"}, "style: 'no/such.png'"),
        ({"style_image": 3}, "style_image is called style here"),
    ],
)
def test_bad_arguments_are_refused_by_name(resnet, options, message):
    with pytest.raises(ValueError, match=message):
        genkit.stylize(picture(1), **({"style": picture(2), "model": resnet} | options))


def test_a_transformer_paints_in_any_size(vit):
    painted = genkit.stylize(picture(1), style=picture(2), model=vit, steps=5)
    assert painted.losses["loss"][-1] < painted.losses["loss"][0]


# ---- the command


def test_the_command_paints(resnet, tmp_path, capsys):
    resnet.model.save_pretrained(tmp_path / "model")
    resnet.processor.save_pretrained(tmp_path / "model")
    picture(1).save(tmp_path / "image.png")
    picture(2).save(tmp_path / "style.png")
    words = f"stylize {tmp_path}/image.png --style {tmp_path}/style.png --model {tmp_path}/model"
    words += f" --steps 2 --scales 1 --style-layers 0 --style-layers 2 --output {tmp_path}/out.png"
    cli.main([*words.split(), "--animation", f"{tmp_path}/film.gif", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["style layers"] == [0, 2] and len(record["losses"]["loss"]) == 2
    with Image.open(tmp_path / "out.png") as painted, Image.open(tmp_path / "film.gif") as film:
        assert painted.size == film.size == (48, 40) and film.n_frames == 2
