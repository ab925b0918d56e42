"""Training and evaluation on few images: they work where they can, and name what would do."""

import numpy as np
import pytest
import torch
from builders import log_of, run_here
from PIL import Image

from genkit.data import images
from genkit.metrics.features import PixelFeatures
from genkit.metrics.judge import Judge
from genkit.metrics.monitor import Monitor, coverage_k
from genkit.training.image_data import ImageSettings, check_count
from genkit.vision.evaluation import evaluate

pytestmark = pytest.mark.slow

DIGITS = images.load_images("digits")
SHORT = ("--max_steps", "1", "--evaluations", "1", "--batch_size", "8", "--mixed_precision", "no")
RECIPES = {
    "train_autoencoder": "--network conv --widths 8 --latent_dim 4 --compile no",
    "train_vae": "--network dense --widths 8 --latent_dim 4 --nll_samples 2 --compile no",
    "train_vaegan": "--widths 8 --discriminator_widths 8 --latent_dim 4",
    "train_pixels": "--depth 1 --width 32 --levels 4",
    "train_classifier": "--depth 1 --width 8",
    "train_gan": "--widths 8 --discriminator_widths 8 --latent_dim 4 --eval_samples 6",
    "train_diffusion": "--widths 8 8 --eval_samples 6 --eval_steps 2",
}
COMPARED = ("train_gan", "train_diffusion")  # with real images, two of which are held out


def write_images(folder, count: int) -> str:
    """Write images of two classes."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DIGITS.pixels[i, 0]).save(path)
    return str(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_few_images_can_be_trained_on(recipe, tmp_path):
    count = 64 if recipe in COMPARED else 20
    source = write_images(tmp_path / "images", count)
    given = (*SHORT, *RECIPES[recipe].split(), "--images", source)
    run_here(recipe, *given, "--output_dir", tmp_path / "run")
    (evaluated,) = log_of(tmp_path / "run")
    assert all(np.isfinite(value) for value in evaluated.values())


@pytest.mark.parametrize("recipe", COMPARED)
def test_too_few_images_name_the_fraction_that_would_do(recipe, tmp_path):
    source = write_images(tmp_path / "images", 20)
    given = (*SHORT, *RECIPES[recipe].split(), "--images", source)
    message = r"--val_fraction 0\.1 leaves 2 of 20 images .* give --val_fraction 0\.18"
    with pytest.raises(ValueError, match=message):
        run_here(recipe, *given, "--output_dir", tmp_path / "run")
    run_here(recipe, *given, "--output_dir", tmp_path / "run", "--val_fraction", "0.18")


@pytest.mark.parametrize("total", [5, 7, 20, 30, 999])
def test_the_fraction_that_check_count_names_is_enough(total):
    settings = ImageSettings(batch_size=1, val_fraction=0.001)
    with pytest.raises(ValueError, match="give --val_fraction") as caught:
        check_count(settings, total - 1, 1, 4)
    fraction = float(str(caught.value).split()[-1])
    train, val = images.split_images(DIGITS.take(np.arange(total)), None, fraction)
    check_count(settings, len(train), len(val), 4)


@pytest.mark.parametrize(
    ("val_images", "train", "val", "message"),
    [
        (None, 3, 1, "--images digits has 4 images; give 5 or more"),
        ("others", 100, 3, "--val_images others has 3 images; give 4 or more"),
    ],
)
def test_check_count_names_what_is_too_few(val_images, train, val, message):
    settings = ImageSettings(batch_size=1)
    settings.val_images = val_images  # after the check that there is such a folder
    with pytest.raises(ValueError, match=message):
        check_count(settings, train, val, 4)


@pytest.mark.parametrize(("count", "k"), [(4, 1), (6, 2), (10, 4), (11, 4), (12, 5), (400, 5)])
def test_monitor_takes_a_smaller_k_for_few_images(count, k):
    monitor = Monitor(DIGITS.take(np.arange(count)), None, 60)
    assert monitor.k == coverage_k(60, count) == k
    figures = monitor.measure(DIGITS.batch(np.arange(500, 560)))
    assert all(np.isfinite(value) for value in figures.values())


@pytest.mark.parametrize(("real", "fake", "k", "most"), [(20, 40, 5, 4), (400, 10, 5, 4)])
def test_evaluate_names_the_k_that_would_do(real, fake, k, most):
    some, drawn = DIGITS.take(np.arange(real)), DIGITS.batch(np.arange(500, 500 + fake))
    with pytest.raises(ValueError, match=rf"k={k}, got 10; give k={most} \(--k {most}\) or less"):
        evaluate(drawn, some, extractor=PixelFeatures(), k=k)
    record = evaluate(drawn, some, extractor=PixelFeatures(), k=most)
    assert record.protocol.k == most


def test_evaluate_of_two_images_names_the_least():
    with pytest.raises(ValueError, match="got 2; give 4 or more images"):
        Judge(DIGITS, extractor=PixelFeatures(), k=1).judge(torch.zeros(2, 1, 8, 8))
