"""The recipe of images from words: it learns, goes on exactly, and refuses bad captions."""

import json
import shutil

import numpy as np
import pytest
from builders import ON_CPU, TWO, captioned_table, log_of, run_here, weights_of
from PIL import Image
from transformers import DistilBertConfig, DistilBertModel

import genkit
from genkit.data import seq2seq_tokenizers
from genkit.models import lm

TINY = "--widths 4 8 --text_layers 1 --text_width 8 --batch_size 4 --mixed_precision no --warmup 0"
LENGTH = "--max_steps 10 --evaluations 2 --save_steps 5 --keep_checkpoints 9"
LONG = "a red one and " * 9


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    captioned_table(folder / "table.parquet")
    captioned_table(folder / "empty.parquet", ("a red one", " ", "a"))
    captioned_table(folder / "missing.parquet", ("a red one", None))
    captioned_table(folder / "long.parquet", ("a red one", LONG))
    tokenizer = seq2seq_tokenizers.make_tokenizer(["abc"])
    shape = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 24}
    config = DistilBertConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape
    )
    DistilBertModel(config).save_pretrained(folder / "encoder")
    lm.save_tokenizer(tokenizer, folder / "encoder")
    return folder


KINDS = {"v": "", "flow": "--objective flow", "frozen": "--text_encoder {home}/encoder"}


def words_of(home, kind: str) -> list[str]:
    given = f"--images {home}/table.parquet {TINY} {LENGTH} {KINDS[kind]}"
    return given.format(home=home).split()


@pytest.fixture(scope="module")
def trained(home):
    """A run of each kind."""
    for kind in KINDS:
        run_here("train_text2image", *words_of(home, kind), "--output_dir", home / "runs" / kind)
    return home / "runs"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_leaves_all_that_it_promises(trained, kind):
    run = trained / kind
    names = {path.name for path in run.iterdir()}
    assert names >= {"model_index.json", "text_diffusion.py", "unet", "text_encoder", "tokenizer"}
    for name in ("loss.png", "progress.png"):
        with Image.open(run / name) as made:
            made.load()
    values = [line["val_loss"] for line in log_of(run) if "val_loss" in line]
    assert len(values) == 2 and values[1] < values[0]
    card = (run / "README.md").read_text()
    facts = json.loads((run / "run.json").read_text())["facts"].values()
    assert all(fact in card for fact in facts if fact)
    rows = genkit.imagine(["a red one", "two blue ones"], model=run, seed=3, steps=4)
    again = genkit.imagine("two blue ones", model=run, seed=4, steps=4)
    assert np.array_equal(np.asarray(rows[1].image), np.asarray(again.image))
    assert (again.guidance, again.evaluations, again.image.size) == (3.0, 8, (8, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_exactly(trained, tmp_path, kind):
    shutil.copytree(trained / kind, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    run_here("train_text2image", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained / kind)
    both = (log_of(tmp_path / "run"), log_of(trained / kind))
    names = ("step", "loss", "val_loss")
    again, before = ([{n: line.get(n) for n in names} for line in log] for log in both)
    assert again == before


def test_a_frozen_encoder_stays_as_it_was(trained, home):
    before = (home / "encoder" / "model.safetensors").read_bytes()
    assert (trained / "frozen" / "text_encoder" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_go_on_exactly(train, home, trained, tmp_path):
    launch = {"recipe": "train_text2image", "launcher": TWO, "env": ON_CPU}
    done = train(*words_of(home, "v"), "--output_dir", tmp_path / "two", **launch)
    assert done.returncode == 0, done.stderr
    for name in ("loss", "val_loss"):
        one, two = log_of(trained / "v"), log_of(tmp_path / "two")
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-2)
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000010")
    done = train("--output_dir", tmp_path / "again", "--resume", **launch)
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "two")


@pytest.mark.slow
def test_a_model_draws_what_its_captions_say(home, tmp_path):
    given = f"--images {home}/table.parquet {TINY} --max_steps 400 --evaluations 1 --ema 0.9"
    run_here("train_text2image", *given.split(), "--output_dir", tmp_path / "run")
    rows = genkit.imagine(["a red one", "two blue ones"], model=tmp_path / "run", seed=0)
    means = [np.asarray(row.image).mean((0, 1)) for row in rows]
    assert means[0][0] > 150 > 100 > means[0][2] and means[1][2] > 150 > 100 > means[1][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images {home}/empty.parquet", "--caption_column text: the caption of row 1 is empty"),
        ("--images {home}/missing.parquet", "row 1 has no label in column 'text'"),
        ("--images {home}/table.parquet --caption_column no", "--caption_column no: .* no such"),
        ("--images digits", "--caption_column text: --images digits has no columns; give a table"),
        (
            "--images {home}/long.parquet --max_tokens 16",
            r"--caption_column: 'a red one and .* has \d+ tokens.* reads 16; shorten it",
        ),
        (
            "--images {home}/long.parquet --text_encoder {home}/encoder",
            r"--caption_column: 'a red one and .* has \d+ tokens.* reads 24; shorten it",
        ),
        ("--text_encoder {home}/encoder --max_tokens 25", "--max_tokens 25: .* reads 24"),
        ("--text_encoder {home}/no", "--text_encoder.*no"),
        ("--text_encoder {home}/runs/v/unet", "text_encoder"),
        ("--widths 4 8 8 8 8", "5 widths need sides that are multiples of 16"),
        ("--vocab_size 100", "--vocab_size must be 300 or more, got 100"),
    ],
)
def test_bad_input_is_refused_at_once(home, trained, tmp_path, words, message):
    given = ["--images", home / "table.parquet", *words.format(home=home).split()]
    with pytest.raises(ValueError, match=message):
        run_here("train_text2image", *given, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
