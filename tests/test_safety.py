"""Malicious models are refused before anything of them runs."""

import functools
import json
import pickle
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from builders import CANARY, MAKE, ROOT, USE, Bomb, images, text_model, weights_file
from safetensors.torch import save_file

import genkit
from genkit.hub import kinds, load_check, safety, staging
from genkit.metrics import features
from genkit.models import lm
from genkit.vision import pipelines


@pytest.fixture(params=MAKE)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A good model, which the test spoils."""
    path = tmp_path / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MAKE[kind](path)
    return path


def refused(kind, folder, message="(model|folder): "):
    """By its verb, by genkit.load and by a push; nothing has run."""
    for use in (USE[kind], genkit.load, lambda path: genkit.push(path, "user/name")):
        with pytest.raises(ValueError, match=message) as raised:
            use(folder)
        assert len(str(raised.value).splitlines()) == 1 or "safetensors" in str(raised.value)
    assert not (folder.parent / CANARY).exists()


def test_a_good_model_is_none_of_these(kind, folder):
    safety.check(folder)
    USE[kind](folder)
    assert kinds.kind_of(folder) == kind


def test_a_pickle_under_the_name_of_safetensors(kind, folder):
    weights_file(folder).write_bytes(pickle.dumps(Bomb(folder.parent / CANARY)))
    refused(kind, folder, r"(model|folder): .*safetensors is not in the safetensors format")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt"])
def test_a_pickle_instead_of_safetensors(kind, folder, name):
    weights = weights_file(folder)
    weights.unlink()
    torch.save({"a": Bomb(folder.parent / CANARY)}, weights.with_name(name))
    refused(kind, folder, r"(model|folder): .* holds no weights in safetensors")


@pytest.mark.parametrize("lie", ["longer", "shorter", "huge", "negative"])
def test_a_header_that_lies_about_its_size(kind, folder, lie):
    weights = weights_file(folder)
    data = weights.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    sizes = {"longer": size + 99, "shorter": size - 9, "huge": 1 << 62, "negative": (1 << 64) - 1}
    weights.write_bytes(struct.pack("<Q", sizes[lie]) + data[8:])
    refused(kind, folder, r"(model|folder): .* is not in the safetensors format")


def test_tensors_that_lie_outside_their_file(kind, folder):
    weights = weights_file(folder)
    data = weights.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 1 << 40
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    refused(kind, folder, r"(model|folder): .* is not in the safetensors format")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..\\other", 3])
def test_an_index_that_names_weights_elsewhere(kind, folder, name):
    weights = weights_file(folder)
    weights.rename(folder.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"a": name}}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    refused(kind, folder, r"(model|folder): .* names a shard outside its folder")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "🙈"])
def test_an_index_that_is_none(kind, folder, text):
    weights_file(folder).with_name("model.safetensors.index.json").write_text(text)
    refused(kind, folder, r"(model|folder): .* is no list of shards")


@pytest.mark.parametrize("what", ["config", "weights"])
def test_a_link_out_of_the_folder(kind, folder, what):
    file = weights_file(folder) if what == "weights" else next(folder.glob("*.json"))
    secret = folder.parent / "secret"
    file.rename(secret)
    file.symlink_to(secret)
    refused(kind, folder, r"(model|folder): .* is a link that leads out of its folder")


def test_a_folder_of_links_out_of_the_folder(folder, kind):
    part = weights_file(folder).parent
    if part == folder:
        part = folder / "part"
        part.mkdir()
        (part / "config.json").write_text("{}")
    part.rename(folder.parent / "elsewhere")
    part.symlink_to(folder.parent / "elsewhere")
    refused(kind, folder, r"(model|folder): .* is a link that leads out of its folder")


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "samples/step-00000001.png", "loss.png"])
def test_links_are_not_published(kind, folder, name):
    """Of no file that a push takes along."""
    secret = folder.parent / "secret"
    secret.write_text("a token")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=r"folder: .* is a link that leads out of its folder"):
        genkit.push(folder, "user/name")


def test_hidden_files_are_not_published(kind, folder, tmp_path):
    (folder / ".secret.json").write_text("{}")
    staged = tmp_path / "staged"
    staged.mkdir()
    staging.stage(folder, staged, "user/name")
    assert not list(staged.rglob(".*"))


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_that_names_a_kernel(tmp_path, where, nested):
    """Which transformers would fetch from the Hub, and run."""
    folder = tmp_path / "model"
    text_model(folder)
    config = json.loads((folder / "config.json").read_text())
    asked = {where: "evil/kernel"}
    (folder / "config.json").write_text(json.dumps(config | ({"a": [asked]} if nested else asked)))
    refused("text", folder, r"(model|folder): .* names code elsewhere: ")


def test_an_adapter_that_leads_to_another_model(kind, folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "user/other"}')
    refused(kind, folder, r"(model|folder): .* leads to weights elsewhere")


CODE = """
from pathlib import Path
Path({canary!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
@pytest.mark.parametrize("known", [False, True])
def test_a_config_that_asks_for_remote_code(tmp_path, known):
    """Code of a type that transformers lacks is refused; of one that it has, its own is taken."""
    folder = tmp_path / "model"
    text_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config["model_type"] = "llama" if known else "own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(canary=str(tmp_path / CANARY)))
    if known:
        genkit.generate("ab", model=folder, max_new_tokens=2)
    else:
        # the last is what a push does in a process of its own
        check = functools.partial(load_check.load_without_genkit, kind="text")
        for use in (USE["text"], genkit.load, lm.load_lm, check):
            with pytest.raises(ValueError, match=r"(?s)model|init_from"):
                use(folder)
    assert not (tmp_path / CANARY).exists()


@pytest.mark.slow
def test_code_beside_a_pipeline_is_not_run(tmp_path):
    """Not by genkit, which has the class itself; a push puts genkit's own in its place."""
    folder, staged = tmp_path / "model", tmp_path / "staged"
    images(folder)
    for file in folder.rglob("gan.py"):
        file.write_text(f"from pathlib import Path\nPath({str(tmp_path / CANARY)!r}).touch()\n")
    genkit.sample(folder)
    pipelines.load_pipeline(folder)
    staged.mkdir()
    staging.stage(folder, staged, "user/name")
    own = (ROOT / "genkit/models/gan.py").read_bytes()
    assert [file.read_bytes() for file in staged.rglob("*.py")] == [own, own]
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("name", ["Other", ["gan", "Other"], ["os", "system"], None, 3, [1, 2], {}])
def test_a_pipeline_of_a_class_that_is_not_known(tmp_path, name):
    folder = tmp_path / "model"
    images(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    refused("gan", folder, r"(model|folder): .* holds a")


def test_an_extractor_is_looked_at_too(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"is a link that leads out"):
        features.load_extractor(tmp_path)


def test_no_module_reads_pickles():
    """Nothing in genkit calls what unpickles."""
    home = Path(genkit.__file__).parent
    found = subprocess.run(
        ["grep", "-rnE", r"torch\.load\(|pickle|allow_pickle=True|joblib", str(home)],
        capture_output=True,
        text=True,
    )
    lines = [line for line in found.stdout.splitlines() if "pickle" not in line.split(":", 2)[2]]
    assert lines == []
