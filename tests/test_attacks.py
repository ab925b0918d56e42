"""Adversarial images: what holds of every attack, and what the verbs make of them."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from genkit.data.images import load_images
from genkit.metrics.features import Classifier
from genkit.models import classifier
from genkit.vision import patches, perturbations
from genkit.vision.attacks import attack_image
from genkit.vision.perturbations import Budget, fgsm, pgd, project, size_of, to_levels
from genkit.vision.robustness import measure_robustness

NAMES = ["cat", "dog", "tabby, tabby cat", "gibbon"]
BUDGETS = [Budget(0.1), Budget(0.7), Budget(0.5, "l2"), Budget(3.0, "l2")]
SHAPE = (2, 6, 5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_pixels(rows=7, shape=SHAPE):
    return torch.rand(rows, *shape, generator=generator(1))


def linear(weights):
    return lambda pixels: pixels.flatten(1) @ weights


def small_convolutions(channels=2, classes=4):
    """A smooth classifier whose rows do not see each other."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, 8, 3, padding=1),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * SHAPE[1] * SHAPE[2], classes),
    ).requires_grad_(False)


def processor(size=8, resize=None, values=(0.5, 0.5, 0.5)):
    return CLIPImageProcessorPil(
        size={"shortest_edge": resize or size},
        crop_size={"height": size, "width": size},
        resample=1,
        image_mean=list(values),
        image_std=list(values),
        do_convert_rgb=len(values) == 3,
    )


def loaded(names=NAMES, size=8, resize=None, seed=0):
    torch.manual_seed(seed)
    model = classifier.make_model(names, (3, size, size), 1, 8).eval()
    return Classifier(model, processor(size, resize), "tiny", "model")


def photo(channels=3, side=8):
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return values if channels == 3 else values[..., 0]


# ---- the ball


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_project_stays_in_the_ball_and_in_the_range(budget):
    center = some_pixels()
    found = project(center + 4 * torch.randn(center.shape, generator=generator()), center, budget)
    assert found.min() >= 0 and found.max() <= 1
    assert (size_of(found - center, budget.norm) <= budget.epsilon * (1 + 1e-5)).all()
    torch.testing.assert_close(project(found, center, budget), found)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_random_starts_fill_the_ball_and_depend_on_the_row_alone(budget):
    center = torch.full((300, 1, 2, 2), 0.5)
    small = dataclasses.replace(budget, epsilon=budget.epsilon / 10)
    seeds = range(300)
    found = perturbations.random_start(center, small, perturbations.row_generators(seeds))
    sizes = size_of(found - center, small.norm) / small.epsilon
    assert sizes.max() <= 1 + 1e-5
    assert (sizes**4).mean() == pytest.approx(0.5, abs=0.06)  # uniform by volume
    alone = perturbations.random_start(center[7:8], small, perturbations.row_generators([7]))
    assert torch.equal(alone[0], found[7])


@pytest.mark.parametrize("budget", [*BUDGETS, Budget(8 / 255), Budget(0.05, "l2")], ids=str)
def test_to_levels_gives_levels_in_the_ball(budget):
    center = (some_pixels() * 255).round() / 255
    changed = project(center + torch.randn(center.shape, generator=generator()), center, budget)
    found = to_levels(changed, center, budget)
    torch.testing.assert_close(found * 255, (found * 255).round(), rtol=0, atol=1e-4)
    sizes = size_of(found - center, budget.norm)
    assert (sizes <= budget.epsilon * (1 + 1e-5)).all()
    assert (sizes > 0.9 * size_of(changed - center, budget.norm)).all()
    assert found.min() >= 0 and found.max() <= 1


# ---- attacks


def test_attacks_equal_the_closed_form_of_a_linear_classifier():
    """Of two classes: the sign of the difference of their weights by linf, its direction by l2."""
    weights = torch.randn(math.prod(SHAPE), 2, generator=generator())
    pixels, labels = torch.full((3, *SHAPE), 0.5), torch.tensor([0, 1, 0])
    rise = (weights[:, 1] - weights[:, 0]).reshape(SHAPE) * (1 - 2 * labels)[:, None, None, None]
    for budget in (Budget(0.1), Budget(0.4, "l2")):
        best = pixels + budget.epsilon * perturbations.steepest(rise, budget.norm)
        found = fgsm(linear(weights), pixels, labels, budget)
        torch.testing.assert_close(found.pixels, best)
        options = {"steps": 20, "seeds": [0, 1, 2], "early": False}
        found = pgd(linear(weights), pixels, labels, budget, **options)
        missed = (rise * (best - found.pixels)).sum((1, 2, 3))
        missed /= (rise * (best - pixels)).sum((1, 2, 3))
        assert missed.abs().max() < (1e-6 if budget.norm == "linf" else 0.03)


@pytest.mark.parametrize("budget", [Budget(0.02), Budget(0.2, "l2")], ids=str)
def test_more_steps_never_have_a_lower_loss_on_a_linear_classifier(budget):
    weights = torch.randn(math.prod(SHAPE), 4, generator=generator())
    pixels, labels = some_pixels(), torch.arange(7) % 4
    losses = []
    for steps in (1, 2, 4, 8, 16):
        options = {"steps": steps, "seeds": range(7), "step_size": 0.005, "early": False}
        found = pgd(linear(weights), pixels, labels, budget, **options)
        scores = linear(weights)(found.pixels)
        losses.append(torch.nn.functional.cross_entropy(scores, labels, reduction="none"))
    assert (torch.stack(losses).diff(dim=0) >= -1e-6).all()


@pytest.mark.parametrize("budget", [Budget(0.05), Budget(0.2, "l2")], ids=str)
@pytest.mark.parametrize("early", [True, False])
def test_a_row_alone_equals_the_row_in_a_batch(budget, early):
    model, pixels = small_convolutions(), some_pixels()
    labels = model(pixels).argmax(1)
    options = {"steps": 6, "restarts": 3, "early": early}
    found = pgd(model, pixels, labels, budget, seeds=range(7), **options)
    searched = perturbations.square_search(model, pixels, labels, budget, steps=40, seeds=range(7))
    assert found.fooled.any() and not found.fooled.all()
    for i in range(7):
        row = slice(i, i + 1)
        alone = pgd(model, pixels[row], labels[row], budget, seeds=[i], **options)
        torch.testing.assert_close(alone.pixels, found.pixels[row])
        assert (alone.fooled, alone.queries) == (found.fooled[row], found.queries[row])
        alone = perturbations.square_search(
            model, pixels[row], labels[row], budget, steps=40, seeds=[i]
        )
        torch.testing.assert_close(alone.pixels, searched.pixels[row])
        assert (alone.fooled, alone.queries) == (searched.fooled[row], searched.queries[row])


@pytest.mark.parametrize("budget", [Budget(0.05), Budget(0.4, "l2")], ids=str)
def test_what_is_returned_is_what_was_judged(budget):
    model, pixels = small_convolutions(), some_pixels(40)
    labels = model(pixels).argmax(1)
    for early in (True, False):
        found = pgd(model, pixels, labels, budget, steps=8, seeds=range(40), early=early)
        assert torch.equal(model(found.pixels).argmax(1) != labels, found.fooled)
    one = fgsm(model, pixels, labels, budget)
    searched = perturbations.square_search(model, pixels, labels, budget, steps=50, seeds=range(40))
    for each in (one, searched, found):
        assert torch.equal(model(each.pixels).argmax(1) != labels, each.fooled)
        assert (size_of(each.pixels - pixels, budget.norm) <= budget.epsilon * (1 + 1e-5)).all()
        assert each.pixels.min() >= 0 and each.pixels.max() <= 1
    assert found.fooled.sum() >= one.fooled.sum() >= 1
    assert found.fooled.sum() >= searched.fooled.sum()


def test_targets_are_reached_and_restarts_only_add():
    model, pixels = small_convolutions(), some_pixels(30)
    targets = (model(pixels).argmax(1) + 1) % 4
    options = {"steps": 10, "seeds": range(30), "targeted": True}
    found = pgd(model, pixels, targets, Budget(0.3), **options)
    assert found.fooled.float().mean() > 0.8
    assert torch.equal(model(found.pixels).argmax(1) == targets, found.fooled)
    few = pgd(model, pixels, targets, Budget(0.1), **options)
    more = pgd(model, pixels, targets, Budget(0.1), restarts=4, **options)
    assert (more.fooled | ~few.fooled).all() and (more.queries >= few.queries).all()
    assert torch.equal(more.pixels[few.fooled], few.pixels[few.fooled])


def test_queries_count_what_each_row_costs():
    """Rows that are fooled are not evaluated again."""
    seen = 0

    def counted(pixels):
        nonlocal seen
        seen += len(pixels)
        return small_convolutions()(pixels)

    pixels = some_pixels(20)
    labels = small_convolutions()(pixels).argmax(1)
    found = pgd(counted, pixels, labels, Budget(0.06), steps=5, restarts=2, seeds=range(20))
    # every forward pass has a gradient, but for the last of each run
    assert seen <= found.queries.sum() <= 2 * seen
    assert (found.queries[~found.fooled] == 2 * (2 * 5 + 1)).all()
    assert found.queries[found.fooled].max() < 2 * (2 * 5 + 1) and found.fooled.any()


def test_training_examples_are_in_the_ball_and_raise_the_loss():
    model, pixels = small_convolutions(), some_pixels(64)
    labels = model(pixels).argmax(1)
    before = torch.nn.functional.cross_entropy(model(pixels), labels)
    for steps in (1, 7):
        torch.manual_seed(0)
        found = perturbations.training_examples(model, pixels, labels, 0.1, steps)
        torch.manual_seed(0)
        again = perturbations.training_examples(model, pixels, labels, 0.1, steps)
        assert torch.equal(found, again) and not found.requires_grad
        assert (found - pixels).abs().max() <= 0.1 + 1e-6
        assert found.min() >= 0 and found.max() <= 1
        assert torch.nn.functional.cross_entropy(model(found), labels) > before


def test_attacks_leave_the_global_random_state():
    model, pixels = small_convolutions(), some_pixels()
    options = {"model": loaded(), "method": "patch", "steps": 2}
    state = torch.random.get_rng_state()
    pgd(model, pixels, torch.zeros(7, dtype=torch.int64), Budget(0.1), steps=2, seeds=range(7))
    attack_image(photo(), **options)
    assert torch.equal(state, torch.random.get_rng_state())


# ---- patches


def test_a_patch_is_pasted_wholly_inside_and_nowhere_else():
    pixels = torch.zeros(200, 1, 20, 30)
    places = torch.rand(200, 4, generator=generator())
    places[:4, :2] = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    found = patches.paste(pixels, torch.ones(1, 12, 12), places, 0.5)
    torch.testing.assert_close(found, found.round())
    found = found.round()
    diameters = 10 * (0.8 + 0.4 * places[:, 2])
    areas = found.sum((1, 2, 3))
    torch.testing.assert_close(areas, math.pi / 4 * diameters**2, rtol=0.12, atol=0)
    for row, (down, right, size, _) in zip(found[:, 0], places.tolist(), strict=True):
        radius = 5 * (0.8 + 0.4 * size)
        inside = row.nonzero().float() + 0.5
        center = torch.tensor(
            [radius + down * (20 - 2 * radius), radius + right * (30 - 2 * radius)]
        )
        torch.testing.assert_close(inside.mean(0), center, rtol=0, atol=0.3)


def test_a_turn_of_zero_and_the_size_of_the_patch_show_it_as_it_is():
    patch = torch.rand(3, 12, 12, generator=generator())
    place = torch.tensor([[0.5, 0.5, 1.0, 0.5]])  # in the middle, 1.2 times the size
    found = patches.paste(torch.zeros(1, 3, 12, 12), patch, place, 1 / 1.2)[0]
    middle = slice(3, 9)
    torch.testing.assert_close(found[:, middle, middle], patch[:, middle, middle])


def test_one_patch_fools_a_classifier_on_many_images():
    """Of a classifier that sees colours: whatever the image, a patch of the target's colour."""
    weights = torch.tensor([[4.0, -4.0], [0.0, 0.0], [-4.0, 4.0]])  # red against blue

    def logits(pixels):
        return 30 * pixels.mean((2, 3)) @ weights

    pixels = torch.rand(20, 3, 16, 16, generator=generator()) * torch.tensor([1.0, 0.5, 0.7]).view(
        3, 1, 1
    )
    assert (logits(pixels).argmax(1) == 0).all()
    target = torch.ones(20, dtype=torch.int64)
    options = {"share": 0.6, "steps": 40, "seed": 0}
    patch = patches.make_patch(logits, pixels, target, targeted=True, **options)
    assert patch.min() >= 0 and patch.max() <= 1
    red, _, blue = patch[:, 4:-4, 4:-4].mean((1, 2))
    assert red < 0.05 and blue > 0.95
    places = torch.rand(20, 4, generator=generator(3))
    assert (logits(patches.paste(pixels, patch, places, 0.6)).argmax(1) == 1).all()
    away = patches.make_patch(logits, pixels, 1 - target, **options)
    torch.testing.assert_close(
        away[:, 4:-4, 4:-4], patch[:, 4:-4, 4:-4]
    )  # away from one of two classes is to the other
    assert torch.equal(patch, patches.make_patch(logits, pixels, target, targeted=True, **options))


# ---- the verb


@pytest.mark.parametrize("method", ["fgsm", "pgd", "patch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_png_is_what_the_record_says(tmp_path, method, channels):
    model = loaded()
    options = {} if method == "patch" else {"epsilon": 0.2}
    options |= {} if method == "fgsm" else {"steps": 20}
    found = attack_image(photo(channels), model=model, method=method, **options)
    found.save(tmp_path / "fooled.png")
    with Image.open(tmp_path / "fooled.png") as picture:
        assert picture.mode == ("L" if channels == 1 else "RGB")
        values = np.asarray(picture)
    planes = values[None] if channels == 1 else values.transpose(2, 0, 1)
    torch.testing.assert_close(found.after * 255, torch.tensor(planes.copy()).float())
    images = torch.tensor(planes.copy())[None].float() / 127.5 - 1
    with torch.no_grad():
        scores = model.model(pixel_values=model.preprocess(images)).logits[0]
    assert model.names[int(scores.argmax())] == found.predicted
    assert float(scores.softmax(0).max()) == pytest.approx(found.confidence, abs=1e-5)
    assert found.success == (found.predicted != found.predicted_before)
    assert found.before.shape == found.after.shape == (channels, 8, 8)
    if method != "patch":
        assert (found.after - found.before).abs().max() <= 0.2 + 1e-6
        assert found.change == pytest.approx(51 / 255)
    for word in (method, found.predicted_before, found.predicted):
        assert word in str(found)
    found.save_comparison(tmp_path / "comparison.png")
    assert found._repr_png_() == (tmp_path / "comparison.png").read_bytes()
    assert all(weights.requires_grad for weights in model.model.parameters())


def test_a_target_is_a_name_or_a_number():
    model = loaded()
    before = attack_image(photo(), model=model).predicted_before
    goal = next(name for name in NAMES if name != before)
    options = {"model": model, "epsilon": 1.0, "steps": 50, "restarts": 3}
    found = attack_image(photo(), target=goal, **options)
    assert found.target == goal and found.success == (found.predicted == goal)
    again = attack_image(photo(), target=NAMES.index(goal), **options)
    assert torch.equal(found.after, again.after) and str(found) == str(again)
    assert found.success


def test_l2_changes_have_their_length():
    found = attack_image(photo(), model=loaded(), norm="l2", epsilon=0.8, steps=20)
    length = float((found.after - found.before).norm())
    assert 0.75 < length <= 0.8 + 1e-6 and found.change == pytest.approx(length)
    assert "l2" in str(found)


def test_an_image_that_the_processor_crops_is_judged_as_it_is_seen(capsys):
    found = attack_image(photo(side=8), model=loaded(resize=10), epsilon=0.3)
    assert "resizes and crops even images of its own size" in capsys.readouterr().err
    assert found.after.shape == (3, 8, 8)


def test_a_vision_transformer_is_attacked_alike():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    model = Classifier(ViTForImageClassification(config).eval(), processor(), "vit", "model")
    assert attack_image(photo(), model=model, epsilon=1.0, steps=20).success


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, r"epsilon must be above 0 .*got 0"),
        ({"epsilon": 1.5}, r"epsilon must be .*at most 1 .*got 1.5"),
        ({"epsilon": 8}, r"8 levels are 8/255.*got 8"),
        ({"epsilon": math.nan}, "epsilon .*got nan"),
        ({"epsilon": True}, "epsilon .*got True"),
        ({"epsilon": 0.003}, "epsilon must be 1/255 or more.*0.003"),
        ({"epsilon": -1.0, "norm": "l2"}, "epsilon must be above 0, got -1.0"),
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"method": "cw"}, "method must be one of fgsm, pgd, patch, got 'cw'"),
        ({"method": "fgsm", "steps": 3}, "steps=3 is for pgd and patch, not for fgsm"),
        ({"method": "patch", "epsilon": 0.1}, "epsilon=0.1 is for fgsm and pgd"),
        ({"share": 0.5}, "share=0.5 is for patch"),
        ({"method": "patch", "share": 0.9}, "share must be above 0 and at most 0.83, got 0.9"),
        ({"steps": 0}, "steps must be a whole number, 1 or more, got 0"),
        ({"restarts": 1.5}, "restarts must be a whole number.*got 1.5"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"target": "gibon"}, "no class 'gibon'.*the nearest: gibbon"),
        ({"target": 4}, "target must be 0 to 3, got 4"),
        ({"image": "nowhere.png"}, "image: 'nowhere.png'"),
    ],
)
def test_bad_options_are_named(options, message):
    given = {"image": photo(), "model": loaded()} | options
    with pytest.raises(ValueError, match=message):
        attack_image(given.pop("image"), **given)


def test_the_model_says_the_target_already_and_other_suffixes_are_refused(tmp_path):
    model = loaded()
    found = attack_image(photo(), model=model)
    with pytest.raises(ValueError, match=f"target: tiny already says {found.predicted_before}"):
        attack_image(photo(), model=model, target=found.predicted_before)
    with pytest.raises(ValueError, match=r"path.*must end in \.png"):
        found.save(tmp_path / "fooled.jpg")


def test_an_image_of_another_size_or_kind_is_said(capsys):
    attack_image(photo(side=12), model=loaded())
    assert "resized from 12 x 12 to 8 x 8" in capsys.readouterr().err
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"
    )
    stock = processor(values=[0.5])
    grey = Classifier(ResNetForImageClassification(config).eval(), stock, "grey", "model")
    found = attack_image(photo(), model=grey, epsilon=0.5)
    assert "made grey" in capsys.readouterr().err and found.after.shape == (1, 8, 8)


# ---- over a data set


@pytest.fixture(scope="module")
def digits():
    """A classifier that has learnt the digits a little."""
    images = load_images("digits")
    model = loaded(images.names, seed=1)
    every = np.arange(len(images))
    pixels, labels = images.batch(every), images.classes(every)
    optimizer = torch.optim.AdamW(model.model.train().parameters(), 1e-2)
    order = torch.randperm(len(every), generator=generator()).split(128)
    for rows in (*order, *order, *order):
        loss = classifier.loss(model.model, pixels[rows], labels[rows], 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.model.eval()
    return model, images


def test_robust_accuracy_is_over_all_images(digits, tmp_path):
    model, images = digits
    options = {"model": model, "epsilon": 0.1, "steps": 5, "count": 100, "checked": 40}
    found = measure_robustness(images, **options)
    which = np.arange(100)
    pixels, labels = (images.batch(which) + 1) / 2, images.classes(which)

    def logits(changed):
        return model.model(pixel_values=(2 * changed - 1).expand(-1, 3, -1, -1)).logits

    right = logits(pixels).argmax(1) == labels
    assert found.clean == right.double().mean().item() > 0.5
    attacked = pgd(logits, pixels, labels, Budget(0.1), steps=5, seeds=which.tolist())
    expected = (~attacked.fooled & right).float().mean().item()
    assert found.robust == pytest.approx(expected, abs=0.011) and found.robust < found.clean
    assert [check.passed for check in found.checks] == [True] * 4
    assert found.checks[2].accuracy == 0
    assert found.protocol["images"] == 100 and found.protocol["checked"] == 40
    assert "of all 100 images" in str(found) and str(found).count("ok  ") == 4
    found.save(tmp_path / "robustness.json")
    saved = json.loads((tmp_path / "robustness.json").read_text())
    assert saved["robust"] == found.robust and len(saved["checks"]) == 4
    again = measure_robustness(images, **options | {"checked": 0, "device": None})
    assert again.robust == found.robust and again.checks == []


def test_a_weak_step_has_a_higher_accuracy(digits):
    model, images = digits
    options = {"model": model, "epsilon": 0.1, "count": 100, "checked": 0}
    strong = measure_robustness(images, restarts=2, **options)
    weak = measure_robustness(images, method="fgsm", **options)
    assert strong.robust <= weak.robust < strong.clean
    assert "steps" not in weak.protocol and strong.protocol["restarts"] == 2


def test_masked_gradients_fail_a_check(digits):
    model, images = digits
    inner = model.model.forward

    def rounded(pixel_values, **options):
        return inner(pixel_values=(pixel_values * 4).round() / 4 + 0 * pixel_values, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "forward", rounded)
        found = measure_robustness(images, model=model, epsilon=0.3, steps=4, count=40, checked=40)
    assert not all(check.passed for check in found.checks) and "FAIL" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 2}, "epsilon .*got 2"),
        ({"method": "patch"}, "method must be one of fgsm, pgd, got 'patch'"),
        ({"method": "fgsm", "restarts": 2}, "restarts=2 is for pgd"),
        ({"step_size": 0}, "step_size must be above 0, got 0"),
        ({"count": 10**6}, "count must be at most 1,797, got 1,000,000"),
        ({"checked": -1}, "checked must be a whole number.*got -1"),
    ],
)
def test_bad_options_of_a_measurement_are_named(digits, options, message):
    model, images = digits
    with pytest.raises(ValueError, match=message):
        measure_robustness(images, model=model, **options)


def test_classes_of_the_data_are_the_models_by_name(digits):
    model, images = digits
    with pytest.raises(ValueError, match="data: tiny has no class 'zero'"):
        measure_robustness(
            dataclasses.replace(images, names=["zero", *images.names[1:]]), model=model
        )
    with pytest.raises(ValueError, match="labels: these images have no labels"):
        measure_robustness(dataclasses.replace(images, labels=None), model=model)
    turned = dataclasses.replace(images, names=images.names[::-1], labels=9 - images.labels)
    options = {"model": model, "method": "fgsm", "epsilon": 0.1, "count": 100, "checked": 0}
    found, same = (measure_robustness(each, **options) for each in (turned, images))
    assert (found.clean, found.robust) == (same.clean, same.robust)
