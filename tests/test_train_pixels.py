"""The recipe of autoregressive pixels: it learns, leaves what it promises, and goes on exactly."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from builders import ON_CPU, TWO, log_of, run_here, weights_of
from PIL import Image

from genkit.data import images
from genkit.vision import pixel_lm

SMALL = ("--depth", "1", "--width", "32", "--batch_size", "8", "--compile", "no")
LENGTH = ("--max_steps", "8", "--evaluations", "2", "--save_steps", "4", "--keep_checkpoints", "9")
SHORT = (*SMALL, *LENGTH, "--mixed_precision", "no", "--eval_samples", "50")
KINDS = {
    "plain": "--levels 16",
    "told": "--conditional --ema 0.9 --optimizer adamw --gradient_accumulation 2",
    "colour": "--channels 3 --levels 4 --dropout 0.1",
}
TIERS = [pytest.param(k, marks=[pytest.mark.slow] * (k != "told")) for k in KINDS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make each kind of run once."""
    folders = {}

    def run(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind) / "run"
            words = (*KINDS[kind].split(), *SHORT, "--output_dir", folders[kind])
            run_here("train_pixels", *words)
        return folders[kind]

    return run


# ---- it learns


@pytest.mark.slow
def test_it_learns_more_than_how_light_each_pixel_is(tmp_path):
    words = ["--max_steps", "150", "--evaluations", "1", "--width", "64", "--depth", "2"]
    words += ["--levels", "16", "--batch_size", "16", "--compile", "no", "--mixed_precision", "no"]
    run_here("train_pixels", *words, "--output_dir", tmp_path / "run")
    train, val = images.load_train_val("digits", None, 0.1)
    pixels = pixel_lm.load_pixel_lm(tmp_path / "run").pixels
    seen, judged = (
        pixels.encode(part.batch(np.arange(len(part))))[:, 1:].numpy() for part in (train, val)
    )
    counts = np.stack([np.bincount(column, minlength=16) for column in seen.T]) + 0.1
    logs = np.log2(counts / counts.sum(1, keepdims=True))
    independent = -logs[np.arange(64), judged].mean()
    assert log_of(tmp_path / "run")[-1]["bits_per_dimension"] < independent - 0.1


# ---- what it leaves


@pytest.mark.parametrize("kind", TIERS)
def test_a_run_leaves_all_that_it_promises(runs, kind):
    folder = runs(kind)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "README.md", "run.json", "metrics.jsonl"}
    for name in ("loss.png", "progress.png", "completions.png"):
        with Image.open(folder / name) as picture:
            picture.load()
    stems = [path.stem for path in sorted((folder / "samples").iterdir())]
    assert stems == ["step-00000004", "step-00000008"]
    best = min((x for x in log_of(folder) if "val_loss" in x), key=lambda x: x["val_loss"])
    assert best["val_loss"] == pytest.approx(best["bits_per_dimension"] * math.log(2))
    card = (folder / "README.md").read_text()
    for name in ("val_loss", "bits_per_dimension"):
        assert f"| {name} | {best[name]:.4f} |" in card
    facts = json.loads((folder / "run.json").read_text())["facts"]
    assert all(digest in card for digest in facts.values())
    assert "likelihood of 50 validation images" in card


@pytest.mark.parametrize("kind", TIERS)
def test_the_figures_are_those_of_the_model_that_is_published(runs, kind):
    pipeline = pixel_lm.load_pixel_lm(runs(kind))
    _, val = images.load_train_val("digits", None, 0.1, channels=3 if kind == "colour" else None)
    which = np.unique(np.linspace(0, len(val) - 1, 50, dtype=int))
    assert pipeline.labels == (10 if kind == "told" else 0)
    assert pipeline.pixels.names == (val.names if kind == "told" else [])
    labels = val.classes(which) if kind == "told" else None
    lines = pipeline.pixels.encode(val.batch(which), labels)
    bits = pixel_lm.bits_per_dimension(pipeline.model, lines).mean().item()
    best = min(x["bits_per_dimension"] for x in log_of(runs(kind)) if "val_loss" in x)
    assert bits == pytest.approx(best, rel=1e-5)


def test_the_card_says_how_to_draw(runs, tmp_path, monkeypatch):
    shutil.copytree(
        runs("told"), tmp_path / runs("told").name
    )  # the card names the folder's base name
    monkeypatch.chdir(tmp_path)
    card = (runs("told") / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    exec(code, {})
    with Image.open(tmp_path / "sample.png") as picture:
        assert picture.size == (8, 8)


# ---- it goes on


@pytest.mark.slow
@pytest.mark.parametrize("kind", TIERS)
def test_a_run_goes_on_exactly(runs, tmp_path, kind):
    shutil.copytree(runs(kind), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    (tmp_path / "run" / "progress.png").unlink()
    run_here("train_pixels", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(runs(kind))
    assert log_of(tmp_path / "run") == log_of(runs(kind))
    for name in ("progress.png", "completions.png"):
        assert (tmp_path / "run" / name).read_bytes() == (runs(kind) / name).read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one(train, runs, tmp_path):
    launch = {"recipe": "train_pixels", "launcher": TWO, "env": ON_CPU}
    done = train(*KINDS["told"].split(), *SHORT, "--output_dir", tmp_path / "run", **launch)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    one, two = log_of(runs("told")), log_of(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        for name in {"loss", "grad_norm", "val_loss", "bits_per_dimension"} & set(ours):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4)


# ---- what cannot work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--levels 1", "levels.*got 1"),
        ("--levels 257", "levels.*got 257"),
        ("--images {tmp}/plain --conditional", "labels: these images have no"),
        ("--images {tmp}/nowhere", "is no folder, table or dataset"),
        ("--val_images {tmp}/plain", "val_images: they are .1, 9, 9."),
        ("--val_fraction 1", "val_fraction.*got 1"),
        ("--eval_samples 0", "eval_samples.*got 0"),
        ("--depth 0", "depth.*got 0"),
        ("--width 30 --heads 4", "width.* 4 heads.* 30"),
        ("--heads 5", "width.* 5 heads.* 32"),
        ("--dropout 1", "dropout.*got 1"),
        ("--channels 2", "channels.*got 2"),
    ],
)
def test_bad_input_is_refused_at_once(tmp_path, words, message):
    (tmp_path / "plain").mkdir()
    for i in range(12):
        Image.new("L", (9, 9), i).save(tmp_path / "plain" / f"{i}.png")
    given = (*SHORT, *words.format(tmp=tmp_path).split())
    with pytest.raises(ValueError, match=message):
        run_here("train_pixels", *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
