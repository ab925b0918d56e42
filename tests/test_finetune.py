"""Fine-tuning: adapters, frozen weights, any tokenizer, and the recipe."""

import copy
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from builders import ON_CPU, SHORT, TWO, log_of, run_here, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import genkit
from genkit import files
from genkit.data import corpus
from genkit.data.tokens import encode_text
from genkit.models import lm, lora
from genkit.training import checkpoints, optim
from genkit.training.run import Run
from genkit.training.settings import RunSettings

LORA = ("--lora_rank", "2", "--learning_rate", "0.05")
WORDS = (*SHORT, "--mixed_precision", "no", "--context", "16", "--max_steps", "8")
WORDS += ("--evaluations", "2", "--save_steps", "4", "--keep_checkpoints", "9")


def byte_level_tokenizer(text):
    """A small tokenizer of the kind that GPT-2 has."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": sorted(alphabet)}
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, **options)
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def small_gpt2(vocabulary, context=32):
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": context}
    rest = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape, **rest))


@pytest.fixture(scope="module")
def base(text_file, tmp_path_factory):
    """The folder of a model to start from, as others would have saved it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_level_tokenizer(text_file.read_text())
    small_gpt2(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base, text_file, tmp_path_factory):
    """The folder of a finished run with adapters."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    words = [*WORDS, *LORA, "--init_from", base, "--text", text_file]
    run_here("finetune_gpt2", *words, "--output_dir", folder)
    return folder


# ---- adapters


def perturbed(network):
    """Adapters that do something: B starts at zero."""
    adapted = lora.add_adapters(network, 2)
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return adapted.eval()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_merging_changes_no_logit_and_no_original(architecture):
    torch.manual_seed(0)
    network = lm.make_model(architecture, 300, 16, 2, 32, 2, 0.0).eval()
    ids = torch.randint(300, (3, 16))
    before, original = copy.deepcopy(network.state_dict()), network(ids).logits
    adapted = perturbed(network)
    own = copy.deepcopy(adapted.state_dict())
    plain = lora.merge_adapters(adapted)
    assert type(plain) is type(network) and plain.state_dict().keys() == before.keys()
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(plain(ids).logits, original, atol=1e-2)
    assert all(torch.equal(adapted.state_dict()[name], own[name]) for name in own)
    for name, weight in plain.state_dict().items():
        matrix = weight.ndim == 2 and "wte" not in name and "wpe" not in name
        matrix = matrix and "embed" not in name and "lm_head" not in name
        assert torch.equal(weight, before[name]) != matrix


def test_adapters_are_few_and_alone_trained():
    network = lm.make_model("gpt2", 300, 16, 2, 32, 2, 0.0)
    total = network.num_parameters()
    adapted = lora.add_adapters(network, 2)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    # a matrix of m inputs and n outputs has m + n weights a rank: attention, its output, up, down
    each = (32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)
    assert sum(p.numel() for p in trained.values()) == 2 * 2 * each < total / 5
    told = RunSettings(optimizer="muon", learning_rate=1, muon_learning_rate=1, weight_decay=0)
    owned = [g["params"] for rule in optim.optimizers(adapted, told) for g in rule.param_groups]
    assert {id(p) for group in owned for p in group} == set(map(id, trained.values()))


# ---- frozen weights in a run


def frozen_run(folder, resume=False):
    """Fit a weight behind one that is frozen, and differs from start to start."""
    rates = {"learning_rate": 0.1, "muon_learning_rate": 0.1, "weight_decay": 0.0}
    options = {"batch_size": 2, "max_steps": 6, "save_steps": 3, "optimizer": "adamw"}
    fixed = {"mixed_precision": "no", "compile": False, "ema": 0.5, "resume": resume}
    with Run(RunSettings(output_dir=str(folder), **rates, **options, **fixed)) as run:
        network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
        network[0].requires_grad_(False).weight.fill_(2.0 if resume else 3.0)
        run.network("model", network, optim.optimizers(network, run.settings))
        run.restore()
        for _ in run.steps():
            run.backward(network(torch.ones(1, 1)).square().sum())
            run.update()
        return run


def test_a_checkpoint_holds_what_is_trained(tmp_path):
    run = frozen_run(tmp_path)
    found, _ = checkpoints.find_newest(tmp_path / "checkpoints")
    state = checkpoints.load_checkpoint(found)["model"]
    assert state["module"].keys() == {"1.weight", "1.bias"}
    assert state["average"].keys() == {"n_averaged", "module.1.weight", "module.1.bias"}
    again = frozen_run(tmp_path, resume=True)
    for ours, theirs in ((again.weights(), run.weights()), (again.networks["model"].module, None)):
        assert ours[0].weight.item() == 2.0  # as loaded this time, not as saved
        if theirs is not None:
            assert torch.equal(ours[1].weight, theirs[1].weight)


def test_a_checkpoint_that_lacks_a_trained_weight_is_refused():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    network[0].requires_grad_(False)
    state = checkpoints.trained_state(network)
    checkpoints.load_trained_state(network, state)
    with pytest.raises(RuntimeError, match=r"1\.bias"):
        checkpoints.load_trained_state(network, {"1.weight": state["1.weight"]})


# ---- a text as ids


@given(text=st.text(alphabet="ab1 .'\n\r\t\N{PILE OF POO}", max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_blocks_cut_no_token(base, tmp_path_factory, text):
    tokenizer = AutoTokenizer.from_pretrained(base)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes((text + "end").encode())
    whole = corpus.measure_corpus(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK", 3)
        ids = [i for block in corpus.read_blocks(whole, "") for i in encode_text(tokenizer, block)]
    assert ids == tokenizer(text + "end").input_ids


# ---- the recipe


def test_a_run_leaves_all_that_it_promises(tuned):
    names = {path.name for path in tuned.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "run.json", "loss.png", "samples"}
    first, *_, last = [line for line in log_of(tuned) if "val_loss" in line]
    assert first["step"] == 0 and last["step"] == 8
    assert last["perplexity"] < first["perplexity"]
    card = (tuned / "README.md").read_text()
    assert f"| perplexity, before | {first['perplexity']:.4f} |" in card
    assert f"| perplexity | {last['perplexity']:.4f} |" in card and "rank 2, merged" in card


def test_the_published_model_is_the_base_and_its_adapters(tuned, base):
    """W + 2 B A by hand, from the base and the checkpoint: no weight of the base has moved."""
    last, _ = checkpoints.find_newest(tuned / "checkpoints")
    adapters = checkpoints.load_checkpoint(last)["model"]["module"]
    assert all("lora_" in name for name in adapters) and len(adapters) == 2 * 2 * 4
    expected = load_file(base / "model.safetensors")
    for name in [name for name in adapters if "lora_A" in name]:
        product = 2 * adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
        short = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
        expected[short] = expected[short] + product.T  # GPT-2's matrices are (inputs, outputs)
    published = load_file(tuned / "model.safetensors")
    assert published.keys() == expected.keys()
    for name, weight in published.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


WITHOUT_GENKIT_AND_PEFT = """
import sys
sys.modules["genkit"] = sys.modules["peft"] = None
import warnings
warnings.simplefilter("error")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("the rain", return_tensors="pt")
print(repr(tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=20)[0])))
print(len(pipeline("text-generation", folder)("the", max_new_tokens=9)[0]["generated_text"]) > 4)
"""


@pytest.mark.slow
def test_the_folder_loads_without_genkit_and_peft(tuned):
    command = [sys.executable, "-c", WITHOUT_GENKIT_AND_PEFT, str(tuned)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    greedy = genkit.generate("the rain", model=tuned, strategy="greedy", max_new_tokens=20)
    assert done.stdout.splitlines() == [repr(greedy.text), "True"]


@pytest.mark.parametrize("kept", [0, 4])
def test_a_run_goes_on_exactly(tuned, tmp_path, kept):
    """From before the first step, too: the base model is judged once."""
    shutil.copytree(tuned, tmp_path / "run")
    for later in range(kept + 4, 9, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later:08d}")
    run_here("finetune_gpt2", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(tuned)
    assert log_of(tmp_path / "run") == log_of(tuned)


@pytest.mark.slow
def test_two_processes_see_the_same_batches(train, tuned, base, text_file, tmp_path):
    words = [*WORDS, *LORA, "--init_from", base, "--text", text_file]
    words += ["--output_dir", tmp_path / "run"]
    done = train(*words, recipe="finetune_gpt2", launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    one, two = log_of(tuned), log_of(tmp_path / "run")
    assert two[0]["val_loss"] == pytest.approx(one[0]["val_loss"], rel=1e-6)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-6)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-4)


def test_all_weights_for_some_epochs(base, text_file, tmp_path):
    words = ["--init_from", base, "--text", text_file, "--output_dir", tmp_path / "run"]
    words += ["--epochs", "0.1", "--batch_size", "8", "--ema", "0.5", "--learning_rate", "0.01"]
    run_here("finetune_gpt2", *words, "--evaluations", "1")
    first, *_, last = log_of(tmp_path / "run")
    trained = int(0.9 * len(text_file.read_text()))  # characters
    record = corpus.measure_corpus(str(text_file))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = len(tokenizer(text_file.read_text()[:trained]).input_ids)
    assert last["step"] == pytest.approx(0.1 * tokens / 32 / 8, abs=1.1)
    assert last["val_loss"] < first["val_loss"]
    assert record.sha256 in (tmp_path / "run" / "README.md").read_text()
    saved, before = genkit.load(tmp_path / "run").model, genkit.load(base).model
    each = zip(saved.parameters(), before.parameters(), strict=True)
    moved = [not torch.equal(a, b) for a, b in each]
    assert all(moved)


def test_another_base_is_refused_on_resuming(tuned, base, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["settings"]["init_from"] = str(tmp_path / "base")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    words = ["--output_dir", tmp_path / "run", "--resume"]
    run_here("finetune_gpt2", *words)
    model = GPT2LMHeadModel.from_pretrained(base)
    model.transformer.ln_f.bias.data += 0.5
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="started with other input: model_sha256"):
        run_here("finetune_gpt2", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_rank -1", "lora_rank.*got -1"),
        ("--epochs 0", "epochs.*got 0.0"),
        ("--context 33", "context must be 32 or less.*got 33"),
        ("--init_revision main", "init_revision main .*folder"),
        (
            "--init_from nobody/nothing",
            "init_from: cannot load 'nobody/nothing', neither from a folder nor",
        ),
        ("--init_from {tmp}", "init_from: .* holds no weights in safetensors"),
        ("--text {tmp}/short.txt", "tokens to validate on are less than one window"),
    ],
)
def test_bad_settings_are_named(base, tmp_path, words, message):
    (tmp_path / "short.txt").write_text("a b c " * 20)
    given = words.format(tmp=tmp_path).split()
    with pytest.raises(ValueError, match=message):
        run_here("finetune_gpt2", "--init_from", base, "--output_dir", tmp_path / "run", *given)
    assert not (tmp_path / "run" / "run.json").exists()


def test_peft_is_named_where_it_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    with pytest.raises(ValueError, match=r"lora_rank.* pip install 'hf-genkit\[finetune\]'"):
        run_here("finetune_gpt2", "--lora_rank", "2")


def test_the_hash_is_that_of_the_weights():
    one, two = small_gpt2(300), small_gpt2(300)
    assert files.weights_hash(one) == files.weights_hash(two)
    two.transformer.wte.weight.data[0, 0] += 1e-6
    assert files.weights_hash(one) != files.weights_hash(two)
