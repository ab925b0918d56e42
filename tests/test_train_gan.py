"""The recipe of adversarial networks: it learns, is right at two processes, and goes on exactly."""

import json
import os
import shutil
import subprocess
import sys

import gan_gradients
import numpy as np
import pytest
import torch
from builders import ACCELERATE, ON_CPU, ROOT, TWO, log_of, run_here, weights_of
from PIL import Image
from safetensors.torch import load_file

from genkit.data import images
from genkit.data.images import proportional_labels
from genkit.metrics.monitor import Monitor
from genkit.models import gan

EVERY = ("--batch_size", "16", "--mixed_precision", "no", "--eval_samples", "60")
LENGTH = ("--max_steps", "8", "--evaluations", "2", "--save_steps", "4", "--keep_checkpoints", "9")
SHORT = (*EVERY, *LENGTH)
SMALL = "--widths 8 8 8 --latent_dim 8"
KINDS = {
    "modern": "--widths 8 --discriminator_widths 8",
    "projection": "--widths 8 --discriminator_widths 8 --conditional --optimizer adamw",
    "dcgan": f"--preset dcgan {SMALL} --discriminator_widths 8 8 --normalize --ema 0.9 "
    "--instance_noise 0.1",
    "wgan_gp": f"--preset wgan_gp {SMALL} --discriminator_widths 8 8 8 --critic_steps 3",
    "ac_wgan": f"--preset ac_wgan {SMALL} --discriminator_widths 4 4 4 4 --critic_steps 2",
    "spectral": f"--preset dcgan {SMALL} --discriminator_widths 8 8 --loss hinge --spectral "
    "--augmentations colour translation cutout --packing 2 --optimizer rmsprop",
}
TIERS = [pytest.param(k, marks=[pytest.mark.slow] * (k != "modern")) for k in KINDS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Launch each kind once, for 8 steps."""
    folders = {}

    def run(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind) / "run"
            run_here("train_gan", *KINDS[kind].split(), *SHORT, "--output_dir", folders[kind])
        return folders[kind]

    return run


# ---- it learns


@pytest.mark.slow
def test_the_modern_preset_learns_to_draw_digits(tmp_path):
    words = ["--max_steps", "400", "--evaluations", "2", "--mixed_precision", "no"]
    words += ["--batch_size", "32", "--eval_samples", "180", "--conditional"]
    run_here("train_gan", *words, "--widths", "32", "--output_dir", tmp_path / "run")
    whole = images.load_images("digits")
    labels = np.arange(200) % 10
    seeds = [torch.Generator().manual_seed(i) for i in range(200)]
    drawn = gan.load_gan(tmp_path / "run")(200, seeds, labels, output_type="pt").images * 2 - 1
    # a drawn digit lies nearest to a real one of the class that was asked for
    real = whole.batch(np.arange(len(whole))).flatten(1)
    near = torch.cdist(drawn.flatten(1), real).argmin(1).numpy()
    assert (whole.labels[near] == labels).mean() > 0.8
    by_class = drawn.unflatten(0, (20, 10)).std(0).mean()
    assert by_class > 0.3 * real.std(0).mean()  # and they are not all the same


# ---- it is right


@pytest.mark.slow
def test_gradients_at_two_processes_and_accumulated_are_those_of_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    gan_gradients.main(str(tmp_path / "one"))
    command = [*ACCELERATE, *TWO, "tests/gan_gradients.py", str(tmp_path / "two")]
    env = os.environ | ON_CPU | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {path: load_file(path) for path in tmp_path.glob("*/*.safetensors")}
    assert len(found) == 4
    one = found.pop(tmp_path / "one" / "1.safetensors")
    assert {key.partition("/")[0] for key in one} == set(gan_gradients.GAMES)
    for path, other in found.items():
        assert other.keys() == one.keys()
        for key, gradient in one.items():
            by_part = key.startswith("normalised")
            # singular vectors turn at every call, so at every part
            by_part = by_part or (key.startswith("spectral") and path.stem == "2")
            assert by_part or alike(other[key], gradient), f"{path}: {key}"
    # batches are normalised by part, be it a process's or of an accumulation
    halves = [load_file(tmp_path / name) for name in ("one/2.safetensors", "two/1.safetensors")]
    normalised = [key for key in one if key.startswith("normalised")]
    assert all(alike(halves[0][key], halves[1][key]) for key in normalised)
    for key, gradient in one.items():  # what is all zeros would be equal, too
        unmoved = key.endswith(("score.bias", "first.bias")) or "/body." in key
        assert gradient.abs().max() > 1e-6 or unmoved, key


def alike(one, other):
    return (one - other).abs().max() < 1e-5 * max(1.0, one.abs().max().item())


@pytest.mark.slow
def test_two_processes_play_the_game_of_one(train, runs, tmp_path):
    launch = {"recipe": "train_gan", "launcher": TWO, "env": ON_CPU}
    words = KINDS["wgan_gp"].split()
    done = train(*words, *SHORT, "--output_dir", tmp_path / "run", **launch)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    one, two = log_of(runs("wgan_gp")), log_of(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("discriminator_loss", "generator_loss", "discriminator_grad_norm"):
        for ours, theirs in zip(one, two, strict=True):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4)
    # and goes on exactly
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000008")
    done = train("--output_dir", tmp_path / "again", "--resume", **launch)
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "run")
    assert log_of(tmp_path / "again") == log_of(tmp_path / "run")


@pytest.mark.slow
def test_clipped_weights_stay_inside(runs):
    name, tensors, _ = weights_of(runs("ac_wgan"))
    state = load_file(runs("ac_wgan") / "checkpoints" / name / "tensors.safetensors")
    sizes = {k: v.abs().max() for k, v in state.items() if "/discriminator/module/" in k}
    assert len(sizes) == 12 and max(sizes.values()) <= 0.01
    assert tensors


# ---- what it leaves


@pytest.mark.parametrize("kind", TIERS)
def test_a_run_leaves_all_that_it_promises(runs, kind):
    folder = runs(kind)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model_index.json",
        "gan.py",
        "generator",
        "README.md",
        "run.json",
        "baseline.json",
    }
    for name in ("loss.png", "progress.png", "progress.gif"):
        with Image.open(folder / name) as picture:
            picture.load()
    stems = [path.stem for path in sorted((folder / "samples").iterdir())]
    assert stems == ["step-00000004", "step-00000008"]
    judged = [line for line in log_of(folder) if "distance" in line]
    best = min(judged, key=lambda line: line["distance"])
    card = (folder / "README.md").read_text()
    for name in ("distance", "coverage", "duplicates", "spread"):
        assert f"| {name} | {best[name]:.4f} |" in card
    facts = json.loads((folder / "run.json").read_text())["facts"]
    assert all(digest in card for digest in facts.values())
    # the figures are those of the weights that are published
    train, val = images.load_train_val("digits", None, 0.1)
    labels = None
    if gan.load_gan(folder).generator.config.labels:
        labels = proportional_labels(train, 60)
    seeds = [torch.Generator().manual_seed(i) for i in range(60)]
    drawn = gan.load_gan(folder)(60, seeds, labels, output_type="pt").images * 2 - 1
    again = Monitor(val, None, 60).measure(drawn, labels)
    assert again["distance"] == pytest.approx(best["distance"], rel=1e-3)


@pytest.mark.slow
def test_raw_weights_lie_beside_averaged_ones(runs):
    averaged, raw = (
        gan.load_gan(runs("modern"), weights).generator for weights in ("averaged", "raw")
    )
    pairs = list(zip(averaged.parameters(), raw.parameters(), strict=True))
    assert any((a - b).abs().max() > 1e-4 for a, b in pairs)
    pairs = list(
        zip(
            *(gan.load_gan(runs("ac_wgan"), w).generator.parameters() for w in ("averaged", "raw")),
            strict=True,
        )
    )
    assert all(torch.equal(a, b) for a, b in pairs)  # that preset averages nothing


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import torch
from diffusers import DiffusionPipeline
for i, folder in enumerate(sys.argv[2:]):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    labels = [3, 1, 4] if pipeline.generator.config.get("labels") else None
    drawn = pipeline(3, seeds, labels, output_type="np").images
    drawn.tofile(f"{sys.argv[1]}/{i}")
"""


@pytest.mark.slow
def test_the_folders_draw_the_same_without_genkit(runs, tmp_path):
    folders = [runs("modern"), runs("dcgan"), runs("ac_wgan")]
    command = [sys.executable, "-c", WITHOUT_GENKIT, str(tmp_path), *map(str, folders)]
    subprocess.run(command, capture_output=True, check=True)
    for i, folder in enumerate(folders):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
        labels = [3, 1, 4] if i == 2 else None
        drawn = gan.load_gan(folder)(3, seeds, labels, output_type="np").images
        assert np.array_equal(np.fromfile(tmp_path / str(i), np.float32), drawn.flatten())


# ---- it goes on


@pytest.mark.parametrize("kind", TIERS)
def test_a_run_goes_on_exactly(runs, tmp_path, kind):
    shutil.copytree(runs(kind), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    for picture in (*(tmp_path / "run").glob("*.png"), tmp_path / "run" / "progress.gif"):
        picture.unlink()
    run_here("train_gan", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(runs(kind))
    assert log_of(tmp_path / "run") == log_of(runs(kind))
    for name in ("progress.png", "progress.gif"):
        assert (tmp_path / "run" / name).read_bytes() == (runs(kind) / name).read_bytes()


# ---- what cannot work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images {tmp}/plain --conditional", "labels: these images have no"),
        ("--images {tmp}/plain --preset ac_wgan", "labels: these images have no"),
        ("--widths 8 8 8 8", "resolution: a generator .* multiples of 16"),
        ("--discriminator_widths 8 8 8 8", "resolution: a discriminator of these widths"),
        ("--images {tmp}/odd", "resolution: .* multiples of 4 pixels, .*17 x 17"),
        ("--critic_steps 0", "critic_steps.*got 0"),
        ("--weight_clip 0.01", "weight_clip.*wasserstein.*relativ"),
        ("--loss hinge --gradient_penalty 10", "gradient_penalty.*wasserstein.*hinge"),
        ("--preset wgan_gp --weight_clip 0.01 --gradient_penalty 1", "weight_clip and"),
        ("--preset dcgan --discriminator_widths 8 8 8", "discriminator_widths must be 2 numbers"),
        (
            "--generator_conditioning embedding_product",
            "generator_conditioning embedding_product .*--conditional",
        ),
        ("--preset dcgan --smoothing 1", "smoothing.*got 1.0"),
        ("--preset wgan_gp --gradient_penalty 0", "loss wasserstein .*gradient_penalty"),
        ("--preset dcgan --normalize --r1 1", "normalize.* r1|normalize.*--r1"),
        ("--normalize", "normalize.*modern"),
        ("--compile yes", "compile.*gradient of a gradient"),
        ("--label_noise 0.1", "label_noise.*relativistic"),
        ("--conditional --packing 2", "packing 2.*conditional"),
        ("--packing 3", "packing 3.* 16 rows .* 3 times"),
        ("--preset style", "preset.*got 'style'"),
        ("--optimizer adam", "optimizer.*got 'adam'"),
        ("--latent_dim 0", "latent_dim.*got 0"),
        ("--widths 0", "widths.*got 0"),
        ("--betas 0.5", "betas.*got .0.5."),
        ("--eval_samples 5", "eval_samples.*got 5"),
        ("--extractor nowhere", "extractor: cannot load 'nowhere'"),
        ("--augmentations mirror", "augmentations.*got 'mirror'"),
    ],
)
def test_bad_input_is_refused_at_once(tmp_path, words, message):
    for name, side in (("plain", 16), ("odd", 17)):
        (tmp_path / name).mkdir()
        for i in range(130):
            Image.new("L", (side, side), i).save(tmp_path / name / f"{i}.png")
    given = words.format(tmp=tmp_path).split()
    with pytest.raises(ValueError, match=message):
        run_here("train_gan", *SHORT, *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
