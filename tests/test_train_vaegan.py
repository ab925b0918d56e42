"""The recipe of the VAE-GAN: it learns, goes on exactly, and leaves what a VAE's does."""

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from builders import ON_CPU, ROOT, TWO, log_of, run_here, weights_of
from PIL import Image
from torch.distributions import Normal, kl_divergence

from genkit.data import images
from genkit.models import autoencoder, gan, gan_losses
from genkit.vision import pipelines

EVERY = ("--widths", "8", "16", "--latent_dim", "8", "--mixed_precision", "no")
EVERY += ("--discriminator_widths", "16", "--batch_size", "16")
LENGTH = ("--max_steps", "8", "--evaluations", "2", "--save_steps", "4", "--keep_checkpoints", "9")
SHORT = (*EVERY, *LENGTH)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of 8 steps."""
    folder = tmp_path_factory.mktemp("vaegan") / "run"
    run_here("train_vaegan", *SHORT, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("vaegan", ROOT / "recipes" / "train_vaegan.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vaegan", module)
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_learns_to_rebuild_and_to_draw(tmp_path):
    words = [
        "--gamma",
        "0.1",
        "--beta",
        "0.2",
        "--max_steps",
        "400",
        "--evaluations",
        "2",
        "--ema",
        "0.9",
    ]
    run_here("train_vaegan", *EVERY, *words, "--output_dir", tmp_path / "run")
    _, val = images.load_train_val("digits", None, 0.1)
    shown = val.batch(np.arange(len(val)))
    spread = (shown - shown.mean(0)).square().mean().item() / 4
    first, last = [line for line in log_of(tmp_path / "run") if "mse" in line]
    assert last["mse"] < first["mse"] and last["mse"] < 0.5 * spread
    assert last["kl"] > 1
    pipeline = pipelines.load_pipeline(tmp_path / "run")
    error = (pipeline.reconstruct(shown) - shown).square().mean().item() / 4
    assert error == pytest.approx(last["mse"], rel=1e-4)
    seeds = [torch.Generator().manual_seed(i) for i in range(200)]
    drawn = 2 * pipeline(200, seeds, output_type="pt").images - 1
    # pixel by pixel, samples are on as often as images are, and not one like the other
    off = (drawn.mean(0) - shown.mean(0)).square().mean()
    assert off < 0.2 * shown.mean(0).var()
    assert drawn.std(0).mean() > 0.5 * shown.std(0).mean()


def test_a_run_leaves_all_that_it_promises(short):
    names = {path.name for path in short.iterdir()}
    assert names >= {"model_index.json", "autoencoder.py", "vae", "README.md", "run.json"}
    for name in ("loss.png", "progress.png", "progress.gif", "reconstructions.png"):
        with Image.open(short / name) as picture:
            picture.load()
            assert getattr(picture, "n_frames", 1) == (2 if name.endswith("gif") else 1)
    judged = [line for line in log_of(short) if "mse" in line]
    best = min(judged, key=lambda line: line["mse"])
    card = (short / "README.md").read_text()
    assert all(f"| {name} | {best[name]:.4f} |" in card for name in ("mse", "kl"))
    facts = json.loads((short / "run.json").read_text())["facts"]
    assert all(digest in card for digest in facts.values())


def test_a_run_goes_on_exactly(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    for leftover in (*(tmp_path / "run").glob("*.png"), *(tmp_path / "run").glob("vae/*")):
        leftover.unlink()
    run_here("train_vaegan", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(short)
    assert log_of(tmp_path / "run") == log_of(short)
    for name in ("progress.png", "progress.gif", "reconstructions.png"):
        assert (tmp_path / "run" / name).read_bytes() == (short / name).read_bytes()


def test_each_part_learns_from_its_own_losses(recipe):
    """Gradients are those of the paper's algorithm, with the decoder's divided by gamma."""
    torch.manual_seed(0)
    network = autoencoder.Autoencoder((1, 8, 8), 3, "conv", (4,), True, "gaussian")
    discriminator = gan.Discriminator((1, 8, 8), widths=(8,), patch=2)
    real, noise = 2 * torch.rand(6, 1, 8, 8) - 1, torch.randn(2, 6, 3)
    options = recipe.Settings(gamma=0.1, beta=2.0)
    game = gan_losses.Game("non_saturating")
    recipe.model_loss(options, game, discriminator, network, network, real, noise).backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters()}

    def gradients(loss):
        named = dict(network.named_parameters())
        grads = torch.autograd.grad(
            loss, list(named.values()), allow_unused=True, retain_graph=True
        )
        return dict(zip(named, grads, strict=True))

    posterior = network.encode(real).latent_dist
    latents = posterior.mean + posterior.std * noise[0]
    error = discriminator.features(network.predict(latents)) - discriminator.features(real)
    rebuilding = gradients(error.square().sum(1).mean() / 2)
    divergence = gradients(
        kl_divergence(Normal(posterior.mean, posterior.std), Normal(0, 1)).sum(1).mean()
    )
    drawn = network.predict(torch.cat([latents.detach()[:3], noise[1, 3:]]))
    scores, _ = discriminator(drawn)
    passing = gradients(torch.nn.functional.softplus(-scores).mean())
    for name, gradient in found.items():
        if name.startswith(("shrink", "squeeze")):
            expected = rebuilding[name] + 2.0 * divergence[name]
        else:
            expected = rebuilding[name] + passing[name] / 0.1
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(train, short, tmp_path):
    """Nothing but the noise of a step differs."""
    launch = {"recipe": "train_vaegan", "launcher": TWO, "env": ON_CPU}
    done = train(*SHORT, "--output_dir", tmp_path / "run", **launch)
    assert done.returncode == 0, done.stderr
    one, two = log_of(short), log_of(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "discriminator_loss", "mse"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images nowhere", "images: 'nowhere' is no folder, table or dataset"),
        ("--gamma 0", "gamma.*got 0.0"),
        ("--gamma nan", "gamma.*got nan"),
        ("--beta -1", "beta.*got -1.0"),
        ("--latent_dim 0", "latent_dim.*got 0"),
        ("--penalty_every 0", "penalty_every.*got 0"),
        ("--widths 8 0", "widths.*got 0"),
        ("--discriminator_widths -4", "widths.*got -4"),
        ("--val_fraction 1", "val_fraction.*got 1.0"),
        ("--loss 🙂", "loss.*got '🙂'"),
        ("--r1 -1", "r1.*got -1.0"),
        ("--resolution 9", "resolution: a discriminator .* multiples of 2 pixels"),
    ],
)
def test_bad_input_is_refused_at_once(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run_here("train_vaegan", *SHORT, *words.split(), "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
