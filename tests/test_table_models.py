"""Tables: columns, the Gaussian, exact likelihood, rows, gaps, anomalies, and the recipe."""

import csv
import itertools
import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import ON_CPU, TWO, log_of, run_here, table_rows, tiny_table, weights_of, write_table
from hub_server import serve
from transformers import AutoModelForCausalLM

import genkit
from genkit.data import table_sources
from genkit.data.columns import CATEGORY, DATE, NUMBER, Column, find_columns
from genkit.metrics import tabular as metrics
from genkit.models.gaussian import fit_gaussian
from genkit.models.margins import WAYS, fit_margin
from genkit.tabular.conditions import parse_conditions
from genkit.tabular.drawing import draw
from genkit.tabular.model import TableModel, load_table_model, save_table
from genkit.tabular.reading import as_windows, read_values

SHAPE = ("--depth", "1", "--width", "32", "--heads", "2", "--batch_size", "8")
TINY = (*SHAPE, "--max_steps", "4", "--evaluations", "2", "--device", "cpu")


def find(name, texts, **kinds):
    columns, values, notes = find_columns([name], [[text] for text in texts], kinds)
    return columns[0], values[:, 0], notes


# ---- columns


def test_find_columns_finds_numbers_categories_dates_and_gaps():
    names = ["age", "region", "since", "smokes"]
    rows = [[str(20 + i), "ns"[i % 2], f"2020-01-{i + 1:02}", "yes"] for i in range(20)]
    rows[3][0], rows[4][1], rows[5][2] = "", None, " "
    columns, values, notes = find_columns(names, rows)
    assert [column.kind for column in columns] == [NUMBER, CATEGORY, DATE, CATEGORY]
    assert columns[1].categories == ["n", "s"] and notes == ["column 'smokes' is always 'yes'"]
    assert np.isnan(values).sum() == 3 and np.isnan(values[[3, 4, 5], [0, 1, 2]]).all()
    for row, given in zip(values, rows, strict=True):
        cells = [column.format(value) for column, value in zip(columns, row, strict=True)]
        assert cells == [(cell or "").strip() for cell in given]


def test_few_numbers_are_categories_unless_told():
    texts = list("0123456789") * 3
    assert find("a", texts)[0].kind == CATEGORY
    assert find("a", texts, a=NUMBER)[0].kind == NUMBER
    many = [str(i) for i in range(30)]
    assert find("a", many)[0].kind == NUMBER
    assert find("a", many, a=CATEGORY)[0].categories == many


def test_na_is_a_gap_among_numbers_and_a_category_among_countries():
    column, values, notes = find("a", [*map(str, range(30)), "NA"])
    assert np.isnan(values[-1]) and notes == ["column 'a': 'NA' is read as a gap"]
    assert math.isnan(column.parse("NA", "here"))
    column, values, notes = find("a", ["NA", "DE", "FR"] * 5)
    assert column.categories == ["DE", "FR", "NA"] and "'NA' is a category" in notes[0]
    columns, values, _ = find_columns(["a"], [["NA"], ["DE"]] * 5, gaps=["NA"])
    assert columns[0].categories == ["DE"] and np.isnan(values[0, 0])
    assert columns[0].is_gap("NA")


def test_mixed_types_and_names_are_refused_with_the_row():
    texts = [str(i / 7) for i in range(100)]
    with pytest.raises(ValueError, match="row 40: column 'a' has 'about 5', which is no number"):
        find("a", [*texts[:40], "about 5", *texts[40:]])
    with pytest.raises(ValueError, match="row 1: column 'a' has 'x', which is no number"):
        find("a", ["1", "x"], a=NUMBER)
    with pytest.raises(ValueError, match="'a' has 50 different texts in 50 rows"):
        find("a", [f"Mr {i}" for i in range(50)])
    with pytest.raises(ValueError, match="--dates: there is no column 'b': a"):
        find("a", ["1"], b=DATE)


def test_a_column_of_gaps_and_a_constant_number_are_said():
    column, values, notes = find("a", ["", None])
    assert column.kind == CATEGORY and np.isnan(values).all()
    assert notes == ["column 'a' has nothing but gaps"]
    assert find("a", ["3"] * 9)[2] == ["column 'a' is always '3'"]


def test_read_table_reads_every_format_alike(tmp_path):
    names = ["a,b", "when", "n"]
    rows = [["x", "2020-02-29", "1.5"], ["NA", "2021-01-01", "-2"]]
    (tmp_path / "t.csv").write_bytes(
        b'\xef\xbb\xbf"a,b",when,n\nx,2020-02-29,1.5\nNA,2021-01-01,-2\n'
    )
    found = table_sources.read_table(str(tmp_path / "t.csv"))
    assert found[:2] == (names, rows)
    days = [np.datetime64(row[1]).astype(object) for row in rows]
    columns = {"a,b": ["x", "NA"], "when": days, "n": [1.5, -2.0]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    _, cells, _ = table_sources.read_table(str(tmp_path / "t.parquet"))
    assert cells == [["x", "2020-02-29", 1.5], ["NA", "2021-01-01", -2.0]]


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_the_header_says_what_is_between_cells(tmp_path, sign, quote):
    lines = [[f"{quote}{name}{quote}" for name in ("a", "c")], ['"1;2|3,4\t"', "5"]]
    (tmp_path / "t.csv").write_text("".join(sign.join(line) + "\n" for line in lines))
    found = table_sources.read_table(str(tmp_path / "t.csv"))
    assert found[:2] == (["a", "c"], [["1;2|3,4\t", "5"]])


def test_signs_in_quotes_and_below_the_header_separate_nothing(tmp_path):
    (tmp_path / "t.csv").write_text('"a, b";c\n1,5;2\n')
    assert table_sources.read_table(str(tmp_path / "t.csv"))[:2] == (["a, b", "c"], [["1,5", "2"]])
    (tmp_path / "t.csv").write_text('"a;b"\n1;2\n')
    assert table_sources.read_table(str(tmp_path / "t.csv"))[:2] == (["a;b"], [["1;2"]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,a\n1,2\n", "two columns of one name"),
        ("a,b\n", "has no rows"),
        ("a,b\n1\n", "has 1 fields, not 2, in line 2"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        table_sources.read_table(str(tmp_path / "t.csv"))


# ---- margins and the Gaussian


@pytest.mark.parametrize("way", WAYS)
def test_a_margin_comes_back_and_its_density_is_one(way):
    values = np.random.default_rng(0).lognormal(size=300)
    margin = fit_margin(values, way)
    some = np.concatenate([values, [values.min() - 1, values.max() + 9]])
    assert np.allclose(margin.to_values(margin.to_scores(some)), some)
    grid = np.linspace(-60, 200, 400_001)
    total = np.exp(margin.log_density(grid)).sum() * (grid[1] - grid[0])
    assert total == pytest.approx(1, abs=2e-3)


def test_innovations_and_conditions_agree_with_each_other_and_with_the_joint_density():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
    gaussian = fit_gaussian(mixed)
    rows = torch.from_numpy(mixed[:3])
    order = torch.tensor([[2, 0, 4, 1, 3]] * 3)
    factors = gaussian.factors(order)
    found = gaussian.innovations(factors, (rows - gaussian.mean).gather(1, order))
    for place, feature in enumerate(order[0].tolist()):
        known = rows.clone()
        known[:, order[0, place:]] = math.nan
        mean, variance = gaussian.given(known, torch.tensor([feature]))
        expected = (rows[:, feature] - mean[:, 0]) / variance[:, 0, 0].sqrt()
        assert torch.allclose(found[:, place], expected)
    each = -0.5 * (found**2 + math.log(2 * math.pi)) - factors.diagonal(dim1=1, dim2=2).log()
    assert each.sum().item() == pytest.approx(gaussian.log_density(rows.numpy()))


def test_fit_gaussian_learns_through_gaps():
    rng = np.random.default_rng(0)
    covariance = np.array([[1, 0.8], [0.8, 1]])
    rows = rng.multivariate_normal([0, 0], covariance, 4000)
    rows[rows[:, 0] > 0.5, 1] = np.nan  # which are not missing at random: their mean alone is off
    fitted = fit_gaussian(rows)
    assert abs(np.nanmean(rows[:, 1])) > 0.3
    assert torch.allclose(fitted.mean, torch.zeros(2).double(), atol=0.08)
    assert torch.allclose(fitted.covariance, torch.from_numpy(covariance), atol=0.08)


# ---- the likelihood


@pytest.fixture(scope="module")
def mixed():
    """A model with random weights of two categories, a number with an atom and gaps, and a date."""
    return tiny_table()


def test_probabilities_of_a_tiny_table_add_up_to_one():
    """Two columns of categories with gaps: all that a row can be, in each order and in the mix."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.integers(0, 3, 60), rng.integers(0, 2, 60)], 1).astype(float)
    values[::7, 1] = np.nan
    model = tiny_table([3, 2], values)
    every = np.array(list(itertools.product(range(3), (0, 1, np.nan))), float)
    assert np.exp(model.log_density(every)).sum() == pytest.approx(1, abs=1e-6)
    for order in ([0, 1], [1, 0]):
        logs = model.log_densities(every, np.tile(order, (len(every), 1))).sum(1)
        assert np.exp(logs).sum() == pytest.approx(1, abs=1e-6)


def test_the_density_of_a_number_adds_up_to_one_given_others(mixed):
    values = table_rows()[1]
    grid = np.linspace(-20, 160, 18_001)
    rows = np.tile(values[0], (len(grid), 1))
    rows[:, 2] = grid
    orders = np.tile([0, 3, 1, 2], (len(grid), 1))
    logs = mixed.log_densities(rows, orders)[:, 2]
    gap = rows[:1].copy()
    gap[:, 2] = np.nan
    lacking = mixed.log_densities(gap, orders[:1])[0, 2]
    assert mixed.table.atoms[2] == [50.0]
    total = np.exp(logs).sum() * (grid[1] - grid[0]) + math.exp(lacking)
    assert total == pytest.approx(1, abs=0.01)


def test_a_decoder_that_says_nothing_leaves_the_gaussian():
    rng = np.random.default_rng(0)
    rows = rng.multivariate_normal([0, 0, 0], [[1, 0.9, 0], [0.9, 1, 0.3], [0, 0.3, 1]], 300)
    model = tiny_table([0, 0, 0], rows, learned=False)
    inner = model.log_densities(rows[:50], np.tile([2, 0, 1], (50, 1)))
    scores = model.table.features(rows[:50])
    slopes = sum(m.log_slope(rows[:50, j]) for j, m in enumerate(model.table.margins))
    expected = model.table.gaussian.log_density(scores) + slopes.sum()
    near = (np.abs(scores) < 2).all(1)  # the tails are exponential
    each = np.array([model.table.gaussian.log_density(row[None]) for row in scores]) + slopes
    assert np.isfinite(expected) and np.allclose(inner.sum(1)[near], each[near], atol=0.05)


def test_classify_is_bayes_rule():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    rows = np.column_stack([labels, rng.normal(size=600) + 2 * labels]).astype(float)
    model = tiny_table([3, 0], rows, learned=False)
    ends = np.array([[0, 0.0], [2, 4.0]])
    logs = model.log_densities(ends, np.tile([1, 0], (2, 1)))[:, 0]
    assert (logs > math.log(0.8)).all()
    swapped = ends[:, [0, 1]].copy()
    swapped[:, 0] = [2, 0]
    assert (model.log_densities(swapped, np.tile([1, 0], (2, 1)))[:, 0] < math.log(0.05)).all()


def test_gaps_that_training_did_not_have_say_nothing(mixed):
    values = table_rows()[1][:5].copy()
    values[:, 0] = np.nan
    logs = mixed.log_densities(values, np.tile([0, 1, 2, 3], (5, 1)))
    assert (logs[:, 0] == 0).all()
    rest = mixed.log_densities(values, np.tile([1, 2, 3, 0], (5, 1)))
    assert np.allclose(logs, rest)


# ---- rows


def test_rows_depend_on_their_seeds_alone(mixed):
    together = genkit.sample_table(mixed, 40, seed=3)
    for some in (slice(0, 1), slice(17, 20), slice(39, 40)):
        count = some.stop - some.start
        alone = genkit.sample_table(mixed, count, seed=3 + some.start)
        assert np.array_equal(alone.values, together.values[some], equal_nan=True)
    again = genkit.sample_table(mixed, 2, seed=[20, 3])
    assert np.array_equal(again.values, together.values[[17, 0]], equal_nan=True)


def test_rows_follow_the_likelihood():
    rng = np.random.default_rng(0)
    values = np.stack([rng.integers(0, 3, 60), rng.integers(0, 2, 60)], 1).astype(float)
    values[::5, 1] = np.nan
    model = tiny_table([3, 2], values)
    every = np.array(list(itertools.product(range(3), (0, 1, np.nan))), float)
    expected = np.exp(model.log_density(every))
    drawn = genkit.sample_table(model, 4000, seed=0).values
    for row, share in zip(every, expected, strict=True):
        same = ((drawn == row) | (np.isnan(drawn) & np.isnan(row))).all(1).mean()
        assert same == pytest.approx(share, abs=0.03)


def test_values_are_within_the_range_and_as_precise_as_those_of_training(mixed):
    rows = genkit.sample_table(mixed, 300, seed=0)
    for column, values in zip(rows.columns, rows.values.T, strict=True):
        known = values[~np.isnan(values)]
        if column.kind != CATEGORY:
            assert known.min() >= column.least and known.max() <= column.most
            assert np.array_equal(known, known.round(column.decimals))
        else:
            assert set(known) <= set(range(len(column.categories)))
    assert np.isnan(rows.values[:, 2]).any() and not np.isnan(rows.values[:, [0, 1, 3]]).any()


def test_a_loaded_model_takes_no_device(mixed):
    with pytest.raises(ValueError, match="device='cpu' is for loading; the model given is loaded"):
        genkit.sample_table(mixed, 1, device="cpu")


def test_conditions_hold(mixed):
    where = ["region=north", "age>=40", "age < 60"]
    rows = genkit.sample_table(mixed, 20, where=where, seed=0)
    for row in rows.rows:
        assert row["region"] == "north" and 40 <= float(row["age"]) < 60
    alone = genkit.sample_table(mixed, 1, where=where, seed=7)
    assert np.array_equal(alone.values, rows.values[7:8], equal_nan=True)
    exact = genkit.sample_table(mixed, 3, where="since=2020-02-29", seed=0)
    assert {row["since"] for row in exact.rows} == {"2020-02-29"}
    assert "where since=2020-02-29" in str(exact)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("regions=north", "where must be a column, a sign .* got 'regions=north'; the columns are"),
        ("region=east", "where: 'east' is no category of 'region': north, south"),
        ("region<north", "'region' is a category, which takes = alone"),
        ("age>500", "where: no row satisfies 'age>500': 'age' is .* in the rows of training"),
        ("age=old", "where: 'old' is no number"),
        ("age=", "where: 'age=' has no value"),
        (["age>89.8", "age<18.2"], "rows did not satisfy age>89.8 and age<18.2 in 300 draws"),
    ],
)
def test_conditions_that_cannot_hold_are_refused(mixed, where, message):
    with pytest.raises(ValueError, match=message):
        genkit.sample_table(mixed, 2, where=where, seed=0)


def test_the_longest_name_of_a_column_is_meant():
    columns = [Column("a", NUMBER, most=9), Column("a<b", NUMBER, most=9)]
    (condition,) = parse_conditions("a<b=3", columns)
    assert (condition.column, condition.sign, condition.value) == (1, "=", 3.0)


def test_samples_are_saved_as_they_are_read(mixed, tmp_path):
    rows = genkit.sample_table(mixed, 50, seed=0)
    for name in ("a.csv", "a.parquet"):
        rows.save(tmp_path / name)
        back = read_values(tmp_path / name, rows.columns)
        assert np.allclose(back.values, rows.values, equal_nan=True) and not back.notes
    with pytest.raises(ValueError, match=r"the file must end in .csv or .parquet, got .*a.xlsx"):
        rows.save(tmp_path / "a.xlsx")


# ---- gaps


def test_fill_keeps_what_is_given_and_fills_what_is_not(mixed, tmp_path):
    cells = table_rows()[0][:12]
    rows = [dict(zip(["region", "smokes", "age", "since"], row, strict=True)) for row in cells]
    for i, row in enumerate(rows):
        row["note"] = f"kept {i}"
        row[["region", "smokes", "age", "since"][i % 4]] = None
    rows[2]["region"] = "moon"  # no category of the model, and no gap
    filled = genkit.fill(rows, model=mixed, draws=4, seed=1)
    assert "'region': 1 cells have a category that no training row has" in str(filled)
    assert rows[0]["region"] is None  # what was given is not changed
    asked = {(cell.row, cell.column) for cell in filled.cells}
    assert asked == {(i, k) for i, row in enumerate(rows) for k, cell in row.items() if not cell}
    for i, (row, given) in enumerate(zip(filled.rows, rows, strict=True)):
        for name, cell in given.items():
            assert row[name] == cell if (i, name) not in asked else row[name] not in ("", None)
    for cell in filled.cells:
        if cell.column == "age":
            assert float(cell.low) <= float(cell.value) <= float(cell.high)
    assert filled.draws.shape == (4, 12, 4) and not np.isnan(filled.draws).any()
    filled.save(tmp_path / "filled.csv")
    filled.save_cells(tmp_path / "cells.csv")
    with pytest.raises(ValueError, match=r"the file must end in .csv, got .*filled.parquet"):
        filled.save(tmp_path / "filled.parquet")
    with (tmp_path / "filled.csv").open() as file:
        assert next(csv.reader(file)) == ["region", "smokes", "age", "since", "note"]
    alone = genkit.fill(rows[5:6], model=mixed, draws=4, seed=6)
    assert [c.value for c in alone.cells] == [c.value for c in filled.cells if c.row == 5]


def test_points_are_those_of_the_distribution():
    """Of a number given another: their mean and deviation are those of the Gaussian."""
    rng = np.random.default_rng(0)
    rows = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 2000)
    model = tiny_table([0, 0], rows, learned=False)
    given = np.array([[1.0, np.nan], [-1.0, np.nan]])
    points = draw(model, given, [0, 1], points=True).points[:, 1]
    assert np.allclose(points.mean(1), [0.8, -0.8], atol=0.1)
    assert np.allclose(points.std(1), 0.6, atol=0.08)
    assert np.isnan(draw(model, given, [0, 1], points=True).points[:, 0]).all()


def test_a_column_that_is_not_there_is_said(mixed):
    filled = genkit.fill([{"region": "north", "age": 30}], model=mixed, draws=2)
    assert filled.notes[0] == "no column 'smokes', 'since': nothing is given of it"
    assert {cell.column for cell in filled.cells} == {"smokes", "since"}
    with pytest.raises(ValueError, match="data: it has none of the model's columns, region"):
        genkit.fill([{"x": 1}], model=mixed)
    with pytest.raises(ValueError, match="data: row 0: column 'age': 'old' is no number"):
        genkit.fill([{"age": "old"}], model=mixed)


# ---- anomalies


def test_anomalies_name_the_row_and_the_column():
    rng = np.random.default_rng(0)
    first = rng.normal(size=400)
    rows = np.column_stack([first, first + 0.1 * rng.normal(size=400), rng.normal(size=400)])
    model = tiny_table([0, 0, 0], rows, learned=False)
    given = [{"a": a, "b": b, "c": c} for a, b, c in rows[:30].tolist()]
    given[17] |= {"c": 9.0}
    given[4] |= {"a": 1.5, "b": -1.5}
    found = genkit.anomalies(given, model=model, count=2)
    assert {row.row for row in found.rows} == {4, 17} and len(found.surprises) == 30
    by_row = {row.row: row for row in found.rows}
    assert by_row[17].columns[0].column == "c" and by_row[4].columns[0].column in "ab"
    assert "outside the range of training" in found.notes[0]
    assert str(found).splitlines()[0].split() == [
        "row",
        "nats",
        "as",
        "rare",
        "column",
        "value",
        "expected",
    ]


def test_windows_are_stretches_of_a_series():
    values = np.arange(10.0).reshape(5, 2)
    assert as_windows(values, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6, 7],
        [4, 5, 6, 7, 8, 9],
    ]


# ---- judging


def test_distances_are_0_for_the_same_rows_and_1_for_others():
    columns = [Column("a", NUMBER, most=1), Column("b", CATEGORY, ["x", "y"])]
    rows = np.column_stack([np.linspace(0, 1, 40), np.arange(40) % 2])
    other = np.column_stack([rows[:, 0] + 5, np.full(40, np.nan)])
    assert (metrics.column_distances(columns, rows, rows) == 0).all()
    assert (metrics.column_distances(columns, rows, other) == 1).all()
    assert (metrics.pair_distances(columns, rows, rows) == 0).all()
    assert (metrics.pair_distances(columns, rows, other) == 1).all()
    numbers = [Column("a", NUMBER), Column("b", NUMBER)]
    rising = np.column_stack([np.arange(40.0), np.arange(40.0) ** 3])
    falling = rising * [1, -1]
    assert metrics.correlation_error(numbers, rising, rising) == 0
    assert metrics.correlation_error(numbers, rising, falling) == pytest.approx(2)
    train = rows[:30]
    assert metrics.nearest_distances(columns, train, rows[:5]).max() == 0
    assert (metrics.nearest_distances(columns, train, other) == 1).all()


def test_shuffled_columns_are_found_out_by_pairs_and_by_a_classifier():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400).astype(float)
    columns = [Column("a", NUMBER, least=-3, most=4), Column("b", CATEGORY, ["x", "y"])]
    rows = np.column_stack([rng.normal(size=400) * 0.3 + labels, labels])
    shuffled = np.column_stack([rng.permutation(rows[:, 0]), rows[:, 1]])
    assert metrics.column_distances(columns, rows, shuffled).max() == 0
    assert metrics.pair_distances(columns, rows, shuffled)[0] > 0.2
    assert metrics.taught_accuracy(columns, 1, rows[:200], rows[200:]) > 0.9
    assert metrics.taught_accuracy(columns, 1, shuffled[:200], rows[200:]) < 0.75


def test_evaluate_finds_copies_and_draws_each_column(mixed, tmp_path):
    train = write_table(tmp_path / "train.csv", table_rows(seed=5)[0])
    record = genkit.evaluate(mixed, data=train, count=60)
    assert list(record.figures) == ["columns", "pairs", "correlations", "accuracy, smokes"]
    assert all(figure.margin >= 0 for figure in record.figures.values())
    record.save(tmp_path / "columns.png")
    assert (tmp_path / "columns.png").read_bytes().startswith(b"\x89PNG")
    copied = genkit.sample_table(mixed, 60, seed=0)
    copied.save(tmp_path / "copied.csv")
    record = genkit.evaluate(mixed, data=train, count=60, train=str(tmp_path / "copied.csv"))
    assert record.figures["copies"].value > 0.9 > record.figures["copies"].baseline
    with pytest.raises(ValueError, match="target must be a column of categories, got 'age'"):
        genkit.evaluate(mixed, data=train, target="age")
    with pytest.raises(ValueError, match=r"extractor='x' is not for models of tables"):
        genkit.evaluate(mixed, data=train, extractor="x")


# ---- saved models


def test_a_saved_model_loads_with_and_without_genkit(mixed, tmp_path):
    save_table(mixed, tmp_path / "model")
    values = table_rows()[1][:8]
    loaded = genkit.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded, TableModel) and "4 columns (2 category" in repr(loaded)
    assert np.allclose(loaded.log_density(values), mixed.log_density(values))
    drawn = genkit.sample_table(loaded, 5, seed=0).values
    assert np.array_equal(drawn, genkit.sample_table(mixed, 5, seed=0).values, equal_nan=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    batch = mixed.table.encode(values, np.tile(mixed.table.orders[0], (8, 1)))
    with torch.no_grad():
        own, theirs = (each(input_ids=batch.ids).logits for each in (mixed.model, stock))
    assert torch.equal(own, theirs)
    with pytest.raises(ValueError, match=r"model of tables, which genkit.sample_table, fill and"):
        genkit.generate("a", model=tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("orders", [[0, 0, 1, 2]]),
        ("mean", [0.0]),
        ("usual_columns", []),
        ("window", -1),
        ("columns", []),
        ("columns", "none"),
        ("covariance", None),
    ],
)
def test_a_damaged_table_json_is_refused(mixed, tmp_path, key, value):
    save_table(mixed, tmp_path / "model")
    path = tmp_path / "model" / "table.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=r"model: .*"):
        load_table_model(str(tmp_path / "model"))


# ---- the recipe


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("rows") / "policies.csv", table_rows()[0])


@pytest.fixture(scope="module")
def trained_table(rows_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "table"
    run_here("train_table", *TINY, "--data", rows_file, "--output_dir", folder, "--save_steps", "2")
    return folder


def test_a_run_leaves_all_that_it_promises(trained_table):
    names = {path.name for path in trained_table.iterdir()}
    assert names >= {"config.json", "model.safetensors", "table.json", "README.md", "run.json"}
    assert names >= {"columns.png", "loss.png", "metrics.jsonl"}
    losses = [line["val_loss"] for line in log_of(trained_table) if "val_loss" in line]
    card = (trained_table / "README.md").read_text()
    assert len(losses) == 2 and f"{min(losses):.4f}" in card and "age (number)" in card
    model = genkit.load(trained_table)
    assert len(model.usual) == 20 and list(model.usual) == sorted(model.usual)
    assert -np.mean(model.usual) == pytest.approx(-min(losses))


def test_a_run_goes_on_exactly(trained_table, tmp_path):
    shutil.copytree(trained_table, tmp_path / "run")
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    run_here("train_table", "--output_dir", tmp_path / "run", "--resume")
    assert weights_of(tmp_path / "run") == weights_of(trained_table)


def test_accumulated_gradients_are_those_of_the_batch(trained_table, rows_file, tmp_path):
    words = (*TINY, "--data", rows_file, "--dropout", "0", "--output_dir")
    run_here("train_table", *words, tmp_path / "whole")
    run_here("train_table", *words, tmp_path / "parts", "--gradient_accumulation", "4")
    whole, parts = (log_of(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_see_the_same_batches(train, rows_file, tmp_path):
    words = [*TINY, "--data", rows_file, "--dropout", "0", "--output_dir"]
    run_here("train_table", *words, tmp_path / "one")
    done = train(*words, tmp_path / "two", recipe="train_table", launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_a_series_is_modelled_by_windows(tmp_path):
    rng = np.random.default_rng(0)
    load = 10 + 3 * np.sin(np.arange(300) / 3) + 0.1 * rng.normal(size=300)
    path = tmp_path / "load.csv"
    path.write_text("load\n" + "".join(f"{value:.3f}\n" for value in load))
    words = (*TINY, "--data", path, "--window", "6", "--output_dir", tmp_path / "run")
    run_here("train_table", *words)
    model = genkit.load(tmp_path / "run")
    assert [column.name for column in model.columns] == [f"load {i}" for i in range(6)]
    load[200] = 2
    path.write_text("load\n" + "".join(f"{value:.3f}\n" for value in load))
    found = genkit.anomalies(str(path), model=model, count=3)
    assert len(found.surprises) == 295
    assert all(195 <= row.row <= 200 for row in found.rows)
    with pytest.raises(ValueError, match=r"windows of 6 rows of a series, which genkit.fill does"):
        genkit.fill(str(path), model=model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--data is required"),
        ("--data {tmp}/no.csv", "data: .*no.csv"),
        ("--data {rows} --leave_out id", "--leave_out: there is no column 'id': region, smokes"),
        ("--data {rows} --numbers id", "--numbers: there is no column 'id'"),
        ("--data {rows} --numbers region", "row 0: column 'region' has '.*', which is no number"),
        ("--data {rows} --dates age --numbers age", "'age' is given twice"),
        ("--data {rows} --window 1", "--window must be 2 or more, or 0 for a table, got 1"),
        ("--data {rows} --window 90", "--window 90: 200 rows are too few"),
    ],
)
def test_bad_settings_are_named(rows_file, tmp_path, words, message):
    given = words.format(tmp=tmp_path, rows=rows_file).split()
    with pytest.raises(ValueError, match=message):
        run_here("train_table", *TINY, "--output_dir", tmp_path / "run", *given)


def test_a_dry_run_tells_and_writes_nothing(rows_file, tmp_path, capsys):
    words = (*SHAPE, "--max_minutes", "2", "--dry_run", "--data", rows_file)
    run_here("train_table", *words, "--output_dir", tmp_path / "dry")
    assert "180 rows to train on, 20 to validate" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the Hub's own
def test_a_pushed_model_comes_back(trained_table, monkeypatch, tmp_path):
    with serve() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        genkit.push(trained_table, "user/table")
        there = genkit.sample_table("user/table", 3, seed=0)
    here = genkit.sample_table(trained_table, 3, seed=0)
    assert np.array_equal(there.values, here.values, equal_nan=True)


def test_a_number_that_is_mostly_0_follows_the_column_that_says_so():
    """As the amount of claims, which is 0 where there is none."""
    rng = np.random.default_rng(0)
    claims = (rng.random(400) < 0.2).astype(float)
    amount = np.where(claims > 0, np.round(rng.lognormal(size=400), 2) + 0.01, 0.0)
    model = tiny_table([2, 0], np.column_stack([claims, amount]), learned=False)
    assert model.table.atoms[1] == [0.0] and len(model.table.owners) == 3
    drawn = genkit.sample_table(model, 500, seed=0).values
    assert ((drawn[:, 0] > 0) == (drawn[:, 1] > 0)).mean() > 0.98
    ends = np.array([[0, 0.0], [1, 1.0], [0, 1.0], [1, 0.0]])
    for order in ([0, 1], [1, 0]):
        likely, also, never, nor = model.log_densities(ends, np.tile(order, (4, 1))).sum(1)
        assert min(likely, also) - max(never, nor) > 3
    grid = np.column_stack([np.ones(60_001), np.linspace(-10, 50, 60_001)])
    logs = model.log_densities(grid, np.tile([0, 1], (len(grid), 1)))[:, 1]
    assert np.exp(logs).sum() * 1e-3 == pytest.approx(1, abs=0.02)
