import math
from functools import partial

import matplotlib.image
import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from genkit.data.images import Images, load_images
from genkit.models import gan
from genkit.models.autoencoder import Autoencoder, AutoencoderPipeline
from genkit.models.autoencoder_losses import reconstruction_loss, variational_loss
from genkit.models.gan import GANPipeline
from genkit.vision import image_grid, latent, pipelines, projection

SIZE = (1, 8, 8)
DIM = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits")


def everything(data) -> torch.Tensor:
    return data.batch(np.arange(len(data)))


def fitted(data, variational: bool, labels: int = 0) -> AutoencoderPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(SIZE, DIM, widths=(64,), variational=variational, labels=labels)
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        rng = np.random.default_rng(0)
        for _ in range(250):
            which = rng.integers(len(data), size=64)
            x, told = data.batch(which), data.classes(which) if labels else None
            seen = model(x, torch.randn(1, 64, DIM) if variational else None, told)
            if variational:
                loss = variational_loss(seen, x, "bernoulli", 1.0)
            else:
                loss = reconstruction_loss(seen, x, "bernoulli")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().zero_grad()
    pipeline = AutoencoderPipeline(model)
    if not variational:
        model.fit_prior(pipeline.encode(everything(data)))
    return pipeline


@pytest.fixture(scope="module")
def vae(digits) -> AutoencoderPipeline:
    return fitted(digits, variational=True)


@pytest.fixture(scope="module")
def plain(digits) -> AutoencoderPipeline:
    """An autoencoder whose `place` moves and stretches."""
    return fitted(digits, variational=False)


@pytest.fixture(scope="module")
def conditional(digits) -> AutoencoderPipeline:
    return fitted(digits, variational=True, labels=10)


@pytest.fixture(scope="module")
def maps() -> AutoencoderPipeline:
    """A stock model, whose latents are feature maps; of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=2,
            norm_num_groups=4,
            sample_size=8,
        )
    return AutoencoderPipeline(vae.eval())


def flat(labels: int = 0) -> GANPipeline:
    """A GAN that decodes latents z of class c to tanh(A z + B c + b): without rectifiers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = gan.Generator(SIZE, 6, widths=(32,), slope=1.0, labels=labels).eval()
    with torch.no_grad():
        generator.first.weight.mul_(4)  # that images differ
    return GANPipeline(generator)


def taught(teacher: AutoencoderPipeline, labels: int = 0) -> GANPipeline:
    """A GAN that draws what an autoencoder does: as if trained, in a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = gan.Generator(SIZE, DIM, widths=(64,), labels=labels)
        optimizer = torch.optim.AdamW(generator.parameters(), 5e-3)
        for _ in range(250):
            noise = torch.randn(64, DIM)
            told = torch.randint(labels, (64,)) if labels else None
            with torch.no_grad():
                wanted = teacher.decode(noise, told)
            F.mse_loss(generator(noise, told), wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
    return GANPipeline(generator.eval())


@pytest.fixture(scope="module")
def drawer(vae) -> GANPipeline:
    return taught(vae)


@pytest.fixture(scope="module")
def conditional_drawer(conditional) -> GANPipeline:
    return taught(conditional, labels=10)


class Linear(Autoencoder):
    """Its means are not squashed."""

    def predict(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.stretch(latents).unflatten(1, SIZE)


def linear(length: int = 3, noise_to_latent: bool = False) -> AutoencoderPipeline:
    """An autoencoder that decodes latents z to W z + b, never near -1 and 1; W has unlike rows."""
    rng = np.random.default_rng(1)
    model = Linear(SIZE, length, widths=(), likelihood="gaussian")
    with torch.no_grad():
        model.stretch[0].weight.copy_(torch.from_numpy(rng.uniform(-0.05, 0.05, (64, length))))
        model.stretch[0].bias.copy_(torch.from_numpy(rng.uniform(-0.2, 0.2, 64)))
        if noise_to_latent:
            mix = np.tril(rng.uniform(0.3, 1.5, (length, length)))
            model.prior_scale.copy_(torch.from_numpy(mix))
            model.prior_mean.copy_(torch.from_numpy(rng.uniform(-1, 1, length)))
    return AutoencoderPipeline(model.eval())


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_picture(path) -> np.ndarray:
    """Return the pixels of a picture on which there is something, and nothing beside it."""
    pixels = matplotlib.image.imread(path)[..., :3]
    assert len(np.unique(pixels)) > 10
    assert not list(path.parent.glob(".*"))
    return pixels


# ---- encoding


def test_blocks_encode_what_the_model_encodes_at_once(digits, plain, maps):
    for pipeline in (plain, maps):
        expected = pipeline.encode(everything(digits))
        assert len(digits) % pipelines.ROWS
        for given_images in (digits, everything(digits)):
            found = pipelines.encode(pipeline, given_images)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_labels_go_with_their_images(digits, conditional):
    told = digits.classes(np.arange(len(digits)))
    expected = conditional.encode(everything(digits), told)
    for labels in (told, told.numpy(), told.tolist()):
        found = pipelines.encode(conditional, digits, labels)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (pipelines.encode(conditional, digits, told.flip(0)) - expected).abs().max() > 0.1


# ---- scatter


def test_two_latents_are_shown_as_they_are():
    latents = draws(50, 2)
    record = latent.scatter(latents, [0, 1] * 25)
    assert torch.equal(record.points, latents.double())
    assert record.explained is None and record.names == ["0", "1"]
    assert str(record) == "50 images, both latents, 2 classes"


@pytest.mark.parametrize("shape", [(40, 3), (30, 60), (25, 2, 3, 3), (3, 3)])
def test_more_latents_are_shown_by_their_principal_components(shape):
    latents = draws(*shape) * torch.linspace(1, 3, shape[-1])
    record = latent.scatter(latents)
    reference = PCA(2, svd_solver="full").fit(latents.flatten(1).double().numpy())
    expected = torch.from_numpy(reference.transform(latents.flatten(1).double().numpy()))
    signs = (record.points * expected).sum(0).sign()
    torch.testing.assert_close(record.points * signs, expected, atol=1e-9, rtol=0)
    assert record.explained == pytest.approx(reference.explained_variance_ratio_, rel=1e-9)
    share = 100 * sum(record.explained)
    assert f"{share:.0f} % of the variance of {latents[0].numel()} latents" in str(record)


def test_a_scatter_does_not_change_from_call_to_call():
    latents = draws(100, 20)
    assert torch.equal(latent.scatter(latents).points, latent.scatter(latents).points)


@pytest.mark.parametrize("kinds", [None, 1, 10, 11, 30])
def test_the_scatter_has_a_colour_for_each_class(tmp_path, kinds):
    """Classes lie around a circle; as many hues must be seen."""
    count = kinds or 1
    turn = 2 * math.pi * torch.arange(count) / count
    latents = 5 * torch.stack([turn.cos(), turn.sin()], 1).repeat(40, 1) + 0.3 * draws(
        40 * count, 2
    )
    classes = None if kinds is None else list(range(count)) * 40
    names = [f"class $ {i} 🙂_^" for i in range(count)] if kinds == 10 else ()
    latent.scatter(latents, classes, names).save(tmp_path / "scatter.png")
    pixels = assert_picture(tmp_path / "scatter.png")
    vivid = pixels[np.ptp(pixels, -1) > 0.35]
    hues = matplotlib.colors.rgb_to_hsv(vivid)[:, 0]
    seen = (np.histogram(hues, 60, (0, 1))[0] > 0).sum()
    assert seen >= min(count, 9) if kinds else seen <= 2  # one of the ten is grey


# ---- plane


@pytest.mark.parametrize(("side", "dims"), [(2, (0, 1)), (5, (2, 0)), (15, (0, 1))])
def test_the_plane_follows_the_normal_quantiles(side, dims):
    pipeline = flat()
    record = latent.plane(pipeline, side, dims)
    expected = scipy.stats.norm.ppf((np.arange(side) + 0.5) / side)
    assert record.quantiles == pytest.approx(expected, abs=1e-12)
    latents = record.latents.unflatten(0, (side, side)).numpy()
    for row in range(side):
        for column in range(side):
            z = np.zeros(6, np.float32)
            z[dims[0]], z[dims[1]] = expected[column], expected[side - 1 - row]
            np.testing.assert_array_equal(latents[row, column], z)
    torch.testing.assert_close(record.images, pipeline.decode(record.latents).detach())


def test_plane_maps_noise_to_latents():
    pipeline = linear(noise_to_latent=True)
    record = latent.plane(pipeline, 3, (0, 2))
    noise = torch.zeros(9, 3)
    for i in range(9):
        noise[i, 0] = record.quantiles[i % 3]
        noise[i, 2] = record.quantiles[2 - i // 3]
    torch.testing.assert_close(record.latents, pipeline.noise_to_latent(noise))
    torch.testing.assert_close(
        record.images, pipeline.decode(pipeline.noise_to_latent(noise)).detach()
    )


@pytest.mark.parametrize("kind", ["conditional", "conditional_drawer"])
def test_the_plane_of_a_class(request, kind):
    conditional = request.getfixturevalue(kind)
    for label in (3, np.int64(3)):
        record = latent.plane(conditional, 9, label=label)  # more than one block
        with torch.no_grad():
            expected = conditional.decode(record.latents, [3] * 81)
        torch.testing.assert_close(record.images, expected, atol=1e-5, rtol=0)


def test_the_picture_of_the_plane_has_gaps(tmp_path, vae):
    latent.plane(vae, 4).save(tmp_path / "plane.png")
    side = 4 * 56 + 5 * image_grid.GAP
    assert assert_picture(tmp_path / "plane.png").shape == (side, side, 3)


# ---- interpolation


def some_vectors(length: int) -> st.SearchStrategy[torch.Tensor]:
    numbers = st.floats(-4, 4, allow_subnormal=False, width=32)
    return st.lists(numbers, min_size=length, max_size=length).map(torch.tensor)


PAIRS = st.integers(2, 6).flatmap(lambda n: st.tuples(some_vectors(n), some_vectors(n)))


@given(PAIRS)
@settings(deadline=None)
def test_slerp_ends_exactly_and_its_length_changes_evenly(pair):
    start, end = pair
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    path = latent.slerp(start, end, t)
    assert torch.equal(path[0], start) and torch.equal(path[-1], end)
    lengths = path.double().norm(dim=1)
    expected = torch.lerp(start.double().norm(), end.double().norm(), t)
    torch.testing.assert_close(lengths, expected, atol=1e-5, rtol=1e-5)


@given(PAIRS)
@settings(deadline=None)
def test_slerp_turns_evenly(pair):
    start, end = (vector.double() for vector in pair)
    if start.norm() < 1e-3 or end.norm() < 1e-3:
        return
    path = latent.slerp(start, end, torch.linspace(0, 1, 7, dtype=torch.float64))
    path = path / path.norm(dim=1, keepdim=True)
    turns = 2 * torch.asin(((path[1:] - path[:-1]).norm(dim=1) / 2).clamp(max=1))
    torch.testing.assert_close(turns, turns[:1].expand(6), atol=1e-7, rtol=0)
    whole = 2 * torch.asin(((path[0] - path[-1]).norm() / 2).clamp(max=1))
    assert turns.sum().item() == pytest.approx(whole.item(), abs=1e-6)


def test_slerp_of_unit_vectors_is_that_of_scipy():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for seed in range(5):
        start, end = torch.nn.functional.normalize(draws(2, 9, seed=seed).double(), dim=1)
        expected = scipy.spatial.geometric_slerp(start.numpy(), end.numpy(), t.numpy())
        np.testing.assert_allclose(latent.slerp(start, end, t).numpy(), expected, atol=1e-12)
        back = latent.slerp(end, start, t).flip(0)
        torch.testing.assert_close(latent.slerp(start, end, t), back, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [2, 3, 50])
def test_slerp_between_opposites_stays_on_the_sphere(length):
    start = draws(length).double()
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    path = latent.slerp(start, -start, t)
    torch.testing.assert_close(path.norm(dim=1), start.norm().expand(5))
    assert (path[2] @ start).abs() < 1e-12
    assert torch.equal(path, latent.slerp(start, -start, t))
    torch.testing.assert_close(latent.slerp(start, -2 * start, t)[2].norm(), 1.5 * start.norm())


def test_slerp_between_parallel_vectors_is_straight():
    start = draws(5).double()
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    for end in (start, 3 * start, 0 * start):
        straight = torch.lerp(start, end, t[:, None])
        torch.testing.assert_close(latent.slerp(start, end, t), straight, atol=1e-12, rtol=0)
    torch.testing.assert_close(latent.slerp(0 * start, start, t), t[:, None] * start)
    assert not latent.slerp(0 * start, 0 * start, t).any()


@pytest.mark.parametrize("make", [linear, partial(linear, noise_to_latent=True), flat])
def test_ends_are_exact_and_the_middle_is_on_the_great_circle(make):
    """The circle is one before `place`, whatever that does."""
    pipeline = make()
    noise = draws(2, *pipeline.latent_shape)
    start, end = pipeline.noise_to_latent(noise)
    record = latent.interpolate(pipeline, start, end, 9)
    for latents, images in (
        (record.linear_latents, record.linear),
        (record.spherical_latents, record.spherical),
    ):
        assert torch.equal(latents[0], start) and torch.equal(latents[-1], end)
        torch.testing.assert_close(images, pipeline.decode(latents).detach())
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    around = pipeline.noise_to_latent(latent.slerp(noise[0], noise[1], t))
    torch.testing.assert_close(record.spherical_latents, around, atol=1e-5, rtol=0)
    torch.testing.assert_close(record.linear_latents[4], (start + end) / 2)
    cosine = noise[0] @ noise[1] / noise[0].norm() / noise[1].norm()
    assert record.angle == pytest.approx(math.acos(cosine), abs=1e-5)
    assert str(record) == f"9 steps, ends {math.degrees(record.angle):.0f}° apart"


def test_images_are_walked_between_by_their_latents(digits, plain, tmp_path):
    latents = pipelines.encode(plain, digits.take(np.array([0, 1])))
    record = latent.interpolate(plain, *latents, steps=70)  # more than one block
    ends = plain.reconstruct(digits.batch(np.array([0, 1])))
    for images in (record.linear, record.spherical):
        assert images.shape == (70, *SIZE)
        torch.testing.assert_close(images[[0, -1]], ends, atol=1e-5, rtol=0)
    record.save(tmp_path / "walk.png")
    assert assert_picture(tmp_path / "walk.png").shape[0] == 2 * (56 + 4)


def test_feature_maps_are_walked_among(maps):
    start, end = draws(2, *maps.latent_shape)
    record = latent.interpolate(maps, start, end, 3)
    assert record.spherical_latents.shape == (3, *maps.latent_shape)
    norm = record.spherical_latents[1].norm()
    torch.testing.assert_close(norm, (start.norm() + end.norm()) / 2)


@pytest.mark.parametrize("kind", ["conditional", "conditional_drawer"])
def test_a_class_is_kept_along_the_way(request, kind):
    conditional = request.getfixturevalue(kind)
    record = latent.interpolate(conditional, *draws(2, DIM), steps=4, label=7)
    with torch.no_grad():
        expected = conditional.decode(record.spherical_latents, [7] * 4)
    torch.testing.assert_close(record.spherical, expected)


# ---- concepts


def test_a_concept_is_the_difference_of_means(digits, vae):
    latents = pipelines.encode(vae, digits)
    has_it = digits.classes(np.arange(len(digits))) == 3
    found = latent.concept(latents, has_it)
    some, others = latents[has_it].double().mean(0), latents[~has_it].double().mean(0)
    torch.testing.assert_close(found.double(), some - others)
    assert torch.equal(latent.concept(latents, has_it.tolist()), found)
    assert torch.equal(latent.concept(latents, ~has_it), -found)
    assert latent.concept(draws(4, 2, 3, 3), [True, False, True, False]).shape == (2, 3, 3)


@pytest.mark.parametrize("kind", ["conditional", "conditional_drawer"])
def test_shifts_are_decoded_sums(request, kind, tmp_path):
    conditional = request.getfixturevalue(kind)
    latents, direction = draws(40, DIM), draws(DIM, seed=1)
    labels = [i % 10 for i in range(40)]
    record = latent.shift(conditional, latents, direction, (-1, 0, 2.5), labels)
    assert record.images.shape == (3, 40, *SIZE)
    for strength, images in zip((-1, 0, 2.5), record.images, strict=True):
        with torch.no_grad():
            expected = conditional.decode(latents + strength * direction, labels)
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    classes = "of classes 0 to 9 in turn"
    assert str(record) == f"40 images {classes} at strengths -1, 0, +2.5"
    record.save(tmp_path / "shift.png")
    assert assert_picture(tmp_path / "shift.png").shape[0] == 3 * (56 + 4)


def test_a_shift_along_the_concept_reaches_it(digits, vae):
    """Zeros moved by the concept of a three look like the mean three."""
    latents = pipelines.encode(vae, digits)
    classes = digits.classes(np.arange(len(digits)))
    chosen = (classes == 0) | (classes == 3)
    direction = latent.concept(latents[chosen], classes[chosen] == 3)
    moved = latent.shift(vae, latents[classes == 0], direction, (0, 1)).images.mean((1, 2))
    zero, three = (everything(digits)[classes == kind].mean((0, 1)) for kind in (0, 3))
    for mean, near, far in ((moved[0], zero, three), (moved[1], three, zero)):
        assert (mean - near).square().mean() < 0.5 * (mean - far).square().mean()


@pytest.mark.parametrize("kind", ["drawer", "conditional_drawer"])
def test_a_gans_own_images_teach_a_concept(request, kind, digits):
    """Drawn, told apart by a classifier, moved: more and more of them are threes."""
    pipeline = request.getfixturevalue(kind)
    seen = everything(digits).flatten(1).numpy()
    classifier = LogisticRegression(max_iter=200).fit(seen, digits.labels)

    def classes(images: torch.Tensor) -> np.ndarray:
        return classifier.predict(images.flatten(1).numpy())

    told = np.arange(600) % 10 if kind == "conditional_drawer" else None
    latents = pipelines.draw_latents(pipeline, 600)
    shown = classes(pipelines.decode(pipeline, latents, told))
    if told is not None:  # it draws what it is told, so the class is no concept of its latents
        assert (shown == told).mean() > 0.9
        return
    three = latent.concept(latents, shown == 3)
    moved = latent.shift(pipeline, latents, three, (-1, 0, 1, 2))
    shares = [(classes(images) == 3).mean() for images in moved.images]
    assert shares == sorted(shares)
    assert shares[0] < 0.02 < shares[1] < 0.3 and shares[3] > 0.8


# ---- draws


@pytest.mark.parametrize("kind", ["vae", "plain", "maps", "drawer"])
@pytest.mark.parametrize("truncation", [None, 0.5])
def test_draws_are_those_of_the_pipeline(request, kind, truncation):
    pipeline = request.getfixturevalue(kind)
    latents = pipelines.draw_latents(pipeline, 70, 3, truncation)  # more than one block
    assert latents.shape == (70, *pipeline.latent_shape)
    torch.testing.assert_close(pipelines.draw_latents(pipeline, 2, 40, truncation), latents[37:39])
    if truncation and kind != "drawer":
        noise = pipelines.latent_to_noise(pipeline, latents)
        whole = pipelines.latent_to_noise(pipeline, pipelines.draw_latents(pipeline, 70, 3))
        assert noise.abs().max() <= 0.5001
        torch.testing.assert_close(noise, gan.truncate(whole, 0.5), atol=1e-4, rtol=0)
        return
    seeds = [torch.Generator().manual_seed(3 + i) for i in range(70)]
    options = {"truncation": truncation} if truncation else {}
    drawn = 2 * pipeline(70, seeds, output_type="pt", **options).images - 1
    torch.testing.assert_close(pipelines.decode(pipeline, latents), drawn, atol=1e-5, rtol=0)


def test_truncated_images_come_together(drawer, plain, conditional_drawer, tmp_path):
    for pipeline in (drawer, plain):
        record = latent.truncate(pipeline, (0, 0.2, 1, None), 40, seed=7)
        assert record.images.shape == (4, 40, *SIZE)
        for limit, images in zip(record.limits, record.images, strict=True):
            expected = pipelines.decode(pipeline, pipelines.draw_latents(pipeline, 40, 7, limit))
            assert torch.equal(images, expected)
        spread = record.images.std(1).mean((1, 2, 3))
        assert spread[0] == 0 and (spread.diff() > 0.02).all()
    labels = np.arange(40) % 10
    told = latent.truncate(conditional_drawer, (0.0,), 40, labels=labels).images[0]
    torch.testing.assert_close(told[:10], told[30:], atol=1e-5, rtol=0)
    assert (told[0] - told[1]).abs().mean() > 0.1
    assert str(record) == "40 images at truncations 0, 0.2, 1, none"
    record.save(tmp_path / "truncation.png")
    assert assert_picture(tmp_path / "truncation.png").shape[0] == 4 * (56 + 4)


# ---- projection


@pytest.mark.parametrize("noise_to_latent", [False, True])
@pytest.mark.parametrize("pull", [0.0, 1e-4, 0.01])
def test_projection_by_a_linear_decoder_is_least_squares(noise_to_latent, pull):
    """With a pull the way leads to ridge regression of the numbers before `place`."""
    pipeline = linear(noise_to_latent=noise_to_latent)
    target = draws(5, *SIZE) * 0.1
    noise = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    *columns, bias = pipeline.decode(pipeline.noise_to_latent(noise)).detach().flatten(1).double()
    matrix = torch.stack(columns, 1) - bias[:, None]  # (pixels, latents)
    wanted = (target.flatten(1).double() - bias).T
    normal = matrix.T @ matrix / 64 + pull / 3 * torch.eye(3)
    best = torch.linalg.solve(normal, matrix.T @ wanted / 64).T
    error = (wanted.T - best @ matrix.T).square().mean(1).float()
    record = projection.project(pipeline, target, restarts=2, steps=400, pull=pull)
    if pull:
        assert (record.error <= error + 1e-7).all()
    else:
        torch.testing.assert_close(record.error, error, atol=1e-7, rtol=1e-4)
        expected = pipeline.noise_to_latent(best.float())
        torch.testing.assert_close(record.latents, expected, atol=0.02, rtol=0)


def test_the_pull_leads_towards_the_middle_of_the_prior():
    pipeline = flat()
    with torch.no_grad():
        pipeline.generator.first.weight[:, 1] = 0  # of a latent that no image shows
        target = pipeline.decode(draws(8, 6, seed=4))
    free, pulled = (projection.project(pipeline, target, pull=p).latents for p in (0, 0.01))
    assert pulled[:, 1].abs().mean() < 0.25
    assert free[:, 1].abs().mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "drawer", "vae", "plain", "maps"])
def test_what_was_decoded_is_found_again(request, kind):
    pipeline = flat() if kind == "flat" else request.getfixturevalue(kind)
    noise = draws(4, *pipeline.latent_shape, seed=9)
    with torch.no_grad():
        target = pipeline.decode(pipeline.noise_to_latent(noise))
    record = projection.project(pipeline, target, pull=0)
    least = record.started.min(1).values
    assert (least > 5e-4).all()
    if kind == "maps":  # 32 numbers, seen through random weights: slow to find
        assert (record.error < least / 20).all()
    else:
        assert record.error.max() < 1e-5
    if kind == "flat":  # different latents make different images
        torch.testing.assert_close(record.latents, noise, atol=0.02, rtol=0)
    assert record.images.shape == target.shape


def test_the_picture_shows_what_is_not_found(digits, drawer, tmp_path):
    """Targets, what was found, their absolute difference, and errors; twelve side by side."""
    record = projection.project(drawer, digits.take(np.arange(15)), restarts=1, steps=5)
    record.save(tmp_path / "found.png")
    pixels = assert_picture(tmp_path / "found.png")
    height, words, pitch = 56 + 2 * image_grid.GAP, 2 * image_grid.SMALL, 56 + image_grid.GAP
    left = pixels.shape[1] - 12 * pitch
    for i in (0, 11, 12, 14):
        top = i // 12 * (3 * height + words) + image_grid.GAP
        start = left + i % 12 * pitch
        shown = [pixels[top + row * height :][:56, start : start + 56, 0] for row in range(3)]
        target, found, difference = (tile[::7, ::7] for tile in shown)
        both = (record.target[i, 0], record.images[i, 0])
        np.testing.assert_allclose(2 * target - 1, both[0], atol=0.005)
        np.testing.assert_allclose(2 * found - 1, both[1], atol=0.005)
        np.testing.assert_allclose(2 * difference, (both[0] - both[1]).abs(), atol=0.005)
        word = pixels[top + 3 * height - image_grid.GAP :][:words, start : start + 56]
        assert (word < 0.5).any()
    assert len(pixels) == 2 * (3 * height + words)


@pytest.mark.parametrize("kind", ["drawer", "vae", "plain"])
def test_the_record_says_what_was_found(request, kind, digits, tmp_path):
    pipeline = request.getfixturevalue(kind)
    record = projection.project(pipeline, digits.take(np.arange(6)), steps=30)
    encoded = kind != "drawer"
    assert torch.equal(record.target, digits.batch(np.arange(6)))
    assert record.errors.shape == record.started.shape == (6, 4 + encoded)
    assert (record.errors <= record.started).all()
    assert torch.equal(record.error, record.errors.min(1).values)
    with torch.no_grad():
        decoded = pipeline.decode(record.latents)
    torch.testing.assert_close(record.images, decoded, atol=1e-5, rtol=0)
    measured = (record.images - record.target).square().flatten(1).mean(1)
    torch.testing.assert_close(record.error, measured)
    assert record.encoded == encoded
    assert f"0: mean squared error {record.error[0]:.5f} (of each start:" in str(record)
    record.save(tmp_path / "found.png")
    assert assert_picture(tmp_path / "found.png").shape[0] == 3 * (56 + 4) + 2 * image_grid.SMALL


def test_project_returns_the_best_point_of_the_descent():
    """A start is right, and a strong pull leads away from it."""
    pipeline = flat()
    noise = torch.randn(6, generator=torch.Generator().manual_seed(11))
    record = projection.project(
        pipeline, pipeline.decode(noise[None]).detach(), steps=3, pull=10, seed=11
    )
    assert record.error.item() < 1e-10
    assert torch.equal(record.latents[0], noise)


def test_the_encoders_answer_is_the_last_start(digits, vae, plain):
    some = digits.batch(np.arange(5))
    for pipeline in (vae, plain):
        record = projection.project(pipeline, some, steps=1)
        kept = pipeline.reconstruct(some)
        expected = (kept - some).square().flatten(1).mean(1)
        torch.testing.assert_close(record.started[:, -1], expected, atol=1e-5, rtol=1e-4)


def test_draws_are_of_the_prior_and_of_their_own_seeds(vae, digits):
    some = digits.batch(np.arange(3))
    few, many = (projection.project(vae, some, restarts=k, steps=1, seed=5) for k in (2, 6))
    torch.testing.assert_close(few.started[:, :2], many.started[:, :2])
    again = projection.project(vae, some, restarts=2, steps=1, seed=[5, 6, 7])
    assert torch.equal(again.started, few.started)
    same = projection.project(vae, some[:1].repeat(2, 1, 1, 1), steps=1, seed=[3, 3])
    assert torch.equal(same.started[0], same.started[1])
    assert not torch.equal(same.started, projection.project(vae, some[:1], steps=1).started)
    noise = torch.randn(1, DIM, generator=torch.Generator().manual_seed(6))
    error = (vae.decode(noise).detach() - some[1]).square().mean()
    torch.testing.assert_close(few.started[1, 0], error)


@pytest.mark.slow
def test_an_image_is_projected_alike_in_every_company(vae, digits, monkeypatch):
    some = digits.batch(np.arange(20))
    together = projection.project(vae, some, steps=100, seed=50)
    assert len(some) * together.errors.shape[1] > projection.ROWS
    alone = projection.project(vae, some[7:8], steps=100, seed=57)
    monkeypatch.setattr(projection, "ROWS", 3)
    apart = projection.project(vae, some, steps=100, seed=50)
    for other, rows in ((alone, slice(7, 8)), (apart, slice(None))):
        torch.testing.assert_close(other.started, together.started[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(other.errors, together.errors[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(other.images, together.images[rows], atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conditional", "conditional_drawer", "flat"])
def test_project_conditions_on_classes(request, kind):
    pipeline = flat(labels=10) if kind == "flat" else request.getfixturevalue(kind)
    with torch.no_grad():
        target = pipeline.decode(draws(3, *pipeline.latent_shape), [1, 5, 9])
    right = projection.project(pipeline, target, pull=0, labels=[1, 5, 9])
    assert right.error.max() < 1e-4
    wrong = projection.project(pipeline, target, pull=0, labels=[4, 0, 2])
    assert (wrong.error > 10 * right.error).all()


def test_encode_conditions_on_classes(conditional):
    with torch.no_grad():
        target = conditional.decode(draws(3, DIM), [1, 5, 9])
    right = projection.project(conditional, target, steps=1, labels=[1, 5, 9])
    kept = conditional.reconstruct(target, [1, 5, 9])
    expected = (kept - target).square().flatten(1).mean(1)
    torch.testing.assert_close(right.started[:, -1], expected, atol=1e-5, rtol=1e-4)


def test_nothing_else_is_touched(vae, digits):
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    some = digits.take(np.arange(4))
    with torch.no_grad():  # the caller's own setting neither matters nor changes
        first = projection.project(vae, some, steps=5)
        assert not torch.is_grad_enabled()
    latents = pipelines.encode(vae, some)
    given_latents = latents.clone()
    latent.scatter(latents)
    latent.plane(vae, 3)
    latent.interpolate(vae, *latents[:2])
    latent.shift(vae, latents, latent.concept(latents, [True, False, True, True]))
    assert torch.equal(latents, given_latents)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before
    torch.manual_seed(4)
    assert torch.equal(projection.project(vae, some, steps=5).latents, first.latents)
    assert all(parameter.grad is None for parameter in vae.vae.parameters())
    assert all(parameter.requires_grad for parameter in vae.vae.parameters())


def test_records_print_short(vae, digits):
    latents = pipelines.encode(vae, digits.take(np.arange(30)))
    for record in (
        latent.scatter(latents, [0] * 30),
        latent.plane(vae, 2),
        latent.interpolate(vae, *latents[:2]),
        latent.shift(vae, latents, latents[0]),
    ):
        assert len(repr(record)) < 120 and len(str(record)) < 120
    record = projection.project(vae, digits.take(np.arange(30)), steps=1)
    assert len(repr(record)) < 120 and len(str(record).splitlines()) == 12


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": ()}, r"limits must be different numbers or None, got \[\]"),
        ({"limits": (1, 1.0)}, "limits must be different numbers or None"),
        ({"limits": (None, None)}, "limits must be different numbers or None"),
        ({"limits": (-1,)}, "truncation must be 0 or more, got -1"),
        ({"limits": (math.nan,)}, "truncation must be 0 or more, got nan"),
        ({"count": 0}, "count must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"labels": [0] * 8}, "labels: .*unconditional"),
        ({"labels": [0]}, "labels must be 8 whole numbers"),
    ],
)
def test_bad_truncations_are_named(drawer, options, message):
    with pytest.raises(ValueError, match=message):
        latent.truncate(drawer, **options)


@pytest.mark.parametrize(
    ("latents", "labels", "message"),
    [
        (draws(2, 3), None, r"latents must have the shape \(n, \*\(4,\)\), got \(2, 3\)"),
        (draws(2, DIM) / 0, None, "latents: 8 of 8 values are not finite"),
        (draws(2, DIM), ["🙂", "1"], "labels must be 2 whole numbers"),
        (draws(2, DIM), [1, 10], "labels must be 2 of 0 to 9"),
    ],
)
def test_latents_that_cannot_be_decoded_are_named(conditional_drawer, latents, labels, message):
    with pytest.raises(ValueError, match=message):
        pipelines.decode(conditional_drawer, latents, labels)


CHECKED = {"encode": pipelines.encode, "project": projection.project}
IMAGES = torch.zeros(2, *SIZE)
SPOILT = torch.zeros(2, *SIZE)
SPOILT[0, 0, 3, 3] = torch.nan


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGES[:0], {}, "images: there are none"),
        (IMAGES[0], {}, r"images must have .*\(1, 8, 8\).* got \(8, 8\)"),
        (torch.zeros(2, 3, 8, 8), {}, r"images must have .*\(1, 8, 8\).* got \(3, 8, 8\)"),
        (torch.zeros(2, 1, 16, 16), {}, r"images must have .*\(1, 8, 8\).* got \(1, 16, 16\)"),
        (IMAGES.byte(), {}, r"images must be floats in \[-1, 1\], got torch.uint8"),
        (SPOILT, {}, "images: 1 of 128 values are not finite"),
        (IMAGES - 255, {}, r"images must be in \[-1, 1\], got -255 to -255"),
        (IMAGES, {"labels": [0, 1]}, "labels: .*unconditional"),
    ],
)
@pytest.mark.parametrize("verb", CHECKED)
def test_bad_images_are_named(vae, verb, images, options, message):
    with pytest.raises(ValueError, match=message):
        CHECKED[verb](vae, images, **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels are required.*10 classes"),
        ([1], r"labels must be 2 whole numbers, got \(1,\) of int64"),
        ([1, 10], "labels must be 2 of 0 to 9"),
        ([1, -1], "labels must be 2 of 0 to 9"),
        ([0.0, 1.0], r"labels must be 2 whole numbers, got \(2,\) of float64"),
        (["1", "🙂"], r"labels must be 2 whole numbers, got \(2,\) of <U1"),
        ([True, False], r"labels must be 2 whole numbers, got \(2,\) of bool"),
    ],
)
@pytest.mark.parametrize("verb", CHECKED)
def test_bad_labels_are_named(conditional, verb, labels, message):
    with pytest.raises(ValueError, match=message):
        CHECKED[verb](conditional, IMAGES, labels=labels)


def test_without_an_encoder_projection_is_named():
    with pytest.raises(ValueError, match="GANPipeline has no encoder"):
        pipelines.encode(flat(), IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restarts": 0}, "restarts must be 1 or more, got 0"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"pull": -1.0}, "pull must be 0 or more, got -1.0"),
        ({"pull": math.nan}, "pull must be 0 or more, got nan"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"seed": [1]}, "seed must be 2 whole numbers"),
        ({"seed": 0.5}, "seed must be 2 whole numbers"),
    ],
)
def test_bad_settings_of_a_projection_are_named(vae, options, message):
    with pytest.raises(ValueError, match=message):
        projection.project(vae, IMAGES, **options)


@pytest.mark.parametrize(
    ("latents", "classes", "names", "message"),
    [
        (draws(2, 2), None, (), r"latents must be .*3 or more.* got \(2, 2\)"),
        (draws(9, 1), None, (), r"latents must be .*3 or more.* got \(9, 1\)"),
        (draws(9), None, (), r"latents must be .*3 or more.* got \(9,\)"),
        (draws(9, 3) / 0, None, (), "latents: 27 of 27 values are not finite"),
        (torch.ones(9, 3), None, (), "latents must differ, got 9"),
        (draws(3, 2), [0, 1], (), "classes must be 3 whole numbers"),
        (draws(3, 2), [0, 1, 2], ("a", "b"), "classes must be 0 to 1, got 0 to 2"),
        (draws(3, 2), [0, 1, -2], (), "classes must be 0 or more, got -2 to 1"),
    ],
)
def test_bad_points_are_named(latents, classes, names, message):
    with pytest.raises(ValueError, match=message):
        latent.scatter(latents, classes, names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 1}, "side must be 2 or more, got 1"),
        ({"dims": (0, 4)}, r"dims must be two different ones of 0 to 3, got \(0, 4\)"),
        ({"dims": (-1, 0)}, "dims must be two different ones"),
        ({"dims": (1, 1)}, "dims must be two different ones"),
        ({"dims": (0, 1, 2)}, "dims must be two different ones"),
        ({"label": 3}, "labels: .*unconditional"),
        ({"label": "🙂"}, "label must be 225 whole numbers"),
    ],
)
def test_bad_planes_are_named(vae, options, message):
    with pytest.raises(ValueError, match=message):
        latent.plane(vae, **options)


def test_feature_maps_have_no_plane(maps):
    with pytest.raises(ValueError, match=r"pipeline: .* feature maps of \(2, 4, 4\)"):
        latent.plane(maps)


@pytest.mark.parametrize(
    ("start", "steps", "message"),
    [
        (torch.zeros(DIM), 1, "steps must be 2 or more, got 1"),
        (torch.zeros(3), 8, r"start must have the shape \(4,\), got \(3,\)"),
        (torch.zeros(1, DIM), 8, r"start must have the shape \(4,\), got \(1, 4\)"),
        (torch.full((DIM,), torch.inf), 8, "start: 4 of 4 values are not finite"),
    ],
)
def test_bad_ways_are_named(vae, start, steps, message):
    with pytest.raises(ValueError, match=message):
        latent.interpolate(vae, start, torch.ones(DIM), steps)


def test_one_latent_has_no_circle():
    with pytest.raises(ValueError, match="latent_dim >= 2, got 1"):
        latent.interpolate(linear(1), torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize(
    ("has_it", "message"),
    [
        ([True, True], "has_it.* 2 of 2"),
        ([False, False], "has_it.* 0 of 2"),
        ([True], r"has_it must be 2 .*got \(1,\) of bool"),
        ([1, 0], r"has_it must be 2 .*got \(2,\) of int64"),
    ],
)
def test_bad_concepts_are_named(has_it, message):
    with pytest.raises(ValueError, match=message):
        latent.concept(draws(2, DIM), has_it)


@pytest.mark.parametrize(
    ("latents", "options", "message"),
    [
        (draws(2, 3), {}, r"latents must have the shape \(n, \*\(4,\)\), got \(2, 3\)"),
        (draws(0, DIM), {}, r"latents must have the shape \(n, \*\(4,\)\), got \(0, 4\)"),
        (
            draws(2, DIM),
            {"direction": draws(2)},
            r"direction must have the shape \(4,\), got \(2,\)",
        ),
        (draws(2, DIM), {"strengths": ()}, r"strengths must be different numbers, got \[\]"),
        (draws(2, DIM), {"strengths": (1, 1.0)}, "strengths must be different numbers"),
        (draws(2, DIM), {"strengths": (math.inf,)}, "strengths: 1 of 1 values are not finite"),
        (draws(2, DIM), {"labels": [0, 1]}, "labels: .*unconditional"),
    ],
)
def test_bad_shifts_are_named(vae, latents, options, message):
    with pytest.raises(ValueError, match=message):
        latent.shift(vae, latents, **({"direction": torch.ones(DIM)} | options))
