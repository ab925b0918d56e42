"""The recipe of translation: it learns by every method, goes on exactly, and refuses bad pairs."""

import json
import shutil

import numpy as np
import pytest
from builders import ON_CPU, TWO, log_of, run_here, weights_of
from PIL import Image

import genkit

TINY = "--resolution 16 --widths 4 8 --batch_size 4 --mixed_precision no --warmup 0"
LENGTH = "--max_steps 10 --evaluations 2 --save_steps 5 --keep_checkpoints 9"
METHODS = {
    "v": "--method diffusion",
    "flow": "--objective flow",
    "regression": "--method regression",
    "pix2pix": "--method pix2pix",
}


def picture(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def folder_of(path, count: int = 12, mode: str = "RGB", size: tuple[int, int] = (16, 16)):
    path.mkdir()
    for i in range(count):
        picture(i, size, mode).save(path / f"{i:02}.png")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("data") / "photos", 24)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run of each method."""
    home = tmp_path_factory.mktemp("runs")
    words = ["--images", photos, *TINY.split(), *LENGTH.split()]
    for name, method in METHODS.items():
        run_here("train_translation", *words, *method.split(), "--output_dir", home / name)
    return home


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_leaves_all_that_it_promises(trained, photos, method):
    run = trained / method
    names = {path.name for path in run.iterdir()}
    assert names >= {"model_index.json", "translation.py", "unet", "README.md", "run.json"}
    assert ("scheduler" in names) == (method in ("v", "flow"))
    for name in ("loss.png", "progress.png", "translations.png"):
        with Image.open(run / name) as made:
            made.load()
    values = [line["val_loss"] for line in log_of(run) if "val_loss" in line]
    assert len(values) == 2 and (method == "pix2pix" or values[1] < values[0])
    card = (run / "README.md").read_text()
    assert all(
        fact in card for fact in json.loads((run / "run.json").read_text())["facts"].values()
    )
    made = genkit.translate(photos / "00.png", model=run, seed=[0, 1])
    same = made.images[0].tobytes() == made.images[1].tobytes()
    assert same == (method in ("regression", "pix2pix"))


def test_pix2pix_trains_the_generator_then_the_critic_then_both(trained):
    lines = log_of(trained / "pix2pix")
    played = ["discriminator_loss" in line for line in lines]
    assert played == [False] * 5 + [True] * 5
    losses = [line["loss"] for line in lines]
    assert losses[4] == losses[5] == losses[6] != losses[7]  # the critic alone, then the game


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_exactly(trained, tmp_path, method):
    shutil.copytree(trained / method, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    run_here("train_translation", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained / method)
    names = ("step", "loss", "discriminator_loss", "val_loss")
    if method == "pix2pix":  # while the critic learns alone, the line repeats the last loss
        names = ("step", "discriminator_loss", "val_loss")
    both = (log_of(tmp_path / "run"), log_of(trained / method))
    again, before = ([{n: line.get(n) for n in names} for line in log] for log in both)
    assert again == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flow", "pix2pix"])
def test_two_processes_learn_what_one_does_and_go_on_exactly(
    train, trained, photos, tmp_path, method
):
    launch = {"recipe": "train_translation", "launcher": TWO, "env": ON_CPU}
    words = ("--images", photos, *TINY.split(), *LENGTH.split(), *METHODS[method].split())
    done = train(*words, "--output_dir", tmp_path / "two", **launch)
    assert done.returncode == 0, done.stderr
    one, two = log_of(trained / method), log_of(tmp_path / "two")
    for name in ("loss", "val_loss"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-2)
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000010")
    done = train("--output_dir", tmp_path / "again", "--resume", **launch)
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "two")


@pytest.mark.parametrize("condition", ["low", "mask", "edges"])
def test_every_condition_is_learned(photos, tmp_path, condition):
    words = ["--images", photos, *TINY.split(), "--max_steps", "2", "--evaluations", "1"]
    words += ["--condition", condition, "--output_dir", tmp_path / "run"]
    run_here("train_translation", *words)
    mask = picture(1, mode="L") if condition == "mask" else None
    made = genkit.translate(picture(3), model=tmp_path / "run", mask=mask, steps=1)
    assert made.condition == condition


def test_pairs_are_learned_from_grey_to_colour(tmp_path):
    a, b = folder_of(tmp_path / "a", mode="L"), folder_of(tmp_path / "b")
    words = [*TINY.split(), "--max_steps", "2", "--evaluations", "1"]
    run_here("train_translation", *words, "--pairs", a, b, "--output_dir", tmp_path / "run")
    model = genkit.load(tmp_path / "run")
    assert (model.condition, model.condition_channels, model.channels) == ("pairs", 1, 3)
    with pytest.raises(ValueError, match="takes grey images alone"):
        genkit.translate(picture(0), model=model)
    assert genkit.translate(picture(0, mode="L"), model=model, steps=1).images[0].mode == "RGB"


def fewer(a, b):
    (b / "03.png").unlink()


def renamed(a, b):
    (b / "03.png").rename(b / "3.png")


def resized(a, b):
    picture(3, (16, 20)).save(b / "03.png")


def empty(a, b):
    for file in b.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fewer, r"--pairs: .* holds 12 images and .* 11, without a partner: 03; give"),
        (renamed, r"12 images and .* 12, without a partner: 03, 3; give"),
        (resized, r"03.png is 16 x 16, but its partner .*03.png is 16 x 20"),
        (empty, r"--pairs: the folder .* holds no image"),
    ],
)
def test_pairs_that_do_not_belong_together_are_refused(tmp_path, change, message):
    a, b = folder_of(tmp_path / "a"), folder_of(tmp_path / "b")
    change(a, b)
    with pytest.raises(ValueError, match=message):
        run_here("train_translation", "--pairs", a, b, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images digits", "--condition grey requires images in colour, and these are grey"),
        ("--condition sepia", "condition.*'sepia'"),
        ("--condition low --resolution 18", "multiples of 4, got 18 x 18; give --resolution 20"),
        ("--method regression --objective flow", "--objective flow excludes --method regression"),
        ("--method pix2pix --min_snr 5", "--min_snr 5.0 excludes --method pix2pix"),
        ("--objective flow --schedule linear", "--schedule linear excludes flow"),
        ("--pairs {tmp}", "--pairs must be two folders"),
        ("--pairs {tmp} {tmp}/missing", "--pairs: '.*missing' is no folder"),
        ("--pairs {tmp} {tmp} --condition grey", "--condition grey excludes --pairs"),
        ("--pairs {tmp} {tmp} --skip_corrupt", "--skip_corrupt True excludes --pairs"),
        ("--images {tmp}/missing", "images: .*missing"),
    ],
)
def test_bad_input_is_refused_at_once(photos, tmp_path, words, message):
    given = ["--images", photos, *words.format(tmp=tmp_path).split()]
    with pytest.raises(ValueError, match=message):
        run_here("train_translation", *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
