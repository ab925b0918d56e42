"""Every recipe, launched as a user launches it."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from builders import (
    ACCELERATE,
    ROOT,
    SHORT,
    TINY,
    captioned_table,
    facts_file,
    listing,
    log_of,
    recipe_module,
    run_here,
    stable_diffusion,
    table_rows,
    weights_of,
    write_table,
)
from classifiers import make_classifier, make_model
from PIL import Image

import genkit
from genkit import recipes
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.text.samples import example_prompt
from genkit.training import checkpoints
from genkit.vision import text2image


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["facts"]


def test_a_run_leaves_all_that_it_promises(trained, text_file):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "run.json", "loss.png"}
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((trained / "samples").iterdir())) == 3
    losses = [line["val_loss"] for line in log_of(trained) if "val_loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    card = (trained / "README.md").read_text()
    assert f"{min(losses):.4f}" in card and "raw weights" in card
    assert hashlib.sha256(text_file.read_bytes()).hexdigest() in card
    record = json.loads((trained / "run.json").read_text())
    assert record["settings"]["max_steps"] == 40


NEEDED = {  # what recipes cannot start without, where there is no Hub
    "train_qa": "--from_scratch --data {questions} --max_seq_len 48",
    "finetune_gpt2": "--init_from {model} --text {text}",
    "train_reward": "--init_from {model} --data {pairs}",
    "align": "--init_from {model} --data {pairs} --method dpo",
    "train_seq2seq": "--data {examples}",
    "train_table": "--data {rows}",
    "train_table_autoencoder": "--data {rows}",
    "train_stylizer": "--style {image} --extractor {classifier} --resolution 64",
    "train_translation": "--condition edges",
    "train_text2image": "--images {captioned}",
    "finetune_text2image": "--init_from {pipeline} --prompt digits",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(path.stem for path in recipes.FOLDER.glob("*.py")))
def test_every_recipe_is_launched_without_a_warning(recipe, train, trained, text_file, tmp_path):
    questions = tmp_path / "questions.json"
    facts_file(questions, 1, 12, own_words=True)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a ", "chosen": "no", "rejected": "so"}\n' * 20)
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"source": "a b", "target": "b a"}\n' * 20)
    given = {"questions": questions, "model": trained, "text": text_file, "pairs": pairs}
    given["examples"] = examples
    given["rows"] = write_table(tmp_path / "rows.csv", table_rows()[0])
    given |= {"image": tmp_path / "style.png", "classifier": tmp_path / "classifier"}
    given |= {"pipeline": tmp_path / "pipeline"}
    given |= {"captioned": tmp_path / "captioned.parquet"}
    Image.new("RGB", (64, 64), "teal").save(given["image"])
    captioned_table(given["captioned"])
    if recipe == "finetune_text2image":
        with text2image.numpy_as_it_was():
            stable_diffusion().save_pretrained(given["pipeline"])
    for part in (make_model("ResNet"), make_classifier("ResNet").processor):
        part.save_pretrained(given["classifier"])
    words = NEEDED.get(recipe, "").format(**given)
    short = ("--batch_size", "8", "--compile", "no", "--dry_run")
    done = train(*words.split(), *short, recipe=recipe)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "not expected" not in done.stderr


WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import warnings
warnings.simplefilter("error")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("the rain", return_tensors="pt")
out = model.generate(**ids, do_sample=False, max_new_tokens=20)
print(repr(tokenizer.decode(out[0])))
print(len(pipeline("text-generation", folder)("the ")[0]["generated_text"]) > 4)
"""


@pytest.mark.slow
def test_the_folder_loads_without_genkit(trained):
    command = [sys.executable, "-c", WITHOUT_GENKIT, str(trained)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    greedy = genkit.generate("the rain", model=trained, strategy="greedy", max_new_tokens=20)
    assert done.stdout.splitlines() == [repr(greedy.text), "True"]


def test_the_card_gives_a_prompt_that_the_model_knows(tmp_path):
    """A model of DNA has never seen "The "."""
    rng = np.random.default_rng(0)
    (tmp_path / "dna.txt").write_text("".join(rng.choice(list("ACGT"), 800)))
    length = ("--max_steps", "1", "--evaluations", "1")
    words = ("--text", tmp_path / "dna.txt", "--output_dir", tmp_path / "run")
    run_here("train_charlm", *TINY, *length, *words)
    prompt = card.example_prompt(tmp_path / "run")
    assert prompt and set(prompt) <= set("ACGT")
    assert f"\nprompt = {prompt!r}\n" in (tmp_path / "run" / "README.md").read_text()
    assert genkit.generate(prompt, model=tmp_path / "run", max_new_tokens=2, seed=0).completion
    (tmp_path / "run" / "README.md").write_text("---\nwidget: [3\n---\n")
    assert card.example_prompt(tmp_path / "run") is None is card.example_prompt(tmp_path)


def test_example_prompt_skips_what_does_not_come_back(trained):
    language = genkit.load(trained)
    encode = language.tokenizer("\n\n\u20ac rain\nthe rain is\n").input_ids
    prompt = example_prompt(np.array(encode), language.model, language.tokenizer, 8)
    assert prompt and "\n" not in prompt and "\ufffd" not in prompt


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(train, trained, text_file, tmp_path):
    """SIGTERM in the middle, then --resume with only the folder, ends where `trained` did."""
    folder = tmp_path / "run"
    words = [*TINY, "--text", str(text_file), "--output_dir", str(folder)]
    words += ["--max_steps", "40", "--evaluations", "3"]
    command = [sys.executable, "recipes/train_charlm.py", *words]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (folder / "metrics.jsonl").exists() or len(log_of(folder)) < 3:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate()
    assert running.returncode == 0
    stopped = re.search(r"stopped after step (\d+)", told)
    assert stopped and 3 <= int(stopped[1]) < 40
    found, _ = checkpoints.find_newest(folder / "checkpoints")
    assert int(found.name[5:]) == int(stopped[1])
    done = train("--output_dir", folder, "--resume")
    assert f"resumed after step {stopped[1]}" in done.stderr
    assert weights_of(folder) == weights_of(trained)
    assert log_of(folder) == log_of(trained)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(text_file, tmp_path):
    """In a step of a minute, the first signal waits for its end; the second does not."""
    slow = "--depth 4 --width 128 --context 64 --batch_size 16384 --gradient_accumulation 1024"
    slow += " --compile no --max_steps 100"
    command = [sys.executable, "recipes/train_charlm.py", *slow.split(), "--text", str(text_file)]
    folder = tmp_path / "run"
    running = subprocess.Popen([*command, "--output_dir", str(folder)], cwd=ROOT)
    while not (folder / "checkpoints" / "step-00000000").exists():
        time.sleep(0.01)
    time.sleep(2)
    while running.poll() is None:  # two within a second are one, passed on by a launcher
        running.send_signal(signal.SIGTERM)
        time.sleep(0.7)
    assert running.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_run_whose_launcher_is_stopped_saves_and_ends(train, text_file, tmp_path):
    folder = tmp_path / "run"
    words = [*TINY, "--text", str(text_file), "--output_dir", str(folder)]
    words += ["--max_steps", "100000", "--save_minutes", "60"]
    launcher = subprocess.Popen([*ACCELERATE, "recipes/train_charlm.py", *words], cwd=ROOT)
    while not (folder / "metrics.jsonl").exists() or len(log_of(folder)) < 3:
        time.sleep(0.01)
    launcher.terminate()
    launcher.wait()
    last = filelock.FileLock(folder / ".lock")
    with last.acquire(timeout=60):
        found, problems = checkpoints.find_newest(folder / "checkpoints")
    assert problems == [] and int(found.name[5:]) == len(log_of(folder)) > 3


def test_a_damaged_checkpoint_costs_only_itself(trained, text_file, tmp_path, capsys):
    folder = tmp_path / "run"
    length = ("--max_steps", "40", "--evaluations", "3", "--save_steps", "15")
    run_here("train_charlm", *TINY, *length, "--text", text_file, "--output_dir", folder)
    newest = folder / "checkpoints" / "step-00000040"
    (newest / checkpoints.TENSORS).write_bytes(b"short")
    run_here("train_charlm", "--output_dir", folder, "--resume")
    told = capsys.readouterr().err
    assert "step-00000040 is damaged: tensors.safetensors has 5 bytes" in told
    assert "resumed after step 30" in told
    assert weights_of(folder) == weights_of(trained)
    assert log_of(folder) == log_of(trained)


def test_fine_tuning_adds_characters(trained, tmp_path, capsys):
    sequel = tmp_path / "sequel.txt"
    sequel.write_text("THE SNOWMAN \N{SNOWMAN} MELTS. " * 200)
    folder = tmp_path / "run"
    words = (*SHORT, "--max_steps", "30", "--evaluations", "2", "--init_from", trained)
    run_here("train_charlm", *words, "--text", sequel, "--output_dir", folder)
    old, new = genkit.load(trained), genkit.load(folder)
    assert old.tokenizer.get_vocab().items() <= new.tokenizer.get_vocab().items()
    assert new.model.config.hidden_size == old.model.config.hidden_size
    assert record_of(folder)["vocabulary_sha256"] != record_of(trained)["vocabulary_sha256"]
    assert "\N{SNOWMAN}" in new.tokenizer.get_vocab()
    genkit.generate("THE \N{SNOWMAN}", model=folder, seed=1)
    with pytest.raises(ValueError, match="never seen"):
        genkit.generate("THE \N{SNOWMAN}", model=trained)
    run_here("train_charlm", "--output_dir", folder, "--resume")
    assert "resumed after step 30" in capsys.readouterr().err


@pytest.mark.slow
def test_gpt2_with_everything_switched_on(train, text_file, tmp_path):
    folder = tmp_path / "run"
    words = ["--architecture", "gpt2", "--dropout", "0.1", "--ema", "0.9", "--optimizer", "muon"]
    words += ["--mixed_precision", "bf16", "--gradient_accumulation", "2", "--patience", "5"]
    words += ["--report_to", "tensorboard", "--max_steps", "12", "--evaluations", "2"]
    done = train(*TINY, *words, "--text", text_file, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert type(genkit.load(folder).model).__name__ == "GPT2LMHeadModel"
    assert "averaged weights" in (folder / "README.md").read_text()
    assert list(folder.rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_a_compiled_run(text_file, tmp_path, capsys):
    words = [*TINY, "--compile", "yes", "--max_steps", "4", "--evaluations", "1"]
    run_here("train_charlm", *words, "--text", text_file, "--output_dir", tmp_path / "run")
    assert re.search(r"compiled in \d+ s", capsys.readouterr().err)
    assert len(log_of(tmp_path / "run")) == 4


def test_a_dry_run_tells_and_writes_nothing(text_file, tmp_path, capsys):
    words = [*TINY, "--dry_run", "--max_minutes", "2"]
    run_here("train_charlm", *words, "--text", text_file, "--output_dir", tmp_path / "run")
    told = capsys.readouterr().out
    for what in ("parameters", "an epoch", "memory", "ms a step", "steps in 2.0 minutes"):
        assert what in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--text {tmp}/missing.txt", "text: '.*missing.txt' is no file"),
        ("--val_text {tmp}/missing.txt", "val_text: '.*missing.txt' is no file"),
        ("--output_dir {trained} --text {tmp}/missing.txt", "text: '.*missing.txt' is no file"),
        ("--text {tmp}/empty.txt", "text: .* is empty"),
        ("--text {tmp}/one.txt", "text: 0 characters to train on"),
        ("--text {tmp}/binary.txt", "binary.txt is binary"),
        ("--val_fraction 1.5", "val_fraction.*got 1.5"),
        ("--depth 0", "depth.*got 0"),
        ("--width 30 --heads 4", "width.* 4 heads.* 30"),
        ("--dropout 2", "dropout.*got 2.0"),
        ("--architecture bert", "architecture.*got .bert."),
        ("--init_from {trained} --depth 3", "depth .*--init_from"),
        ("--init_from {tmp}/missing", "cannot load"),
        ("--output_dir {tmp}/one.txt", "output_dir: cannot write in"),
        ("--output_dir {trained}", "holds another run"),
        ("--output_dir {trained} --resume --seed 3", "seed 0 -> 3"),
        ("--output_dir {tmp} --resume", "there is no run to resume"),
    ],
)
def test_bad_input_ends_with_one_clear_line(trained, tmp_path, capsys, words, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    given = words.format(tmp=tmp_path, trained=trained).split()
    shape = SHORT if "--init_from" in words or "--resume" in words else TINY
    if "--resume" in words:
        shape = ()
    run = ("--output_dir", tmp_path / "run")
    with (
        recipe_module("train_charlm", *run, *shape, *given) as recipe,
        pytest.raises(SystemExit) as stopped,
        clean_errors(),
    ):
        recipe.main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and re.fullmatch(f"error: .*{message}.*\n", shown.err)
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_its_folder_as_it_was(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for folder in (mine, tmp_path / "new" / "folders"):
        with pytest.raises(ValueError, match="text: 0 characters"):
            run_here("train_charlm", *TINY, "--text", short, "--output_dir", folder)
    assert listing(mine) == {"notes.txt": b"mine"} and not (tmp_path / "new").exists()


def test_no_two_recipes_have_one_default_folder():
    folders = {}
    for path in (ROOT / "recipes").glob("*.py"):
        with recipe_module(path.stem) as recipe:
            folders[path.stem] = recipe.Settings.output_dir
    assert len(set(folders.values())) == len(folders)


@pytest.mark.slow
def test_a_launch_with_bad_input_ends_with_one_clear_line(train, tmp_path):
    done = train("--output_dir", tmp_path / "run", *TINY, "--val_fraction", "1.5")
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("error: ")[0]
    assert re.search(r"error: .*val_fraction.* got 1.5\n", done.stderr)


@pytest.mark.slow
def test_a_compiled_run_goes_on_exactly(train, text_file, tmp_path):
    words = [*TINY, "--compile", "yes", "--text", text_file, "--evaluations", "2"]
    words += ["--max_steps", "40", "--save_steps", "15"]
    for name in ("whole", "stopped"):
        done = train(*words, "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000040")
    done = train("--output_dir", tmp_path / "stopped", "--resume")
    assert "resumed after step 30" in done.stderr
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_fine_tuned_run_with_dropout_goes_on_exactly(train, text_file, tmp_path):
    base, length = tmp_path / "base", ("--max_steps", "12", "--evaluations", "2")
    words = (*TINY, "--dropout", "0.2", *length, "--text", text_file)
    assert train(*words, "--output_dir", base).returncode == 0
    words = (*SHORT, *length, "--text", text_file, "--init_from", base, "--ema", "0.5")
    for name in ("whole", "stopped"):
        done = train(*words, "--output_dir", tmp_path / name, "--save_steps", "4")
        assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000012")
    done = train("--output_dir", tmp_path / "stopped", "--resume")
    assert "resumed after step 8" in done.stderr
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")
