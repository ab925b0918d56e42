"""The recipes of autoencoders: they learn, go on exactly, and leave what they promise."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import ON_CPU, TWO, log_of, run_here, weights_of
from PIL import Image

from genkit.data import images
from genkit.models import autoencoder

EVERY = ("--batch_size", "16", "--compile", "no", "--mixed_precision", "no")
LENGTH = ("--max_steps", "8", "--evaluations", "2", "--save_steps", "4", "--keep_checkpoints", "9")
SHORT = (*EVERY, *LENGTH)
KINDS = {
    "dense": ("train_autoencoder", "--widths 32 --latent_dim 2"),
    "conv": ("train_autoencoder", "--network conv --widths 4 8 --likelihood bernoulli --invert"),
    "denoising": ("train_autoencoder", "--widths 32 --noise salt --head_weight 0.1 --ema 0.5"),
    "vae": ("train_vae", "--widths 32 --latent_dim 2 --conditional --kl_warmup 0.5 --beta 2"),
    "iwae": ("train_vae", "--network conv --widths 4 --binarize --importance_samples 3"),
    "spatial": ("train_vae", "--network spatial --widths 4 8 --latent_dim 1 --nll_samples 3"),
    "game": (
        "train_vae",
        "--network spatial --widths 4 8 --likelihood laplace --scale 0.05 --adversarial 0.1 "
        "--nll_images 0",
    ),
}
QUICK = ("dense", "spatial", "game")
TIERS = [pytest.param(k, marks=[pytest.mark.slow] * (k not in QUICK)) for k in KINDS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Launch each kind once, for 8 steps."""
    folders = {}

    def run(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind) / "run"
            recipe, words = KINDS[kind]
            run_here(recipe, *words.split(), *SHORT, "--output_dir", folders[kind])
        return folders[kind]

    return run


# ---- they learn


def test_an_autoencoder_beats_the_mean_image_by_far(tmp_path):
    words = ["--latent_dim", "16", "--max_steps", "400", "--evaluations", "1"]
    run_here("train_autoencoder", *words, *EVERY, "--output_dir", tmp_path / "run")
    _, val = images.load_train_val("digits", None, 0.1)
    shown = val.batch(np.arange(len(val)))
    spread = (shown - shown.mean(0)).square().mean().item() / 4
    assert log_of(tmp_path / "run")[-1]["mse"] < 0.2 * spread
    again = autoencoder.load_autoencoder(tmp_path / "run").reconstruct(shown)
    error = (again - shown).square().mean().item() / 4
    assert error == pytest.approx(log_of(tmp_path / "run")[-1]["mse"], rel=1e-4)


def test_a_head_tells_the_class(tmp_path):
    words = ["--head_weight", "0.1", "--max_steps", "300", "--evaluations", "1"]
    run_here("train_autoencoder", *words, *EVERY, "--output_dir", tmp_path / "run")
    assert log_of(tmp_path / "run")[-1]["accuracy"] > 0.85


def test_a_discriminator_enters_the_game_halfway(runs, tmp_path):
    """Before, the model is that of a run without one; afterwards it is not."""
    recipe, words = KINDS["game"]
    plain = words.replace("--adversarial 0.1 ", "")
    run_here(recipe, *plain.split(), *SHORT, "--output_dir", tmp_path / "run")
    with_game, without = (
        {line["step"]: line["val_loss"] for line in log_of(folder) if "val_loss" in line}
        for folder in (runs("game"), tmp_path / "run")
    )
    assert with_game[4] == without[4] and with_game[8] != without[8]


@pytest.mark.slow
def test_a_variational_one_learns_what_its_bounds_say(tmp_path):
    words = ["--latent_dim", "8", "--binarize", "--conditional"]
    words += ["--max_steps", "500", "--evaluations", "2"]
    run_here("train_vae", *words, *EVERY, "--output_dir", tmp_path / "run")
    first, last = [line for line in log_of(tmp_path / "run") if "nll" in line]
    assert last["nll"] < last["val_loss"] and last["nll"] < first["nll"]
    coin = 64 * np.log(2)  # nats of an image whose pixels are all open
    assert last["nll"] < 0.65 * coin and last["kl"] > 1
    # a class that is told is drawn: the mean of its samples is nearest to the mean of its images
    pipeline, whole = autoencoder.load_autoencoder(tmp_path / "run"), images.load_images("digits")
    labels = np.repeat(np.arange(10), 20)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(labels))]
    drawn = 2 * pipeline(len(labels), seeds, labels, output_type="pt").images - 1
    drawn = drawn.reshape(10, 20, 64).mean(1)
    shown = whole.batch(np.arange(len(whole))).flatten(1)
    means = torch.stack([shown[whole.labels == label].mean(0) for label in range(10)])
    assert torch.equal(torch.cdist(drawn, means).argmin(1), torch.arange(10))


# ---- what they leave


@pytest.mark.parametrize("kind", TIERS)
def test_a_run_leaves_all_that_it_promises(runs, kind):
    folder = runs(kind)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model_index.json", "autoencoder.py", "vae", "README.md", "run.json"}
    pictures = ["loss", "progress", "reconstructions"]
    pictures += [] if kind in ("spatial", "game") else ["latents", "plane"]
    for name in pictures:
        with Image.open(folder / f"{name}.png") as picture:
            picture.load()
    assert [path.stem for path in sorted((folder / "samples").iterdir())] == [
        "step-00000004",
        "step-00000008",
    ]
    judged = [line for line in log_of(folder) if "val_loss" in line]
    best = judged[-1] if kind == "game" else min(judged, key=lambda line: line["val_loss"])
    card = (folder / "README.md").read_text()
    for name in {"val_loss", "mse", "kl", "nll", "accuracy"} & set(best):
        assert f"| {name} | {best[name]:.4f} |" in card
    facts = json.loads((folder / "run.json").read_text())["facts"]
    assert all(digest in card for digest in facts.values())


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import torch
from diffusers import DiffusionPipeline
for i, folder in enumerate(sys.argv[2:]):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    labels = [3, 1, 4] if pipeline.vae.config.get("labels") else None
    drawn = pipeline(3, seeds, labels, output_type="np").images
    drawn.tofile(f"{sys.argv[1]}/{i}")
"""


@pytest.mark.slow
def test_the_folders_draw_the_same_without_genkit(runs, tmp_path):
    folders = [runs("conv"), runs("vae"), runs("spatial")]
    command = [sys.executable, "-c", WITHOUT_GENKIT, str(tmp_path), *map(str, folders)]
    subprocess.run(command, capture_output=True, check=True)
    for i, folder in enumerate(folders):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
        labels = [3, 1, 4] if i == 1 else None
        drawn = autoencoder.load_autoencoder(folder)(3, seeds, labels, output_type="np").images
        assert np.array_equal(np.fromfile(tmp_path / str(i), np.float32), drawn.flatten())


# ---- they go on


@pytest.mark.parametrize("kind", TIERS)
def test_a_run_goes_on_exactly(runs, tmp_path, kind):
    shutil.copytree(runs(kind), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    for leftover in (*(tmp_path / "run").glob("*.png"), *(tmp_path / "run").glob("vae/*")):
        leftover.unlink()
    samples = tmp_path / "run" / "samples"
    shutil.copy(samples / "step-00000008.png", samples / "step-00000007.png")
    run_here(KINDS[kind][0], "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(runs(kind))
    assert log_of(tmp_path / "run") == log_of(runs(kind))
    for name in ("progress.png", "reconstructions.png"):
        assert (tmp_path / "run" / name).read_bytes() == (runs(kind) / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "spatial"])
def test_two_processes_learn_what_one_does(train, runs, tmp_path, kind):
    """Nothing is drawn in a step of these, but for the noise of a VAE, which differs."""
    recipe, words = KINDS[kind]
    launch = {"recipe": recipe, "launcher": TWO, "env": ON_CPU}
    done = train(*words.split(), *SHORT, "--output_dir", tmp_path / "run", **launch)
    assert done.returncode == 0, done.stderr
    one, two = log_of(runs(kind)), log_of(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    tolerance = 1e-4 if recipe == "train_autoencoder" else 0.1
    for name in ("loss", "val_loss"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=tolerance)


# ---- what cannot work


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("train_vae", "--images nowhere", "images: 'nowhere' is no folder, table or dataset"),
        ("train_vae", "--images {tmp}/plain --conditional", "labels: these images have no"),
        ("train_vae", "--images {tmp}/mixed", "pass --resolution"),
        ("train_vae", "--images {tmp}/bad", "bad.png is no image"),
        ("train_vae", "--network deep", "network.*got 'deep'"),
        ("train_vae", "--latent_dim 0", "latent_dim.*got 0"),
        ("train_vae", "--importance_samples 5 --beta 2", "importance_samples.*beta"),
        ("train_vae", "--network spatial --conditional", "network spatial.*conditional"),
        ("train_vae", "--network spatial --widths 4 8 8 8 8", "resolution: AutoencoderKL of 5"),
        ("train_vae", "--binarize --likelihood gaussian", "binarize.*bernoulli"),
        ("train_vae", "--scale 0.1", "scale 0.1.*gaussian or laplace"),
        ("train_vae", "--adversarial 0.1", "adversarial 0.1 requires --network spatial"),
        ("train_vae", "--adversarial -1", "adversarial.*got -1"),
        ("train_vae", "--sample_warmup 0.1", "sample_warmup.*importance_samples"),
        ("train_vae", "--kl_warmup 2", "kl_warmup.*got 2.0"),
        ("train_vae", "--val_images {tmp}/plain", "val_images: they are .1, 16, 16."),
        ("train_autoencoder", "--amount 0.5", "amount 0.5.*noise"),
        ("train_autoencoder", "--noise mask --amount 2", "amount.*mask, got 2"),
        ("train_autoencoder", "--head_weight -1", "head_weight.*got -1.0"),
        ("train_autoencoder", "--head_weight 1 --images {tmp}/plain", "labels: these images have"),
        ("train_autoencoder", "--resolution 4", "resolution.*got 4"),
        ("train_autoencoder", "--channels 2", "channels.*got 2"),
    ],
)
def test_bad_input_is_refused_at_once(tmp_path, recipe, words, message):
    for name in ("plain", "mixed", "bad"):
        (tmp_path / name).mkdir()
        for i in range(3):
            size = (16, 16 + i * (name == "mixed"))
            Image.new("L", size, i).save(tmp_path / name / f"{i}.png")
    (tmp_path / "bad" / "bad.png").write_text("no image")
    given = words.format(tmp=tmp_path).split()
    with pytest.raises(ValueError, match=message):
        run_here(recipe, *SHORT, *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_corrupt_files_are_left_out_when_told(tmp_path, capsys):
    for i in range(9):
        Image.new("L", (16, 16), 20 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_text("no image")
    words = ("--images", tmp_path, "--skip_corrupt", "--widths", "8", "--dry_run")
    run_here("train_vae", *SHORT, *words, "--output_dir", tmp_path / "run")
    told = capsys.readouterr().out
    assert "skipped" in told and "bad.png" in told and "ms a step" in told
    assert not (tmp_path / "run").exists()
