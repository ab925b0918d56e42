"""The recipe of diffusion and flow matching: it learns, is right, and goes on exactly."""

import json
import os
import shutil
import subprocess
import warnings
from functools import partial

import diffusion_gradients
import numpy as np
import pytest
import torch
from builders import ACCELERATE, ON_CPU, ROOT, TWO, log_of, recipe_module, run_here, weights_of
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

import genkit
from genkit.data import images
from genkit.data.images import proportional_labels
from genkit.data.order import Order
from genkit.metrics.monitor import Monitor
from genkit.models import denoisers, diffusion
from genkit.training.run import Run
from genkit.training.settings import parse
from genkit.vision import denoising
from genkit.vision.sampling import draw_samples

SMALL = ("--widths", "8", "16", "--batch_size", "8", "--compile", "no", "--mixed_precision", "no")
JUDGED = ("--eval_samples", "16", "--eval_steps", "2")
LENGTH = ("--max_steps", "8", "--evaluations", "2", "--save_steps", "4", "--keep_checkpoints", "9")
SHORT = (*SMALL, *JUDGED, *LENGTH)
KINDS = {
    "epsilon": "--objective epsilon",
    "x0": "--objective x0 --attention --gradient_accumulation 2 --ema 0",
    "flow": "--objective flow --ema 0.9 --channels 3",
    "mean": "--objective meanflow --conditional --attention",
    "told": "--objective v --min_snr 5 --optimizer adamw --layers 2 --conditional",
}
QUICK = ("flow", "told", "mean")
TIERS = [pytest.param(k, marks=[pytest.mark.slow] * (k not in QUICK)) for k in KINDS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make each kind of run once."""
    folders = {}

    def run(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind) / "run"
            words = (*KINDS[kind].split(), *SHORT, "--output_dir", folders[kind])
            run_here("train_diffusion", *words)
        return folders[kind]

    return run


def best_of(folder):
    judged = [line for line in log_of(folder) if "distance" in line]
    return min(judged, key=lambda line: line["distance"])


def validation(kind):
    return images.load_train_val("digits", None, 0.1, channels=3 if kind == "flow" else None)[1]


# ---- it learns

LEARNED = {"epsilon": 0.3, "v": 0.75, "x0": 0.4, "flow": 0.6}  # of what silence costs


@pytest.mark.slow
@pytest.mark.parametrize("objective", diffusion.OBJECTIVES)
def test_every_objective_is_learned(tmp_path, objective):
    words = ["--objective", objective, "--max_steps", "80", "--evaluations", "2"]
    words += ["--conditional"] if objective == "flow" else []
    run_here("train_diffusion", *words, *SMALL, *JUDGED, "--output_dir", tmp_path / "run")
    first, last = (line["val_loss"] for line in log_of(tmp_path / "run") if "val_loss" in line)

    def silent(seen, times, labels):
        return torch.zeros_like(seen)

    pipeline = denoisers.load_diffusion(tmp_path / "run")
    nothing = denoising.loss_by_time(pipeline, validation(None), silent).mean
    assert last < first and last < LEARNED[objective] * nothing


# ---- it is right


@pytest.mark.slow
def test_gradients_at_two_processes_and_accumulated_are_those_of_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    diffusion_gradients.main(str(tmp_path / "one"))
    command = [*ACCELERATE, *TWO, "tests/diffusion_gradients.py", str(tmp_path / "two")]
    env = os.environ | ON_CPU | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {path: load_file(path) for path in tmp_path.glob("*/*.safetensors")}
    assert len(found) == 4
    one = found.pop(tmp_path / "one" / "1.safetensors")
    assert {key.partition("/")[0] for key in one} == set(diffusion_gradients.KINDS)
    for path, other in found.items():
        assert other.keys() == one.keys()
        for key, gradient in one.items():
            limit = 1e-5 * max(1.0, gradient.abs().max().item())
            assert (other[key] - gradient).abs().max() < limit, f"{path}: {key}"
    for key, gradient in one.items():  # what is all zeros would be equal, too
        # attention is not moved by what all keys share
        assert gradient.abs().max() > 1e-6 or key.endswith("to_k.bias"), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["told", "mean"])
def test_two_processes_train_as_one(train, runs, tmp_path, kind):
    launch = {"recipe": "train_diffusion", "launcher": TWO, "env": ON_CPU}
    words = (*KINDS[kind].split(), *SHORT, "--output_dir", tmp_path / "run")
    done = train(*words, **launch)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    one, two = log_of(runs(kind)), log_of(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        for name in {"loss", "grad_norm", "val_loss"} & set(ours):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3)
    # and goes on exactly
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000008")
    done = train("--output_dir", tmp_path / "again", "--resume", **launch)
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "run")
    assert log_of(tmp_path / "again") == log_of(tmp_path / "run")


def test_batch_drops_the_asked_part_of_the_classes(tmp_path):
    words = ["--conditional", "--cond_dropout", "0.3", "--batch_size", "512", "--dry_run"]
    words += ["--output_dir", str(tmp_path), "--compile", "no"]
    with recipe_module("train_diffusion") as recipe:
        settings = parse(recipe.Settings, recipe.preset, words)
        train, scheduler = images.load_images("digits"), diffusion.make_scheduler("v")
        order, run = Order(len(train), settings.seed), Run(settings)
        rows = np.arange(512)
        labels = recipe.make_batch(run, settings, scheduler, train, order, rows)[2]
    dropped = labels == train.count_classes()
    assert 0.2 < dropped.float().mean() < 0.4
    assert torch.equal(labels[~dropped], train.classes(order(rows)[1])[~dropped])


def test_a_batch_is_drawn_by_its_number_and_its_rows_by_their_place_in_it(tmp_path):
    """So that after a change of the batch size none is drawn again, or across two."""
    words = ["--batch_size", "8", "--dry_run", "--output_dir", str(tmp_path), "--compile", "no"]
    with recipe_module("train_diffusion") as recipe:
        settings = parse(recipe.Settings, recipe.preset, words)
        train, scheduler = images.load_images("digits"), diffusion.make_scheduler("v")
        order, run = Order(len(train), settings.seed), Run(settings)
        batch = partial(recipe.make_batch, run, settings, scheduler, train, order)
        run.progress.step, run.progress.rows = 3, 24
        same = next(batch(rows)[1] for rows in run.rows())
        run.progress.rows = 20  # the two steps before had 6 rows each
        other = next(batch(rows) for rows in run.rows())
    seed = int(np.random.SeedSequence((settings.seed, 2)).generate_state(1, np.uint64)[0])
    drawn = torch.randn(8, *train.size, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(same, drawn) and torch.equal(other[1], drawn)
    assert torch.equal(other[0], train.batch(order(np.arange(12, 20))[1]))


def test_the_loss_is_of_images_from_everywhere():
    """Folders of classes are loaded class by class."""
    ten = images.load_images("digits")
    ten = ten.take(np.argsort(ten.classes(np.arange(len(ten))).numpy(), kind="stable"))
    with recipe_module("train_diffusion") as recipe:
        seen = recipe.take_evenly(ten)
        assert len(seen) == recipe.VAL_ROWS
        assert len(recipe.take_evenly(ten.take(np.arange(9)))) == 9
    counts = np.bincount(seen.classes(np.arange(len(seen))).numpy())
    assert len(counts) == 10 and counts.min() > 90


# ---- what it leaves


@pytest.mark.parametrize("kind", TIERS)
def test_a_run_leaves_all_that_it_promises(runs, kind):
    folder = runs(kind)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model_index.json", "unet", "scheduler", "README.md", "run.json"}
    assert ("diffusion.py" in names) == (kind in ("told", "mean"))
    for name in ("loss.png", "loss_by_time.png", "progress.png", "progress.gif"):
        with Image.open(folder / name) as picture:
            picture.load()
    stems = [path.stem for path in sorted((folder / "samples").iterdir())]
    assert stems == ["step-00000004", "step-00000008"]
    best, card = best_of(folder), (folder / "README.md").read_text()
    for name in ("val_loss", "distance", "coverage", "duplicates", "spread"):
        assert f"| {name} | {best[name]:.4f} |" in card
    facts = json.loads((folder / "run.json").read_text())["facts"]
    assert all(digest in card for digest in facts.values())


@pytest.mark.parametrize("kind", TIERS)
def test_the_figures_are_those_of_the_model_that_is_published(runs, kind):
    pipeline, best, val = (
        denoisers.load_diffusion(runs(kind)),
        best_of(runs(kind)),
        validation(kind),
    )
    objective = {"told": "v", "mean": "flow"}.get(kind, kind)
    assert diffusion.objective_of(pipeline.scheduler) == objective
    assert pipeline.labels == (10 if kind in ("told", "mean") else 0)
    assert pipeline.mean == (kind == "mean")
    again = denoising.loss_by_time(pipeline, val)
    assert again.mean == pytest.approx(best["val_loss"], rel=1e-4)
    labels = (
        proportional_labels(images.load_train_val("digits", None, 0.1)[0], 16)
        if kind in ("told", "mean")
        else None
    )
    drawn = draw_samples(pipeline, range(16), labels, {"num_inference_steps": 2})
    figures = Monitor(val, None, 16).measure(drawn, labels)
    assert figures["distance"] == pytest.approx(best["distance"], rel=1e-3)


@pytest.mark.parametrize(
    "kind", ["flow", *(pytest.param(k, marks=pytest.mark.slow) for k in ("epsilon", "x0"))]
)
def test_the_folder_is_a_stock_pipeline(runs, kind):
    stock = DDPMPipeline.from_pretrained(runs(kind))
    stock.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in (5, 6)]
    theirs = stock(2, seeds, num_inference_steps=6, output_type="np").images
    scheduler = "euler" if kind == "flow" else "ddpm"
    ours = genkit.sample(runs(kind), 2, seed=5, steps=6, scheduler=scheduler).images
    assert np.abs(theirs - (ours.permute(0, 2, 3, 1).numpy() + 1) / 2).max() < 1e-5


@pytest.mark.parametrize("kind", [*QUICK, pytest.param("epsilon", marks=pytest.mark.slow)])
def test_the_card_says_how_to_draw(runs, tmp_path, monkeypatch, kind):
    shutil.copytree(runs(kind), tmp_path / runs(kind).name)  # the card names the folder's base name
    monkeypatch.chdir(tmp_path)
    card = (runs(kind) / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    with warnings.catch_warnings():  # diffusers' own
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")
        exec(code, {})
    with Image.open(tmp_path / "sample.png") as picture:
        assert picture.size == (8, 8)
    with Image.open(tmp_path / "samples.png") as picture:
        picture.load()


# ---- it goes on


@pytest.mark.parametrize(
    ("kind", "back"),
    [
        pytest.param("epsilon", 1, marks=pytest.mark.slow),
        ("flow", 2),
        pytest.param("told", 1, marks=pytest.mark.slow),
        ("told", 2),
        ("mean", 1),
    ],
)
def test_a_run_goes_on_exactly(runs, tmp_path, kind, back):
    shutil.copytree(runs(kind), tmp_path / "run")
    for checkpoint in ("step-00000008", "step-00000004")[:back]:  # from the middle, or the start
        shutil.rmtree(tmp_path / "run" / "checkpoints" / checkpoint)
    pictures = ("loss_by_time.png", "progress.png", "progress.gif")
    for picture in pictures:
        (tmp_path / "run" / picture).unlink()
    run_here("train_diffusion", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(runs(kind))
    assert log_of(tmp_path / "run") == log_of(runs(kind))
    for name in pictures:
        assert (tmp_path / "run" / name).read_bytes() == (runs(kind) / name).read_bytes()


# ---- what cannot work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--objective score", "objective.*got 'score'"),
        ("--schedule steep", "schedule.*got 'steep'"),
        ("--objective flow --schedule cosine", "schedule cosine.*flow"),
        ("--objective flow --min_snr 5", "min_snr 5.0.*flow"),
        ("--objective meanflow --min_snr 5", "min_snr 5.0.*meanflow"),
        ("--init_from runs/flow", "init_from runs/flow requires --objective meanflow"),
        ("--objective meanflow --init_from nowhere", "init_from: cannot load 'nowhere'"),
        ("--min_snr -1", "min_snr.*got -1"),
        ("--conditional --cond_dropout 1", "cond_dropout.*got 1"),
        ("--conditional --cond_dropout 0", "cond_dropout.*got 0"),
        ("--cond_dropout 0.1", "cond_dropout 0.1.*--conditional"),
        ("--eval_samples 5", "eval_samples.*got 5"),
        ("--eval_steps 61", "eval_steps 61"),
        ("--compile yes", "compile.*gradient of"),
        ("--eval_steps 0", "eval_steps.*got 0"),
        (
            "--eval_steps 1001",
            "eval_steps 1001: .*1000",
        ),
        ("--layers 0", "layers.*got 0"),
        ("--widths 8 0", "widths.*got 0"),
        ("--widths 8 8 8 8 8", "resolution: 5 widths .* 16, got images of 8 x 8"),
        ("--images {tmp}/odd", "resolution: 2 widths .* 17 x 17; give --resolution 18, or 1 wi"),
        ("--images {tmp}/plain --conditional", "labels: these images have no"),
        ("--images {tmp}/nowhere", "is no folder, table or dataset"),
        ("--val_images {tmp}/plain", "val_images: they are .1, 16, 16."),
        ("--extractor nowhere", "extractor: cannot load 'nowhere'"),
        ("--channels 2", "channels.*got 2"),
        ("--gradient_accumulation 3", "batch_size: 8 rows do not divide among 1 processes times 3"),
        ("--optimizer sgd", "optimizer.*got 'sgd'"),
    ],
)
def test_bad_input_is_refused_at_once(tmp_path, words, message):
    for name, side in (("plain", 16), ("odd", 17)):
        (tmp_path / name).mkdir()
        for i in range(130):
            Image.new("L", (side, side), i).save(tmp_path / name / f"{i}.png")
    given = (*SHORT, *words.format(tmp=tmp_path).split())
    with pytest.raises(ValueError, match=message):
        run_here("train_diffusion", *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
