"""Quantised models on disk: the same when they are read, refused when they are damaged."""

import copy
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from builders import full_disk, listing, small_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import genkit
from genkit import cli
from genkit.engine import kernels
from genkit.engine.kernels import pack_matrix
from genkit.engine.quantized_files import stored_tensors
from genkit.engine.weights_files import read_plain
from genkit.files import WriteError
from genkit.models import lm
from genkit.text.language_model import LanguageModel

compiled = pytest.mark.skipif(not kernels.available(), reason="installed without a compiler")
WEIGHTS = "model.genkit.safetensors"
CLASSES = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}


def make(folder: Path, architecture: str = "llama", tied: bool = True) -> Path:
    """Save an ordinary model with weights of every size, and its tokenizer."""
    language = small_model(architecture)
    config = copy.deepcopy(language.model.config)
    config.tie_word_embeddings = tied
    model = CLASSES[architecture](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.5))
    model.save_pretrained(folder)
    lm.save_tokenizer(language.tokenizer, folder)
    return folder


def same(one: PreTrainedModel, two: PreTrainedModel) -> bool:
    """Whether all tensors are the same, bit for bit, and shared in the same way."""
    ours, theirs = stored_tensors(one), stored_tensors(two)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model that was saved in int4."""
    if not kernels.available():
        pytest.skip("installed without a compiler")
    home = tmp_path_factory.mktemp("saved")
    genkit.save(genkit.load(make(home / "whole"), quantize="int4"), home / "small")
    return home / "small"


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


# ---- the same model


@compiled
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", CLASSES)
def test_save_and_load_give_the_same_model(tmp_path, architecture, tied, kind):
    fly = genkit.load(make(tmp_path / "whole", architecture, tied), quantize=kind)
    record = genkit.save(fly, tmp_path / "runs" / "small")
    size = sum(file.stat().st_size for file in (tmp_path / "runs" / "small").iterdir())
    assert (record.folder, record.precision) == (str(tmp_path / "runs" / "small"), kind)
    assert record.bytes == size and f"{size / 1e6:,.1f} MB" in str(record)
    read = genkit.load(tmp_path / "runs" / "small")
    assert read.precision == kind and same(read.model, fly.model)
    assert repr(read).split(":")[1] == repr(fly).split(":")[1]
    texts = ["abc bca", "b"]
    for options in ({"seed": 3}, {"strategy": "beam"}):
        ours, theirs = (
            genkit.generate(texts, model=m, max_new_tokens=12, **options) for m in (fly, read)
        )
        assert [r.text for r in ours] == [r.text for r in theirs]
        assert [r.tokens for r in ours] == [r.tokens for r in theirs]


@compiled
def test_models_that_transformers_runs_are_saved_as_well(tmp_path):
    """Encoders and decoders that share an embedding, in int4 beside layers of another width."""
    torch.manual_seed(0)
    tokenizer = small_model("gpt2").tokenizer
    shape = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 0}
    config = T5Config(decoder_start_token_id=0, **shape, **tokens)
    T5ForConditionalGeneration(config).eval().save_pretrained(tmp_path / "whole")
    lm.save_tokenizer(tokenizer, tmp_path / "whole")
    fly = genkit.load(tmp_path / "whole", quantize="int4")
    genkit.save(fly, tmp_path / "small")
    read = genkit.load(tmp_path / "small")
    assert same(fly.model, read.model)
    ours, theirs = (genkit.generate("abc", model=m, seed=1, max_new_tokens=5) for m in (fly, read))
    assert ours.text == theirs.text and ours.tokens == theirs.tokens


@compiled
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_blocks_do_not_depend_on_the_cpu(kind):
    weight = torch.randn(70, 100, generator=torch.Generator().manual_seed(0))
    before, found = kernels._native.target(), []
    try:
        for target in kernels._native.list_targets():
            kernels._native.use_target(target)
            found.append(pack_matrix(weight, None, kind).weights)
    finally:
        kernels._native.use_target(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_other_models_are_saved_as_transformers_does(tmp_path):
    language = genkit.load(make(tmp_path / "whole"))
    assert genkit.save(language, tmp_path / "copy").precision == "float32"
    assert same(genkit.load(tmp_path / "copy").model, language.model)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert same(stock, language.model)


@compiled
def test_quantize_is_a_command(tmp_path, capsys):
    whole, small = make(tmp_path / "whole"), tmp_path / "small"
    words = ["quantize", str(whole), "--to", "int8", "--output_dir", str(small)]
    cli.main(words)
    assert capsys.readouterr().out.startswith(f"{small}: int8, ")
    assert genkit.load(small).precision == "int8"
    with pytest.raises(SystemExit):
        cli.main(words)
    assert f"--output_dir: '{small}' exists" in capsys.readouterr().err


# ---- refused


def refused(folder: Path, *words: str, **options: str) -> None:
    """Check that a model is refused in one line, with these words in it."""
    with pytest.raises(ValueError, match=r"\Amodel: ") as raised:
        genkit.load(folder, **options)
    text = str(raised.value)
    assert len(text.splitlines()) == 1 and all(word in text for word in words), text


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Write the weights again with some tensors changed, or left out; `_` stands for a dot."""
    found = load_file(folder / WEIGHTS)
    names = {name.replace(".", "_"): name for name in found}
    for name, tensor in tensors.items():
        full = names.get(name, name)
        if tensor is None:
            del found[full]
        else:
            found[full] = tensor
    (folder / WEIGHTS).unlink()
    save_file(found, folder / WEIGHTS)


def test_weights_that_do_not_fit_are_refused(saved, tmp_path):
    whole = load_file(saved / WEIGHTS)
    blocks, norm = whole["model.embed_tokens.weight"], whole["model.norm.weight"]
    infinite = blocks.clone()
    infinite[0, 0, 1] = 0x7C  # the high byte of a scale
    infinite[0, 0, 0] = 0
    cases = {
        "model_embed_tokens_weight": [
            *(None, blocks[:-1].clone(), blocks[..., :-1].clone(), blocks.view(torch.int8)),
            *(blocks.flatten(), blocks.float(), infinite),
        ],
        "model_norm_weight": [None, norm[1:].clone(), norm.half(), norm * torch.nan],
        "model_layers_1_mlp_up_proj_weight": [None, blocks.clone()],
        "another": [torch.zeros(3)],
    }
    for name, changes in cases.items():
        for number, tensor in enumerate(changes):
            folder = Path(shutil.copytree(saved, tmp_path / f"{name}{number}"))
            change(folder, **{name: tensor})
            refused(folder, WEIGHTS, name.rpartition("_")[0].rpartition("_")[2] or name)


def test_damaged_files_are_refused(copied):
    whole = (copied / WEIGHTS).read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole[:20], whole + b"0"):
        (copied / WEIGHTS).write_bytes(damaged)
        refused(copied, WEIGHTS)
    (copied / WEIGHTS).unlink()
    refused(copied, "weights")


def test_settings_of_another_model_are_refused(copied):
    settings = json.loads((copied / "config.json").read_text())
    for name, value in (
        ("hidden_size", 64),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("vocab_size", 300),
        ("tie_word_embeddings", False),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "genkit", "weights": "int8"}),
    ):
        (copied / "config.json").write_text(json.dumps(settings | {name: value}))
        refused(copied, WEIGHTS)
    for method in ({"quant_method": "genkit", "weights": "int2"}, {"quant_method": "genkit"}):
        (copied / "config.json").write_text(json.dumps(settings | {"quantization_config": method}))
        refused(copied, "config.json", "int8 and int4")
    (copied / "config.json").write_text(
        json.dumps(settings | {"quantization_config": {"quant_method": "other"}})
    )
    refused(copied, "config.json", "quantization_config")


def test_other_precisions_are_refused(saved):
    refused(saved, "quantize='int8'", "int4", quantize="int8")
    refused(saved, "dtype='float32'", "int4", dtype="float32")
    assert genkit.load(saved, quantize="int4").precision == "int4"


def test_who_cannot_read_packed_weights_says_so(saved, tmp_path):
    """transformers finds no weights; genkit's push and its training name the reason."""
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"\Afolder: .*config\.json.* saved quantised"):
        genkit.push(saved, "user/name")
    with pytest.raises(ValueError, match=r"\Ainit_from: .* saved quantised"):
        lm.load_lm(str(saved))


# ---- written whole


def test_a_folder_that_exists_is_left_alone(saved, tmp_path):
    language, before = genkit.load(saved), listing(saved)
    for folder in (saved, tmp_path):
        with pytest.raises(ValueError, match=r"\Afolder: .* exists"):
            genkit.save(language, folder)
    assert listing(saved) == before
    with pytest.raises(ValueError, match=r"\Amodel must be loaded by genkit.load, got a str"):
        genkit.save(str(saved), tmp_path / "x")


def test_nothing_is_left_where_the_disk_is_full(saved, tmp_path):
    language = genkit.load(saved)
    with full_disk(1 << 14), pytest.raises(WriteError, match="could not write"):
        genkit.save(language, tmp_path / "small")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writing_leaves_no_model(saved, tmp_path):
    """The system ends the process in the middle of a file; the next writing takes its place."""
    language, folder = genkit.load(saved), tmp_path / "small"
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        genkit.save(language, folder)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGXFSZ
    (left,) = tmp_path.iterdir()
    refused(left)
    genkit.save(language, folder)
    assert list(tmp_path.iterdir()) == [folder] and same(genkit.load(folder).model, language.model)


# ---- read straight from the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", CLASSES)
def test_read_plain_reads_what_transformers_does(tmp_path, architecture, tied, dtype):
    model = CLASSES[architecture].from_pretrained(make(tmp_path, architecture, tied))
    model.to(dtype).save_pretrained(tmp_path)
    for kept in (torch.float32, torch.bfloat16):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kept)
        ours = read_plain(tmp_path, AutoConfig.from_pretrained(tmp_path), kept)
        assert ours is not None and type(ours) is type(stock) and same(ours, stock)
        assert dict(ours.named_parameters()).keys() == dict(stock.named_parameters()).keys()
        buffers, theirs = dict(ours.named_buffers()), dict(stock.named_buffers())
        assert all(torch.equal(buffers[name], theirs[name]) for name in theirs)
        assert ours.config.to_dict() == stock.config.to_dict()
        assert ours.generation_config == stock.generation_config
        assert not ours.training and all(p.requires_grad for p in ours.parameters())


def test_read_plain_leaves_other_files_to_transformers(tmp_path):
    make(tmp_path)
    config, found = AutoConfig.from_pretrained(tmp_path), load_file(tmp_path / "model.safetensors")
    for changed in (
        {name.removeprefix("model."): tensor for name, tensor in found.items()},
        found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()},
        found | {"model.norm.weight": torch.zeros(3)},
    ):
        save_file(changed, tmp_path / "model.safetensors")
        assert read_plain(tmp_path, config, torch.float32) is None
    save_file(found, tmp_path / "model.safetensors")
    assert isinstance(genkit.load(tmp_path), LanguageModel)
    (tmp_path / "generation_config.json").unlink()
    assert read_plain(tmp_path, config, torch.float32) is None
