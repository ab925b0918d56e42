"""Pipelines of images: what they draw, and what of them travels."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

from genkit.hub import vendoring
from genkit.models import autoencoder, gan
from genkit.models.autoencoder import Autoencoder, AutoencoderPipeline
from genkit.vision import pipelines

SIZE = (3, 9, 13)


def own(**options) -> AutoencoderPipeline:
    torch.manual_seed(1)
    options = {"image_size": SIZE, "latent_dim": 3, "widths": (6,), "network": "conv"} | options
    model = Autoencoder(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # that images differ
    model.fit_prior(torch.randn(50, 3) * 2 + 1)
    return AutoencoderPipeline(model)


def stock() -> AutoencoderPipeline:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    )
    return AutoencoderPipeline(vae.eval())


KINDS: dict[str, Callable[[], AutoencoderPipeline]] = {
    "conv": own,
    "dense": lambda: own(network="dense", likelihood="gaussian", variational=True),
    "told": lambda: own(labels=4, variational=True),
    "head": lambda: own(head=4),
    "stock": stock,
}


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request) -> AutoencoderPipeline:
    return KINDS[request.param]()


def told(pipeline: AutoencoderPipeline, count: int) -> list[int] | None:
    """Labels, where the model wants some."""
    return [i % 4 for i in range(count)] if pipeline.vae.config.get("labels") else None


def size_of(pipeline: AutoencoderPipeline) -> tuple[int, int, int]:
    return (3, 16, 16) if isinstance(pipeline.vae, AutoencoderKL) else SIZE


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def drawn(pipeline: AutoencoderPipeline, count: int = 5, **options) -> torch.Tensor:
    options = {"generator": generators(count), "labels": told(pipeline, count)} | options
    return pipeline(count, output_type="pt", **options).images


def some_images(pipeline: AutoencoderPipeline, count: int) -> torch.Tensor:
    return torch.randn(count, *size_of(pipeline), generator=generators(1)[0]).tanh()


# ---- what it draws


def test_an_image_is_the_same_alone_and_among_others(pipeline):
    labels = told(pipeline, 64)
    together = drawn(pipeline, 64)
    assert together.shape == (64, *size_of(pipeline))
    for i in (0, 1, 17, 63):
        label = None if labels is None else labels[i : i + 1]
        alone = drawn(pipeline, 1, generator=generators(64)[i : i + 1], labels=label)
        assert (alone[0] - together[i]).abs().max() < 1e-6
    assert (together[0] - together[4]).abs().max() > 1e-3


def test_images_come_in_three_forms(pipeline):
    tensor = drawn(pipeline)
    assert tensor.min() >= 0 and tensor.max() <= 1 and not tensor.requires_grad
    arguments = {"labels": told(pipeline, 5)}
    array = pipeline(5, generators(5), output_type="np", **arguments).images
    assert isinstance(array, np.ndarray) and np.array_equal(array, tensor.permute(0, 2, 3, 1))
    pictures = pipeline(5, generators(5), **arguments).images
    for picture, values in zip(pictures, array, strict=True):
        assert np.abs(np.asarray(picture) / 255 - values).max() < 0.51 / 255
    (plain,) = pipeline(5, generators(5), output_type="pt", return_dict=False, **arguments)
    assert torch.equal(plain, tensor)


def test_grey_images_are_grey_pictures():
    pipeline = own(image_size=(1, 9, 13))
    (picture,) = pipeline(1, generators(1)).images
    assert picture.mode == "L" and picture.size == (13, 9)


def test_one_generator_or_none_will_do(pipeline):
    labels = told(pipeline, 3)
    first, second = (
        drawn(pipeline, 3, generator=torch.Generator().manual_seed(5), labels=labels)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert drawn(pipeline, 3, generator=None, labels=labels).shape == first.shape


@pytest.mark.parametrize("count", [0, 2, 4])
def test_generators_are_counted(count):
    with pytest.raises(ValueError, match=f"generator.* 3, got {count}"):
        drawn(KINDS["conv"](), 3, generator=generators(count))


def test_what_is_drawn_is_what_is_decoded(pipeline):
    noise = torch.stack([torch.randn(pipeline.latent_shape, generator=g) for g in generators(5)])
    decoded = pipeline.decode(pipeline.noise_to_latent(noise), told(pipeline, 5))
    torch.testing.assert_close(drawn(pipeline), (decoded + 1) / 2, rtol=0, atol=1e-6)


def test_a_reconstruction_is_what_is_decoded_from_what_is_encoded(pipeline):
    images, labels = some_images(pipeline, 4), told(pipeline, 4)
    latents = pipeline.encode(images, labels)
    assert latents.shape == (4, *pipeline.latent_shape)
    again = pipeline.reconstruct(images, labels)
    assert torch.equal(again, pipeline.decode(latents, labels))
    assert again.shape == images.shape and again.abs().max() <= 1
    extra = [] if labels is None else [torch.tensor(labels)]
    assert torch.equal(latents, pipeline.vae.encode(images, *extra).latent_dist.mode())


def test_gradients_pass_through_the_decoder(pipeline):
    latents = torch.randn(2, *pipeline.latent_shape).requires_grad_()
    pipeline.decode(latents, told(pipeline, 2)).sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("labels", [None, [0, 1], [0, 1, 4], [0, -1, 1], 2, [[0], [1], [2]]])
def test_labels_are_checked(labels):
    pipeline = KINDS["told"]()
    what = r"labels.* \(4 classes\)" if labels is None else "labels must be 3 of 0 to 3, got"
    images = some_images(pipeline, 3)
    calls = (
        lambda: pipeline(3, labels=labels),
        lambda: pipeline.encode(images, labels),
        lambda: pipeline.decode(torch.zeros(3, 3), labels),
        lambda: pipeline.reconstruct(images, labels),
    )
    for call in calls:
        with pytest.raises(ValueError, match=what):
            call()


@pytest.mark.parametrize("kind", ["conv", "stock"])
def test_unconditional_pipeline_refuses_labels(kind):
    with pytest.raises(ValueError, match=r"labels: .*unconditional"):
        KINDS[kind]()(3, labels=[0, 1, 2])


def test_labels_may_be_a_tensor():
    pipeline = KINDS["told"]()
    assert torch.equal(drawn(pipeline), drawn(pipeline, labels=torch.tensor([0, 1, 2, 3, 0])))


# ---- what travels


@pytest.fixture
def saved(pipeline, tmp_path) -> Path:
    vendoring.save_pipeline(pipeline, tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_pipeline_draws_the_same(pipeline, saved):
    again = autoencoder.load_autoencoder(saved)
    assert torch.equal(drawn(again), drawn(pipeline)) and not again.vae.training
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    code = set() if isinstance(pipeline.vae, AutoencoderKL) else {"vae/autoencoder.py"}
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert files == {"model_index.json", "autoencoder.py", "vae/config.json", weights} | code
    state = load_file(saved / weights)
    assert state.keys() == pipeline.vae.state_dict().keys()


def tamper(folder: Path, canary: Path) -> None:
    """Let the code beside the weights tell when it is run."""
    for code in folder.rglob("*.py"):
        with code.open("a") as file:
            file.write(f"\nopen({str(canary)!r}, 'w').close()\n")


def test_the_code_beside_a_model_is_not_run(pipeline, saved, tmp_path):
    tamper(saved, tmp_path / "canary")
    assert torch.equal(drawn(autoencoder.load_autoencoder(saved)), drawn(pipeline))
    assert not (tmp_path / "canary").exists()


def saved_kinds(folder: Path, *kinds: str) -> dict[str, Path]:
    for kind in kinds:
        vendoring.save_pipeline(KINDS[kind](), folder / kind)
    return {kind: folder / kind for kind in kinds}


STRANGER = """
import json, sys
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
sys.modules["genkit"] = None  # from here on importing it fails
torch.set_num_threads(1)
folder = Path(sys.argv[1])
told = {}
for kind in sys.argv[2:]:
    try:
        DiffusionPipeline.from_pretrained(folder / kind)
    except ValueError as error:
        told[kind] = str(error)
told["ran"] = (folder / "canary").exists()
for kind in sys.argv[2:]:
    pipeline = DiffusionPipeline.from_pretrained(folder / kind, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    labels = [0, 1, 2, 3, 0] if kind == "told" else None
    images = pipeline(5, generator=generators, labels=labels, output_type="pt").images
    torch.save(images, folder / kind / "images.pt")
assert not any(name.startswith("genkit.") for name in sys.modules)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> tuple[Path, dict]:
    """Pipelines of every kind that a program without genkit loaded, and what it told of them."""
    folder = tmp_path_factory.mktemp("stranger")
    for saved in saved_kinds(folder, *KINDS).values():
        tamper(saved, folder / "canary")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(folder), *KINDS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_without_genkit_the_same_is_drawn(stranger, kind):
    images = torch.load(stranger[0] / kind / "images.pt", weights_only=True)
    torch.testing.assert_close(images, drawn(KINDS[kind]()), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_without_trust_nothing_is_run(stranger):
    folder, told = stranger
    assert told.pop("ran") is False and told.keys() == KINDS.keys()
    assert all("trust_remote_code=True" in message for message in told.values())
    assert (folder / "canary").exists()  # it sings when it is run


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("kind", ["conv", "stock"])
def test_weights_in_pickles_are_refused(kind, tmp_path):
    (folder,) = saved_kinds(tmp_path, kind).values()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    weights = pickle.dumps(Bomb(tmp_path / "canary"))
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(weights)
    with pytest.raises(ValueError, match=r"holds no autoencoder .*safetensors"):
        autoencoder.load_autoencoder(folder)
    assert not (tmp_path / "canary").exists()


def test_load_autoencoder_refuses_other_models(tmp_path):
    (folder,) = saved_kinds(tmp_path, "conv").values()
    index = folder / "model_index.json"
    facts = json.loads(index.read_text())

    def refused(path: Path, what: str = "") -> None:
        with pytest.raises(ValueError, match=rf"model: '{path}' holds no autoencoder .*{what}"):
            autoencoder.load_autoencoder(path)

    refused(tmp_path / "nowhere 🦉", "No such file")
    for text in ("", "no json", "[]", "null", "{}", '{"vae": null}', '{"vae": ["a", "UNet2D"]}'):
        index.write_text(text)
        refused(folder)
    index.write_text(json.dumps(facts | {"vae": ["os", "system"]}))
    refused(folder, "system")
    index.write_text(json.dumps(facts | {"_class_name": "StableDiffusionPipeline"}))
    refused(folder, "its class is StableDiffusionPipeline")
    index.write_text(json.dumps(facts))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], b"", whole[:8] + b"\xff" * 40 + whole[48:]):
        weights.write_bytes(damaged)
        refused(folder)
    weights.write_bytes(whole)
    lacking = load_file(weights)
    del lacking["squeeze.0.bias"]
    save_file(lacking, weights, {"format": "pt"})
    refused(folder, "its weights lack .'squeeze.0.bias'.")
    weights.write_bytes(whole)
    shards = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    shards.write_text('{"weight_map": {"squeeze.0.bias": "../../x.safetensors"}}')
    refused(folder, "its weights are in several files")
    shards.unlink()
    shutil.rmtree(folder / "vae")
    refused(folder)


def test_a_pipeline_of_diffusers_has_our_stock_model_inside(tmp_path):
    """An AutoencoderKL that was trained here is found by any program as a component."""
    (folder,) = saved_kinds(tmp_path, "stock").values()
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    assert torch.equal(drawn(AutoencoderPipeline(vae.eval())), drawn(KINDS["stock"]()))
    assert issubclass(AutoencoderPipeline, DiffusionPipeline)


# ---- any family


def test_a_saved_model_of_any_family_is_loaded(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator, raw = (gan.Generator((1, 8, 8), 3, widths=(4,), labels=7) for _ in range(2))
    kinds = {
        "own": (own(), 0),
        "told": (KINDS["told"](), 4),
        "stock": (stock(), 0),
        "gan": (gan.GANPipeline(generator.eval()), 7),
    }
    for name, (pipeline, classes) in kinds.items():
        vendoring.save_pipeline(pipeline, tmp_path / name)
        again = pipelines.load_pipeline(tmp_path / name)
        assert type(again) is type(pipeline)
        assert pipelines.count_classes(again) == classes
        noise = torch.randn(2, *pipeline.latent_shape)
        labels = [1, 0] if classes else None
        assert torch.equal(again.decode(noise, labels), pipeline.decode(noise, labels))
    raw.save_pretrained(tmp_path / "gan" / "generator", variant=gan.RAW)
    other = pipelines.load_pipeline(tmp_path / "gan", "raw").generator
    assert torch.equal(other.first.weight, raw.first.weight)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "holds no model"),
        ("no JSON 🙈", "holds no model"),
        ("[]", "holds no settings of a model"),
        ("{}", "holds a None"),
        ('{"_class_name": "DDPMPipeline"}', "holds no weights in safetensors"),
        ('{"_class_name": "LDMPipeline"}', "holds a LDMPipeline; language models, "),
        ('{"_class_name": ["gan", "Other"]}', "holds a .'gan', 'Other'."),
        ('{"_class_name": ["gan", "GANPipeline"]}', "holds no weights in safetensors"),
    ],
)
def test_a_folder_of_no_known_family_is_named(tmp_path, index, message):
    folder = tmp_path / "model 🖼"
    folder.mkdir()
    if index is not None:
        (folder / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=f"model: .*model 🖼' {message}"):
        pipelines.load_pipeline(folder)
