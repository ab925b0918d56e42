"""The recipe of stylizers: they learn, go on exactly, and leave what they promise."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import ON_CPU, TWO, log_of, run_here, weights_of
from diffusers import ConfigMixin, ModelMixin
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

import genkit
from genkit.hub import vendoring
from genkit.models.stylizer import Stylizer, StylizerPipeline, load_stylizer

TINY = "--resolution 24 --widths 4 8 --blocks 1 --batch_size 4 --mixed_precision no --warmup 0"
LENGTH = "--max_steps 8 --evaluations 2 --save_steps 4 --keep_checkpoints 9"


def picture(seed: int, side: int = 32) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A classifier, a style and pictures, as the recipe's arguments."""
    home = tmp_path_factory.mktemp("data")
    (home / "photos").mkdir()
    for i in range(20):
        picture(i).save(home / "photos" / f"{i}.png")
    picture(99).save(home / "wave.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}
        model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **shape))
    model.save_pretrained(home / "classifier")
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3).save_pretrained(home / "classifier")
    words = f"--style {home}/wave.png --images {home}/photos --extractor {home}/classifier"
    return home, words.split()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stylizer") / "run"
    run_here("train_stylizer", *data[1], *TINY.split(), *LENGTH.split(), "--output_dir", folder)
    return folder


# ---- the family


def tiny(channels: int = 3, stride: int = 2) -> StylizerPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StylizerPipeline(Stylizer(channels, (4, 8), 1, stride).eval())


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (40, 13)])
@pytest.mark.parametrize(("channels", "stride"), [(1, 1), (3, 2)])
def test_stylizer_keeps_any_size(size, channels, stride):
    images = torch.rand(2, channels, *size) * 2 - 1
    painted = tiny(channels, stride)(images, output_type="pt").images
    assert [row.shape for row in painted] == [images[0].shape] * 2
    assert all(row.min() >= 0 and row.max() <= 1 for row in painted)


def test_a_row_alone_is_equal_to_that_row_in_a_batch():
    pipeline, images = tiny(), torch.rand(3, 3, 20, 25) * 2 - 1
    batch = pipeline(images, output_type="pt").images
    for image, row in zip(images, batch, strict=True):
        assert torch.equal(pipeline(image[None], output_type="pt").images[0], row)


def test_pictures_of_several_sizes_are_painted_as_their_tensors_are():
    pipeline, pictures = tiny(), [picture(0, 16), picture(1, 24)]
    painted = pipeline(pictures).images
    assert [image.size for image in painted] == [(16, 16), (24, 24)]
    values = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1)[None] / 127.5 - 1
    (again,) = pipeline(values, output_type="np").images
    assert np.abs(np.asarray(painted[0]) - again * 255).max() < 0.51
    assert pipeline(pictures[0].convert("L")).images[0].mode == "RGB"


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images must have 3 channels.*\(1, 9, 9\)"):
        tiny()(torch.zeros(1, 1, 9, 9))
    with pytest.raises(ValueError, match=r"sides of 8.*\(3, 7, 9\)"):
        tiny()(torch.zeros(1, 3, 7, 9))


def test_a_saved_stylizer_paints_the_same(tmp_path):
    pipeline, image = tiny(), picture(3)
    vendoring.save_pipeline(pipeline, tmp_path / "model")
    for loaded in (load_stylizer(tmp_path / "model"), genkit.load(tmp_path / "model")):
        assert isinstance(loaded.stylizer, ModelMixin) and isinstance(loaded.stylizer, ConfigMixin)
        assert loaded(image).images[0].tobytes() == pipeline(image).images[0].tobytes()
    made = genkit.stylize(image, model=tmp_path / "model")
    assert made.image.tobytes() == pipeline(image).images[0].tobytes()
    with pytest.raises(ValueError, match=r"is a stylizer, which genkit\.stylize takes"):
        genkit.sample(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="holds no stylizer"):
        load_stylizer(tmp_path)


# ---- the recipe


def test_a_run_learns_and_leaves_all_that_it_promises(trained, data):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"model_index.json", "stylizer.py", "stylizer", "README.md", "run.json"}
    for name in ("loss.png", "progress.png", "painted.png", "progress.gif"):
        with Image.open(trained / name) as made:
            made.load()
    evaluated = [line for line in log_of(trained) if "val_loss" in line]
    assert len(evaluated) == 2 and evaluated[1]["val_loss"] < evaluated[0]["val_loss"]
    card = (trained / "README.md").read_text()
    facts = json.loads((trained / "run.json").read_text())["facts"]
    assert set(facts) == {"train_sha256", "val_sha256", "extractor_sha256", "style_sha256"}
    assert all(digest in card for digest in facts.values())
    assert f"| val_loss | {evaluated[1]['val_loss']:.4f} |" in card
    assert str(data[0]) not in card
    painted = genkit.stylize(data[0] / "wave.png", model=trained)
    assert painted.image.size == (32, 32)


def test_a_run_goes_on_exactly(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    run_here("train_stylizer", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)
    assert log_of(tmp_path / "run") == log_of(trained)
    for name in ("progress.png", "painted.png"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_go_on_exactly(train, trained, data, tmp_path):
    launch = {"recipe": "train_stylizer", "launcher": TWO, "env": ON_CPU}
    words = (*data[1], *TINY.split(), *LENGTH.split())
    done = train(*words, "--output_dir", tmp_path / "two", **launch)
    assert done.returncode == 0, done.stderr
    one, two = log_of(trained), log_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "val_loss"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-3)
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000008")
    done = train("--output_dir", tmp_path / "again", "--resume", **launch)
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "two")
    assert log_of(tmp_path / "again") == log_of(tmp_path / "two")


@pytest.mark.slow
def test_an_average_of_the_weights_is_published(data, tmp_path):
    words = [*data[1], *TINY.split(), "--ema", "0.5", "--max_steps", "2", "--evaluations", "1"]
    run_here("train_stylizer", *words, "--output_dir", tmp_path / "run")
    assert "averaged weights" in (tmp_path / "run" / "README.md").read_text()


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
from diffusers import DiffusionPipeline
from PIL import Image
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline(Image.open(sys.argv[2])).images[0].save(sys.argv[3])
"""


@pytest.mark.slow
def test_the_folder_paints_the_same_without_genkit(trained, data, tmp_path):
    image, made = data[0] / "photos" / "0.png", tmp_path / "painted.png"
    command = [sys.executable, "-c", WITHOUT_GENKIT, str(trained), str(image), str(made)]
    subprocess.run(command, capture_output=True, check=True)
    with Image.open(made) as painted:
        expected = genkit.stylize(image, model=trained).image
        assert painted.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--style {tmp}/missing.png", "--style: .*missing.png"),
        ("--style {tmp}/text.png", "text.png is no image"),
        ("--style {tmp}/small.png", "small.png is 3 x 3"),
        ("--images {tmp}/empty", "images: .*empty"),
        ("--extractor {tmp}/missing", "--extractor"),
        ("--extractor {tmp}/empty", "extractor|model"),
        ("--style_layers 9", "style_layers.*9"),
        ("--content_layer 9", "content_layer.*9"),
        ("--style_weight -1", "style_weight.*-1"),
        ("--channels 1", "images.*1 channel.*--channels 3"),
        ("--resolution 4", "resolution.*4"),
        ("--batch_size 4 --widths 0", "widths.*0"),
    ],
)
def test_bad_input_is_refused_at_once(data, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    picture(0, 3).save(tmp_path / "small.png")
    given = [*data[1], *TINY.split(), *LENGTH.split(), *words.format(tmp=tmp_path).split()]
    with pytest.raises(ValueError, match=message):
        run_here("train_stylizer", *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("name", ["style", "extractor"])
def test_style_and_extractor_are_required(data, tmp_path, name):
    given = list(data[1])
    at = given.index(f"--{name}")
    del given[at : at + 2]
    with pytest.raises(ValueError, match=f"--{name} is required"):
        run_here("train_stylizer", *given, *TINY.split(), "--output_dir", tmp_path / "run")
