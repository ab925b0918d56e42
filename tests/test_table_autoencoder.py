"""Denoising autoencoders of tables: scores, noise, features, gaps, and the recipe."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import (
    ON_CPU,
    TWO,
    log_of,
    run_here,
    table_autoencoder,
    table_rows,
    tiny_table_autoencoder,
    weights_of,
    write_table,
)
from hub_server import serve

import genkit
from genkit.models.table_autoencoder import TableAutoencoderPipeline
from genkit.models.table_autoencoder_losses import cell_losses, corrupt, rank_gauss

SHAPE = ("--widths", "16", "8", "--batch_size", "8")
TINY = (*SHAPE, "--max_steps", "4", "--evaluations", "2", "--device", "cpu")
RECIPE = "train_table_autoencoder"


# ---- scores, noise, loss


def test_scores_by_rank_are_standard_and_do_not_depend_on_the_scale():
    values = np.random.default_rng(0).lognormal(size=2000)
    knots, scores = rank_gauss(values)
    found = np.interp(values, knots, scores)
    assert abs(found.mean()) < 0.01 and found.std() == pytest.approx(1, abs=0.01)
    assert np.allclose(rank_gauss(np.log(values))[1], scores)
    assert len(knots) <= 256 and np.allclose(np.interp(found, scores, knots), values)
    known = np.where(np.arange(2000) % 3, values, np.nan)
    assert rank_gauss(known)[0][0] == np.nanmin(known)


def test_equal_values_share_a_score_and_a_constant_has_0():
    knots, scores = rank_gauss(np.array([0, 0, 0, 0, 5, 7.0]))
    assert knots == [0, 5, 7] and len(scores) == 3 and np.diff(scores).min() > 0
    assert np.mean([scores[0]] * 4 + scores[1:]) == pytest.approx(0)
    assert rank_gauss(np.full(9, 3.0)) == ([3.0], [0.0])


def test_noise_swaps_and_leaves_out_as_often_as_it_says():
    rows, donors = torch.zeros(4000, 3), torch.ones(4000, 3)
    u = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0))
    noisy = corrupt(rows, donors, u, swap=0.2, blank=0.1)
    assert (noisy == 1).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert noisy.isnan().float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(corrupt(rows, donors, u, 0.0, 0.0), rows)


def test_the_loss_leaves_gaps_out():
    rows = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
    predictions = torch.tensor([[0.5, -1.0, 0.0, 1.0]] * 2)
    losses = cell_losses(predictions, rows, [0, 3])
    expected = -predictions[0, 1:].log_softmax(0)[2]
    assert torch.allclose(losses, torch.tensor([[0.125, expected.item()], [0.0, 0.0]]))


# ---- the pipeline


@pytest.fixture(scope="module")
def mixed():
    """An autoencoder with random weights of two categories, a number with gaps, and a date."""
    return table_autoencoder()


def test_a_row_is_read_alone(mixed):
    values = table_rows()[1][:12]
    together = mixed(values)
    assert together.features.shape == (12, 24) and together.features.dtype == np.float32
    for i in (0, 7):
        alone = mixed(values[i : i + 1])
        for name, found in alone.items():
            assert np.allclose(found[0], together[name][i], atol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match=r"values must be \(rows, 4\), got \(12, 3\)"):
        mixed(values[:, :3])
    assert mixed(values[:0]).features.shape == (0, 24)


def test_a_gap_a_category_and_a_number_enter_apart(mixed):
    row = table_rows()[1][:1]
    seen = [mixed(row).features]
    for j, other in ((0, np.nan), (0, 1 - row[0, 0]), (2, np.nan), (2, 1 + row[0, 2])):
        changed = row.copy()
        changed[0, j] = other
        seen.append(mixed(changed).features)
    assert len({own.tobytes() for own in seen}) == 5


def test_what_is_expected_is_within_its_interval_and_the_range_of_training(mixed):
    output = mixed(table_rows()[1])
    numbers, categories = [2, 3], [0, 1]
    low, expected, high = output.low, output.expected, output.high
    assert (low <= expected)[:, numbers].all() and (expected <= high)[:, numbers].all()
    assert np.isnan(low[:, categories]).all() and np.isnan(output.probability[:, numbers]).all()
    for j in numbers:
        column = mixed.network.config.columns[j]
        assert column["least"] <= low[:, j].min() and high[:, j].max() <= column["most"]
    assert (output.probability[:, categories] >= 0.5 - 1e-6).all()  # of two categories


# ---- verbs

NAMES = ["region", "smokes", "age", "since"]


def test_features_are_saved_as_they_are(mixed, tmp_path):
    rows = [dict(zip(NAMES, row, strict=True)) for row in table_rows()[0][:9]]
    rows[3]["region"] = "moon"
    found = genkit.features(rows, model=mixed)
    assert found.values.shape == (9, 24) and "9 rows, 24 features of this model" in str(found)
    assert "'region': 1 cells have a category that no training row has" in found.notes[0]
    for name in ("a.parquet", "a.csv"):
        found.save(tmp_path / name)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == found.names == [f"feature_{i}" for i in range(24)]
    assert np.array_equal(np.column_stack([own.to_numpy() for own in table.columns]), found.values)
    with (tmp_path / "a.csv").open() as file:
        head, *lines = csv.reader(file)
    assert head == found.names and np.allclose(np.array(lines, float), found.values, rtol=1e-6)
    with pytest.raises(ValueError, match=r"the file must end in .csv or .parquet, got .*a.txt"):
        found.save(tmp_path / "a.txt")


def test_fill_keeps_what_is_given_and_fills_what_is_not(mixed, tmp_path):
    rows = [dict(zip(NAMES, row, strict=True)) for row in table_rows()[0][:12]]
    for i, row in enumerate(rows):
        row[NAMES[i % 4]] = None
    filled = genkit.fill(rows, model=mixed)
    assert filled.draws.shape == (1, 12, 4) and not np.isnan(filled.draws).any()
    assert len(filled.cells) == sum(not cell for row in rows for cell in row.values())
    for given, row in zip(rows, filled.rows, strict=True):
        assert all(row[name] == given[name] for name in NAMES if given[name])
        assert all(row.values())
    for cell in filled.cells:
        if cell.column in ("age", "since"):
            assert cell.probability is None and cell.low <= cell.value <= cell.high
        else:
            assert cell.low is None and 0 < cell.probability <= 1
    filled.save(tmp_path / "filled.csv")
    with pytest.raises(ValueError, match="draws=3 is for table models"):
        genkit.fill(rows, model=mixed, draws=3)
    with pytest.raises(ValueError, match="device='cpu' is for loading; the model given is loaded"):
        genkit.features(rows, model=mixed, device="cpu")


# ---- saved models

WITHOUT_GENKIT = """
import sys
sys.modules["genkit"] = None
import numpy as np
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
output = pipeline(np.array([[0, 1, np.nan, 18000.0]]))
print(output.features.sum(), *output.expected[0])
"""


def test_a_saved_model_loads_the_same(mixed, tmp_path):
    tiny_table_autoencoder(tmp_path / "model")
    loaded = genkit.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded, TableAutoencoderPipeline)
    values = table_rows()[1][:8]
    for name, own in mixed(values).items():
        assert np.array_equal(loaded(values)[name], own, equal_nan=True)
    for refused in (genkit.anomalies, genkit.sample_table):
        given = ("a.csv",) if refused is genkit.anomalies else ()
        with pytest.raises(ValueError, match=r"an autoencoder of tables, which genkit.features"):
            refused(*given, model=tmp_path / "model")


@pytest.mark.slow
def test_a_saved_model_loads_without_genkit(mixed, tmp_path):
    tiny_table_autoencoder(tmp_path / "model")
    command = [sys.executable, "-c", WITHOUT_GENKIT, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    output = mixed(np.array([[0, 1, np.nan, 18000.0]]))
    expected = [output.features.sum(), *output.expected[0]]
    assert np.allclose(np.array(done.stdout.split(), float), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("columns", []),
        ("columns", "none"),
        ("columns", [{"kind": "number"}] * 4),
        ("knots", [[[], []]]),
        ("widths", []),
        ("widths", [8, 8]),
    ],
)
def test_a_damaged_model_is_refused(tmp_path, key, value):
    tiny_table_autoencoder(tmp_path / "model")
    path = tmp_path / "model" / "network" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=r"model: .*"):
        genkit.load(tmp_path / "model")


# ---- the recipe


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("rows") / "policies.csv", table_rows()[0])


@pytest.fixture(scope="module")
def trained(rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dae"
    run_here(RECIPE, *TINY, "--data", rows_file, "--output_dir", folder, "--save_steps", "2")
    return folder


def test_a_run_leaves_all_that_it_promises(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"model_index.json", "table_autoencoder.py", "network", "README.md"}
    assert names >= {"loss.png", "metrics.jsonl", "run.json"}
    losses = [line["val_loss"] for line in log_of(trained) if "val_loss" in line]
    card = (trained / "README.md").read_text()
    assert len(losses) == 2 and f"{min(losses):.4f}" in card and "age (number)" in card
    errors = genkit.load(trained).network.errors
    assert (errors[:2] == 1).all() and (errors[2:] > 0.3).all() and (errors[2:] != 1).all()


def test_a_run_goes_on_exactly(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    run_here(RECIPE, "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_accumulated_gradients_are_those_of_the_batch(trained, rows_file, tmp_path):
    words = (*TINY, "--data", rows_file, "--gradient_accumulation", "4")
    run_here(RECIPE, *words, "--output_dir", tmp_path / "parts")
    for a, b in zip(log_of(trained), log_of(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_see_the_same_batches(train, trained, rows_file, tmp_path):
    words = [*TINY, "--data", rows_file, "--output_dir", tmp_path / "two"]
    done = train(*words, recipe=RECIPE, launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    one, two = log_of(trained), log_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a.get("val_loss", 0) == pytest.approx(b.get("val_loss", 0), abs=1e-4)


def test_it_learns_a_column_from_another(tmp_path):
    """As y is -x of each row, and z whether that is above 0; other rows' values tell nothing."""
    x = np.random.default_rng(0).normal(size=400)
    lines = [f"{v:.3f},{-v:.3f},{'yes' if v < 0 else 'no'}\n" for v in x]
    (tmp_path / "t.csv").write_text("x,y,z\n" + "".join(lines))
    words = ("--widths", "32", "32", "--batch_size", "64", "--max_steps", "300", "--device", "cpu")
    words = (*words, "--learning_rate", "0.01", "--blank", "0.3", "--data", tmp_path / "t.csv")
    run_here(RECIPE, *words, "--output_dir", tmp_path / "run")
    rows = [{"x": f"{v:.2f}", "y": None, "z": None} for v in (-1.2, -0.5, 0.5, 1.2)]
    filled = genkit.fill(rows, model=tmp_path / "run")
    for row in filled.rows:
        assert float(row["y"]) == pytest.approx(-float(row["x"]), abs=0.3)
        assert row["z"] == ("yes" if float(row["x"]) < 0 else "no")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--data is required"),
        ("--data {rows} --leave_out id", "--leave_out: there is no column 'id': region, smokes"),
        ("--data {rows} --dates age --numbers age", "'age' is given twice"),
        ("--data {rows} --swap 0 --blank 0", "--swap 0 and --blank 0 must add up to more than 0"),
        ("--data {rows} --swap 0.6 --blank 0.6", "--swap 0.6 and --blank 0.6 must add up to more"),
    ],
)
def test_bad_settings_are_named(rows_file, tmp_path, words, message):
    given = words.format(rows=rows_file).split()
    with pytest.raises(ValueError, match=message):
        run_here(RECIPE, *TINY, "--output_dir", tmp_path / "run", *given)


@pytest.mark.parametrize("recipe", [RECIPE, "train_table"])
def test_a_column_without_a_number_to_train_on_is_named(recipe, tmp_path):
    held = np.random.default_rng(0).permutation(60)[0]  # the first row that is held out
    lines = [f"{i / 3:.2f},{5.5 if i == held else ''}" for i in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["x,rare", *lines]) + "\n")
    words = ("--data", tmp_path / "a.csv", "--numbers", "rare", "--max_steps", "1")
    with pytest.raises(ValueError, match=r"'rare' has no number in the 54 rows .*--leave_out"):
        run_here(recipe, *words, "--device", "cpu", "--output_dir", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the Hub's own
def test_a_pushed_model_comes_back(trained, rows_file, monkeypatch, tmp_path):
    with serve() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        genkit.push(trained, "user/dae")
        there = genkit.features(rows_file, model="user/dae")
    here = genkit.features(rows_file, model=trained)
    assert np.array_equal(there.values, here.values)
