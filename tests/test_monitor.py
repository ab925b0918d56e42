import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import log_of, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from genkit.data import images
from genkit.metrics import monitor
from genkit.metrics.collapse import Trouble, find_troubles
from genkit.metrics.features import PixelFeatures, extract, extract_cached
from genkit.metrics.monitor import Monitor
from genkit.models.gan_losses import LOSSES, UNIFORMS, Batch, Game, discriminator_loss
from genkit.training import curves

DIGITS = images.load_images("digits")
TRAIN, VAL = images.split_images(DIGITS, None, 0.1)
PREPROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    """A classifier that knows digits, and numbers them backwards."""
    names = DIGITS.names[::-1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(
            ResNetConfig(
                num_channels=1,
                embedding_size=16,
                hidden_sizes=[16, 24],
                depths=[1, 1],
                layer_type="basic",
                id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
            )
        )
    optimizer, rng = torch.optim.AdamW(model.parameters(), 3e-3), np.random.default_rng(0)
    for _ in range(100):
        which = rng.integers(len(TRAIN), size=128)
        logits = model(pixel_values=TRAIN.batch(which)).logits
        F.cross_entropy(logits, 9 - TRAIN.classes(which)).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("classifier")
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return str(folder)


@pytest.fixture(scope="module")
def watching(classifier) -> Monitor:
    return Monitor(VAL, classifier, 900)


def some(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(TRAIN))[:count]


# ---- pixels as features


@pytest.mark.parametrize(
    ("size", "count"), [((1, 8, 8), 64), ((1, 28, 28), 196), ((3, 33, 20), 330), ((1, 16, 17), 144)]
)
def test_pixels_are_averaged_to_a_small_map(size, count):
    pictures = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features, classes = PixelFeatures()(pictures)
    assert features.shape == (3, count)
    assert not classes.any()
    tall, wide = (math.ceil(side / 16) for side in size[1:])
    assert torch.allclose(features[:, 0], pictures[:, 0, :tall, :wide].mean((1, 2)), atol=1e-6)


def test_small_pixels_are_their_own_features():
    seen = extract(DIGITS, PixelFeatures())
    assert np.allclose(seen.features, DIGITS.batch(np.arange(len(DIGITS))).flatten(1))
    again = extract_cached(DIGITS, PixelFeatures())
    assert np.array_equal(seen.features, again.features)


# ---- figures


def test_monitor_gives_real_images_the_baseline(watching):
    which = some(900)
    figures = watching.measure(TRAIN.batch(which), TRAIN.classes(which))
    assert set(figures) == set(watching.baseline)
    assert figures["duplicates"] < 0.1
    assert figures["label_accuracy"] > 0.9  # though the classifier numbers classes otherwise
    for name in ("coverage", "entropy", "spread", "label_accuracy"):
        assert figures[name] == pytest.approx(watching.baseline[name], abs=0.05), name
    assert figures["distance"] < 3 * watching.baseline["distance"]


def test_one_image_alone(watching):
    figures = watching.measure(TRAIN.batch(np.zeros(900, int)))
    assert figures["duplicates"] == 1
    assert figures["spread"] == pytest.approx(0, abs=1e-6)
    assert figures["entropy"] == 0
    assert figures["coverage"] < 0.15
    assert figures["distance"] > 10 * watching.baseline["distance"]
    assert "label_accuracy" not in figures


@pytest.mark.parametrize("extractor", ["classifier", None])
def test_few_images_are_found_by_their_birthdays(extractor, classifier):
    watching = Monitor(VAL, extractor and classifier, 900)
    drawn = np.random.default_rng(0)
    found = []
    for few in (30, 100, 1000):
        which = some(few)[drawn.integers(few, size=900)]
        found.append(watching.measure(TRAIN.batch(which))["duplicates"])
        met = 1 - (1 - 1 / few) ** 89  # among 90, which are compared at a time
        assert met - 0.05 < found[-1] < met + 0.12
    assert found == sorted(found, reverse=True)


def test_measure_does_not_depend_on_order(watching):
    which = some(900)
    by_class = which[np.argsort(TRAIN.classes(which).numpy(), kind="stable")]
    first, second = (watching.measure(TRAIN.batch(each)) for each in (which, by_class))
    for name in ("entropy", "spread"):
        assert first[name] == pytest.approx(second[name], rel=1e-6)
    for name in ("coverage", "duplicates"):
        assert first[name] == pytest.approx(second[name], abs=0.05)
    assert first["distance"] == pytest.approx(second["distance"], rel=0.2)


def test_one_class_has_no_entropy_and_wrong_labels_no_accuracy(watching):
    threes = np.resize(np.flatnonzero(TRAIN.classes(np.arange(len(TRAIN))) == 3), 900)
    figures = watching.measure(TRAIN.batch(threes), [4] * 900)
    assert figures["entropy"] < 0.3
    assert figures["label_accuracy"] < 0.1


def test_classes_by_other_names_are_not_compared(classifier):
    renamed = dataclasses.replace(VAL, names=[f"number {name}" for name in VAL.names])
    assert "label_accuracy" not in Monitor(renamed, classifier, 20).baseline


def test_more_images_than_are_compared_at_once(monkeypatch):
    monkeypatch.setattr(monitor, "MOST", 50)
    watching = Monitor(VAL, None, 80)
    assert watching.measure(TRAIN.batch(np.zeros(80, int)))["duplicates"] == 1
    assert watching.measure(TRAIN.batch(some(80)))["spread"] == pytest.approx(1, abs=0.15)


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 9))
def test_nearest_others_by_brute_force(count, width, seed):
    points = np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(float)
    found = monitor.nearest_others(points)
    for i, distance in enumerate(found):
        others = np.delete(points, i, 0)
        assert distance == pytest.approx(np.linalg.norm(others - points[i], axis=1).min())


def test_a_hundredth_of_real_points_look_like_duplicates():
    draws = np.random.default_rng(0).normal(size=(2, 2000, 20))
    limit = monitor.duplicate_limit(draws[0])
    assert monitor.duplicates(draws[0], limit) == pytest.approx(0.01, abs=0.002)
    assert monitor.duplicates(draws[1], limit) == pytest.approx(0.01, abs=0.01)


def test_features_that_differ_by_rounding_are_duplicates():
    rng = np.random.default_rng(0)
    real = np.repeat(rng.normal(size=(50, 8)), 2, 0)  # real images have copies, too
    assert monitor.duplicates(real * (1 + 1e-7 * rng.normal(size=real.shape)), 0.0) == 0
    limit = monitor.duplicate_limit(real)
    assert monitor.duplicates(real * (1 + 1e-7 * rng.normal(size=real.shape)), limit) == 1


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([1, 0, 0], 0), ([1], 0), ([0.25] * 4, 1), ([0.5, 0.5, 0, 0], 0.5)],
)
def test_evenness(shares, expected):
    assert monitor.evenness(np.array(shares, float)) == pytest.approx(expected)


def test_figures_do_not_depend_on_what_else_was_drawn(classifier):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (Monitor(VAL, classifier, 60) for _ in range(2))
    assert first.baseline == second.baseline
    drawn = TRAIN.batch(some(60))
    assert first.measure(drawn) == second.measure(drawn) == first.measure(drawn)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("real", "count", "message"),
    [
        (VAL, 5, "count must be at least 6 for k=5, got 5"),
        (VAL, 0, "count must be .* got 0"),
        (VAL.take(np.arange(3)), 9, "real must be 4 images or more, got 3"),
        (VAL.take(np.zeros(30, int)), 9, "real images must differ, got 30"),
    ],
)
def test_what_cannot_be_watched(real, count, message):
    with pytest.raises(ValueError, match=message):
        Monitor(real, None, count)


@pytest.mark.parametrize(
    ("drawn", "labels", "message"),
    [
        (TRAIN.batch(some(7)), None, "images must have 6 rows, got 7"),
        (TRAIN.batch(some(6)) * 3, None, r"images\[0\] must be in \[-1, 1\]"),
        (TRAIN.batch(some(6)) * torch.nan, None, r"images\[0\] must be in \[-1, 1\]"),
        (TRAIN.batch(some(6)), [0] * 5, "labels must be 6 integers"),
        (TRAIN.batch(some(6)), [10] * 6, r"labels\[0\] must be one of 10 classes"),
    ],
)
def test_what_cannot_be_looked_at(drawn, labels, message):
    fewest = Monitor(VAL.take(np.arange(12)), None, 6)
    with pytest.raises(ValueError, match=message):
        fewest.measure(drawn, labels)


# ---- troubles, of made-up logs

FLOOR = {"distance": 1.0, "coverage": 0.97, "entropy": 0.99, "duplicates": 0.01, "spread": 1.0}
GOOD = {"distance": 5.0, "coverage": 0.4, "entropy": 0.9, "duplicates": 0.02, "spread": 0.9}
BAD = {"distance": 90.0, "coverage": 0.0, "entropy": 0.0, "duplicates": 1.0, "spread": 0.001}
STEP = {"discriminator_loss": 0.9, "generator_loss": 1.2} | {
    "discriminator_grad_norm": 2.0,
    "generator_grad_norm": 1.0,
}


def game_of(*judged: dict[str, float], every: int = 100, **changes: float) -> list[dict]:
    """A log with an evaluation every so many steps; changes hold after the first half."""
    log = [{"step": step} | STEP for step in range(1, every * len(judged) + 1)]
    for entry in log[len(log) // 2 :]:
        entry |= changes
    for i, figures in enumerate(judged, 1):
        log[every * i - 1] |= figures
    return log


def kinds(log: list[dict], loss: str = "non_saturating", baseline=FLOOR) -> list[tuple[int, str]]:
    return [(trouble.step, trouble.kind) for trouble in find_troubles(log, loss, baseline)]


def test_find_troubles_finds_none_in_healthy_training():
    assert kinds(game_of(GOOD, GOOD, GOOD)) == []
    assert kinds([]) == kinds(game_of(GOOD, every=3)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("entropy", 0.4), ("duplicates", 0.6), ("spread", 0.05), ("coverage", 0.005)],
)
def test_any_loss_of_variety_after_success_is_a_collapse(name, value):
    (trouble,) = find_troubles(game_of(GOOD, GOOD | {name: value}, BAD), "hinge", FLOOR)
    assert (trouble.step, trouble.kind, trouble.fatal) == (200, "collapse", True)
    assert f"{name} {value:.2f} (real {FLOOR[name]:.2f})" in str(trouble)
    assert str(trouble).startswith("step 200: collapse: ")


def test_a_collapse_that_comes_again_is_named_again():
    assert kinds(game_of(GOOD, BAD, GOOD, BAD)) == [(200, "collapse"), (400, "collapse")]


def test_nothing_learnt_yet_is_no_collapse():
    falling = [BAD | {"distance": 90.0 - i} for i in range(9)]  # by a hundredth in three
    assert kinds(game_of(*falling)) == []  # the distance falls
    assert kinds(game_of(*[BAD] * 9, every=20)) == []  # it is the beginning
    far = [GOOD | {"coverage": 0.0}] * 9  # varied, but like no real image
    assert kinds(game_of(*far)) == []


def test_a_game_that_never_gets_anywhere_has_collapsed():
    assert kinds(game_of(*[BAD] * 6)) == [(400, "collapse")]
    assert kinds(game_of(*[BAD] * 9, every=30)) == [(210, "collapse")]
    for name in ("entropy", "duplicates"):  # which need longer
        log = game_of(*[GOOD | {"coverage": 0.0, name: BAD[name]}] * 12)
        assert kinds(log) == [(1000, "collapse")]


def test_without_a_classifier():
    baseline, good, bad = (
        {k: v for k, v in d.items() if k != "entropy"} for d in (FLOOR, GOOD, BAD)
    )
    assert kinds(game_of(good, bad), baseline=baseline) == [(200, "collapse")]


def test_real_images_that_are_alike_themselves():
    baseline = FLOOR | {"entropy": 0.0, "duplicates": 1.0}  # one class, all duplicates
    figures = GOOD | {"entropy": 0.0, "duplicates": 1.0}
    assert kinds(game_of(figures, figures, figures), baseline=baseline) == []


def test_a_vanished_gradient():
    log = game_of(*[GOOD] * 6, generator_grad_norm=5e-4)
    (trouble,) = find_troubles(log, "minimax", FLOOR)
    assert (trouble.step, trouble.kind, trouble.fatal) == (400, "vanished", True)
    assert kinds(game_of(*[GOOD] * 6, generator_grad_norm=2e-3)) == []
    falling = [GOOD | {"distance": 50.0 - i} for i in range(6)]
    assert kinds(game_of(*falling, generator_grad_norm=5e-4)) == []  # it learns all the same
    log = game_of(*[GOOD] * 6, generator_grad_norm=0.01)
    for entry in log[50:53]:  # a spike
        entry["generator_grad_norm"] = 1e6
    assert kinds(log) == []


def test_a_gradient_that_never_was():
    log = game_of(*[GOOD] * 4)
    for entry in log:
        entry["generator_grad_norm"] = 0.0
    assert kinds(log) == [(400, "vanished")]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [0.001, -0.2])
def test_a_saturated_discriminator(loss, value):
    log = game_of(GOOD, GOOD, GOOD, discriminator_loss=value)
    for entry in log[::4]:  # a penalty, every fourth step
        entry["discriminator_loss"] += 0.5
    assert kinds(log, loss) == ([] if loss == "wasserstein" else [(300, "saturated")])
    assert kinds(game_of(GOOD, GOOD, GOOD, discriminator_loss=0.05), loss) == []


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "wasserstein"])
def test_find_troubles_finds_a_discriminator_at_chance(loss):
    scores = torch.linspace(-2, 2, 4001)
    values = torch.stack([discriminator_loss(loss, score, score) for score in scores])
    told_nothing = values.min().item()
    poor, good = GOOD | {"coverage": 0.3}, GOOD | {"coverage": 0.9}
    log = game_of(*[poor] * 6, discriminator_loss=told_nothing)
    assert kinds(log, loss) == [(400, "at chance")]
    assert kinds(game_of(*[good] * 6, discriminator_loss=told_nothing), loss) == []
    falling = [poor | {"distance": 50.0 - i} for i in range(6)]
    assert kinds(game_of(*falling, discriminator_loss=told_nothing), loss) == []
    for entry in log[::50]:
        entry["discriminator_loss"] += 0.05
    assert kinds(log, loss) == []


def test_steps_that_were_not_finite_are_left_out():
    log = game_of(GOOD, GOOD)
    log[120] |= {"generator_grad_norm": None, "discriminator_loss": None}
    del log[130]["generator_grad_norm"]
    assert kinds(log) == []


@settings(max_examples=40)
@given(st.data())
def test_what_is_said_of_a_step_depends_on_no_later_one(data):
    choices = st.sampled_from([GOOD, BAD, BAD | {"distance": 80.0}])
    log = game_of(*data.draw(st.lists(choices, min_size=1, max_size=6)), every=60)
    for name in ("discriminator_loss", "generator_grad_norm"):
        border = data.draw(st.integers(0, len(log)))
        for entry in log[border:]:
            entry[name] = data.draw(st.shared(st.sampled_from([0.0, 1.386]), key=name))
    end = data.draw(st.integers(1, len(log)))
    whole = find_troubles(log, "minimax", FLOOR)
    assert find_troubles(log[:end], "minimax", FLOOR) == [t for t in whole if t.step <= end]


# ---- troubles, of games that are played


class Scorer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.LeakyReLU(0.2)
        )
        self.score = torch.nn.Linear(128, 1)
        self.gain = 1.0

    def forward(self, images, labels=None):
        return self.gain * self.score(self.body(images)).squeeze(1), None


class Maker(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(16, 128), torch.nn.LeakyReLU(0.2), torch.nn.Linear(128, 64)
        )
        self.variety = 1.0

    def forward(self, noise, labels=None):
        return self.body(self.variety * noise).tanh().view(-1, 1, 8, 8)


def play(
    game: Game,
    steps: int,
    rates=(1e-3, 1e-3),
    one_image=lambda step: False,
    gain: float = 1.0,
    every: int = 100,
) -> list[dict]:
    """Play on digits, small networks against each other, and write a run's log."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maker, scorer = Maker(), Scorer()
    scorer.gain = gain
    players = {"discriminator": scorer, "generator": maker}
    chances = torch.Generator().manual_seed(0)
    optimizers = {
        name: torch.optim.Adam(player.parameters(), rate, betas=(0.5, 0.99))
        for (name, player), rate in zip(players.items(), rates, strict=True)
    }
    watching, log = Monitor(VAL, None, 360), []
    fixed = torch.randn(360, 16, generator=torch.Generator().manual_seed(1))
    for step in range(1, steps + 1):
        maker.variety = 0.0 if one_image(step) else 1.0
        entry: dict[str, float] = {"step": step}
        for name, loss in (
            ("discriminator", game.discriminator_loss),
            ("generator", game.generator_loss),
        ):
            which = torch.randint(len(TRAIN), (64,), generator=chances).numpy()
            noise = torch.randn(64, 16, generator=chances)
            batch = Batch(TRAIN.batch(which), noise, torch.rand(64, UNIFORMS, generator=chances))
            lost = loss(scorer, maker, batch)
            for player in players.values():
                player.zero_grad()
            lost.backward()
            norm = torch.nn.utils.clip_grad_norm_(players[name].parameters(), math.inf)
            optimizers[name].step()
            entry |= {f"{name}_loss": lost.item(), f"{name}_grad_norm": norm.item()}
        if step % every == 0:
            with torch.no_grad():
                entry |= watching.measure(maker(fixed))
        log.append(entry)
    return log


PIXEL_FLOOR = Monitor(VAL, None, 360).baseline
REGULAR = Game("relativistic", r1=1.0, r2=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "game",
    [
        REGULAR,
        pytest.param(Game("non_saturating", r1=1.0), marks=pytest.mark.slow),
        pytest.param(Game("hinge", r1=1.0), marks=pytest.mark.slow),
        pytest.param(Game("wasserstein", gradient_penalty=10.0), marks=pytest.mark.slow),
    ],
    ids=lambda game: game.loss,
)
def test_games_that_go_well(game):
    log = play(game, 500, every=25)
    assert find_troubles(log, game.loss, PIXEL_FLOOR) == []
    assert log[-1]["distance"] < log[24]["distance"] / 2


def first(log: list[dict], loss: str, kind: str) -> Trouble:
    return next(t for t in find_troubles(log, loss, PIXEL_FLOOR) if t.kind == kind)


@pytest.mark.slow
def test_a_generator_that_forgets_its_noise():
    log = play(REGULAR, 400, one_image=lambda step: step > 320, every=25)
    (trouble,) = find_troubles(log, REGULAR.loss, PIXEL_FLOOR)
    assert (trouble.step, trouble.kind) == (325, "collapse")


def test_a_generator_that_has_one_image_from_the_start():
    log = play(REGULAR, 300, one_image=lambda step: True, every=25)
    (trouble,) = find_troubles(log, REGULAR.loss, PIXEL_FLOOR)
    assert trouble.kind == "collapse"
    assert 200 <= trouble.step <= 250


@pytest.mark.slow
def test_a_discriminator_that_is_too_good():
    log = play(Game("minimax"), 500, rates=(1e-2, 1e-5), every=50)
    assert first(log, "minimax", "saturated").step <= 200
    assert first(log, "minimax", "vanished").step <= 500
    assert log[-1]["discriminator_loss"] < 1e-3


def test_a_discriminator_that_hardly_scores():
    log = play(Game("non_saturating"), 300, rates=(1e-5, 1e-3), gain=1e-3, every=25)
    assert first(log, "non_saturating", "at chance").step <= 300


# ---- on the recipe's log


@pytest.mark.slow
def test_a_run_of_the_recipe(tmp_path):
    small = (
        "--widths",
        "8",
        "--discriminator_widths",
        "8",
        "--compile",
        "no",
        "--eval_samples",
        "60",
    )
    length = ("--max_steps", "20", "--batch_size", "8", "--evaluations", "2")
    run_here("train_gan", "--output_dir", tmp_path / "run", *small, *length)
    log, baseline = log_of(tmp_path / "run"), Monitor(VAL, None, 60).baseline
    assert [entry["step"] for entry in log if "coverage" in entry] == [10, 20]
    assert all(STEP.keys() <= entry.keys() for entry in log)
    assert find_troubles(log, "relativistic", baseline) == []
    drawn = np.asarray(Image.open(tmp_path / "run" / "loss.png").convert("RGB"))
    assert np.array_equal(drawn, picture(log, baseline, [], tmp_path / "game.png"))


@pytest.mark.slow
def test_a_run_that_collapses_is_stopped(tmp_path, capsys):
    small = ("--widths", "8", "8", "8", "--discriminator_widths", "8", "8", "--compile", "no")
    small += (
        "--eval_samples",
        "60",
        "--batch_size",
        "16",
        "--evaluations",
        "12",
        "--max_steps",
        "600",
    )
    wild = ("--preset", "dcgan", "--learning_rate", "0.1", "--stop_on_collapse")
    with pytest.raises(SystemExit) as stopped:
        run_here("train_gan", "--output_dir", tmp_path, *small, *wild)
    assert stopped.value.code == 0
    log, said = log_of(tmp_path), capsys.readouterr().err
    assert 200 <= log[-1]["step"] < 600
    fatal = [
        t for t in find_troubles(log, "non_saturating", Monitor(VAL, None, 60).baseline) if t.fatal
    ]
    assert fatal[0].step == log[-1]["step"]
    assert str(fatal[0]) in said
    assert (tmp_path / "model_index.json").exists()


# ---- the picture


def picture(log: list[dict], baseline: dict[str, float], found: list[Trouble], path: Path):
    curves.plot_game(log, baseline, found, path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_troubles_are_drawn_in_red(tmp_path):
    log = game_of(GOOD, BAD, BAD)
    found = [Trouble(200, kind, "", True) for kind in curves.SHOWN_BY]
    plain, marked = (picture(log, FLOOR, each, tmp_path / "a.png") for each in ([], found))
    red = (marked[..., 0] > 150) & (marked[..., 1:] < 90).all(2)
    assert red.sum() > 500
    assert not ((plain[..., 0] > 150) & (plain[..., 1:] < 90).all(2)).any()
    assert {each.name for each in tmp_path.iterdir()} == {"a.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "log",
    [
        game_of(GOOD, every=1),
        game_of(GOOD | {"label_accuracy": 0.5}, GOOD),
        [{k: v for k, v in entry.items() if k != "entropy"} for entry in game_of(GOOD, GOOD)],
        game_of(GOOD, BAD | {"distance": 0.0}, generator_grad_norm=0.0),
        [STEP | {"step": 1, "generator_loss": None, "discriminator_loss": None} | BAD],
        game_of(*[GOOD] * 20, every=1000),
    ],
    ids=["one step", "labels", "no classes", "zeros", "nothing finite", "long"],
)
def test_any_log_can_be_drawn(log, tmp_path):
    baseline = FLOOR | {"label_accuracy": 0.98}
    assert picture(log, baseline, [], tmp_path / "a.png").shape == (770, 1430, 3)
