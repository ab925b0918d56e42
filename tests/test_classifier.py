"""The classifier: what it is made of; that its recipe learns, goes on exactly, and is served."""

import json
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import ON_CPU, ROOT, TWO, log_of, run_here, weights_of
from PIL import Image
from transformers import AutoImageProcessor

from genkit import plots
from genkit.data import images, pixels
from genkit.metrics import features
from genkit.models import classifier
from genkit.vision import robustness

EVERY = ("--width", "8", "--mixed_precision", "no")
LENGTH = ("--max_steps", "8", "--evaluations", "2", "--save_steps", "4", "--keep_checkpoints", "9")
SHORT = (*EVERY, "--batch_size", "16", *LENGTH)
ATTACKED = (*SHORT, "--adversarial", "fast")
SIZES = [(1, 8, 8), (3, 9, 30), (1, 16, 16), (1, 17, 17), (1, 28, 28), (3, 64, 8), (3, 40, 40)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that has learnt the digits."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    words = ("--width", "16", "--max_steps", "400", "--evaluations", "2")
    run_here("train_classifier", *words, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 8 steps, with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run_here("train_classifier", *SHORT, "--ema", "0.5", "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def hardened(tmp_path_factory):
    """A run of 8 steps on attacked images."""
    folder = tmp_path_factory.mktemp("runs") / "hardened"
    run_here("train_classifier", *ATTACKED, "--output_dir", folder)
    return folder


def judged(folder):
    return [line for line in log_of(folder) if "accuracy" in line]


def best(folder):
    return max(judged(folder), key=lambda line: line["accuracy"])


def squares(folder, sides):
    """Two classes that nobody mistakes: black squares and white ones."""
    for name, colour in (("black", 0), ("white", 255)):
        (folder / name).mkdir(parents=True)
        for i, side in enumerate(sides):
            Image.new("L", (side, side), colour).save(folder / name / f"{i}.png")
    return folder


# ---- what it is made of


def weight_gradient(layer, shown, dtype):
    """Of a convolution by itself, for an output gradient of ones."""
    weight = layer.weight.detach().to(dtype).requires_grad_()
    shown = shown.to(dtype).contiguous(memory_format=torch.channels_last)
    F.conv2d(shown, weight, None, layer.stride, layer.padding).sum().backward()
    return weight.grad.float()


@pytest.mark.parametrize("size", SIZES)
def test_gradients_in_bfloat16_are_those_in_float32(size):
    """oneDNN's are garbage where a convolution halves a single pixel: no network has one."""
    generator = torch.Generator().manual_seed(0)
    model, inputs = classifier.make_model("abc", size, depth=1, width=32), {}
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, given: inputs.update({layer: given[0].shape}))
    model.eval()(torch.zeros(8, 3, *size[1:]))
    for layer in layers:
        shown = torch.rand(inputs[layer], generator=generator)
        exact = weight_gradient(layer, shown, torch.float32)
        for _ in range(3):
            dirt = [torch.full((1 << i,), torch.inf) for i in range(8, 22)]  # left in freed memory
            del dirt
            error = weight_gradient(layer, shown, torch.bfloat16) - exact
            assert error.abs().max() < 0.02 * exact.abs().max()


def test_stages_halve_while_there_is_something_to_halve():
    for side, stages in {8: 2, 12: 3, 16: 3, 28: 3, 64: 3}.items():
        model = classifier.make_model("ab", (1, side, side), depth=1, width=4).eval()
        assert model.config.hidden_sizes == [4, 8, 16][:stages]
        maps = model(torch.zeros(1, 3, side, side), output_hidden_states=True).hidden_states
        assert all(each.shape[-1] > 1 for each in maps[1:-1])  # what the later stages halve
    assert model.config.id2label == {0: "a", 1: "b"} and model.config.label2id == {"a": 0, "b": 1}


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_shift_is_a_crop_of_the_padded_image(most):
    torch.manual_seed(0)
    shown = torch.randn(300, 2, 5, 4)
    torch.manual_seed(1)
    moved = classifier.random_shift(shown, most)
    torch.manual_seed(1)
    assert torch.equal(moved, classifier.random_shift(shown, most))
    counts = np.zeros((2 * most + 1, 2 * most + 1), int)
    for before, after in zip(shown.numpy(), moved.numpy(), strict=True):
        padded = np.pad(before, ((0, 0), (most, most), (most, most)), "edge")
        places = np.argwhere(np.ones_like(counts))
        fits = [np.array_equal(padded[:, y : y + 5, x : x + 4], after) for y, x in places]
        assert sum(fits) == 1
        counts[tuple(places[fits.index(True)])] += 1
    assert counts.min() > 0 and counts.max() < 5 * 300 / counts.size


def test_the_loss_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 3, 0])

    def model(shown):
        assert shown.shape == (6, 3, 8, 8)
        return type("Output", (), {"logits": logits})

    log_probabilities = logits.log_softmax(1)
    right = -log_probabilities[torch.arange(6), labels].mean()
    for smoothing in (0.0, 0.1, 0.5):
        found = classifier.loss(model, torch.zeros(6, 1, 8, 8), labels, smoothing)
        want = (1 - smoothing) * right - smoothing * log_probabilities.mean()
        assert found.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_stock_processor_sees_what_genkit_sees(tmp_path, size):
    classifier.save_classifier(classifier.make_model("ab", size, 1, 4), size, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    channels, height, width = size
    shape = (height, width) if channels == 1 else (height, width, 3)
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    picture = Image.fromarray(values)
    array = pixels.image_to_array(picture, None, channels)
    want = classifier.in_colour(torch.tensor(array)[None] / 127.5 - 1)
    seen = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, want, rtol=0, atol=1e-6)


def test_the_stock_processor_scales_and_crops_as_genkit_does(tmp_path):
    classifier.save_classifier(
        classifier.make_model("ab", (3, 16, 16), 1, 4), (3, 16, 16), tmp_path
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    for width, height in ((64, 64), (48, 32), (32, 48), (12, 12)):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        want = torch.tensor(pixels.image_to_array(picture, 16, 3)) / 127.5 - 1
        seen = processor(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(seen, want, rtol=0, atol=4 / 255)


# ---- pictures


def test_rare_mistakes_and_strange_names_are_drawn(tmp_path):
    matrix, names = 1000 * np.eye(4, dtype=int), ["a name of many words", "$x$", "日本", "b"]
    matrix[3] = 0  # a class that is not among the images
    drawn = []
    for mistakes in (0, 1):
        matrix[0, 1] = mistakes
        plots.confusion(matrix, names, tmp_path / "small.png")
        with Image.open(tmp_path / "small.png") as picture:
            drawn.append(np.asarray(picture.convert("RGB"), int)[60:])  # below the title
    assert np.abs(drawn[0] - drawn[1]).max() > 100  # the number in its cell
    plots.confusion(np.eye(120, dtype=int), [f"class {i}" for i in range(120)], tmp_path / "l.png")
    plots.captioned(np.zeros((7, 8, 20, 3)), ["$x$\ntaken for 日本, 9%"] * 7, tmp_path / "m.png")
    for name in ("l", "m"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.load()


# ---- it learns, and what it leaves is an ordinary model


@pytest.mark.slow
def test_it_learns_the_digits(learned):
    assert best(learned)["accuracy"] > 0.95


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import warnings
warnings.simplefilter("error")
import json
from pathlib import Path
from PIL import Image
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1])
pictures = [Image.open(path) for path in sorted(Path(sys.argv[2]).iterdir())]
assert pictures[0].mode == "L", pictures[0].mode
rows = [classify(picture)[0] for picture in pictures]
assert rows[0] == classify(pictures[0].convert("RGB"))[0]
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_the_stock_pipeline_is_right_as_often_as_the_card_says(learned, tmp_path):
    _, val = images.load_train_val("digits", None, 0.1)
    for i, row in enumerate(val.rows):
        Image.fromarray(np.asarray(val.pixels[row, 0])).save(tmp_path / f"{i:03}.png")
    command = [sys.executable, "-c", WITHOUT_GENKIT, str(learned), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    true = [val.names[label] for label in val.classes(np.arange(len(val)))]
    right = [row["label"] == name for row, name in zip(rows, true, strict=True)]
    assert np.mean(right) == best(learned)["accuracy"]
    assert all(0 < row["score"] <= 1 for row in rows)
    seen = features.extract(val, features.load_extractor(learned))
    assert [val.names[i] for i in seen.classes] == [row["label"] for row in rows]
    assert seen.features.shape == (len(val), 32)


def test_a_run_leaves_all_that_it_promises(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "run.json"}
    for name in ("loss", "confusion", "mistakes"):
        with Image.open(trained / f"{name}.png") as picture:
            picture.load()
    assert [line["step"] for line in judged(trained)] == [4, 8]
    card = (trained / "README.md").read_text()
    for name in ("accuracy", "val_loss"):
        assert f"| {name} | {best(trained)[name]:.4f} |" in card
    assert "pipeline_tag: image-classification" in card
    assert "All 180 validation images" in card and "averaged weights in float32" in card
    facts = json.loads((trained / "run.json").read_text())["facts"]
    assert all(digest in card for digest in facts.values())


@pytest.mark.slow
def test_a_model_without_mistakes_has_no_picture_of_them(tmp_path):
    """And a class may be missing from what it is validated on."""
    folder = squares(tmp_path / "images", [16] * 12)
    words = ("--images", folder, "--val_fraction", "0.04", *EVERY, "--batch_size", "8")
    run_here("train_classifier", *words, "--max_steps", "30", "--output_dir", tmp_path / "run")
    assert judged(tmp_path / "run")[-1]["accuracy"] == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "confusion.png" in names and "mistakes.png" not in names
    assert "All 1 validation images" in (tmp_path / "run" / "README.md").read_text()


def test_a_process_without_images_predicts_none():
    recipe = runpy.run_path(str(ROOT / "recipes" / "train_classifier.py"))
    whole = images.load_images("digits")
    model = classifier.make_model(whole.names, whole.size, 1, 4).eval()
    found = recipe["predict_shard"](model, whole, np.arange(0), torch.device("cpu"))
    assert [len(each) for each in found] == [0, 0, 0]


# ---- it goes on


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 4])
def test_a_run_goes_on_exactly(trained, tmp_path, kept):
    shutil.copytree(trained, tmp_path / "run")
    for later in range(kept + 4, 9, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later:08d}")
    run_here("train_classifier", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)
    assert log_of(tmp_path / "run") == log_of(trained)
    for name in ("confusion.png", "mistakes.png"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.slow
def test_two_processes_judge_one_model(train, tmp_path):
    """Each has running statistics of its own; those of the main process are judged and saved."""
    words = (*EVERY, "--batch_size", "16", "--learning_rate", "0.1", "--max_steps", "20")
    words += ("--evaluations", "1", "--output_dir", tmp_path / "run")
    done = train(*words, recipe="train_classifier", launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    recipe = runpy.run_path(str(ROOT / "recipes" / "train_classifier.py"))
    _, val = images.load_train_val("digits", None, 0.1)
    model = classifier.ResNetForImageClassification.from_pretrained(tmp_path / "run").eval()
    predicted, _, nats = recipe["predict_shard"](
        model, val, np.arange(len(val)), torch.device("cpu")
    )
    true = val.classes(np.arange(len(val))).numpy()
    assert best(tmp_path / "run")["accuracy"] == np.mean(predicted == true)
    assert best(tmp_path / "run")["val_loss"] == pytest.approx(nats.mean(), rel=1e-6)


@pytest.mark.slow
def test_two_processes_go_on_exactly(train, tmp_path):
    launch = {"recipe": "train_classifier", "launcher": TWO, "env": ON_CPU}
    done = train(*SHORT, "--ema", "0.5", "--output_dir", tmp_path / "whole", **launch)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000008")
    done = train("--output_dir", tmp_path / "stopped", "--resume", **launch)
    assert "resumed after step 4" in done.stderr
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    words = ("--epochs", "2", "--optimizer", "muon", "--output_dir", tmp_path / "run", "--dry_run")
    run_here("train_classifier", *EVERY, "--batch_size", "16", *words)
    told = capsys.readouterr().out
    assert "1,617 images of 1 x 8 x 8 in 10 classes" in told and "203 steps" in told
    assert not (tmp_path / "run").exists()


# ---- it trains on attacked images


def test_adversarial_training_keeps_the_most_robust_model(hardened):
    lines = judged(hardened)
    assert [line["step"] for line in lines] == [4, 8]
    kept = max(lines, key=lambda line: line["robust_accuracy"])
    assert all(0 <= line["robust_accuracy"] <= line["accuracy"] for line in lines)
    card = (hardened / "README.md").read_text()
    assert f"| robust_accuracy | {kept['robust_accuracy']:.4f} |" in card
    assert "right under PGD of 10 steps within 0.3 (linf, pixels in [0, 1])" in card
    saved = json.loads((hardened / "run.json").read_text())["settings"]
    assert (saved["epsilon"], saved["shift"], saved["label_smoothing"]) == (0.3, 0, 0.0)
    with Image.open(hardened / "loss.png") as picture:
        assert picture.width > 1.9 * picture.height  # two panels


@pytest.mark.slow
def test_robust_accuracy_is_that_of_the_saved_model(hardened):
    """The same attack, from the same starts, on the folder."""
    _, val = images.load_train_val("digits", None, 0.1)
    found = robustness.measure_robustness(
        val, model=hardened, epsilon=0.3, steps=10, checked=0, device="cpu"
    )
    kept = max(judged(hardened), key=lambda line: line["robust_accuracy"])
    assert found.robust == pytest.approx(kept["robust_accuracy"], abs=1.5 / len(val))


@pytest.mark.slow
def test_adversarial_training_goes_on_exactly(hardened, tmp_path):
    shutil.copytree(hardened, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    run_here("train_classifier", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(hardened)
    assert log_of(tmp_path / "run") == log_of(hardened)


@pytest.mark.slow
def test_two_processes_train_on_attacked_images_and_go_on_exactly(train, tmp_path):
    launch = {"recipe": "train_classifier", "launcher": TWO, "env": ON_CPU}
    words = (*SHORT, "--adversarial", "pgd", "--output_dir", tmp_path / "whole")
    done = train(*words, **launch)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000008")
    done = train("--output_dir", tmp_path / "stopped", "--resume", **launch)
    assert "resumed after step 4" in done.stderr
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    assert all("robust_accuracy" in line for line in judged(tmp_path / "whole"))


# ---- what cannot work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images {tmp}/plain", "labels: these images have no"),
        ("--images {tmp}/single", "images: .*'cat'"),
        ("--images {tmp}/mixed", "pass --resolution"),
        ("--images nowhere", "images: 'nowhere' is no folder, table or dataset"),
        ("--images {tmp}/mixed --resolution 8 --val_images digits", "val_images: their classes"),
        ("--resolution 4", "resolution.*got 4"),
        ("--val_fraction 1", "val_fraction.*got 1.0"),
        ("--label_smoothing 1", "label_smoothing.*got 1.0"),
        ("--depth 0", "depth.*got 0"),
        ("--width 0", "width.*got 0"),
        ("--shift -1", "shift.*got -1"),
        ("--shift 8", "shift .*got 8"),
        ("--adversarial fgsm", "adversarial must be one of no, fast or pgd, got 'fgsm'"),
        ("--epsilon 0", "epsilon.*got 0.0"),
        ("--epsilon 8", "epsilon.*got 8.0"),
        ("--epsilon 0.1", "--epsilon 0.1 is for --adversarial"),
        ("--epochs 0", "epochs.*got 0.0"),
        ("--gradient_accumulation 16", "batch_size 16 .* 32 or more"),
    ],
)
def test_bad_settings_are_named(tmp_path, words, message):
    squares(tmp_path / "mixed", [16, 20, 24])
    shutil.copytree(tmp_path / "mixed" / "white", tmp_path / "plain")
    shutil.copytree(tmp_path / "mixed" / "white", tmp_path / "single" / "cat")
    given = words.format(tmp=tmp_path).split()
    if "plain" in words or "single" in words:
        given += ["--resolution", "16"]
    with pytest.raises(ValueError, match=message):
        run_here("train_classifier", *SHORT, *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
