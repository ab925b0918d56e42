"""genkit.sample: a saved model of any family draws images, each by its own seed."""

import gc
import os
import pickle
import random
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_autoencoder, tiny_denoiser, tiny_gan, tiny_pixels
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import genkit
from genkit.data import images
from genkit.engine import unet as quick
from genkit.metrics import features
from genkit.models import denoisers, diffusion
from genkit.vision import denoising, latent, pipelines, sampling

TOLD = ("autoencoder", "told", "told_flow", "told_mean")  # of 4 classes
DIFFUSION = ("diffusion", "flow", "told", "told_flow", "mean", "told_mean")


FAMILIES = {
    "autoencoder": tiny_autoencoder,
    "gan": tiny_gan,
    "diffusion": tiny_denoiser("epsilon"),
    "flow": tiny_denoiser("flow"),
    "told": tiny_denoiser("v", 4, "cosine"),
    "told_flow": tiny_denoiser("flow", 4),
    "mean": tiny_denoiser("flow", mean=True),
    "told_mean": tiny_denoiser("flow", 4, mean=True),
    "pixels": tiny_pixels,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each family, of random weights."""
    folder = tmp_path_factory.mktemp("saved")
    with torch.random.fork_rng():
        for name, save in FAMILIES.items():
            torch.manual_seed(0)
            save(folder / name)
    return folder


def told(name: str, count: int) -> dict:
    return {"label": [i % 4 for i in range(count)]} if name in TOLD else {}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """The same pictures, but for what rounds: x_t is 157 times the image in it at first."""
    torch.testing.assert_close(one, other, rtol=0, atol=5e-5)
    levels = [((images + 1) * 127.5).round() for images in (one, other)]
    assert (levels[0] != levels[1]).float().mean() < 2e-3


# ---- rows


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_depends_on_its_own_seed_alone(saved, name):
    labels = told(name, 64)
    whole = genkit.sample(saved / name, 64, seed=100, **labels)
    assert whole.seeds == list(range(100, 164)) and whole.labels == labels.get("label")
    assert whole.images.min() >= -1 and whole.images.max() <= 1
    assert whole.images.shape[0] == 64 and whole.images.dtype == torch.float32
    assert whole.images.flatten(1).unique(dim=0).shape[0] == 64
    some = [60, 3, 8, 21, 34, 5, 13]
    for rows in (some, [33]):
        own = {"label": [i % 4 for i in rows]} if labels else {}
        given = [100 + i for i in rows]
        again = genkit.sample(str(saved / name), len(rows), seed=given, **own)
        assert again.seeds == given
        if name == "pixels":
            assert torch.equal(again.images, whole.images[rows])
        assert_same(again.images, whole.images[rows])


def test_more_rows_than_are_drawn_at_a_time(saved):
    count = sampling.ROWS["cpu"] + 3
    whole = genkit.sample(saved / "told", count, seed=7, steps=2, label=3)
    assert len(whole.images) == count and whole.seeds[-1] == 7 + count - 1
    last = genkit.sample(saved / "told", 1, seed=whole.seeds[-1], steps=2, label=3)
    assert_same(last.images, whole.images[-1:])


@pytest.mark.parametrize("name", ["gan", "flow", "pixels"])
def test_sample_without_seed_records_a_random_one(saved, name):
    first, second = (genkit.sample(saved / name, 3) for _ in range(2))
    assert first.seeds != second.seeds and not torch.equal(first.images, second.images)
    assert first.seeds == list(range(first.seeds[0], first.seeds[0] + 3))
    again = genkit.sample(saved / name, 3, seed=first.seeds[0])
    assert_same(again.images, first.images)


@pytest.mark.parametrize("name", FAMILIES)
def test_global_random_state_is_neither_read_nor_changed(saved, name):
    drawn = []
    for start in (1, 2):
        torch.manual_seed(start)
        np.random.seed(start)
        random.seed(start)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        options = {"scheduler": "ddpm", "steps": 4} if name in ("diffusion", "told") else {}
        drawn.append(genkit.sample(saved / name, 2, seed=5, **told(name, 2), **options).images)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert torch.equal(*drawn)


# ---- classes


@pytest.mark.parametrize("name", TOLD)
def test_classes_take_turns_by_default(saved, name, monkeypatch):
    options = {"seed": 5, "steps": 2 if name in DIFFUSION else None}
    drawn = genkit.sample(saved / name, 7, **options)
    assert drawn.labels == [0, 1, 2, 3, 0, 1, 2] and drawn.seeds == list(range(5, 12))
    assert "classes 0 to 3 in turn" in str(drawn)
    assert torch.equal(
        drawn.images, genkit.sample(saved / name, 7, label=drawn.labels, **options).images
    )
    monkeypatch.setattr(sampling, "ROWS", {"cpu": 3})  # drawn at a time
    again = genkit.sample(saved / name, 9, **options)
    assert again.labels[:7] == drawn.labels
    torch.testing.assert_close(again.images[:7], drawn.images, rtol=0, atol=5e-5)
    own = options | {"seed": drawn.seeds[6], "label": drawn.labels[6]}
    alone = genkit.sample(saved / name, 1, **own).images
    torch.testing.assert_close(alone, drawn.images[6:], rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOLD)
def test_classes_take_turns_in_latent_spaces(saved, name):
    pipeline = pipelines.load_pipeline(saved / name)
    latents = pipelines.draw_latents(pipeline, 5)
    turns = [0, 1, 2, 3, 0]
    assert torch.equal(
        pipelines.decode(pipeline, latents), pipelines.decode(pipeline, latents, turns)
    )
    truncated = latent.truncate(pipeline, (0.5, None), count=5)
    assert truncated.labels == turns and "classes 0 to 3 in turn" in str(truncated)
    shifted = latent.shift(pipeline, latents, latents[0], (0.0, 1.0))
    assert shifted.labels == turns and torch.equal(shifted.images[0], truncated.images[1])
    walk = latent.interpolate(pipeline, latents[0], latents[1], 3)
    assert walk.label == 0 and "class 0" in str(walk)
    one = latent.interpolate(pipeline, latents[0], latents[1], 3, label=0)
    assert torch.equal(walk.linear, one.linear)


def test_a_plane_and_a_trajectory_are_of_the_first_class(saved):
    plane = latent.plane(pipelines.load_pipeline(saved / "autoencoder"), 2)
    assert plane.label == 0 and "class 0" in str(plane)
    way = denoising.denoising_trajectory(pipelines.load_pipeline(saved / "told"), steps=2)
    assert way.label == 0 and "class 0" in str(way)
    plain = denoising.denoising_trajectory(pipelines.load_pipeline(saved / "flow"), steps=2)
    assert plain.label is None


def test_images_that_are_given_have_their_own_classes(saved):
    digits = images.load_images("digits")
    some = digits.take(np.flatnonzero(digits.labels < 4)[:3])
    own = some.classes(np.arange(3))
    vae, told = (pipelines.load_pipeline(saved / name) for name in ("autoencoder", "told"))
    assert torch.equal(pipelines.encode(vae, some), pipelines.encode(vae, some, own))
    inverted = [denoising.invert(told, some, labels, 2).noise for labels in (None, own)]
    assert torch.equal(*inverted)
    with pytest.raises(ValueError, match="labels are required"):
        pipelines.encode(vae, some.batch(np.arange(3)))


@pytest.mark.parametrize("name", TOLD)
def test_sample_takes_one_label_or_one_for_each(saved, name):
    options = {"seed": 0, "steps": 3 if name in DIFFUSION else None}
    one = genkit.sample(saved / name, 3, label=2, **options)
    assert one.labels == [2, 2, 2]
    for label in ([2, 2, 2], np.array([2, 2, 2]), torch.tensor([2, 2, 2]), (2, 2, np.int64(2))):
        each = genkit.sample(saved / name, 3, label=label, **options)
        assert each.labels == [2, 2, 2] and torch.equal(each.images, one.images)
    other = genkit.sample(saved / name, 3, label=[2, 1, 2], **options).images
    assert (other[1] - one.images[1]).abs().max() > 1e-3
    assert_same(other[[0, 2]], one.images[[0, 2]])


def test_guidance_changes_images_and_1_is_none(saved):
    plain = genkit.sample(saved / "told", 4, label=1, seed=0, steps=5)
    assert plain.guidance == 1.0
    same = genkit.sample(saved / "told", 4, label=1, seed=0, steps=5, guidance=1)
    assert torch.equal(same.images, plain.images)
    more = genkit.sample(saved / "told", 4, label=1, seed=0, steps=5, guidance=3)
    assert more.guidance == 3.0 and (more.images - plain.images).abs().max() > 1e-3
    free = [genkit.sample(saved / "told", 4, label=i, seed=0, guidance=0) for i in (0, 3)]
    assert_same(free[0].images, free[1].images)  # towards no class at all


# ---- the record


def few(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("diffusion", {}, ("dpm++", 10, 10)),
        ("diffusion", {"scheduler": "ddpm", "steps": 7}, ("ddpm", 7, 7)),
        ("diffusion", {"scheduler": "ddim"}, ("ddim", 50, 50)),
        ("diffusion", {"scheduler": "unipc", "steps": 6}, ("unipc", 6, 6)),
        ("diffusion", {"scheduler": "euler", "steps": 6}, ("euler", 6, 6)),
        ("diffusion", {"scheduler": "heun"}, ("heun", 15, 29)),
        ("flow", {}, ("dpm++", 10, 10)),
        ("flow", {"scheduler": "heun"}, ("heun", 15, 29)),
        ("mean", {}, ("euler", 1, 1)),
        ("told_mean", {"guidance": 1.5, "steps": 4}, ("euler", 4, 4)),
        ("flow", {"scheduler": "euler", "steps": 3}, ("euler", 3, 3)),
        ("told", {"guidance": 2.0, "steps": 4}, ("dpm++", 4, 8)),
        ("told_flow", {"guidance": 0, "steps": 4}, ("dpm++", 4, 8)),
        ("told", {"guidance": 1}, ("dpm++", 10, 10)),
    ],
)
def test_evaluations_are_those_that_were_made(saved, name, options, wanted):
    unet, rows = sampling.load_image_model(str(saved / name)).unet, []
    hook = unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    made = genkit.sample(saved / name, 3, seed=0, **told(name, 3), **options)
    hook.remove()
    assert (made.scheduler, made.steps, made.evaluations) == wanted
    assert sum(rows) == 3 * made.evaluations
    assert made.model == str(saved / name) and made.seconds > 0
    text = str(made)
    for part in ("3 of 1 x 8 x 8", "seeds 0 to 2", f"{few(wanted[1], 'step')} of {wanted[0]}"):
        assert part in text
    assert f"{few(wanted[2], 'evaluation')} each" in text
    assert ("guidance" in text) == (options.get("guidance", 1) != 1)


def test_other_families_are_asked_once_or_once_a_pixel(saved, monkeypatch):
    rows = []
    generator = sampling.load_image_model(str(saved / "gan")).generator
    hook = generator.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    made = genkit.sample(saved / "gan", 3, seed=0)
    hook.remove()
    assert rows == [3] and made.evaluations == 1
    model, rows = sampling.load_image_model(str(saved / "pixels")).model, []
    hook = model.register_forward_pre_hook(
        lambda _, __, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    made = genkit.sample(saved / "pixels", 3, seed=0)
    hook.remove()
    assert rows.count(3) == made.evaluations == 12  # where rounding decides, a row is read alone
    assert genkit.sample(saved / "autoencoder", 1, label=0).evaluations == 1
    assert (made.scheduler, made.steps, made.guidance, made.labels) == (None,) * 4
    assert "seeds 0 to 2, 12 evaluations" in str(made)
    assert "seeds 9, " in str(genkit.sample(saved / "gan", 1, seed=9))


def test_a_grid_is_written_whole(saved, tmp_path, monkeypatch):
    made = genkit.sample(saved / "gan", 5, seed=0)
    made.save_grid(tmp_path / "square.png")
    made.save_grid(str(tmp_path / "row.png"), columns=5)
    sizes = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            picture.load()
            sizes[path.name] = picture.size
    assert sizes == {"square.png": (3 * 58 + 2, 2 * 58 + 2), "row.png": (5 * 58 + 2, 58 + 2)}
    with Image.open(tmp_path / "row.png") as picture:
        shown = np.asarray(picture)[5, 5::58][:5, 0]  # the first pixel of each, enlarged
    first = ((made.images[:, 0, 0, 0] + 1) * 127.5).round()
    assert shown.tolist() == first.tolist()
    before = (tmp_path / "row.png").read_bytes()

    def fail(picture, path, *_, **__):
        Path(path).write_bytes(before[:50])
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        made.save_grid(tmp_path / "row.png")
    assert (tmp_path / "row.png").read_bytes() == before


# ---- with and without genkit


STRANGER = """
import os, sys
sys.modules["genkit"] = None  # importing it fails
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
torch.set_num_threads(1)
folder, out = sys.argv[1:]
seeds = lambda: [torch.Generator().manual_seed(i) for i in (3, 4, 5)]
found = {}
for name in ("diffusion", "flow"):
    pipeline = DiffusionPipeline.from_pretrained(f"{folder}/{name}")
    assert type(pipeline) is DDPMPipeline
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(3, seeds(), num_inference_steps=12, output_type="np").images
    found[name] = torch.from_numpy(images).permute(0, 3, 1, 2)
for name in ("told", "told_flow", "told_mean"):
    try:
        DiffusionPipeline.from_pretrained(f"{folder}/{name}")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("it was loaded without trust")
    pipeline = DiffusionPipeline.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    found[name] = pipeline(3, seeds(), labels=[2, 0, 1], output_type="pt").images
    how = {"num_inference_steps": 6, "guidance": 2.5, "output_type": "pt"}
    found[f"{name}_guided"] = pipeline(3, seeds(), labels=[2, 0, 1], **how).images
assert not any(name.startswith("genkit.") for name in sys.modules)
save_file({k: v.contiguous() for k, v in found.items()}, out)
"""


@pytest.fixture(scope="module")
def stranger(saved, tmp_path_factory):
    """What a program without genkit draws."""
    folder = tmp_path_factory.mktemp("stranger")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(saved), str(folder / "images.safetensors")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "images.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheduler"), [("diffusion", "ddpm"), ("flow", "euler")])
def test_the_stock_pipeline_draws_the_same(saved, stranger, name, scheduler):
    ours = genkit.sample(saved / name, 3, seed=3, scheduler=scheduler, steps=12).images
    assert_same(ours, 2 * stranger[name] - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["told", "told_flow"])
def test_the_code_that_travels_draws_the_same(saved, stranger, name):
    ours = genkit.sample(saved / name, 3, seed=3, label=[2, 0, 1]).images
    assert_same(ours, 2 * stranger[name] - 1)
    how = {"steps": 6, "guidance": 2.5}
    ours = genkit.sample(saved / name, 3, seed=3, label=[2, 0, 1], **how).images
    assert_same(ours, 2 * stranger[f"{name}_guided"] - 1)


def copied(folder: Path, to: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            target = to / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("name", ["autoencoder", "gan", "told"])
def test_the_code_beside_a_model_is_not_run(saved, tmp_path, name, monkeypatch):
    folder = copied(saved / name, tmp_path / "model")
    codes = list(folder.rglob("*.py"))
    assert codes
    for code in codes:
        with code.open("a") as file:
            file.write(f"\nopen({str(tmp_path / 'canary')!r}, 'w').close()\n")
    made = genkit.sample(folder, 2, seed=0, **told(name, 2)).images
    assert_same(made, genkit.sample(saved / name, 2, seed=0, **told(name, 2)).images)
    assert not (tmp_path / "canary").exists()
    if name == "told":  # it sings when it is run
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(str(folder))
        assert not (tmp_path / "canary").exists()
        DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
        assert (tmp_path / "canary").exists()


def test_a_model_that_was_trained_on_is_loaded_anew(saved, tmp_path):
    folder = copied(saved / "gan", tmp_path / "model")
    before = genkit.sample(folder, 2, seed=0).images
    assert sampling.load_image_model(str(folder)) is sampling.load_image_model(str(folder))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny_gan(folder)
    after = genkit.sample(folder, 2, seed=0).images
    assert (after - before).abs().max() > 1e-2


# ---- how fast


@pytest.mark.parametrize("name", ["diffusion", "told"])
def test_half_the_precision_is_nearly_the_same(saved, name):
    options = {"seed": 0, "steps": 5, **told(name, 8)}
    whole, half = (
        genkit.sample(saved / name, 8, dtype=dtype, **options).images
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().mean() < 0.1 * whole.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion", "told_flow"])
def test_compiled_networks_draw_the_same(saved, name):
    # 66 rows are two parts of those that it is compiled for
    options = {"seed": 0, "steps": 4, **told(name, 66)}
    plain = genkit.sample(saved / name, 66, compile=False, **options)
    quick = genkit.sample(saved / name, 66, compile=True, **options)
    torch.testing.assert_close(quick.images, plain.images, rtol=0, atol=1e-3)
    assert quick.evaluations == plain.evaluations
    # in another batch, of rows enough to be compiled; row 40 has the class that row 0 has
    again = genkit.sample(
        saved / name, 10, compile=True, **options | {"seed": 40} | told(name, 10)
    ).images
    torch.testing.assert_close(again, plain.images[40:50], rtol=0, atol=1e-3)


# ---- what is kept


def test_another_scheduler_in_the_folder_is_another_model(saved, tmp_path):
    shutil.copytree(saved / "diffusion", tmp_path / "run")
    before = genkit.sample(tmp_path / "run", seed=0, steps=4).images
    other = diffusion.make_scheduler("v", "cosine")
    other.save_pretrained(tmp_path / "run" / "scheduler")
    after = genkit.sample(tmp_path / "run", seed=0, steps=4).images
    assert (after - before).abs().max() > 0.1


def test_a_network_that_is_not_compiled_is_not_kept():
    network = denoisers.make_unet((1, 8, 8), (8, 16))
    quick.get_runner(network)
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


# ---- judged


def test_evaluate_takes_a_diffusion_model(saved):
    options = {"extractor": features.PixelFeatures(), "count": 30}
    record = genkit.evaluate(saved / "flow", "digits", **options)
    assert (record.protocol.count, record.protocol.evaluations) == (30, 10)
    assert "10 steps of dpm++" in str(record)
    given = genkit.sample(saved / "flow", 30, seed=0).images
    wanted = genkit.evaluate(given, "digits", **options)
    for name, figure in wanted.figures.items():
        assert record.figures[name].value == pytest.approx(figure.value, rel=1e-3), name


# ---- what cannot work


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gan", {"n": 0}, "n must be a whole number, 1 or more, got 0"),
        ("gan", {"n": -3}, "n must be a whole number, 1 or more, got -3"),
        ("gan", {"n": True}, "n must be a whole number, 1 or more, got True"),
        ("gan", {"n": 2.0}, "n must be a whole number, 1 or more, got 2.0"),
        ("gan", {"n": "2"}, "n must be a whole number, 1 or more, got '2'"),
        ("gan", {"n": 2, "seed": [1]}, "seed: 1 seeds for 2 images"),
        ("gan", {"n": 2, "seed": [1, 2, 3]}, "seed: 3 seeds for 2 images"),
        ("gan", {"seed": -1}, "seed must be 0 or more and less than 2.63, got -1"),
        ("gan", {"n": 2, "seed": [0, -1]}, r"seed must be 0 or more .* got \[0, -1\]"),
        ("gan", {"seed": 2**63}, "seed must be 0 or more and less than 2.63, got 9223372036"),
        ("gan", {"n": 2, "seed": 2**63 - 1}, "seed must be 0 or more and less than 2.63"),
        ("gan", {"seed": True}, "seed must be a whole number, or one an image, got True"),
        ("gan", {"seed": 1.5}, "seed must be a whole number, or one an image, got 1.5"),
        ("gan", {"seed": "7"}, "seed must be a whole number, or one an image, got '7'"),
        (
            "gan",
            {"seed": [0.5]},
            r"seed must be a whole number, or one an image, got \[0.5\]",
        ),
        ("gan", {"steps": 5}, "steps=5 .*GANPipeline"),
        ("pixels", {"scheduler": "ddim"}, "scheduler='ddim' requires .* PixelPipeline"),
        ("autoencoder", {"label": 0, "guidance": 2.0}, "guidance=2.0 .* Autoencoder"),
        ("gan", {"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ("gan", {"compile": True}, "compile=True"),
        ("gan", {"label": 1}, "label: .*unconditional, got 1"),
        ("flow", {"label": 1}, "label: .*unconditional, got 1"),
        ("pixels", {"label": 1}, "label: .*unconditional, got 1"),
        ("told", {"label": 4}, "label must be 0 to 3, got 4"),
        ("told", {"label": -1}, "label must be 0 to 3, got -1"),
        ("told", {"n": 3, "label": [0, 1]}, r"label must be a whole number, or 3 .* got \[0, 1\]"),
        ("told", {"label": 0.5}, "label must be a whole number, or 1 of them, got 0.5"),
        ("told", {"label": "cat"}, "label must be a whole number, or 1 of them, got 'cat'"),
        ("told", {"label": True}, "label must be a whole number, or 1 of them, got True"),
        ("told", {"label": 0, "guidance": -1}, "guidance must be 0 or more, and finite, got -1"),
        ("told", {"label": 0, "guidance": float("nan")}, "guidance must be 0 or more, .* got nan"),
        ("diffusion", {"guidance": 3}, "guidance: 3 requires"),
        ("diffusion", {"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16"),
        ("gan", {"dtype": "half"}, "dtype must be one of float32, bfloat16, got 'half'"),
        ("diffusion", {"steps": 0}, "steps must be a whole number from 1 to 1000, .* got 0"),
        ("diffusion", {"steps": 1001}, "steps must be a whole number from 1 to 1000, .* got 1001"),
        ("diffusion", {"steps": 2.5}, "steps must be a whole number .* got 2.5"),
        ("diffusion", {"scheduler": "plms"}, "scheduler: 'plms' does not fit .* epsilon"),
        ("flow", {"scheduler": "ddpm"}, "scheduler: 'ddpm' does not fit .* flow"),
        ("mean", {"scheduler": "dpm++"}, "scheduler: 'dpm..' does not fit .* meanflow; .* euler$"),
        ("mean", {"guidance": 1.5}, "guidance: 1.5 requires"),
        ("told_mean", {"guidance": 0.5}, "guidance must be 1 to 2 for a mean flow, .* got 0.5"),
        ("told_mean", {"guidance": 3}, "guidance must be 1 to 2 for a mean flow, .* got 3"),
        ("flow", {"revision": "main"}, "revision: 'main' .* on the Hub"),
    ],
)
def test_what_cannot_work_is_refused_by_name(saved, name, options, message):
    with pytest.raises(ValueError, match=message):
        genkit.sample(saved / name, **{"n": 1, "seed": 0} | options)


@pytest.mark.parametrize("model", ["nowhere/at-all", "no such folder 🦉", "a/b/c"])
def test_sample_refuses_an_unknown_model(model):
    with pytest.raises(ValueError, match=f"model: cannot load '{model}'"):
        genkit.sample(model)


def test_sample_refuses_a_folder_without_a_model(tmp_path):
    folder = tmp_path / "empty 🦉"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"model: .*empty 🦉' holds no model .* a recipe"):
        genkit.sample(folder)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match=r"holds a StableDiffusionPipeline; "):
        genkit.sample(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_from_outside_the_folder_are_refused(saved, tmp_path, name):
    folder = copied(saved / name, tmp_path / "model")
    (weights,) = folder.rglob("*.safetensors")
    weights.rename(tmp_path / "other.safetensors")
    up = "../" * len(weights.relative_to(folder).parts)
    index = f'{{"metadata": {{}}, "weight_map": {{"a": "{up}other.safetensors"}}}}'
    weights.with_name(f"{weights.name}.index.json").write_text(index)
    with pytest.raises(ValueError, match=f"model: {folder}.*names a shard outside its folder"):
        genkit.sample(folder, **told(name, 1))


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("name", FAMILIES)
def test_pickles_are_refused(saved, tmp_path, name):
    folder = copied(saved / name, tmp_path / "model")
    (weights,) = folder.rglob("*.safetensors")
    weights.unlink()
    stem = "pytorch_model" if name == "pixels" else weights.stem
    weights.with_name(f"{stem}.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(ValueError, match=f"model: '{folder}' holds no "):
        genkit.sample(folder, **told(name, 1))
    assert not (tmp_path / "canary").exists()
