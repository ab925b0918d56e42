"""Training under differential privacy: gradients, noise, draws, budgets, and that nothing leaks."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import ON_CPU, TWO, benchmark, log_of, recipe_module, run_here, weights_of
from PIL import Image
from scipy import stats
from torch.func import functional_call

import genkit
from genkit.data import images
from genkit.hub import staging
from genkit.models import mean_embedding, private
from genkit.models.mean_embedding import RandomFeatures
from genkit.models.private_critic import Critic, CriticSteps
from genkit.training import accounting, checkpoints
from genkit.vision import usefulness

KEY = bytes(range(32))
TINY = "--conditional --widths 8 4 --critic_widths 4 8 --latent_dim 4 --accountant rdp"
SHORT = "--max_steps 6 --evaluations 2 --save_steps 2 --keep_checkpoints 9 --batch_size 100"
GAN = ("--method", "gan", *TINY.split(), *SHORT.split(), "--epsilon", "8", "--delta", "1e-4")


def small_critic(size=(1, 8, 8), labels=3):
    torch.manual_seed(0)
    critic = Critic(size, (4, 6), labels).double()
    for weight in critic.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return critic


def row_loss(critic):
    def loss(weights, image, classes):
        return F.relu(1 - functional_call(critic, weights, (image[None], classes[None]))[0])

    return loss


def some_rows(count, size=(1, 8, 8), labels=3):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, *size, generator=generator, dtype=torch.float64) * 2 - 1
    classes = F.one_hot(torch.arange(count) % labels, labels).double()
    return pixels, classes


def parameters_of(critic):
    return {name: weight.detach() for name, weight in critic.named_parameters()}


# ---- gradients


@pytest.mark.parametrize("limit", [0.5, 3.0, 1e6])
def test_clipped_gradients_of_rows_are_those_of_a_loop(limit):
    critic = small_critic()
    pixels, classes = some_rows(150)
    found, losses = private.clipped_sum(
        row_loss(critic), parameters_of(critic), (pixels, classes), limit
    )
    expected = torch.zeros_like(found)
    for i in range(150):
        critic.zero_grad()
        loss = F.relu(1 - critic(pixels[i : i + 1], classes[i : i + 1])[0])
        loss.backward()
        own = torch.cat([weight.grad.flatten() for weight in critic.parameters()])
        expected += own * min(1.0, limit / max(own.norm().item(), 1e-300))
        assert losses[i].item() == pytest.approx(loss.item(), abs=1e-12)
    assert (found - expected).abs().max() < 1e-6


def test_no_row_moves_the_sum_by_more_than_the_limit():
    critic = small_critic()
    pixels, classes = some_rows(20)
    pixels[3] *= 1e6
    pixels[7] *= 1e-6
    weights = parameters_of(critic)
    whole, _ = private.clipped_sum(row_loss(critic), weights, (pixels, classes), 0.7)
    for i in range(20):
        rest = torch.arange(20) != i
        less, _ = private.clipped_sum(row_loss(critic), weights, (pixels[rest], classes[rest]), 0.7)
        assert (whole - less).norm() <= 0.7 * (1 + 1e-9)


def test_a_row_whose_gradient_is_not_finite_adds_nothing():
    critic = small_critic()
    pixels, classes = some_rows(5)
    pixels[2] = math.inf
    weights = parameters_of(critic)
    whole, _ = private.clipped_sum(row_loss(critic), weights, (pixels, classes), 1.0)
    rest = torch.arange(5) != 2
    less, _ = private.clipped_sum(row_loss(critic), weights, (pixels[rest], classes[rest]), 1.0)
    assert whole.isfinite().all()
    assert torch.allclose(whole, less, atol=1e-12)


def test_an_empty_draw_is_a_step_of_noise_alone():
    critic = small_critic()
    pixels, classes = some_rows(0)
    total, losses = private.clipped_sum(
        row_loss(critic), parameters_of(critic), (pixels, classes), 1.0
    )
    assert not total.any() and len(losses) == 0
    normal = private.normals(KEY, "noise", 1, len(total))
    mean = private.noisy_mean(total, normal, 2.0, 3.0, 10.0)
    assert mean.numpy() == pytest.approx(normal * 0.6)


def test_parts_of_a_draw_add_up_to_it():
    critic = small_critic()
    pixels, classes = some_rows(70)
    weights, loss = parameters_of(critic), row_loss(critic)
    whole, _ = private.clipped_sum(loss, weights, (pixels, classes), 1.0)
    for parts in (2, 4):
        borders = [70 * i // parts for i in range(parts + 1)]
        shards = [
            private.clipped_sum(loss, weights, (pixels[a:b], classes[a:b]), 1.0)[0]
            for a, b in itertools.pairwise(borders)
        ]
        assert (sum(shards) - whole).abs().max() < 1e-6


def test_a_gradient_is_given_to_parameters_in_their_order():
    critic = small_critic()
    vector = torch.arange(sum(p.numel() for p in critic.parameters()), dtype=torch.float64)
    private.assign_gradient(critic, vector)
    assert torch.equal(torch.cat([p.grad.flatten() for p in critic.parameters()]), vector)


def test_singular_values_are_limited():
    critic = small_critic()
    private.limit_spectrum(critic, 0.5)
    matrices = [weight for weight in critic.parameters() if weight.ndim == 2]
    assert all(torch.linalg.matrix_norm(weight, 2) <= 0.5 + 1e-9 for weight in matrices)
    before = [weight.clone() for weight in matrices]
    private.limit_spectrum(critic, 0.6)
    assert all(torch.equal(a, b) for a, b in zip(before, matrices, strict=True))


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 10, 7), (1, 28, 28)])
def test_a_critic_scores_each_image_by_itself(size):
    critic = small_critic(size)
    pixels, classes = some_rows(6, size)
    together = critic(pixels, classes)
    alone = torch.cat([critic(pixels[i : i + 1], classes[i : i + 1]) for i in range(6)])
    assert together.shape == (6,)
    assert torch.allclose(together, alone, atol=1e-12)
    other = critic(pixels, classes.roll(1, 0))
    assert not torch.allclose(together, other)


@pytest.mark.parametrize("accuracy", [0.3, 0.9])
def test_critic_steps_double_when_the_critic_falls_behind(accuracy):
    turns, generators = CriticSteps(), []
    for step in range(1, 61):
        if turns.is_generators():
            generators.append(step)
            turns.record(accuracy)
    if accuracy < 0.6:  # 20 turns of one step, then of two
        assert generators == [*range(1, 21), *range(22, 61, 2)]
        assert turns.count == 4
    else:
        assert generators == [*range(1, 61)]


def test_critic_steps_that_are_given_stay():
    turns = CriticSteps(3)
    for step in range(1, 200):
        assert turns.is_generators() == (step % 3 == 0)
        turns.record(0.0)


def test_critic_steps_go_on_where_they_were():
    turns, resumed = CriticSteps(), CriticSteps()
    for step in range(70):
        if step == 33:
            resumed.load_state(json.loads(json.dumps(turns.state())))
        following = turns.is_generators()
        turns.record(0.2)
        if step >= 33:
            assert resumed.is_generators() == following
            resumed.record(0.2)
    assert resumed.state() == turns.state()


# ---- secret random numbers


def test_noise_is_standard_normal():
    count = 200_001
    drawn = private.normals(KEY, "noise", 5, count)
    assert drawn.shape == (count,)
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], count)
    assert low < np.square(drawn).sum() < high
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(drawn[: count // 2], drawn[-(count // 2) :])[0, 1]) < 0.02


def test_noise_of_a_step_has_the_variance_that_is_accounted():
    total = torch.zeros(100_000, dtype=torch.float64)
    normal = private.normals(KEY, "noise", 1, len(total))
    added = private.noisy_mean(total, normal, 1.3, 0.5, 20.0).numpy() * 20
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], len(total))
    assert low < np.square(added / (1.3 * 0.5)).sum() < high


def test_random_numbers_depend_on_key_purpose_and_step():
    base = private.uniforms(KEY, "noise", 1, 100)
    assert np.array_equal(base, private.uniforms(KEY, "noise", 1, 100))
    assert np.array_equal(base[:10], private.uniforms(KEY, "noise", 1, 10))
    others = [(KEY, "draw", 1), (KEY, "noise", 2), (KEY[::-1], "noise", 1)]
    for other in others:
        assert not np.intersect1d(base, private.uniforms(*other, 100)).size
    assert base.min() > 0 and base.max() < 1


def test_each_row_is_drawn_by_itself():
    count, rate, steps = 300, 0.1, 400
    drawn = np.zeros((steps, count))
    for step in range(steps):
        drawn[step, private.poisson_draw(KEY, step, count, rate)] = 1
    sizes = drawn.sum(1)
    # Binomial sizes, as no shuffled batch has
    assert sizes.mean() == pytest.approx(count * rate, rel=0.03)
    assert sizes.var() == pytest.approx(count * rate * (1 - rate), rel=0.2)
    by_row = drawn.sum(0)
    expected = np.full(count, by_row.mean())
    assert stats.chisquare(by_row, expected).pvalue > 1e-3
    assert not len(private.poisson_draw(KEY, 1, 10, 1e-9))


# ---- accounting


def test_divergences_without_sampling_are_those_of_gaussians():
    for noise in (0.5, 1.0, 3.0):
        found = accounting.renyi_divergences(noise, 1.0)
        few = accounting.ORDERS < 64
        expected = accounting.ORDERS / (2 * noise**2)
        assert found[few] == pytest.approx(expected[few], rel=1e-6)


def test_divergences_of_whole_orders_are_their_sum():
    noise, rate = 1.1, 0.02
    found = accounting.renyi_divergences(noise, rate)
    for order in (12, 20, 40):
        k = np.arange(order + 1)
        log_terms = [
            math.lgamma(order + 1) - math.lgamma(i + 1) - math.lgamma(order - i + 1)
            + (order - i) * math.log1p(-rate) + i * math.log(rate) + (i * i - i) / (2 * noise**2)
            for i in k
        ]  # fmt: skip
        expected = np.logaddexp.reduce(log_terms) / (order - 1)
        index = int(np.flatnonzero(order == accounting.ORDERS)[0])
        assert found[index] == pytest.approx(expected, rel=1e-6)


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise():
    base = accounting.epsilon("rdp", 1.0, 0.01, 1000, 1e-5)
    assert accounting.epsilon("rdp", 1.0, 0.01, 0, 1e-5) == 0
    assert accounting.epsilon("rdp", 1.0, 0.01, 1100, 1e-5) > base
    assert accounting.epsilon("rdp", 1.0, 0.011, 1000, 1e-5) > base
    assert accounting.epsilon("rdp", 1.1, 0.01, 1000, 1e-5) < base
    assert accounting.epsilon("rdp", 1.0, 0.01, 1000, 1e-4) < base


@pytest.mark.parametrize(
    ("budget", "rate", "steps"), [(10, 0.01, 3000), (1, 0.01, 3000), (5, 1, 1)]
)
def test_noise_from_a_budget_spends_it(budget, rate, steps):
    noise = accounting.find_noise("rdp", budget, rate, steps, 1e-5)
    spent = accounting.epsilon("rdp", noise, rate, steps, 1e-5)
    assert 0.98 * budget < spent <= budget


def test_steps_from_a_budget_do_not_exceed_it():
    steps = accounting.find_steps("rdp", 2.0, 1.0, 0.01, 1e-5, None)
    assert accounting.epsilon("rdp", 1.0, 0.01, steps, 1e-5) <= 2
    assert accounting.epsilon("rdp", 1.0, 0.01, int(steps * 1.01) + 2, 1e-5) > 2
    assert accounting.find_steps("rdp", 2.0, 1.0, 0.01, 1e-5, 7) == 7
    with pytest.raises(ValueError, match=r"spends more than --epsilon 0\.1 in one step"):
        accounting.find_steps("rdp", 0.1, 0.3, 0.5, 1e-5, 7)


GRID = [(0.7, 0.01, 500), (1.0, 0.01, 2000), (1.5, 0.05, 300), (3.0, 0.1, 1000), (1.0, 1.0, 1)]


@pytest.mark.parametrize(("noise", "rate", "steps"), GRID)
def test_epsilon_is_that_of_dp_accounting(noise, rate, steps):
    dp = pytest.importorskip("dp_accounting")
    own = dp.GaussianDpEvent(noise)
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, own) if rate < 1 else own, steps)
    for delta in (1e-5, 1e-3):
        rdp = dp.rdp.RdpAccountant(list(accounting.ORDERS)).compose(event).get_epsilon(delta)
        assert accounting.epsilon("rdp", noise, rate, steps, delta) == pytest.approx(rdp, rel=0.01)
        if accounting.default_accountant() == "prv":
            pld = dp.pld.PLDAccountant().compose(event).get_epsilon(delta)
            found = accounting.epsilon("prv", noise, rate, steps, delta)
            assert found == pytest.approx(pld, rel=0.01)
            assert found < rdp * 1.01


# ---- mean embeddings


def test_what_an_image_adds_to_an_embedding_has_norm_1():
    pixels, classes = some_rows(9)
    features = RandomFeatures((1, 8, 8), 400, 0)(pixels.float())
    assert features.norm(dim=1).tolist() == pytest.approx([1] * 9, rel=1e-5)
    whole = mean_embedding.class_sums(features, classes.float())
    less = mean_embedding.class_sums(features[1:], classes[1:].float())
    assert (whole - less).norm().item() == pytest.approx(1, rel=1e-5)


def test_some_features_are_columns_of_all():
    pixels, _ = some_rows(9)
    extract = RandomFeatures((1, 8, 8), 400, 0)
    some = torch.tensor([3, 150, 199])
    found = extract(pixels.float(), some) * math.sqrt(3 / extract.pairs)
    assert torch.allclose(found, extract(pixels.float())[:, extract.columns(some)], atol=1e-6)
    descriptions = extract.describe(pixels.float())
    assert descriptions.norm(dim=1).tolist() == pytest.approx([1] * 9, rel=1e-5)
    distances = torch.cdist(descriptions, descriptions)
    whole = extract(pixels.float())
    kernels = sum((-(distances**2) / (2 * h**2)).exp() for h in mean_embedding.LENGTHS) / 2
    assert (whole @ whole.T - kernels).abs().max() < 0.25  # of 200 frequencies


def test_gradients_of_processes_average_to_that_of_the_batch():
    released = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    own = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    for part in own:
        part.requires_grad_()
    mean = (own[0] + own[1]) / 2
    whole = (mean - released).square().sum()
    expected = torch.autograd.grad(whole, own)
    for part, gradient in zip(own, expected, strict=True):
        loss = mean_embedding.embedding_loss(released, part, mean.detach())
        assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
        (found,) = torch.autograd.grad(loss / 2, part)
        assert torch.allclose(found, gradient, atol=1e-6)


# ---- the recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private") / "run"
    run_here("train_private", *GAN, "--output_dir", folder)
    return folder


def key_of(folder):
    last, _ = checkpoints.find_newest(folder / "checkpoints")
    return checkpoints.load_checkpoint(last)["secret"]["key"]


def test_the_card_says_what_is_guaranteed(run):
    card = (run / "README.md").read_text()
    settings = json.loads((run / "run.json").read_text())["settings"]
    spent = accounting.epsilon("rdp", settings["noise"], 100 / 1797, 6, 1e-4)
    assert 7.8 < spent <= 8
    noise = f"{settings['noise']:.6g}"
    for words in (f"{spent:.3f}", "| δ | 0.0001 |", "one image with its class added or removed"):
        assert words in card
    for words in ("Poisson", noise, "| 6, 6 |", "RDP of genkit", "Outside the"):
        assert words in card
    assert log_of(run)[-1]["epsilon"] == pytest.approx(spent)


def test_nothing_leaves_a_private_run_but_the_model(run, tmp_path):
    """No key, no hash of the data and no real image: neither in its folder nor in a push."""
    real = images.load_images("digits")
    staged = tmp_path / "staged"
    staged.mkdir()
    staging.stage(run, staged, "user/private")
    key = key_of(run)
    assert len(bytes.fromhex(key)) == 32
    pixels = {hashlib.sha256(real.pixels[i].tobytes()).hexdigest() for i in range(len(real))}
    found = [file for folder in (run, staged) for file in folder.rglob("*") if file.is_file()]
    assert {"README.md", "metrics.jsonl", "loss.png"} <= {file.name for file in found}
    for file in found:
        if "checkpoints" in file.parts:
            continue
        content = file.read_bytes()
        for secret in (key, real.sha256, real.sha256[:12]):
            assert secret.encode() not in content, file
            assert bytes.fromhex(secret) not in content, file
        if file.suffix == ".png":
            assert not pixels & hashes_of_tiles(file, *real.size), file
    assert not any("checkpoints" in file.parts for file in staged.rglob("*"))
    logged = {name for line in log_of(run) for name in line}
    assert logged <= {
        "step", "rate", "epsilon", "discriminator_loss", "discriminator_grad_norm",
        "generator_loss", "generator_grad_norm",
    }  # fmt: skip


def hashes_of_tiles(file, channels, height, width):
    """Hash every tile of a picture that has the size of an image."""
    picture = np.asarray(Image.open(file).convert("L" if channels == 1 else "RGB"))
    view = np.lib.stride_tricks.sliding_window_view(picture, (height, width))[::2, ::2]
    tiles = np.ascontiguousarray(view.reshape(-1, height * width))
    varied = tiles[tiles.std(1) > 0]
    return {hashlib.sha256(tile.tobytes()).hexdigest() for tile in np.unique(varied, axis=0)}


def test_a_killed_run_repeats_its_draws_and_its_noise(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for step in (4, 6):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    run_here("train_private", "--output_dir", again, "--resume")
    assert weights_of(again) == weights_of(run)
    assert log_of(again) == log_of(run)
    assert key_of(again) == key_of(run)


def test_two_runs_have_two_keys_and_one_seed(run, tmp_path):
    run_here("train_private", *GAN, "--output_dir", tmp_path / "other")
    assert key_of(tmp_path / "other") != key_of(run)
    assert weights_of(tmp_path / "other")[2] != weights_of(run)[2]


def test_a_run_without_its_key_does_not_go_on(run, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints")
    last, _ = checkpoints.find_newest(run / "checkpoints")
    state = checkpoints.load_checkpoint(last)
    del state["secret"]["key"]
    checkpoints.save_checkpoint(again / "checkpoints", 6, state, 2)
    with pytest.raises(ValueError, match="does not hold the key of the run's noise"):
        run_here("train_private", "--output_dir", again, "--resume")


def test_the_images_cannot_be_changed(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    record = json.loads((again / "run.json").read_text())
    record["settings"]["resolution"] = 8
    with recipe_module("train_private", "--output_dir", again, "--resume") as module:
        loaded = images.load_images("digits")
        changed = dataclasses.replace(loaded, sha256="0" * 64)
        module.private_run.images.load_images, keep = (lambda *_, **__: changed), images.load_images
        try:
            with pytest.raises(ValueError, match="was started with other --images"):
                module.main()
        finally:
            module.private_run.images.load_images = keep


def test_a_mean_embedding_is_released_once(tmp_path):
    words = "--method merf --features 200 --max_steps 4 --evaluations 2 --epsilon 1 --delta 1e-4 "
    words += "--conditional --widths 8 --accountant rdp"
    run_here("train_private", *words.split(), "--output_dir", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    spent = accounting.epsilon("rdp", settings["noise"], 1.0, 1, 1e-4)
    assert [line["epsilon"] for line in log_of(tmp_path / "run") if "epsilon" in line] == [
        spent
    ] * 2
    assert "none: all, once" in (tmp_path / "run" / "README.md").read_text()


def test_public_images_choose_the_model(tmp_path):
    words = ("--public_images", "digits", "--eval_samples", "60", "--output_dir", tmp_path / "run")
    run_here("train_private", *GAN, *words)
    evaluated = [line for line in log_of(tmp_path / "run") if "epsilon" in line]
    assert all({"distance", "coverage"} <= set(line) for line in evaluated)


BAD = [
    ("--epsilon 0", "--epsilon must be above 0"),
    ("--epsilon -1", "--epsilon must be above 0"),
    ("--delta 1", "--delta must be above 0 and below 1"),
    ("--delta 0.01", "--delta 0.01 allows publishing one of 1,797 images"),
    ("--batch_size 2000", "--batch_size 2000 is more than the 1,797 images"),
    ("--val_images digits", "--val_images: figures of private images spend privacy"),
    ("--accept_changes", "--accept_changes: steps that are repeated"),
    ("--mixed_precision bf16", "--mixed_precision bf16"),
    ("--compile", "--compile is not for private training"),
    ("--loss wasserstein", "--loss wasserstein requires --weight_clip or --spectral_limit"),
    ("--patience 3", "--patience 3 requires --public_images"),
    ("--max_minutes 1", "--max_minutes: the noise follows from the number of steps"),
    ("--max_minutes 1 --max_steps 5 --decay 0.5", "--max_minutes excludes --warmup and --decay"),
    ("--gradient_accumulation 2", "--gradient_accumulation is not for private training"),
    ("--noise 0.05 --epsilon 0.001 --max_steps 3", "spends more than --epsilon 0.001 in one step"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_what_cannot_be_private_is_refused(words, message, tmp_path):
    words += " --method gan --accountant rdp"
    with pytest.raises(ValueError) as refused:
        run_here("train_private", *words.split(), "--output_dir", tmp_path / "run")
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_train_gan_names_the_recipe_that_is_private(tmp_path):
    with pytest.raises(ValueError, match=r"--private: unknown flag; train_private\.py"):
        run_here("train_gan", "--private", "--epsilon", "10", "--output_dir", tmp_path / "run")


def test_few_images_are_refused(tmp_path):
    pictures = tmp_path / "pictures" / "a"
    pictures.mkdir(parents=True)
    for shade in range(5):
        Image.new("L", (8, 8), 40 * shade).save(pictures / f"{shade}.png")
    words = ["--images", pictures.parent, "--accountant", "rdp", "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match="has 5 images; with fewer than 1,000 no useful ε"):
        run_here("train_private", *words)


def test_more_noise_than_a_budget_allows_ends_the_run_early(tmp_path):
    words = f"--method gan {TINY} --batch_size 100 --noise 1 --epsilon 2 --delta 1e-4".split()
    words += ["--max_steps", "4000"]
    with recipe_module("train_private", *words, "--output_dir", tmp_path / "run") as module:
        settings = module.parse(module.Settings, module.preset)
        with module.Run(settings) as run:
            train, _ = module.private_run.load_private(run, settings)
            budget = module.private_run.plan(run, settings, len(train))
    assert settings.max_steps == budget.steps < 4000
    assert budget.spent(budget.steps) <= 2


@pytest.mark.slow
def test_two_processes_are_one(run, train, tmp_path):
    """The same key gives the same run, up to rounding."""
    other = tmp_path / "two"
    shutil.copytree(run, other)
    for step in (2, 4, 6):
        shutil.rmtree(other / "checkpoints" / f"step-{step:08d}")
    words = ["--output_dir", other, "--resume"]
    done = train(*words, recipe="train_private", launcher=TWO, env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert key_of(other) == key_of(run)
    for ours, theirs in zip(log_of(run), log_of(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


# ---- how useful generated images are


def test_images_of_the_right_classes_teach_more_than_others(monkeypatch):
    monkeypatch.setattr(usefulness, "STEPS", 60)
    real = images.load_images("digits")
    some, rest = real.take(np.arange(1200)), real.take(np.arange(1200, 1797))
    state = torch.get_rng_state()
    good = genkit.evaluate(some, rest, task="classify", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    labels = np.random.default_rng(0).permutation(some.labels[some.rows])
    bad = genkit.evaluate(some, rest, task="classify", labels=labels)
    assert good.accuracy > 0.5 > bad.accuracy
    assert (good.count, good.real, good.seed) == (1200, 597, 3)
    assert good.margin == pytest.approx(1.96 * math.sqrt(good.accuracy * (1 - good.accuracy) / 597))
    assert f"accuracy  {good.accuracy:.4f}" in str(good) and rest.sha256[:12] in str(good)


def test_a_private_model_is_put_to_use(run, monkeypatch):
    monkeypatch.setattr(usefulness, "STEPS", 5)
    found = genkit.evaluate(run, "digits", task="classify", count=300)
    assert 0 <= found.accuracy < 0.6 and found.count == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "draw"}, "task must be classify, got 'draw'"),
        ({"task": "classify", "k": 3}, "k=3 compares features; leave it out with a task"),
        ({"task": "classify", "extractor": "x"}, "extractor='x' compares features"),
        ({"task": "classify", "count": 0}, "count must be 1 or more, got 0"),
    ],
)
def test_options_that_are_for_other_evaluations_are_refused(options, message):
    real = images.load_images("digits")
    with pytest.raises(ValueError, match=re.escape(message)):
        genkit.evaluate(real, real, **options)


def test_images_without_classes_teach_nothing():
    real = images.load_images("digits")
    with pytest.raises(ValueError, match="requires images with labels"):
        genkit.evaluate(real.batch(np.arange(20)), real, task="classify")


# ---- the audit


def test_a_bound_of_the_audit_is_below_what_was_spent():
    audit = benchmark("privacy")
    rng = np.random.default_rng(0)
    # without sampling, one step of noise 1: the log-likelihood ratio is normal
    without, with_it = rng.normal(-0.5, 1, 4000), rng.normal(0.5, 1, 4000)
    bound = audit.lower_bound((without, with_it))
    spent = accounting.epsilon("rdp", 1.0, 1.0, 1, audit.DELTA)
    assert 0.3 < bound < spent
    assert audit.lower_bound((without, without)) == 0
    assert audit.lower_bound((without - 9, with_it + 9)) > 5


@pytest.mark.slow
def test_the_audit_catches_broken_steps(capsys):
    audit = benchmark("privacy")
    audit.audit(1000)
    lines = capsys.readouterr().out.splitlines()
    bounds = {line[:16].strip(): float(line.split()[-1]) for line in lines[1:]}
    assert list(bounds) == ["as it is", *audit.BROKEN]
    assert bounds.pop("as it is") < audit.CLAIM < min(bounds.values())
