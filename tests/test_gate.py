"""The checks that a folder passes: every known way out of it is refused, in one line."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import CANARY, MAKE, ROOT, USE, Bomb, weights_file
from safetensors.torch import load_file, save_file

import genkit
from genkit import files
from genkit.errors import clean_errors
from genkit.hub import safe_configs, safe_weights, safety, staging
from genkit.models import lm

RUNS = "from pathlib import Path\nPath({!r}).touch()\nclass Generator: pass\n"


@pytest.fixture(params=MAKE)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A good model, which the test spoils."""
    return make(kind, tmp_path)


def make(kind: str, parent: Path) -> Path:
    folder = parent / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MAKE[kind](folder)
    return folder


def refused(kind, folder, *named, push=True):
    """By its verb, by genkit.load and by a push, in one line that names what; nothing has run.

    A fault that only building the network shows is found in a process of the push, which is slow.
    """
    before = sorted(folder.parent.rglob("*"))
    pushes = [lambda path: genkit.push(path, "user/name")] if push else []
    for use in (USE[kind], genkit.load, *pushes):
        with pytest.raises(ValueError, match=r"\A(model|folder): ") as raised:
            use(folder)
        assert len(str(raised.value).splitlines()) == 1
        for name in named:
            assert name in str(raised.value)
        assert "genkit-scratch" not in str(raised.value)
    assert sorted(folder.parent.rglob("*")) == before  # nor was anything written


def edit(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def config_of(folder: Path) -> Path:
    return weights_file(folder).with_name("config.json")


# ---- code and paths in model_index.json


@pytest.mark.parametrize(
    "component",
    [
        ["../LICENSE", "Generator"],
        ["LICENSE", "Generator"],
        ["gan", "../Generator"],
        ["os", "system"],
        ["pipeline_utils", "DiffusionPipeline"],
        ["transformers", "AutoModel"],
        ["diffusers", "OnnxRuntimeModel"],
        ["gan"],
        ["gan", "Generator", "more"],
        [None, "Generator"],
    ],
)
def test_component_of_unknown_class_is_refused(tmp_path, component):
    folder = make("gan", tmp_path)
    (folder / "LICENSE.py").write_text(RUNS.format(str(tmp_path / CANARY)))
    (folder / "generator" / "LICENSE.py").write_text(RUNS.format(str(tmp_path / CANARY)))
    edit(folder / "model_index.json", generator=component)
    refused("gan", folder, "model_index.json", "generator")


@pytest.mark.parametrize(
    "key", ["..", ".", "../outside", "", "a b", "/tmp", "a\x00b", "generator/"]
)
def test_component_whose_name_is_a_path_is_refused(tmp_path, key):
    (tmp_path / "outside").mkdir()
    folder = make("gan", tmp_path)
    edit(folder / "model_index.json", **{key: ["gan", "Generator"]})
    refused("gan", folder, "model_index.json")


def test_component_without_a_folder_is_refused(tmp_path):
    """Libraries would read the files around it."""
    folder = make("gan", tmp_path)
    edit(folder / "model_index.json", other=["gan", "Generator"])
    refused("gan", folder, "model_index.json", "other")


@pytest.mark.slow
def test_code_of_a_folder_is_neither_staged_nor_run(tmp_path):
    folder, staged = make("gan", tmp_path), tmp_path / "staged"
    for name in ("LICENSE.py", "generator/diffusers.py", "generator/LICENSE.py", "conftest.py"):
        (folder / name).write_text(RUNS.format(str(tmp_path / CANARY)))
    staged.mkdir()
    staging.stage(folder, staged, "user/name")
    own = (ROOT / "genkit/models/gan.py").read_bytes()
    code = {file.relative_to(staged).as_posix(): file.read_bytes() for file in staged.rglob("*.py")}
    assert code == {"gan.py": own, "generator/gan.py": own}
    staging.validate(staged, "gan")
    assert not (tmp_path / CANARY).exists()


# ---- other files than those that are looked at


def test_a_pickle_as_a_shard_is_refused(kind, folder):
    weights = weights_file(folder)
    torch.save({"a": Bomb(folder.parent / CANARY)}, weights.with_name("pytorch_model.bin"))
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    refused(kind, folder, "pytorch_model.bin")
    assert not (folder.parent / CANARY).exists()


def test_a_missing_shard_is_refused(kind, folder):
    weights = weights_file(folder)
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    refused(kind, folder, "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("pattern", ["a/b/link.json", "samples/link", "deep"])
def test_a_link_at_any_depth_is_refused(kind, folder, pattern):
    (folder.parent / "secret").mkdir()
    link = folder / pattern
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder.parent / "secret")
    refused(kind, folder, link.name)


def test_a_link_that_leads_nowhere_is_refused(kind, folder):
    (folder / "circle").symlink_to("circle")
    refused(kind, folder, "circle")


@pytest.mark.parametrize("name", ["config.json", "samples/pipe", "weights"])
def test_a_pipe_is_not_waited_for(kind, folder, name):
    file = weights_file(folder) if name == "weights" else folder / name
    if name == "config.json" and kind == "gan":
        file = folder / "model_index.json"
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    os.mkfifo(file)
    refused(kind, folder, file.name)


SETTINGS = {
    "transformers_weights": "adapter_model.bin",
    "configuration_files": ["config.4.0.0.json"],
    "quantization_config": {"quant_method": "fp8"},
    "fusion_config": {"a": True},
    "backbone": "user/other",
    "pretrained_cfg": {"hf_hub_id": "user/other"},
    "_attn_implementation": "user/kernel",
    "attn_implementation": {"": "flash_attention_2"},
    "vocab_file": "/etc/passwd",
    "weights_path": "../x",
}


def test_settings_that_lead_nowhere_are_fine(tmp_path):
    """As many models on the Hub have them."""
    folder = make("text", tmp_path)
    write = functools.partial(genkit.generate, "ab", model=folder, max_new_tokens=8, seed=1)
    before = write().text
    edit(folder / "config.json", _name_or_path="user/base", auto_map={}, rope_theta=1e6)
    edit(folder / "config.json", quantization_config=None, _attn_implementation="sdpa")
    origins = {
        "name_or_path": "user/base",
        "special_tokens_map_file": "/home/me/special_tokens_map.json",
    }
    edit(folder / "tokenizer_config.json", vocab_file="vocab.json", init_inputs=[], **origins)
    assert write().text == before


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_setting_that_leads_elsewhere_is_refused(tmp_path, name, nested):
    folder = make("text", tmp_path)
    edit(
        folder / "config.json",
        **({"text_config": {name: SETTINGS[name]}} if nested else {name: SETTINGS[name]}),
    )
    refused("text", folder, "config.json", name)


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "fast_tokenizer_files": ["../tokenizer.4.0.0.json"],
        "gguf_file": "/etc/passwd",
        "vocab": "/etc/passwd",
        "init_inputs": ["/etc/passwd"],
        "mecab_kwargs": {"mecab_option": "-r /etc/passwd"},
    }.items(),
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_that_leads_elsewhere_is_refused(tmp_path, name, value, file):
    folder = make("text", tmp_path)
    (folder / file).exists() or (folder / file).write_text("{}")
    edit(folder / file, **{name: value})
    refused("text", folder, file, name)


@pytest.mark.parametrize(
    "text", ['{..., "dtype": "float32"}', "[" * 2000, "3", "\ufeff{}", "{", '{"a": ' * 99]
)
def test_settings_that_parsers_read_differently_are_refused(tmp_path, text):
    folder = make("text", tmp_path)
    whole = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{...", whole[:-2]), encoding="utf-8")
    refused("text", folder, "config.json" if text != "3" else "")


def test_what_is_checked_is_what_is_read(kind, folder, tmp_path):
    """Files that take the place of those that were checked are not read, nor is what links name."""
    data = {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with safety.opened(folder) as private:
        for name in data:
            (folder / name).unlink()
            (folder / name).write_bytes(b"another")
        for file in (file for file in private.rglob("*") if file.is_file()):
            assert file.read_bytes() == data[file.relative_to(private)]
        assert not list(private.rglob("*.py"))
    assert not private.exists()


def test_only_a_models_own_files_are_read(tmp_path):
    """Whatever else lies in a run's folder is the user's, and is passed over."""
    folder = make("text", tmp_path)
    (folder / "run.json").write_text('{"output_dir": "/home/me"}')
    (folder / "notes (copy).json").write_text("no JSON")
    (folder / "book.txt").write_bytes(b"\xff")
    with safety.opened(folder) as private:
        names = {file.name for file in private.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not names & {"run.json", "notes (copy).json", "book.txt"}


# ---- weights


def tensor_of(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name, each in weights.items() if each.is_floating_point())


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        *(pytest.param(v, marks=pytest.mark.slow) for v in (float("inf"), -float("inf"))),
    ],
)
def test_weights_that_are_not_finite_are_refused(kind, folder, value):
    weights = load_file(weights_file(folder))
    weights[tensor_of(weights)].view(-1)[-1] = value
    save_file(weights, weights_file(folder), {"format": "pt"})
    refused(kind, folder, "not finite", push=kind == "gan" and value != value)


def test_weights_that_are_missing_are_refused(kind, folder):
    weights = load_file(weights_file(folder))
    del weights[tensor_of(weights)]
    save_file(weights, weights_file(folder), {"format": "pt"})
    refused(kind, folder, push=False)


def test_a_run_does_not_begin_with_random_weights(tmp_path):
    folder = make("text", tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = tensor_of(weights)
    save_file(
        {k: v for k, v in weights.items() if k != name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"\Ainit_from: .*lack"):
        lm.load_lm(str(folder))


def test_finite_numbers_whose_sum_is_not_are_fine():
    large = torch.full((9,), torch.finfo(torch.float32).max)
    assert safe_weights.count_finite(large) == 9
    assert (
        safe_weights.count_finite(
            large.to(torch.float64) * torch.tensor([1.0, torch.nan] * 4 + [1.0])
        )
        == 5
    )
    assert safe_weights.count_finite(torch.full((9,), 6e4, dtype=torch.float16)) == 9
    assert safe_weights.count_finite(torch.full((9,), 448.0).to(torch.float8_e4m3fn)) == 9


# ---- sizes


@pytest.mark.parametrize("size", [10**6, 10**9])
@pytest.mark.parametrize(
    "name",
    [
        "num_hidden_layers",
        "num_labels",
        "hidden_size",
        "vocab_size",
        "intermediate_size",
        "head_dim",
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path, name, size):
    folder = make("text", tmp_path)
    edit(folder / "config.json", **{name: size})
    refused("text", folder, push=False)


@pytest.mark.parametrize("size", [10**6, 10**9])
@pytest.mark.parametrize(
    "name", ["widths", "latent_dim", "image_size", "labels", "blocks", "patch"]
)
def test_a_size_of_a_gan_that_cannot_be_is_refused(tmp_path, name, size):
    folder = make("gan", tmp_path)
    found = json.loads(config_of(folder).read_text())
    value = [size] * len(found[name]) if isinstance(found.get(name), list) else size
    edit(config_of(folder), **{name: value})
    refused("gan", folder, push=False)


def test_a_header_of_very_many_tensors_is_refused(tmp_path):
    folder = make("text", tmp_path)
    entry = ',"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = "{" + "".join(entry.format(i) for i in range(safe_weights.TENSORS + 1))[1:] + "}"
    size = len(header).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(size + header.encode())
    refused("text", folder, "model.safetensors")


@pytest.mark.parametrize("escaped", [False, True])
def test_a_normalizer_that_multiplies_is_refused(tmp_path, escaped):
    folder = make("text", tmp_path)
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}
    edit(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [step] * 12})
    if escaped:
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"Replace"', '"R\\u0065place"'))
    refused("text", folder, "tokenizer.json", "normalizer")


def test_a_normalizer_that_does_not_is_fine(tmp_path):
    folder = make("text", tmp_path)
    step = {"type": "Replace", "pattern": {"String": "b"}, "content": "a"}
    edit(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [step] * 12})
    assert genkit.generate("acb", model=folder, max_new_tokens=1).prompt == "acb"


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_very_many_added_tokens_are_refused(tmp_path, file):
    folder = make("text", tmp_path)
    names = [f"<{i}>" for i in range(safe_configs.ADDED + 1)]
    if file == "added_tokens.json":
        (folder / file).write_text(json.dumps({name: i for i, name in enumerate(names)}))
    elif file == "tokenizer_config.json":
        edit(folder / file, extra_special_tokens=names)
    else:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        edit(folder / file, added_tokens=[{"id": 9, "content": name} | flags for name in names])
    refused("text", folder, file)


# ---- tokenizers that panic


def test_a_tokenizer_that_panics_is_an_error(tmp_path, capsys):
    folder = make("text", tmp_path)
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+a+)+b"},
        "behavior": "Isolated",
        "invert": False,
    }
    edit(folder / "tokenizer.json", pre_tokenizer=split)
    text = "a" * 60
    uses = [
        lambda: genkit.generate(text, model=folder),
        lambda: next(iter(genkit.stream(text, model=folder))),
        lambda: genkit.perplexity(text, model=folder),
        lambda: genkit.next_tokens(text, model=folder),
        lambda: genkit.rescore([(text, -1.0), ("b", -2.0)], model=folder),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"\Amodel: .*tokenizer"):
            use()


def test_a_panic_is_one_line_on_the_command_line(capsys):
    class PanicException(BaseException):
        pass

    with pytest.raises(SystemExit) as ended, clean_errors():
        raise PanicException("a regex\nthat panics")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: a regex that panics\n"


# ---- what is pushed


def test_only_files_that_the_card_lists_are_staged(kind, folder, tmp_path):
    for name in ("secret.json", "me.png", "diary.txt", "token", "LICENSE.py", "samples/me.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    (folder / "LICENSE").write_text("yours")
    staged = tmp_path / "staged"
    staged.mkdir()
    staging.stage(folder, staged, "user/name")
    names = {file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file()}
    card = (staged / "README.md").read_text()
    listed = set(re.findall(r"^- (.+)$", card.partition("## Files")[2], flags=re.M))
    assert names == listed
    assert "LICENSE" in names
    assert not {
        name for name in names if re.search(r"secret|me\.png|diary|token$|LICENSE\.py", name)
    }


@pytest.mark.parametrize("where", ["README.md", "config.json", "metrics.jsonl", "loss.png"])
@pytest.mark.parametrize("what", ["home", "folder"])
def test_a_file_that_identifies_this_machine_is_refused(tmp_path, where, what):
    folder = make("text", tmp_path)
    path = Path.home() / "data" if what == "home" else tmp_path / "data"
    if where == "config.json":
        edit(folder / where, note=f"from {path}")
    else:
        (folder / where).write_text(f"from {path}\n")
    (tmp_path / "staged").mkdir()
    with pytest.raises(ValueError, match=rf"\Afolder: {re.escape(where)} "):
        staging.stage(folder, tmp_path / "staged", "user/name")


# ---- what a killed process leaves


def test_the_next_push_clears_up_after_a_killed_one(tmp_path):
    code = """
import os, signal
from genkit import files
with files.scratch_folder() as folder:
    (folder / "weights").write_text("many")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    left = Path(done.stdout.strip())
    assert done.returncode == -signal.SIGKILL and left.exists()
    with files.scratch_folder() as own, files.scratch_folder() as other:
        assert own.exists() and other.exists() and own != other
        assert not left.exists()
    assert not own.exists()


def test_folders_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / "genkit-scratch-link"
    (tmp_path / "kept").mkdir()
    mine.symlink_to(tmp_path / "kept")
    (tmp_path / "genkit").mkdir()
    with files.scratch_folder() as folder:
        assert folder.parent == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "genkit",
        "genkit-scratch-link",
        "kept",
    ]
