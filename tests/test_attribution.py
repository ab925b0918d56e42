"""genkit.attribute on classifiers of many architectures, and how good maps are."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from classifiers import SHAPES, make_classifier, make_image, make_model
from PIL import Image

import genkit
from genkit.metrics import attribution as measures
from genkit.vision import attribution, hidden_maps
from genkit.vision.differentiable import DifferentiableClassifier

METHODS = list(attribution.METHODS)
KINDS = list(SHAPES)


@pytest.fixture
def resnet():
    return make_classifier("ResNet")


# ---- pixels

PROCESSORS = {
    "vit": transformers.ViTImageProcessorPil(size={"height": 48, "width": 64}),
    "clip": transformers.CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=48),
    "convnext": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.8),
    "efficientnet": transformers.EfficientNetImageProcessorPil(
        size={"height": 56, "width": 56}, rescale_offset=True, include_top=True
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_normalize_undoes_pixels(name):
    """What the function makes of pixels is what the model's own processor makes of the image."""
    picture = Image.fromarray((127.5 * (make_image(side=96) + 1)).byte().permute(1, 2, 0).numpy())
    given = genkit.metrics.features.Classifier(make_model("ResNet"), PROCESSORS[name], name)
    classifier = DifferentiableClassifier(given)
    pixels = classifier.pixels(picture)
    assert pixels.min() >= 0 and pixels.max() <= 1
    own = PROCESSORS[name](picture, return_tensors="pt")["pixel_values"]
    assert (classifier.normalize(pixels[None]) - own).abs().max() < 1e-5


def test_an_image_is_the_same_in_every_form(tmp_path, resnet):
    classifier = DifferentiableClassifier(resnet)
    tensor = make_image()
    array = (127.5 * (tensor + 1)).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "image.png")
    forms = [tensor, array, Image.fromarray(array), tmp_path / "image.png"]
    found = [classifier.pixels(form) for form in forms]
    assert all((each - found[0]).abs().max() < 1e-6 for each in found)


def test_a_grey_image_keeps_its_channel(resnet):
    """Its gradient is the sum of those of the three channels that it becomes."""
    classifier = DifferentiableClassifier(resnet)
    grey = classifier.pixels(make_image(channels=1))
    assert grey.shape == (1, 64, 64)
    colour = grey.expand(3, -1, -1)
    one, three = (attribution.gradient(classifier, each[None], 2)[0] for each in (grey, colour))
    assert (one[0] - three.sum(0)).abs().max() < 1e-4 * one.abs().max()


def test_resizing_is_said(resnet, capsys):
    genkit.attribute(make_image(side=80), model=resnet, method="saliency")
    assert "80 x 80 to 64 x 64" in capsys.readouterr().err


# ---- maps of every architecture


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_map_with_a_gradient_is_found(kind, capsys):
    record = genkit.attribute(make_image(), model=make_classifier(kind), method="grad_cam")
    assert record.values.shape == (1, 64, 64) and record.values.min() >= 0
    stepped = "gradient of zero" in capsys.readouterr().err
    assert stepped == (kind in ("ViT", "DeiT"))  # whose head reads no patch
    last = len(make_model(kind)(torch.zeros(1, 3, 64, 64), output_hidden_states=True)[1]) - 1
    assert record.settings["layer"] == f"hidden state {last - stepped} of {last}"


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "Swin", "ResNet"])
def test_the_grid_is_that_of_the_pixels(kind):
    """Images that are not square: a wide image's grid is wide."""
    classifier = DifferentiableClassifier(make_classifier(kind))
    pixels = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    pixels.requires_grad_()
    logits, maps = hidden_maps.hidden_maps(classifier, pixels)
    for each in maps:
        height, width = each.as_map(each.state).shape[2:]
        assert (height, width) == each.size and width == 2 * height
    assert logits.shape == (1, 7)


def test_a_patch_is_where_it_changes_the_map():
    """Tokens are laid out in rows: a change in a corner of the image is one in that of the map."""
    classifier = DifferentiableClassifier(make_classifier("ViT"))
    pixels = torch.zeros(2, 3, 64, 64)
    pixels[1, :, :8, 56:] = 1  # the patch at the top right
    _, maps = hidden_maps.hidden_maps(classifier, pixels, layer=0)
    plain, changed = maps[0].as_map(maps[0].state)
    differs = (plain - changed).abs().sum(0) > 1e-6
    assert differs[0, 7] and differs.sum() == 1


@pytest.mark.parametrize("layer", [-2, "2", "resnet.encoder.stages.1"])
def test_a_layer_can_be_named(resnet, layer):
    record = genkit.attribute(make_image(), model=resnet, layer=layer)
    assert record.settings["grid"] == {-2: "4x4", "2": "8x8"}.get(layer, "8x8")


# ---- methods


@pytest.mark.parametrize("kind", ["ResNet", "ConvNext", "ViT", "Dinov2", "Swin"])
def test_integrated_gradients_are_complete(kind):
    record = genkit.attribute(
        make_image(), model=make_classifier(kind), method="integrated_gradients", steps=300
    )
    classifier = DifferentiableClassifier(make_classifier(kind))
    with torch.no_grad():
        black, image = classifier(torch.stack([torch.zeros(3, 64, 64), record.pixels]))
    rise = float((image - black)[record.index])
    assert float(record.values.sum()) == pytest.approx(rise, rel=0.01)
    assert record.error == pytest.approx(abs(float(record.values.sum()) / rise - 1), abs=1e-4)


def test_saliency_is_the_slope_of_the_logit(resnet):
    record = genkit.attribute(make_image(), model=resnet, method="saliency", target=3)
    classifier = DifferentiableClassifier(resnet)
    with classifier.frozen(), torch.no_grad():
        direction = torch.zeros(3, 64, 64)
        place = np.unravel_index(int(record.values.argmax()), record.values.shape)
        direction[place] = 1e-3
        up, down = classifier(torch.stack([record.pixels + direction, record.pixels - direction]))
    slope = float((up - down)[3]) / 2e-3
    assert abs(slope) == pytest.approx(float(record.values[place]), rel=0.05)


def test_smooth_grad_is_of_its_seed_alone(resnet):
    state = torch.get_rng_state()
    found = [
        genkit.attribute(make_image(), model=resnet, method="smooth_grad", steps=20, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0].values, found[1].values)
    assert not torch.equal(found[0].values, found[2].values)
    assert torch.equal(torch.get_rng_state(), state)


def test_occlusion_by_the_image_itself_changes_nothing(resnet):
    white = torch.ones(3, 64, 64)
    record = genkit.attribute(white, model=resnet, method="occlusion", baseline="white")
    assert record.values.abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_record_prints_and_saves_and_the_model_is_as_it_was(method, resnet, tmp_path):
    resnet.model.train()
    next(resnet.model.parameters()).requires_grad_(False)
    record = genkit.attribute(make_image(), model=resnet, method=method, target="class 3")
    assert all(module.training for module in resnet.model.modules())
    wanted = [weights.requires_grad for weights in resnet.model.parameters()]
    assert not wanted[0] and all(wanted[1:])
    next(resnet.model.parameters()).requires_grad_()
    resnet.model.eval()
    assert str(record).startswith(f"{method} for class 3 (") and record.index == 3
    assert record.values.shape[1:] == (64, 64) and record.values.isfinite().all()
    record.save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.size == (3 * 256 + 16, 256)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "class 33"}, r"target: ResNet has no class 'class 33'.*class 3"),
        ({"target": 7}, r"target must be 0 to 6, got 7"),
        ({"target": -1}, r"target must be 0 to 6, got -1"),
        ({"method": "lime"}, r"method must be one of .*occlusion, got 'lime'"),
        ({"method": "saliency", "steps": 3}, r"steps=3 is for"),
        ({"method": "smooth_grad", "steps": 0}, r"steps must be .*got 0"),
        ({"method": "saliency", "layer": 3}, r"layer=3 is for grad_cam"),
        ({"layer": 9}, r"layer must be 0 to 4, or a module, got 9"),
        ({"layer": "resnet.encoder.stage.1"}, r"layer: .*resnet\.encoder\.stages\.1"),
        ({"layer": "classifier"}, r"layer: the output of classifier"),
        ({"baseline": "grey"}, r"baseline must be one of black, white, mean"),
        ({"seed": -1}, r"seed must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(options, message, resnet):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        genkit.attribute(make_image(), model=resnet, **options)


def test_what_is_no_image_is_refused(resnet, tmp_path):
    (tmp_path / "empty.png").touch()
    for wrong in (3, torch.zeros(64, 64), 2 * torch.ones(3, 64, 64), np.zeros((4, 4, 3))):
        with pytest.raises(ValueError, match="image must be"):
            genkit.attribute(wrong, model=resnet)
    for path in (tmp_path / "empty.png", tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError, match=path.name):
            genkit.attribute(path, model=resnet)


def test_a_quantised_model_is_refused(resnet):
    resnet.model.classifier[1].weight = torch.nn.Parameter(
        torch.zeros(7, 32, dtype=torch.int8), requires_grad=False
    )
    make_model.cache_clear()
    with pytest.raises(ValueError, match="quantised"):
        genkit.attribute(make_image(), model=resnet)


# ---- how good a map is


def linear_scores(weights):
    return lambda images: (images * weights).sum((1, 2, 3))


def test_deletion_of_a_linear_score_has_a_closed_form():
    weights = torch.tensor([[[4.0, 1.0], [3.0, 2.0]]])
    curves = measures.delete_and_insert(
        linear_scores(weights), torch.ones(1, 2, 2), weights[0], torch.zeros(1, 2, 2), steps=4
    )
    assert curves.deletion.tolist() == [10, 6, 3, 1, 0]
    assert curves.insertion.tolist() == [0, 4, 7, 9, 10]
    assert curves.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curves.deletion_area == pytest.approx(3.75)


def test_no_order_deletes_a_linear_score_faster_than_its_weights():
    weights = torch.tensor([[[4.0, 1.0], [3.0, 2.0]]])
    areas = {
        order: measures.delete_and_insert(
            linear_scores(weights),
            torch.ones(1, 2, 2),
            torch.tensor(order).view(2, 2),
            torch.zeros(1, 2, 2),
        )
        for order in itertools.permutations((1.0, 2.0, 3.0, 4.0))
    }
    best = areas[(4.0, 1.0, 3.0, 2.0)]
    assert min(each.deletion_area for each in areas.values()) == best.deletion_area
    assert max(each.insertion_area for each in areas.values()) == best.insertion_area


def test_rank_correlation_is_that_of_ranks():
    rising = torch.arange(12.0).view(3, 4)
    assert measures.rank_correlation(rising, rising**3) == pytest.approx(1)
    assert measures.rank_correlation(rising, 11 - rising) == pytest.approx(-1)
    assert measures.rank_correlation(rising, torch.ones(3, 4)) == 0
    from scipy.stats import spearmanr

    one, two = torch.tensor([1.0, 2, 2, 5]), torch.tensor([3.0, 1, 4, 4])
    assert measures.rank_correlation(one, two) == pytest.approx(spearmanr(one, two).statistic)


def test_randomising_leaves_the_model_and_changes_copies_from_the_top():
    network = make_model("ResNet")
    before = {name: weights.clone() for name, weights in network.state_dict().items()}
    names = []
    for name, copied in measures.randomize_from_the_top(network):
        names.append(name)
        changed = {
            key.rpartition(".")[0]
            for key, weights in copied.state_dict().items()
            if not torch.equal(weights, before[key])
        }
        assert changed == set(names)
    assert names[0].startswith("classifier") and "embedder" in names[-1]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_map_is_measured(resnet):
    record = genkit.attribute(make_image(), model=resnet, method="saliency", measure=True)
    quality = record.quality
    assert 0 <= quality.deletion <= 1 and 0 <= quality.insertion <= 1
    assert len(quality.sanity) == 5 and all(-1 <= v <= 1 for v in quality.sanity.values())
    assert "less is better" in str(record)


def test_a_digit_in_clutter_is_in_its_box():
    rng = np.random.default_rng(0)
    digits, labels = rng.integers(1, 256, (20, 28, 28)).astype(np.uint8), np.arange(20) % 10
    many = measures.clutter(digits, labels, range(5))
    for i, (top, left, bottom, right) in enumerate(many.boxes):
        alone = measures.clutter(digits, labels, [i])
        assert torch.equal(alone.pixels[0], many.pixels[i])
        found = (many.pixels[i, 0, top:bottom, left:right] * 255).round().byte().numpy()
        assert many.labels[i] in labels[(digits == found).all((1, 2))]


def test_mass_in_a_box():
    heat = torch.zeros(4, 4)
    box = np.array([0, 0, 2, 2])
    assert measures.mass_in_box(heat, box) == 0.25
    heat[0, 0], heat[3, 3], heat[2, 2] = 3, 1, -5
    assert measures.mass_in_box(heat, box) == 0.75
