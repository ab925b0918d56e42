"""Translation of images: colours, conditions, tiles, the pipeline, the verb and the command."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import tiny_translator, translator
from PIL import Image

import genkit
from genkit import cli
from genkit.hub import vendoring
from genkit.models import translation, translation_losses
from genkit.models.translation import (
    in_tiles,
    load_translation,
    luminance,
    tile_starts,
    with_luminance,
)
from genkit.models.translation_losses import PatchDiscriminator, make_condition


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def picture(width: int = 12, height: int = 9, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


# ---- colours and conditions


def test_a_colouring_keeps_the_luminance_and_stays_in_range():
    made, grey = 1.5 * images(4, 3, 6, 7), images(4, 1, 6, 7, seed=1)
    kept = with_luminance(made, grey)
    assert (luminance(kept) - grey).abs().max() < 1e-5
    assert kept.abs().max() <= 1 + 1e-5


def test_a_colouring_of_the_right_luminance_stays_as_it_is():
    true = images(4, 3, 6, 7)
    assert (with_luminance(true, luminance(true)) - true).abs().max() < 1e-5


def test_the_luminance_is_that_of_pillow():
    image = picture()
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    grey = torch.from_numpy(np.array(image.convert("L"))) / 127.5 - 1
    assert (luminance(values)[0, 0] - grey).abs().max() < 1.1 / 127.5


def test_a_low_resolution_is_what_the_small_image_is_prepared_to():
    small = images(1, 3, 2, 3)
    large = F.interpolate(small, scale_factor=translation.FACTOR)
    assert torch.allclose(make_condition(large, "low", torch.zeros(1, 4)), large)
    levels = ((small[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    prepared = translator("low").prepare(Image.fromarray(levels))
    assert (prepared - large).abs().max() < 0.51 / 127.5


def test_a_mask_hides_a_rectangle_and_says_where():
    u = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    given = images(50, 3, 20, 30)
    condition = make_condition(given, "mask", u)
    hidden = condition[:, 3:] > 0
    assert torch.equal(condition[:, :3], given.masked_fill(hidden, 0))
    sides = hidden.any(3).sum(2).squeeze(), hidden.any(2).sum(2).squeeze()
    assert torch.equal(hidden.sum((1, 2, 3)), sides[0] * sides[1])
    least, most = translation_losses.HOLE
    assert sides[0].min() >= 20 * least and sides[1].max() <= 30 * most


def test_edges_are_white_at_a_step_and_black_on_a_plane():
    step = torch.full((1, 1, 6, 8), -1.0)
    step[..., 4:] = 1
    edges = make_condition(step, "edges", torch.zeros(1, 4))
    assert (edges[..., 3:5] == 1).all() and (edges[..., [0, 1, 6, 7]] == -1).all()
    assert torch.equal(make_condition(step.mT, "edges", torch.zeros(1, 4)), edges.mT)


@pytest.mark.parametrize(("side", "patch"), [(256, 70), (128, 34), (64, 16), (28, 16)])
def test_a_score_is_of_a_patch_of_the_papers_size(side, patch):
    """By the gradient of a score in the middle, without normalisation, which mixes all pixels."""
    network = PatchDiscriminator(4, side)
    network.layers = torch.nn.Sequential(
        *(m for m in network.layers if not isinstance(m, torch.nn.InstanceNorm2d))
    )
    given = images(1, 3, 128, 128).requires_grad_()
    scores = network(given, images(1, 1, 128, 128))
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    seen = given.grad[0].abs().sum(0) > 0
    assert int(seen.any(1).sum()) == int(seen.any(0).sum()) == patch


# ---- tiles


@pytest.mark.parametrize("side", [8, 9, 12, 15, 16, 17, 100, 1024])
def test_tiles_cover_a_side_and_overlap_by_half(side):
    starts = tile_starts(side, 8)
    assert starts[0] == 0 and starts[-1] == side - 8
    assert all(0 < b - a <= 4 for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("size", [(8, 8), (8, 30), (21, 13)])
def test_tiles_of_a_pointwise_network_are_the_whole_image(size):
    x, beside = images(2, 3, *size), images(2, 1, *size, seed=1)
    found = in_tiles(lambda own, given: own.square() * given, x, beside, (8, 8))
    assert (found - x.square() * beside).abs().max() < 1e-6


def test_a_mean_of_tiles_has_no_seam():
    """A network that says of each tile one number: between neighbours the mean is straight."""

    def mean(own, given):
        return given.mean((2, 3), keepdim=True).expand_as(given)

    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 16, 64)
    (found,) = in_tiles(mean, ramp[:, :0], ramp, (16, 16))
    steps = found[0].diff(dim=1)
    assert steps.min() > -1e-6 and steps.max() < 2.5 / 63


def test_an_image_that_repeats_is_translated_alike_across_seams():
    """A period of the tiles' step: every tile sees the same, and so do all of its pixels."""
    pipeline = translator("low", None)
    whole = images(1, 3, 4, 4).repeat(1, 1, 16, 16)  # 64 x 64
    made = pipeline.translate(whole, torch.zeros(1, 3, 64, 64))[0]
    inside = made[:, 4:-4, 4:-4].unfold(1, 4, 4).unfold(2, 4, 4)
    assert (inside - inside[:, :1, :1]).abs().max() < 1e-5


@pytest.mark.slow
def test_a_large_image_equals_itself_across_seams():
    pipeline = translator("low", None)
    side, step = 1024, 4
    whole = images(1, 3, step, step).repeat(1, 1, side // step, side // step)
    made = pipeline.translate(whole, torch.zeros(1, 3, side, side))[0]
    inside = made[:, step:-step, step:-step].unfold(1, step, step).unfold(2, step, step)
    assert (inside - inside[:, :1, :1]).abs().max() < 1e-3


def test_large_noise_of_equal_tiles_agrees_at_every_step():
    """Tiles share their noise: a pixel has one value at every step, whatever tile it is in."""
    pipeline, seen = translator("low", "flow"), []
    plain = pipeline.predict

    def predict(t, x, condition):
        seen.append(x.clone())
        return plain(t, x, condition)

    pipeline.predict = predict
    pipeline.translate(images(1, 3, 8, 12), images(1, 3, 8, 12, seed=1), 3)
    assert len(seen) == 3
    for left, right in seen:
        assert torch.equal(left[:, :, 4:], right[:, :, :4])


# ---- sampling and the pipeline


@pytest.mark.parametrize("objective", ["epsilon", "v", "x0", "flow"])
@pytest.mark.parametrize("steps", [5, 20, 100])
def test_the_sampler_of_a_perfect_network_ends_at_the_image(objective, steps):
    """For a single image in the world, the best prediction is known in closed form."""
    from genkit.models import diffusion, diffusion_losses

    saved = diffusion.make_scheduler(objective, "cosine")
    sampler = translation.make_sampler(saved, steps)
    assert len(sampler.timesteps) == steps
    image, x = images(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    for t in sampler.timesteps:
        at = t[None] if objective == "flow" else t[None].long()
        levels = diffusion_losses.noising_at_timesteps(saved, at)
        alpha, sigma = (each[:, None, None, None] for each in (levels.alpha, levels.sigma))
        noise = (x - alpha * image) / sigma
        prediction = diffusion_losses.target(image, noise, levels.alpha, levels.sigma, objective)
        x = sampler.step(prediction, t, x).prev_sample
    assert (x - image).abs().max() < 0.02


@pytest.mark.parametrize("objective", ["v", "flow"])
def test_a_seed_draws_its_own_image_in_any_company(objective):
    pipeline, image = translator("grey", objective), picture()
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = pipeline(image, seeds, 3, output_type="pt").images
    alone = pipeline(image, torch.Generator().manual_seed(4), 3, output_type="pt").images
    assert (both[1] - alone[0]).abs().max() < 1e-5
    assert (both[0] - both[1]).abs().max() > 0.01


def test_what_the_condition_knows_is_kept():
    made = translator("grey")(picture(mode="L"), torch.Generator(), 2).images[0]
    kept = np.abs(np.array(made.convert("L"), int) - np.array(picture(mode="L"), int))
    assert kept.max() <= 1
    mask = Image.new("L", (12, 9))
    mask.paste(255, (4, 2, 8, 6))
    made = np.array(translator("mask")(picture(), torch.Generator(), 2, mask).images[0])
    same = (made == np.array(picture())).all(2)
    assert same[np.array(mask) == 0].all() and not same[np.array(mask) > 0].all()


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (9, 21)])
@pytest.mark.parametrize("condition", translation.CONDITIONS)
def test_images_of_any_size_are_translated(size, condition):
    pipeline = translator(condition, None)
    mask = picture(*size, mode="L", seed=1) if condition == "mask" else None
    (made,) = pipeline(picture(*size), mask=mask).images
    times = translation.FACTOR if condition == "low" else 1
    assert made.size == (times * size[0], times * size[1])


@pytest.mark.parametrize("objective", ["v", "flow", None])
def test_a_saved_model_translates_the_same(tmp_path, objective):
    pipeline, image = translator("grey", objective), picture()
    vendoring.save_pipeline(pipeline, tmp_path / "model")
    first = pipeline(image, torch.Generator().manual_seed(1), None).images[0]
    for loaded in (load_translation(tmp_path / "model"), genkit.load(tmp_path / "model")):
        assert loaded.condition == "grey" and loaded.deterministic == (objective is None)
        again = loaded(image, torch.Generator().manual_seed(1), None).images[0]
        assert again.tobytes() == first.tobytes()
    made = genkit.translate(image, model=tmp_path / "model", seed=1)
    assert made.images[0].tobytes() == first.tobytes()


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import torch
from diffusers import DiffusionPipeline
from PIL import Image
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
image = pipeline(Image.open(sys.argv[2]), torch.Generator().manual_seed(5)).images[0]
image.save(sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["v", "flow", None])
def test_the_folder_translates_the_same_without_genkit(tmp_path, objective):
    tiny_translator(tmp_path / "model", "grey", objective)
    picture().save(tmp_path / "a.png")
    paths = [str(tmp_path / name) for name in ("model", "a.png", "b.png")]
    command = [sys.executable, "-c", WITHOUT_GENKIT, *paths]
    subprocess.run(command, capture_output=True, check=True)
    (expected,) = genkit.translate(paths[1], model=tmp_path / "model", seed=5).images
    with Image.open(paths[2]) as made:
        assert made.tobytes() == expected.tobytes()


# ---- the verb and the command


def test_the_record_says_how_images_were_made(tmp_path):
    tiny_translator(tmp_path / "model")
    made = genkit.translate(picture(), model=tmp_path / "model", seed=[7, 2], steps=3)
    assert (made.seeds, made.steps, made.tiles, made.evaluations) == ([7, 2], 3, 4, 12)
    assert "2 of 12 x 9 from grey, seeds 7, 2, 3 steps, 4 tiles, 12 evaluations each" in str(made)
    files = made.save_each(tmp_path / "a.png")
    assert [file.name for file in files] == ["a.png", "a-2.png"]
    made.save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (24, 9)


def test_the_command_writes_an_image_for_each_seed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_translator(tmp_path / "model")
    picture().save("a.png")
    cli.main(["translate", "a.png", "--model", "model", "--seed", "0", "1", "--steps", "2",
              "--json"])  # fmt: skip
    record = json.loads(capsys.readouterr().out)
    assert record["output"] == ["translated.png", "translated-2.png"]
    assert record["seeds"] == [0, 1] and record["evaluations"] == 8
    first, second = (Image.open(name).tobytes() for name in record["output"])
    assert first != second


def test_an_upload_that_is_a_bomb_is_refused(tmp_path):
    tiny_translator(tmp_path / "model")
    Image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="pixels, more than max_pixels"):
        genkit.translate(tmp_path / "bomb.png", model=tmp_path / "model")


@pytest.mark.parametrize(
    ("condition", "objective", "options", "message"),
    [
        ("grey", "v", {"steps": 0}, "steps must be a whole number from 1 to 100, got 0"),
        ("grey", "v", {"steps": True}, "steps must be a whole number"),
        ("grey", None, {"steps": 5}, "steps: this model takes a single one, got 5"),
        ("grey", "v", {"seed": -1}, "seed must be 0 or more"),
        ("grey", "v", {"seed": []}, "seed: there are none"),
        ("grey", "v", {"seed": "one"}, "seed"),
        ("grey", "v", {"mask": picture()}, "trained for grey, and takes no mask"),
        ("mask", "v", {}, "trained for mask, and requires a mask"),
        ("mask", "v", {"mask": picture(4, 4)}, r"mask must have the image's size \(12, 9\)"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(condition, objective, options, message):
    with pytest.raises(ValueError, match=message):
        genkit.translate(picture(), model=translator(condition, objective), **options)


def test_a_grey_model_is_not_asked_for_colour():
    with pytest.raises(ValueError, match="this model takes grey images alone, got one in colour"):
        genkit.translate(picture(), model=translator("low", "v", channels=1))
    made = genkit.translate(picture(mode="L"), model=translator("low", "v", channels=1), steps=1)
    assert made.images[0].mode == "L"


def test_results_too_large_are_refused():
    large = Image.new("L", (2048, 1024))
    with pytest.raises(ValueError, match="image: the result would have 8192 x 4096 pixels"):
        genkit.translate(large, model=translator("low", None, channels=1))


def test_other_models_are_named_by_their_verb(tmp_path):
    tiny_translator(tmp_path / "model")
    with pytest.raises(ValueError, match=r"translates images, which genkit\.translate takes"):
        genkit.sample(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="model"):
        genkit.translate(picture(), model=tmp_path / "missing")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("condition", "sepia", "its condition is 'sepia'"),
        ("condition", "mask", "do not fit mask"),
        ("scheduler", ["diffusers", "PNDMScheduler"], "PNDMScheduler"),
        ("scheduler", [None, None], "do not fit grey"),
    ],
)
def test_a_folder_that_was_changed_is_refused(tmp_path, key, value, message):
    tiny_translator(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_translation(tmp_path / "model")
