"""Language models of pixels: exact likelihoods, and images that depend on their seed alone."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from genkit.models import lm
from genkit.text import logits as decoding
from genkit.text.logits import NEAR_LOGIT
from genkit.vision import pixel_lm
from genkit.vision.pixel_lm import PixelFormat, PixelPipeline
from genkit.vision.sampling import draw_samples

TINY = PixelFormat((1, 2, 2), 2)
GREY = PixelFormat((1, 6, 5), 16, 3, ("a", "b", "c"))
COLOUR = PixelFormat((3, 3, 4), 256)


def model_of(pixels, spread=4.0):
    """A small model with random weights, large enough that its distributions are far from even."""
    torch.manual_seed(0)
    model = pixel_lm.make_model(pixels, depth=2, width=32, heads=2).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(spread)
    return model


def random_images(pixels, count):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(pixels.levels, (count, *pixels.image_size), generator=generator)
    return levels / (pixels.levels - 1) * 2 - 1


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def every_image(pixels):
    """All lines of images without a class, (levels ** length, 1 + length)."""
    levels = itertools.product(range(pixels.levels), repeat=pixels.length)
    return torch.tensor([[pixels.levels, *line] for line in levels])


# ---- images as lines


@pytest.mark.parametrize("pixels", [TINY, GREY, COLOUR])
def test_images_come_back(pixels):
    images = random_images(pixels, 5)
    labels = torch.arange(5) % pixels.labels if pixels.labels else None
    lines = pixels.encode(images, labels)
    assert lines.shape == (5, 1 + pixels.length) and lines.dtype == torch.int64
    assert lines[:, 1:].min() >= 0 and lines[:, 1:].max() < pixels.levels
    assert torch.equal(lines[:, 0] - pixels.levels, torch.zeros(5) if labels is None else labels)
    assert torch.allclose(pixels.decode(lines), images, atol=1e-6)


def test_a_line_goes_from_left_to_right_with_its_channels_together():
    images = torch.zeros(1, 3, 3, 4)
    for channel, row, column in itertools.product(range(3), range(3), range(4)):
        images[0, channel, row, column] = (100 * channel + 10 * row + column) / 255 * 2 - 1
    wanted = [10 * r + c + 100 * k for r in range(3) for c in range(4) for k in range(3)]
    assert COLOUR.encode(images)[0].tolist() == [256, *wanted]


def test_all_bytes_are_exact_and_others_go_to_the_nearest_level():
    whole = PixelFormat((1, 16, 16), 256)
    values = torch.arange(256).float().div(127.5).sub(1).view(1, 1, 16, 16)  # as images.batch does
    assert whole.encode(values)[0, 1:].tolist() == list(range(256))
    for levels in (2, 3, 7, 16, 100):
        coarse = PixelFormat((1, 16, 16), levels)
        error = (coarse.decode(coarse.encode(values)) - values).abs().max()
        assert error <= 1 / (levels - 1) + 1e-6


# ---- likelihood


def test_a_model_that_knows_nothing_needs_all_bits_of_a_level():
    for pixels in (TINY, GREY, COLOUR):
        model = model_of(pixels)
        torch.nn.init.zeros_(model.lm_head.weight)
        labels = [0, 1, 2] if pixels.labels else None
        lines = pixels.encode(random_images(pixels, 3), labels)
        bits = pixel_lm.bits_per_dimension(model, lines)
        assert bits.dtype == torch.float64
        assert (bits - math.log2(pixels.levels)).abs().max() < 1e-12


def test_all_images_together_have_probability_1():
    model = model_of(TINY)
    bits = TINY.length * pixel_lm.bits_per_dimension(model, every_image(TINY))
    assert bits.std() > 0.5  # they are not equally likely
    assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-6)


def test_bits_are_those_of_a_stock_forward_pass_over_levels_alone(monkeypatch):
    model, images = model_of(GREY), random_images(GREY, 5)
    lines = GREY.encode(images, [0, 1, 2, 0, 1])
    with torch.no_grad():
        logs = model(input_ids=lines).logits[:, :-1, : GREY.levels].double().log_softmax(-1)
    wanted = [-logs[i].gather(1, lines[i, 1:, None]).sum().item() for i in range(5)]
    found = pixel_lm.bits_per_dimension(model, lines) * GREY.length * math.log(2)
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    monkeypatch.setattr(lm, "LOGITS", 1)  # one at a time
    again = pixel_lm.bits_per_dimension(model, lines) * GREY.length * math.log(2)
    assert again.tolist() == pytest.approx(wanted, rel=1e-6)


def test_training_on_independent_pixels_reaches_their_entropy():
    pixels = PixelFormat((1, 2, 2), 3)
    chances = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3], [0.0, 0.5, 0.5]])
    entropy = -torch.special.xlogy(chances, chances).sum(1).mean().item() / math.log(2)
    torch.manual_seed(0)
    model = pixel_lm.make_model(pixels, depth=1, width=32, heads=2)
    steps = 200
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        drawn = torch.multinomial(chances, 256, replacement=True).T
        lines = torch.cat([torch.full((256, 1), pixels.levels), drawn], 1)
        optimizer.zero_grad()
        lm.loss(model, lines[:, :-1], lines[:, 1:]).backward()
        optimizer.step()
        schedule.step()
    # exactly, over all images: cross-entropy is entropy and divergence, which is never below 0
    lines = every_image(pixels)
    weights = chances.log().gather(1, lines[:, 1:].T).sum(0).exp().double()
    bits = (weights * pixel_lm.bits_per_dimension(model.eval(), lines)).sum().item()
    assert entropy <= bits < entropy + 0.01


# ---- drawing


def test_images_are_drawn_as_often_as_they_are_likely():
    model = model_of(TINY)
    chances = 2 ** (-TINY.length * pixel_lm.bits_per_dimension(model, every_image(TINY)))
    count = 4096
    drawn = PixelPipeline(model)(count, torch.Generator().manual_seed(0), output_type="pt").images
    codes = (drawn.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1).long()
    found = torch.bincount(codes, minlength=16)
    expected = count * chances
    chi_squared = ((found - expected) ** 2 / expected)[expected > 1].sum()
    assert chi_squared < 37.7  # exceeded once in a thousand with 15 degrees of freedom


@pytest.mark.parametrize("pixels", [GREY, COLOUR])
def test_an_image_depends_on_its_own_seed_alone(pixels):
    pipeline = PixelPipeline(model_of(pixels))
    labels = torch.arange(64) % pixels.labels if pixels.labels else None
    whole = pipeline(64, seeds(*range(64)), labels, output_type="pt").images
    assert whole.flatten(1).unique(dim=0).shape[0] == 64
    some = [60, 3, 8, 21, 34, 5, 13]
    told = None if labels is None else labels[some]
    assert torch.equal(pipeline(7, seeds(*some), told, output_type="pt").images, whole[some])
    for i in (0, 34, 63):
        told = None if labels is None else labels[i : i + 1]
        assert torch.equal(pipeline(1, seeds(i), told, output_type="pt").images, whole[i : i + 1])


def drawn_without_a_cache(model, pixels, label, generator):
    """One image, each level after a whole forward pass over what stands before it."""
    line = [pixels.levels + label]
    for _ in range(pixels.length):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([line]), use_cache=False).logits[0, -1]
        uniform = torch.rand(pixels.levels, generator=generator, dtype=torch.float64)
        line.append(int((logits[: pixels.levels] - (-uniform.log()).log().float()).argmax()))
    return pixels.decode(torch.tensor([line]))[0]


@pytest.mark.parametrize("near", [decoding.NEAR_LOGIT, 0.0, 1e9])  # 0: never read alone
def test_drawing_is_that_of_whole_forward_passes(monkeypatch, near):
    monkeypatch.setattr(decoding, "NEAR_LOGIT", near)
    model = model_of(GREY)
    drawn = PixelPipeline(model)(5, seeds(*range(5)), [0, 1, 2, 0, 1], output_type="pt").images
    for i, image in enumerate(drawn):
        wanted = drawn_without_a_cache(model, GREY, i % 3, seeds(i)[0])
        assert torch.allclose(image * 2 - 1, wanted, atol=1e-6)


def test_rounding_is_far_below_what_is_read_alone(monkeypatch):
    pixels, found = PixelFormat((1, 16, 16), 256), []
    model, choose = model_of(pixels), pixel_lm.choose

    def record(logits, *rest):
        found.append(logits)
        return choose(logits, *rest)

    monkeypatch.setattr(decoding, "NEAR_LOGIT", 0.0)
    monkeypatch.setattr(pixel_lm, "choose", record)
    drawn = PixelPipeline(model)(64, seeds(*range(64)), output_type="pt").images
    lines = pixels.encode(drawn * 2 - 1)[:, :-1]
    for row in range(0, 64, 9):
        with torch.inference_mode():
            alone = model(input_ids=lines[row, None], use_cache=False).logits[0, :, :256]
        together = torch.stack([logits[row] for logits in found])
        assert (alone - together).abs().max() < NEAR_LOGIT / 10


def test_more_images_than_are_drawn_at_once(monkeypatch):
    pipeline = PixelPipeline(model_of(GREY))
    labels = torch.arange(10) % 3
    whole = pipeline(10, seeds(*range(10)), labels, output_type="pt").images
    monkeypatch.setattr(pixel_lm, "BATCH", 4)
    assert torch.equal(pipeline(10, seeds(*range(10)), labels, output_type="pt").images, whole)


def test_beginnings_are_never_drawn():
    model = model_of(GREY)
    with torch.no_grad():
        model.lm_head.weight[GREY.levels :].mul_(100)
    with torch.inference_mode():
        likeliest = model(input_ids=torch.arange(16, 19)[:, None]).logits.argmax(-1)
    assert (likeliest >= GREY.levels).any()
    drawn = PixelPipeline(model)(9, seeds(*range(9)), [0, 1, 2] * 3, output_type="pt").images
    assert drawn.min() >= 0 and drawn.max() <= 1


def test_a_class_changes_what_is_drawn_and_how_likely_it_is():
    model, image = model_of(GREY), random_images(GREY, 1).expand(3, -1, -1, -1)
    pipeline, own = PixelPipeline(model), range(30)
    one, other = (pipeline(30, seeds(*own), [k] * 30, "pt").images for k in (0, 1))
    assert not torch.equal(one, other)
    bits = pixel_lm.bits_per_dimension(model, GREY.encode(image, [0, 1, 2]))
    assert bits.unique().shape[0] == 3


def test_all_kinds_of_output_show_the_same():
    pipeline = PixelPipeline(model_of(COLOUR))
    drawn = pipeline(2, seeds(0, 1), output_type="pt").images
    arrays = pipeline(2, seeds(0, 1), output_type="np").images
    assert np.array_equal(arrays, drawn.permute(0, 2, 3, 1).numpy())
    pictures = pipeline(2, seeds(0, 1)).images
    assert np.array_equal(np.asarray(pictures[1]), np.round(arrays[1] * 255).astype(np.uint8))
    assert torch.equal(pipeline(2, seeds(0, 1), None, "pt", return_dict=False)[0], drawn)


def test_evaluation_draws_from_it():
    pipeline = PixelPipeline(model_of(GREY))
    drawn = draw_samples(pipeline, range(5, 9), [2, 1, 0, 2])
    own = pipeline(4, seeds(5, 6, 7, 8), [2, 1, 0, 2], output_type="pt").images
    assert torch.equal(drawn, own * 2 - 1)
    assert pipeline.to("cpu").device.type == "cpu" and pipeline.labels == 3


def test_global_random_state_is_left_alone():
    pipeline, state = PixelPipeline(model_of(TINY)), torch.get_rng_state()
    pipeline(2, seeds(0, 1), output_type="pt")
    assert torch.equal(torch.get_rng_state(), state)


# ---- completing


@pytest.mark.parametrize("pixels", [GREY, COLOUR])
def test_what_is_given_is_kept_and_what_is_drawn_is_the_seeds(pixels):
    pipeline = PixelPipeline(model_of(pixels))
    images, height = random_images(pixels, 7), pixels.image_size[1]
    labels = torch.arange(7) % pixels.labels if pixels.labels else None
    for kept in (1, height // 2, height - 1):
        done = pipeline.complete(images, labels, kept, seeds(*range(7)))
        assert torch.allclose(done[:, :, :kept], images[:, :, :kept], atol=1e-6)
        assert not torch.allclose(done[:, :, kept:], images[:, :, kept:], atol=1e-6)
        told = None if labels is None else labels[4:5]
        assert torch.equal(pipeline.complete(images[4:5], told, kept, seeds(4)), done[4:5])


def test_a_drawn_image_completes_itself():
    pipeline = PixelPipeline(model_of(GREY))
    labels = [0, 1, 2, 0]
    drawn = pipeline(4, seeds(0, 1, 2, 3), labels, output_type="pt").images * 2 - 1
    noise = random_images(GREY, 4)
    assert torch.allclose(pipeline.complete(noise, labels, 0, seeds(0, 1, 2, 3)), drawn, atol=1e-6)
    for kept in (1, 3, 5):
        done = pipeline.complete(drawn, labels, kept, seeds(0, 1, 2, 3))
        assert torch.allclose(done, drawn, atol=1e-6)


# ---- the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pixels")
    model_of(GREY).save_pretrained(path)
    return path


def test_a_saved_model_draws_the_same(folder):
    pipeline = pixel_lm.load_pixel_lm(folder)
    assert pipeline.pixels.names == ["a", "b", "c"] and pipeline.pixels.image_size == [1, 6, 5]
    own = PixelPipeline(model_of(GREY))
    one, other = (p(3, seeds(0, 1, 2), [0, 1, 2], "pt").images for p in (pipeline, own))
    assert torch.equal(one, other)


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
facts = model.config.pixels
assert facts == {"image_size": [1, 6, 5], "levels": 16, "labels": 3, "names": ["a", "b", "c"]}
torch.manual_seed(0)
lines = model.generate(torch.tensor([[17]] * 4))
assert lines.shape == (4, 31) and lines[:, 1:].max() < 16, lines
from safetensors.torch import save_file
save_file({"lines": lines, "logits": model(input_ids=lines).logits}, sys.argv[2])
"""


@pytest.mark.slow
def test_the_folder_is_a_stock_model_without_genkit(folder, tmp_path):
    told = tmp_path / "told.safetensors"
    command = [sys.executable, "-W", "error", "-c", WITHOUT_GENKIT, str(folder), str(told)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(told)
    with torch.no_grad():
        logits = model_of(GREY)(input_ids=theirs["lines"]).logits
    assert torch.allclose(theirs["logits"], logits, atol=1e-5)


def edit(folder, **changes):
    """Change a saved config; None takes a key away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def point_outside(folder):
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FACTS = {"image_size": [1, 6, 5], "levels": 16, "labels": 3, "names": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "No such file"),
        (lambda f: (f / "config.json").write_text("{"), "Expecting property name"),
        (lambda f: (f / "config.json").write_text("[]"), "no settings of a model"),
        (lambda f: edit(f, pixels=None), "model_type is llama"),
        (lambda f: edit(f, model_type="gpt2"), "model_type is gpt2"),
        (lambda f: edit(f, pixels=FACTS | {"levels": 17}), "vocab_size is 19, but .* 20"),
        (lambda f: edit(f, pixels=FACTS | {"levels": 1}), "levels must be 2 to 256, got 1"),
        (lambda f: edit(f, pixels=FACTS | {"names": []}), "labels: 3 classes do not have 0 names"),
        (lambda f: edit(f, pixels=FACTS | {"image_size": [6, 5]}), "image_size must be 3 numbers"),
        (lambda f: edit(f, pixels={"levels": 16}), "image_size"),
        (lambda f: edit(f, max_position_embeddings=29), "max_position_embeddings is 29, but .* 30"),
        (drop_a_weight, "its weights lack .*model.norm.weight"),
        (point_outside, "names a shard outside its folder"),
        (pickle_weights, "safetensors"),
    ],
)
def test_a_folder_that_holds_no_such_model_is_refused(folder, tmp_path, spoil, message):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as told:
        pixel_lm.load_pixel_lm(tmp_path)
    assert str(tmp_path) in str(told.value) and "train_pixels" in str(told.value)


# ---- what cannot work


PLAIN = PixelPipeline(model_of(TINY))
TOLD = PixelPipeline(model_of(GREY))
ONE = torch.zeros(1, 1, 6, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PixelFormat((1, 2, 2), 1), "levels must be 2 to 256, got 1"),
        (lambda: PixelFormat((1, 2, 2), 257), "levels must be 2 to 256, got 257"),
        (lambda: PixelFormat((1, 2, 2), 2.0), "levels must be 2 to 256, got 2.0"),
        (lambda: PixelFormat((1, 0, 2), 2), "image_size must be 3 numbers above 0, got .1, 0, 2."),
        (lambda: pixel_lm.make_model(TINY, 1, 30, 4), "width .*4 heads.* 30"),
        (lambda: PLAIN(0), "batch_size must be 1 or more, got 0"),
        (lambda: PLAIN(2, seeds(0, 1, 2)), "generator must be one or a list of 2, got 3"),
        (lambda: PLAIN(1, labels=[0]), "labels: .*unconditional"),
        (lambda: PLAIN(1, output_type="pdf"), "output_type must be pil, np or pt, got 'pdf'"),
        (lambda: TOLD(1), "labels are required.*3 classes"),
        (lambda: TOLD(1, labels=[3]), "labels must be 1 of 0 to 2, got .3."),
        (lambda: TOLD(1, labels=[-1]), "labels must be 1 of 0 to 2, got .-1."),
        (lambda: TOLD(2, labels=[0]), "labels must be 2 of 0 to 2, got .0."),
        (lambda: TOLD(1, labels=[0.5]), "labels must be 1 of 0 to 2, got .0.5."),
        (lambda: TOLD.complete(ONE, [0], 6), "kept_rows must be 0 to 5, got 6"),
        (lambda: TOLD.complete(ONE, [0], -1), "kept_rows must be 0 to 5, got -1"),
        (lambda: TOLD.complete(ONE, None, 3), "labels are required.*3"),
        (lambda: TOLD.complete(torch.zeros(1, 1, 5, 6), [0], 3), r"images must be \(n, 1, 6, 5\)"),
        (lambda: TOLD.complete(torch.zeros(1, 6, 5), [0], 3), r"images must be \(n, 1, 6, 5\)"),
        (
            lambda: TOLD.complete(ONE + 1.5, [0], 3),
            r"images must be floats in \[-1, 1\], got .*1.5",
        ),
        (lambda: TOLD.complete(ONE / 0, [0], 3), r"images must be floats in \[-1, 1\], got"),
        (lambda: TOLD.complete(ONE.int(), [0], 3), r"images must be floats .* got torch.int32"),
        (lambda: TOLD.complete(ONE[:0], [], 3), "images: there are none"),
    ],
)
def test_invalid_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
