"""Diffusion in the latents of an autoencoder: encoding, scale, drawing, saving, the recipe."""

import json
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from builders import log_of, run_here, tiny_latents, weights_of
from diffusers import AutoencoderKL

import genkit
from genkit.data import latents
from genkit.data.images import load_images, load_train_val, proportional_labels
from genkit.hub import staging, vendoring
from genkit.metrics.monitor import Monitor
from genkit.models import autoencoder, denoisers, diffusion, latent_space
from genkit.vision import denoising, inpainting, sampling

OBJECTIVES = ("epsilon", "v", "x0", "flow")


def kl(size=(1, 8, 8), widths=(4, 8), channels=2, seed=0) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return autoencoder.make_spatial(size, widths, channels).eval().requires_grad_(False)


def pipeline_of(*given, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_latents(*given, **options)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


# ---- what is encoded


@pytest.mark.parametrize(("widths", "shape"), [((4, 8), (3, 4, 4)), ((4, 4, 8), (3, 2, 2))])
def test_latents_are_the_means_that_the_encoder_predicts(widths, shape):
    vae, images = kl(widths=widths, channels=3), load_images("digits")
    some = images.take(np.array([5, 900, 3]))
    encoded = latents.encode_images(some, partial(latent_space.encode, vae), str(widths))
    assert encoded.size == shape and len(encoded) == 3 and encoded.sha256 == some.sha256
    assert latent_space.factor(vae) == 8 // shape[1]
    every = np.arange(3)
    expected = vae.encode(some.batch(every)).latent_dist.mean
    torch.testing.assert_close(encoded.batch(every), expected)
    assert torch.equal(encoded.classes(every), some.classes(every))
    assert encoded.names == images.names
    last = encoded.take(np.array([2]))
    torch.testing.assert_close(last.batch(np.arange(1)), expected[2:])
    assert torch.equal(last.classes(np.arange(1)), images.classes(np.array([3])))


def test_images_are_encoded_once_for_each_encoder():
    images, seen = load_images("digits").take(np.arange(100)), []

    def encode(batch):
        seen.append(len(batch))
        return batch[:, :, ::2, ::2] * 3

    first = latents.encode_images(images, encode, "thirds")
    assert sum(seen) >= 100
    seen.clear()
    again = latents.encode_images(images, encode, "thirds")
    assert sum(seen) == 1  # for the shape alone
    assert np.array_equal(first.pixels, again.pixels)
    assert len(latents.encode_images(images, lambda b: b[:, :, :2, :2], "other").pixels) == 100


def test_latents_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"latent: .* not finite"):
        latents.encode_images(load_images("digits"), lambda b: b * torch.inf, "endless")


def test_the_deviation_is_that_about_the_mean():
    images = load_images("digits")
    encoded = latents.encode_images(images, lambda b: 3 * b + 7, "moved")
    every = images.batch(np.arange(len(images)))
    assert encoded.deviation() == pytest.approx(3 * every.std().item(), rel=1e-4)


# ---- what is drawn


@pytest.mark.parametrize("name", [*diffusion.SAMPLERS, "flow"])
def test_a_sample_is_the_decoded_sample_of_latents(name):
    flow = name == "flow"
    pipeline = pipeline_of("flow" if flow else "v", labels=3)
    plain = diffusion.DenoisingPipeline(pipeline.unet, pipeline.scheduler)
    plain.to_images = lambda x: x
    how = {"sampler_name": "euler" if flow else name, "num_inference_steps": 5, "output_type": "pt"}
    made = pipeline(3, seeds(4, 5, 6), [0, 2, 1], **how).images
    sampled = 2 * plain(3, seeds(4, 5, 6), [0, 2, 1], **how).images - 1
    assert sampled.shape == (3, 2, 4, 4) and made.shape == (3, 1, 8, 8)
    assert sampled.abs().max() > 1  # latents are not clipped
    decoded = pipeline.vae.decode(sampled / 0.5).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(made, decoded, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["dpm++", "unipc", "heun", "ddpm"])
def test_no_sampler_clips_latents_and_all_clip_images(name):
    asked = {"dpm++": "thresholding", "unipc": "thresholding"}.get(name, "clip_sample")
    for clip in (True, False):
        scheduler = diffusion.make_scheduler("v", clip=clip)
        assert bool(diffusion.make_sampler(scheduler, name, 5).config[asked]) == clip


def test_an_image_depends_on_its_own_seed_alone():
    pipeline = pipeline_of("v")
    whole = sampling.draw_samples(pipeline, range(100, 140))
    assert whole.flatten(1).unique(dim=0).shape[0] == 40
    alone = sampling.draw_samples(pipeline, [137])
    torch.testing.assert_close(alone[0], whole[37], rtol=0, atol=5e-5)


def test_what_is_decoded_is_what_is_drawn_and_gradients_pass():
    pipeline = pipeline_of("flow")
    noise = torch.stack([torch.randn(2, 4, 4, generator=each) for each in seeds(1, 2)])
    decoded = pipeline.decode(noise.requires_grad_())
    drawn = pipeline(2, seeds(1, 2), output_type="pt").images
    torch.testing.assert_close(decoded.detach() / 2 + 0.5, drawn, rtol=0, atol=1e-4)
    decoded.sum().backward()
    assert noise.grad.isfinite().all() and noise.grad.abs().sum() > 0


def test_a_trajectory_is_shown_decoded_and_ends_at_the_sample():
    pipeline = pipeline_of("v")
    shown = denoising.denoising_trajectory(pipeline, seed=3, steps=6, shown=4)
    assert shown.mixed.shape == shown.clean.shape == (4, 1, 8, 8)
    drawn = sampling.draw_samples(pipeline, [3], arguments={"num_inference_steps": 6})
    torch.testing.assert_close(shown.image, drawn[0], rtol=0, atol=1e-4)


def test_what_looks_at_pixels_refuses_latents():
    pipeline, images = pipeline_of("v"), torch.zeros(1, 1, 8, 8)
    for look in (
        lambda: denoising.invert(pipeline, images),
        lambda: denoising.noising_trajectory(pipeline, images),
        lambda: inpainting.inpaint(pipeline, images, torch.ones(8, 8, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="pipeline: this model denoises latents"):
            look()


# ---- what is saved


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("labels", [0, 3])
def test_a_saved_pipeline_draws_the_same(tmp_path, objective, labels):
    pipeline, how = pipeline_of(objective, labels), {"seed": 5, "steps": 3}
    denoisers.save_diffusion(pipeline, tmp_path)
    again = denoisers.load_diffusion(tmp_path)
    assert again.vae.config.scaling_factor == 0.5 and not again.vae.training
    own = [1, 2] if labels else None
    expected = sampling.draw_samples(pipeline, (5, 6), own, {"num_inference_steps": 3})
    made = genkit.sample(tmp_path, 2, label=own, **how)
    torch.testing.assert_close(made.images, expected, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_a_model_of_before_there_were_latents_is_loaded(tmp_path):
    with torch.random.fork_rng():
        pipeline = diffusion.DenoisingPipeline(
            denoisers.make_unet((1, 8, 8), (8,), labels=3), diffusion.make_scheduler("v")
        )
    vendoring.save_pipeline(pipeline, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("vae") == [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert denoisers.load_diffusion(tmp_path).vae is None
    vendoring.vendor(tmp_path)  # as a push does
    staging.validate(tmp_path, "diffusion")


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
pipeline(2, seeds, [2, 1], output_type="np").images.tofile(sys.argv[2])
"""


@pytest.mark.slow
def test_the_folder_draws_the_same_without_genkit(tmp_path):
    denoisers.save_diffusion(pipeline_of("v", 3), tmp_path / "model")
    command = [sys.executable, "-c", WITHOUT_GENKIT, str(tmp_path / "model"), str(tmp_path / "a")]
    subprocess.run(command, capture_output=True, check=True)
    expected = genkit.sample(tmp_path / "model", 2, seed=5, label=[2, 1]).images
    found = np.fromfile(tmp_path / "a", np.float32).reshape(2, 8, 8, 1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected.numpy() / 2 + 0.5, atol=5e-5)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("vae/config.json", {"_class_name": "VQModel"}, "holds no AutoencoderKL .*'VQModel'"),
        ("vae/config.json", {"latent_channels": 3}, "holds no AutoencoderKL"),
        ("vae/a.index.json", {}, "in several files"),
    ],
)
def test_a_spoiled_autoencoder_is_refused(tmp_path, file, changes, message):
    denoisers.save_diffusion(pipeline_of("v"), tmp_path)
    path = tmp_path / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | changes))
    with pytest.raises(ValueError, match=f"(?s)holds no diffusion model .*{message}"):
        denoisers.load_diffusion(tmp_path)


def test_an_autoencoder_of_other_channels_than_the_unet_is_refused(tmp_path):
    denoisers.save_diffusion(pipeline_of("v"), tmp_path)
    shutil.rmtree(tmp_path / "vae")
    kl(channels=3).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="its vae has 3 channels, its unet 2"):
        denoisers.load_diffusion(tmp_path)


# ---- the recipe

VAE = (
    "--network spatial --widths 4 8 --latent_dim 2 --nll_images 0 --max_steps 30 --batch_size 32 "
    "--evaluations 1 --compile no --mixed_precision no"
)
SHORT = (
    "--widths 8 16 --batch_size 8 --compile no --mixed_precision no --eval_samples 16 "
    "--eval_steps 2 --max_steps 8 --evaluations 2 --save_steps 4 --keep_checkpoints 9"
)
KINDS = {
    "v": "--objective v --conditional",
    "flow": "--objective flow",
    "mean": "--objective meanflow --conditional",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained autoencoder in `kl`, and a short run in its latents of each kind."""
    home = tmp_path_factory.mktemp("latents")
    run_here("train_vae", *VAE.split(), "--output_dir", home / "kl")
    for kind, words in KINDS.items():
        given = ("--latent", home / "kl", *words.split(), *SHORT.split())
        run_here("train_diffusion", *given, "--output_dir", home / kind)
    return home


def test_training_latents_have_unit_deviation(home):
    pipeline = denoisers.load_diffusion(home / "v")
    train, _ = load_train_val("digits", None, 0.1)
    images = train.batch(np.arange(len(train)))
    scaled = pipeline.vae.config.scaling_factor * latent_space.encode(pipeline.vae, images)
    assert scaled.std().item() == pytest.approx(1, abs=1e-3)
    given = AutoencoderKL.from_pretrained(home / "kl", subfolder="vae")
    saved = pipeline.vae.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in given.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_model_that_draws_what_was_measured(home, kind):
    names = {path.name for path in (home / kind).iterdir()}
    assert names >= {"diffusion.py", "unet", "vae", "scheduler", "README.md", "progress.png"}
    config = (home / kind / "vae" / "config.json").read_text()
    assert json.loads(config)["_name_or_path"] == "kl"
    best = min(
        (line for line in log_of(home / kind) if "distance" in line), key=lambda x: x["distance"]
    )
    pipeline, (train, val) = genkit.load(home / kind), load_train_val("digits", None, 0.1)
    labels = proportional_labels(train, 16) if pipeline.labels else None
    drawn = sampling.draw_samples(pipeline, range(16), labels, {"num_inference_steps": 2})
    assert drawn.shape == (16, 1, 8, 8)
    found = Monitor(val, None, 16).measure(drawn, labels)
    assert found["distance"] == pytest.approx(best["distance"], rel=1e-3)
    card = (home / kind / "README.md").read_text()
    assert "as latents of 2 x 4 x 4 by kl" in card and str(home) not in card
    facts = json.loads((home / kind / "run.json").read_text())["facts"]
    assert set(facts) == {"train_sha256", "val_sha256", "vae_sha256"}
    assert all(digest in card for digest in facts.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_exactly(home, tmp_path, kind):
    shutil.copytree(home / kind, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    run_here("train_diffusion", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(home / kind)
    assert log_of(tmp_path / "run") == log_of(home / kind)


def test_a_run_does_not_go_on_in_other_latents(home, tmp_path):
    shutil.copytree(home / "v", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    shutil.copytree(home / "kl", tmp_path / "kl")
    shutil.rmtree(tmp_path / "kl" / "vae")
    kl().save_pretrained(tmp_path / "kl" / "vae")
    given = ("--output_dir", tmp_path / "run", "--resume", "--latent", tmp_path / "kl")
    with pytest.raises(ValueError, match=r"vae_sha256|latent"):
        run_here("train_diffusion", *given)


def test_a_folder_of_the_autoencoder_alone_will_do(tmp_path):
    kl().save_pretrained(tmp_path / "alone")
    given = ("--latent", tmp_path / "alone", *SHORT.split(), "--dry_run")
    run_here("train_diffusion", *given, "--output_dir", tmp_path / "run")


@pytest.mark.slow
def test_a_pushed_model_loads_with_genkit_and_without(home, tmp_path):
    staging.stage(home / "v", tmp_path, "user/latents")
    staging.validate(tmp_path, "diffusion")
    assert {"diffusion.py", "vae"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--latent {tmp}/nowhere", "latent: cannot load .*nowhere"),
        ("--latent {tmp}/empty", "latent: .*empty"),
        (
            "--latent {tmp}/other",
            "latent: .*other.* holds no AutoencoderKL .*train_vae --network spa",
        ),
        ("--latent {tmp}/colour", "latent: .* images of 3 channels, got 1; give --channels 3"),
        ("--latent {tmp}/deep", "latent: .* multiples of 16, got images of 8 x 8; .* 16"),
        (
            "--latent {tmp}/kl --widths 8 8 8 8",
            "4 widths .* latents of 4 x 4; give --resolution 16",
        ),
        ("--latent {tmp}/constant", "latent: .* encodes all images alike"),
    ],
)
def test_bad_input_is_refused_at_once(tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    kl().save_pretrained(tmp_path / "kl")
    kl((3, 8, 8)).save_pretrained(tmp_path / "colour")
    kl((1, 16, 16), (4,) * 5).save_pretrained(tmp_path / "deep")
    constant = kl()
    for weight in constant.quant_conv.parameters():
        weight.zero_()
    constant.save_pretrained(tmp_path / "constant")
    denoisers.make_unet((1, 8, 8), (8,)).save_pretrained(tmp_path / "other")
    given = words.format(tmp=tmp_path).split()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run_here("train_diffusion", *SHORT.split(), *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
