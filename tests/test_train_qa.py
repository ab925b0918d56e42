"""The question-answering recipe: it learns, goes on exactly, and leaves what it promises."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from builders import ON_CPU, TWO, facts_file, log_of, run_here, weights_of
from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

import genkit
from genkit.data import squad
from genkit.qa import model, training
from genkit.qa.reader import load_reader

RATES = ("--batch_size", "32", "--learning_rate", "1e-3", "--mixed_precision", "no")
WINDOW = ("--max_seq_len", "48", "--doc_stride", "8", "--max_answer_len", "4")
SCRATCH = ("--from_scratch", "--depth", "1", "--width", "32", "--heads", "2")
SHORT = (*WINDOW, "--batch_size", "4", "--mixed_precision", "no", "--max_steps", "8")
SHORT += ("--evaluations", "2", "--save_steps", "4", "--keep_checkpoints", "9")


def encoder(folder, data, seed=0):
    """Save a small encoder with random weights and no head, as others would have."""
    examples, _ = squad.read_examples(str(data))
    tokenizer = model.make_tokenizer(examples, 300, 48)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=48,
        dim=64,
        hidden_dim=256,
        n_layers=2,
        n_heads=2,
        initializer_range=0.2,
        dropout=0.0,
        attention_dropout=0.0,
        qa_dropout=0.0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def possible(tmp_path_factory):
    return facts_file(tmp_path_factory.mktemp("data") / "possible.json", 0, 40, own_words=True)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that has learnt when to answer what, and its data."""
    folder = tmp_path_factory.mktemp("learned")
    data = facts_file(folder / "data.json", 0, 400, own_words=True, impossible=True)
    words = ["--data", data, "--init_from", encoder(folder / "base", data), *RATES, *WINDOW]
    words += ["--max_steps", "700", "--evaluations", "2"]
    run_here("train_qa", *words, "--output_dir", folder / "run")
    return folder / "run", data


@pytest.fixture(scope="module")
def trained(possible, tmp_path_factory):
    """The folder of a short run from scratch."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run_here("train_qa", *SCRATCH, *SHORT, "--data", possible, "--output_dir", folder)
    return folder


# ---- it learns


@pytest.mark.slow
def test_it_learns_to_answer_and_when_not_to(learned):
    folder, data = learned
    last = log_of(folder)[-1]
    assert last["exact"] > 95 and last["HasAns_f1"] > 95 and last["NoAns_f1"] > 90
    _, held = squad.split_examples(str(data), None, 0.1)
    questions, contexts = [e.question for e in held], [e.context for e in held]
    said = genkit.answer(questions, contexts, model=folder)
    pairs = list(zip(said, held, strict=True))
    right = [a.answer == (e.answers[0][0] if e.answers else "") for a, e in pairs]
    assert sum(right) > 0.95 * len(right)
    silent = [a.answer == "" for a, e in pairs if not e.answers]
    assert len(silent) == 40 and sum(silent) > 36
    assert all(a.confidence is not None and a.null_score is not None for a in said)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_read(tmp_path, seed):
    """All subjects have the same words: over 95 % exact on articles that it never saw."""
    data = facts_file(tmp_path / "data.json", seed, 500, own_words=False)
    base = encoder(tmp_path / "base", data, seed)
    words = ["--data", data, "--init_from", base, "--seed", str(seed), *RATES, *WINDOW]
    words += ["--max_steps", "2500", "--evaluations", "5", "--output_dir", tmp_path / "run"]
    run_here("train_qa", *words)
    assert log_of(tmp_path / "run")[-1]["exact_match"] > 95


# ---- what it leaves


def test_a_run_leaves_all_that_it_promises(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "model.safetensors", "README.md", "tokenizer.json", "run.json"}
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (trained / "calibration.png").read_bytes().startswith(b"\x89PNG")
    judged = [line for line in log_of(trained) if "f1" in line]
    assert [line["step"] for line in judged] == [4, 8]
    best = max(judged, key=lambda line: line["f1"])
    card, config = (trained / "README.md").read_text(), (trained / "config.json").read_text()
    for name in ("exact_match", "f1", "ece_before", "ece_after", "val_loss", "temperature"):
        assert f"| {name} | {best[name]:.4f} |" in card
    assert "All 12 validation questions, by the rules of SQuAD 1.1" in card
    calibration = {"temperature": best["temperature"], "threshold": 0.0, "impossible": False}
    calibration |= {"max_seq_len": 48, "doc_stride": 8, "max_answer_len": 4}
    assert json.loads(config)["calibration"] == pytest.approx(calibration)
    table = (trained / "samples" / "step-00000008.md").read_text().splitlines()
    assert len(table) == 4 + 12 and table[4].startswith(("| right | What", "| wrong | What"))


def test_the_figures_are_those_of_answer(trained, possible):
    """By genkit.answer, one question at a time, in the published model."""
    _, held = squad.split_examples(str(possible), None, 0.1)
    best = max((line for line in log_of(trained) if "f1" in line), key=lambda line: line["f1"])
    reader = load_reader(trained)
    said = [genkit.answer(e.question, e.context, model=reader) for e in held]
    read = [training.Prediction(a.answer, a.score, a.confidence, a.null_score, 0.0) for a in said]
    figures = training.evaluate_predictions(read, held).figures
    for name in ("exact_match", "f1", "ece_before"):
        assert figures[name] == pytest.approx(best[name], rel=1e-4)


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import warnings
warnings.simplefilter("error")
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model = AutoModelForQuestionAnswering.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer.model_max_length == 48
pair = tokenizer("What is the zorp?", "The zorp is blue.", return_tensors="pt")
assert list(pair) == ["input_ids", "attention_mask"], list(pair)
print(model(**pair).start_logits.argmax(1).item(), type(model).__name__)
"""


@pytest.mark.slow
def test_the_folder_loads_without_genkit(trained):
    command = [sys.executable, "-c", WITHOUT_GENKIT, str(trained)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reader = load_reader(trained)
    pair = reader.tokenizer("What is the zorp?", "The zorp is blue.", return_tensors="pt")
    place = reader.model(**pair).start_logits.argmax(1).item()
    assert done.stdout.splitlines() == [f"{place} DistilBertForQuestionAnswering"]


# ---- it goes on


@pytest.mark.parametrize("kept", [0, 4])
def test_a_run_goes_on_exactly(trained, tmp_path, kept):
    shutil.copytree(trained, tmp_path / "run")
    for later in range(kept + 4, 9, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later:08d}")
    run_here("train_qa", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)
    assert log_of(tmp_path / "run") == log_of(trained)


@pytest.mark.slow
def test_two_processes_are_one_run(train, trained, possible, tmp_path):
    words = [*SCRATCH, *SHORT, "--data", possible, "--output_dir", tmp_path / "run"]
    done = train(*words, recipe="train_qa", launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    one, two = log_of(trained), log_of(tmp_path / "run")
    assert len(one) == len(two) == 8
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    for name in ("val_loss", "ece_before", "ece_after", "temperature"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-4)
    assert two[-1]["f1"] == one[-1]["f1"]


@pytest.mark.slow
def test_a_trained_head_is_kept_and_a_dry_run_writes_nothing(learned, tmp_path, capsys):
    folder, data = learned
    words = ["--data", data, "--init_from", folder, *RATES, "--learning_rate", "1e-9"]
    run_here("train_qa", *words, "--output_dir", tmp_path / "dry", "--dry_run")
    assert not (tmp_path / "dry").exists()
    run_here("train_qa", *words, "--output_dir", tmp_path / "run", "--epochs", "0.01")
    told = capsys.readouterr().out  # of the dry run
    assert "windows of up to 48 tokens" in told and "ms a step" in told
    figures, last = log_of(folder)[-1], log_of(tmp_path / "run")[-1]
    assert last["f1"] == pytest.approx(figures["f1"], abs=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert "step" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--from_scratch --epochs 0", "epochs.*got 0.0"),
        ("--from_scratch --val_fraction 1", "val_fraction.*got 1.0"),
        ("--from_scratch --width 30 --heads 4", "width 30 .*heads 4"),
        ("--from_scratch --init_from a/b", "init_from a/b .*from_scratch"),
        ("--from_scratch --init_revision main", "init_revision main .*from_scratch"),
        (
            "--from_scratch --max_seq_len 16 --doc_stride 8",
            "data: the question of '0-0': .* it leaves 8",
        ),
        ("--from_scratch --max_answer_len 0", "max_answer_len.*got 0"),
        ("--depth 2", "depth 2 .*--from_scratch"),
        (
            "--init_from nobody/nothing",
            "init_from: cannot load 'nobody/nothing', neither from a folder nor",
        ),
        ("--init_from {tmp}", "init_from: .*holds no weights in safetensors"),
        ("--init_from {base} --max_seq_len 49", "max_seq_len must be 48 or less.*got 49"),
        ("--init_from {base} --init_revision main", "init_revision main .*folder"),
        ("--init_from {left} --max_seq_len 48", "is a slow one, or pads on the left"),
        ("--from_scratch --val_data {tmp}/one.json", "data must .*2 or more questions.*got 1"),
        ("--from_scratch --data {tmp}/none.json", "data: .* is no file of rows"),
    ],
)
def test_bad_settings_are_named(possible, tmp_path, words, message):
    base = encoder(tmp_path / "base", possible)
    left = shutil.copytree(base, tmp_path / "left")
    config = json.loads((left / "tokenizer_config.json").read_text())
    config |= {"padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"}
    (left / "tokenizer_config.json").write_text(json.dumps(config))
    content = json.loads(possible.read_text())
    paragraph = content["data"][0]["paragraphs"][0]
    paragraph["qas"] = paragraph["qas"][:1]
    content["data"] = content["data"][:1]
    (tmp_path / "one.json").write_text(json.dumps(content))
    given = words.format(tmp=tmp_path, base=base, left=left).split()
    with pytest.raises(ValueError, match=message):
        run_here("train_qa", "--data", possible, "--output_dir", tmp_path / "run", *given)
    assert not (tmp_path / "run" / "run.json").exists()
