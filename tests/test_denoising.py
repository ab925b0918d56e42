import math
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit.data.images import Images, load_images
from genkit.models import denoisers, diffusion, diffusion_losses
from genkit.models.diffusion import OBJECTIVES, DenoisingPipeline
from genkit.vision import denoising, inpainting, latent, pipelines

SIZE = (1, 8, 8)
SPREAD = 0.2  # of the pixels around their mean


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unet(labels: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return denoisers.make_unet(SIZE, (8, 16), labels=labels).eval()


def scheduler(objective: str) -> diffusion.Scheduler:
    """As the recipe has it: noise grows to where nothing is left of an image, but for epsilon."""
    return diffusion.make_scheduler(objective, "cosine" if objective in ("v", "x0") else "linear")


class Gaussian(DenoisingPipeline):
    """Predicts exactly, for normal images with a mean for each class."""

    def __init__(self, objective: str, labels: int = 0, reach: float = 0.0) -> None:
        super().__init__(unet(labels), scheduler(objective))
        places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
        far = torch.cdist(places, places)
        alike = torch.exp(-(far**2) / (2 * reach**2)) if reach else torch.eye(64).double()
        self.covariance = SPREAD**2 * alike
        self.values, self.axes = torch.linalg.eigh(self.covariance)
        means = torch.linspace(-0.2, 0.2, max(1, labels) + 2)[1:-1].double()
        self.means = torch.cat([means, means.mean()[None]])  # the last is of no class

    def class_mean(self, labels: torch.Tensor | None, count: int) -> torch.Tensor:
        means = self.means[[0] * count if labels is None else labels]
        return means[:, None].expand(count, 64)

    def parts(self, seen, times, labels) -> tuple[torch.Tensor, torch.Tensor, denoising.Noising]:
        """Return the expected image and noise, (n, *SIZE), and where x_t is."""
        at = denoising.noising_at(self, times)
        alpha, sigma = at.alpha.double()[:, None], at.sigma.double()[:, None]
        mean = self.class_mean(labels, len(seen))
        beyond = (seen.double().flatten(1) - alpha * mean) @ self.axes
        beyond /= alpha**2 * self.values.clamp(min=0) + sigma**2
        image = mean + alpha * (self.values * beyond) @ self.axes.T
        noise = sigma * beyond @ self.axes.T
        return image.float().unflatten(1, SIZE), noise.float().unflatten(1, SIZE), at

    def predict(self, seen, times, labels):
        image, noise, at = self.parts(seen, times, labels)
        objective = diffusion.objective_of(self.scheduler)
        return diffusion_losses.target(image, noise, at.alpha, at.sigma, objective)

    def sample(self, count: int, labels: torch.Tensor | None = None) -> torch.Tensor:
        root = self.axes * self.values.clamp(min=0).sqrt()
        images = self.class_mean(labels, count) + draws(count, 64).double() @ root.T
        return images.float().unflatten(1, SIZE).clamp(-1, 1)


def real(objective: str, labels: int = 0) -> DenoisingPipeline:
    return DenoisingPipeline(unet(labels), scheduler(objective))


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_picture(path) -> np.ndarray:
    """Return the pixels of a picture on which there is something, and nothing beside it."""
    pixels = matplotlib.image.imread(path)[..., :3]
    assert len(np.unique(pixels)) > 10
    assert not list(path.parent.glob(".*"))
    return pixels


def samplers(objective: str) -> list[str]:
    known = diffusion.FLOW_SAMPLERS if objective == "flow" else diffusion.SAMPLERS
    return [name for name in known if (name, objective) != ("heun", "x0")]


EACH = [(objective, name) for objective in OBJECTIVES for name in samplers(objective)]

# ---- strips


@pytest.mark.parametrize(("objective", "name"), EACH)
def test_denoising_trajectory_has_x_t_of_training_and_predicted_images(objective, name):
    pipeline = Gaussian(objective, labels=2)
    record = denoising.denoising_trajectory(
        pipeline, seed=3, label=1, steps=40, scheduler=name, shown=6
    )
    assert len(record.timesteps) == len(record.mixed) == len(record.clean) == 6
    assert (np.diff(record.timesteps) < 0).all()
    told = torch.ones(6, dtype=torch.int64)
    expected, _, at = pipeline.parts(record.mixed, torch.tensor(record.timesteps), told)
    far = 1e-3 if at.alpha.min() > 1e-3 else 2e-2  # a division by so little is not exact
    torch.testing.assert_close(record.clean, expected, atol=far, rtol=0)
    # x_t is as far from its mean as of images that have got noise, not as of others
    scale = (at.alpha**2 * SPREAD**2 + at.sigma**2).sqrt()
    mean = at.alpha * pipeline.means[1]
    beyond = (record.mixed.flatten(1) - mean[:, None]) / scale[:, None]
    assert ((beyond.square().mean(1).sqrt() - 1).abs() < 0.35).all()
    if name != "ddpm":  # all others keep every pixel at its quantile
        torch.testing.assert_close(beyond, beyond[:1].expand_as(beyond), atol=0.35, rtol=0)


@pytest.mark.parametrize(("objective", "name"), EACH)
def test_denoising_trajectory_ends_in_the_image_of_its_seed(objective, name):
    for pipeline, label in ((Gaussian(objective), None), (real(objective, labels=3), 2)):
        record = denoising.denoising_trajectory(pipeline, 5, label, steps=8, scheduler=name)
        (expected,) = pipeline(
            1,
            torch.Generator().manual_seed(5),
            None if label is None else [label],
            num_inference_steps=8,
            sampler_name=name,
            output_type="pt",
        ).images
        torch.testing.assert_close(record.image, expected * 2 - 1, atol=1e-5, rtol=0)
        torch.testing.assert_close(record.clean[-1].clamp(-1, 1), record.image, atol=1e-3, rtol=0)


def test_denoising_trajectory_follows_guidance():
    pipeline = Gaussian("v", labels=2)
    plain, more = (
        denoising.denoising_trajectory(pipeline, label=1, guidance=w).image for w in (1.0, 4.0)
    )
    assert (plain - more).abs().max() > 0.05


@pytest.mark.parametrize("steps", [1, 2, 8, 20])
def test_denoising_trajectory_shows_all_of_few_steps(steps):
    record = denoising.denoising_trajectory(Gaussian("v"), steps=steps, scheduler="ddim")
    assert len(record.timesteps) == min(8, steps)
    assert str(record).startswith(f"{min(8, steps)} timesteps from 999")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noising_trajectory_adds_noise_of_own_seeds(objective):
    pipeline, digits = real(objective), load_images("digits").take(np.arange(5))
    record = denoising.noising_trajectory(pipeline, digits, shown=7, seed=2)
    images = digits.batch(np.arange(5))
    assert record.mixed.shape == (7, 5, *SIZE)
    assert record.timesteps[0] == 0 and record.timesteps[-1] == (
        1000 if objective == "flow" else 999
    )
    assert (abs(np.diff(record.timesteps, 2)) <= 1).all()
    for time, mixed in zip(record.timesteps, record.mixed, strict=True):
        at = denoising.noising_at(pipeline, torch.tensor([time]))
        noise = torch.stack([draws(*SIZE, seed=2 + i) for i in range(5)])
        torch.testing.assert_close(mixed, at.mix(images, noise), atol=1e-5, rtol=1e-5)
    alone = denoising.noising_trajectory(pipeline, images[3:4], shown=7, seed=5)
    assert torch.equal(alone.mixed[:, 0], record.mixed[:, 3])


def test_noising_at_interpolates_between_timesteps():
    pipeline = real("v")
    times = torch.arange(0, 999, 0.25)
    at = denoising.noising_at(pipeline, times)
    assert (at.alpha.diff() < 0).all() and (at.sigma.diff() >= 0).all()
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones_like(at.alpha))
    whole = diffusion_losses.noising_at_timesteps(pipeline.scheduler, torch.arange(999))
    torch.testing.assert_close(at.alpha[::4], whole.alpha, atol=0, rtol=1e-4)
    torch.testing.assert_close(at.sigma[::4], whole.sigma, atol=0, rtol=1e-4)


# ---- paths


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_interpolate_joins_two_images(objective):
    pipeline = Gaussian(objective, labels=2)
    start, end = (pipelines.draw_latents(pipeline, 1, seed)[0] for seed in (4, 9))
    record = latent.interpolate(pipeline, start, end, 5, label=1)
    ends = pipelines.decode(pipeline, torch.stack([start, end]), [1, 1])
    for images in (record.linear, record.spherical):
        torch.testing.assert_close(images[[0, -1]], ends, atol=1e-4, rtol=0)
    lengths = record.spherical_latents.flatten(1).norm(dim=1)
    assert lengths.min() >= min(lengths[0], lengths[-1]) - 1e-4
    # the straight line is in the middle too near to the mean; so are its images
    spread = [(w - pipeline.means[1]).std() for w in (record.linear[2], record.spherical[2])]
    assert spread[0] < 0.85 * spread[1] and abs(spread[1] / SPREAD - 1) < 0.3


# ---- inversion


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_invert_finds_the_noise_with_less_error_by_more_steps(objective):
    pipeline, labels = Gaussian(objective, labels=2), torch.tensor([0, 1, 1])
    images = pipeline.sample(3, labels)
    expected = (images - pipeline.means[labels][:, None, None, None].float()) / SPREAD
    found = [denoising.invert(pipeline, images, labels, steps) for steps in (5, 20, 80)]
    noise_errors = [(each.noise - expected).square().mean().item() for each in found]
    assert all(b < a / 3 for a, b in pairwise(noise_errors))
    errors = torch.stack([each.errors for each in found])
    assert (errors[1:] < errors[:-1] / 3).all()
    assert errors[-1].max() < 1e-3
    assert torch.equal(found[0].images, images) and found[0].errors.shape == (3,)


@pytest.mark.parametrize("objective", ["v", "flow"])
def test_invert_a_network_with_less_error_by_more_steps(objective):
    pipeline = real(objective)
    images = pipelines.decode(pipeline, draws(4, *SIZE)) * 0.5
    errors = [denoising.invert(pipeline, images, steps=n).errors.mean() for n in (5, 50)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("steps", [1, 7, 61])
@pytest.mark.parametrize("objective", ["v", "flow"])
def test_invert_takes_steps_that_do_not_divide_those_of_training(objective, steps):
    pipeline = Gaussian(objective)
    images = pipeline.sample(2)
    record = denoising.invert(pipeline, images, steps=steps)
    assert record.errors.max() < 10 / (steps + 1) ** 2


def test_invert_in_batches_equals_invert_at_once(monkeypatch):
    pipeline = real("v", labels=3)
    images, labels = 0.3 * draws(5, *SIZE).clamp(-1, 1), [0, 1, 2, 0, 1]
    whole = denoising.invert(pipeline, images, labels, steps=4)
    monkeypatch.setattr(denoising, "ROWS", 2)
    blocks = denoising.invert(pipeline, images, labels, steps=4)
    torch.testing.assert_close(blocks.noise, whole.noise, atol=1e-4, rtol=1e-4)
    other = denoising.invert(pipeline, images, labels[::-1], steps=4)
    assert (other.noise - whole.noise).abs().max() > 1e-3


# ---- inpainting

LEFT = (torch.arange(8) < 4).expand(8, 8)


# epsilon: against the stock scheduler below; v: with nothing kept; predictions of all: invert
@pytest.mark.parametrize("objective", ["x0", "flow"])
def test_inpaint_keeps_given_pixels_and_samples_the_others_to_fit(objective):
    """The masked pixels of normal images have a known mean, given the others."""
    pipeline, kept = Gaussian(objective, reach=1.5), LEFT.flatten()
    image = pipeline.sample(1).expand(64, *SIZE)
    inner, across = pipeline.covariance[kept][:, kept], pipeline.covariance[~kept][:, kept]
    around = image[0].flatten()[kept].double() - pipeline.means[0]
    mean = pipeline.means[0] + across @ torch.linalg.pinv(inner, rtol=1e-5) @ around
    far = []
    for resample in (1, 10):
        record = inpainting.inpaint(pipeline, image, LEFT, steps=50, resample=resample)
        assert torch.equal(record.images[:, :, LEFT], image[:, :, LEFT])
        assert not record.given[:, :, ~LEFT].any()
        made = record.images.flatten(1)[:, ~kept].double()
        assert 0.5 * SPREAD < made.std(0).mean() < SPREAD
        far.append((made.mean(0) - mean).square().mean().sqrt())
    assert far[1] < 0.75 * far[0] and far[1] < 0.1


@torch.no_grad()
def test_inpaint_is_as_good_as_the_stock_scheduler():
    pipeline = Gaussian("epsilon", reach=1.5)
    image = pipeline.sample(1).expand(48, *SIZE)
    stock = RePaintScheduler(beta_schedule="linear", eta=1.0)
    stock.set_timesteps(50, 2, 10)
    x, before, chance = draws(48, *SIZE), math.inf, torch.Generator().manual_seed(1)
    for time in stock.timesteps.tolist():
        if time < before:
            told = pipeline.predict(x, torch.full((48,), float(time)), None)
            x = stock.step(told, time, x, image, LEFT.float(), chance).prev_sample
        else:
            x = stock.undo_step(x, before, chance)
        before = time
    record = inpainting.inpaint(pipeline, image, LEFT, steps=50, resample=10)
    assert record.images.shape == x.shape
    torch.testing.assert_close(record.images.mean(0), x.mean(0), atol=0.15, rtol=0)
    assert (record.images.mean(0) - x.mean(0)).square().mean().sqrt() < 0.04


def test_inpaint_depends_on_own_seed_alone():
    pipeline = real("epsilon", labels=3)
    images, labels = draws(4, *SIZE).clamp(-1, 1), torch.tensor([0, 1, 2, 0])
    masks = torch.stack([LEFT, ~LEFT, LEFT.T, ~LEFT.T])
    options = {"steps": 5, "resample": 2}
    together = inpainting.inpaint(pipeline, images, masks, labels, seed=3, **options)
    for i in range(4):
        one = slice(i, i + 1)
        alone = inpainting.inpaint(
            pipeline, images[one], masks[i], labels[one], seed=3 + i, **options
        )
        torch.testing.assert_close(alone.images, together.images[one], atol=1e-3, rtol=0)
    other = inpainting.inpaint(pipeline, images, masks, labels, seed=4, **options)
    assert all(
        (a - b).abs().max() > 0.05 for a, b in zip(other.images, together.images, strict=True)
    )


def test_inpaint_with_all_or_no_pixels_kept():
    pipeline = Gaussian("v")
    images = pipeline.sample(2)
    all_kept = inpainting.inpaint(pipeline, images, torch.ones(8, 8, dtype=torch.bool), steps=3)
    assert torch.equal(all_kept.images, images)
    none = inpainting.inpaint(pipeline, images, ~LEFT & LEFT, steps=50, resample=1)
    assert abs(none.images.std() / SPREAD - 1) < 0.25


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 6))
def test_resampling_schedule_repeats_each_step_as_often_as_given(steps, resample):
    walk = inpainting.resampling_schedule(steps, resample)
    moves = np.diff(walk)
    length = max(1, steps // inpainting.JUMPS)
    assert walk[0] == steps and walk[-1] == 0 and 0 not in walk[:-1]
    assert set(moves) <= {-1, length} and max(walk) == steps
    downs = np.bincount(np.asarray(walk)[:-1][moves < 0], minlength=steps + 1)[1:]
    assert set(downs) <= {1, resample}
    jumped = (steps - 1) // length * length  # parts that jumps go over
    assert (downs > 1).sum() == (jumped if resample > 1 else 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 30, 1000])
def test_add_noise_and_remove_noise_have_the_mixtures_of_training(objective, steps):
    way = denoising.noise_levels(real(objective), steps)
    way = diffusion_losses.Noising(way.timesteps, way.alpha.double(), way.sigma.double())
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for low, high in {(0, 1), (0, steps), (steps // 2, steps), (steps - 1, steps)}:
        kept, added = (inpainting.add_noise(x, 1 - x, way, low, high) for x in (one, zero))
        image = inpainting.remove_noise(way.alpha[high], one, zero, way, high, low)
        old = inpainting.remove_noise(one, zero, zero, way, high, low)
        new = inpainting.remove_noise(zero, zero, one, way, high, low)
        found = [kept * way.alpha[low], (kept * way.sigma[low]) ** 2 + added**2]
        found += [image, (old * way.sigma[high]) ** 2 + new**2]
        found += [old * way.sigma[high] ** 2]  # alike forwards and backwards
        expected = [way.alpha[high], way.sigma[high] ** 2, way.alpha[low], way.sigma[low] ** 2]
        expected += [kept * way.sigma[low] ** 2]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# ---- records, chance, pictures


@pytest.fixture(scope="module")
def records() -> list:
    pipeline = Gaussian("v")
    images = pipeline.sample(14)
    return [
        denoising.denoising_trajectory(pipeline, steps=10),
        denoising.noising_trajectory(pipeline, images[:2]),
        denoising.invert(pipeline, images, steps=5),
        inpainting.inpaint(pipeline, images, LEFT, steps=3, resample=1),
    ]


def test_records_print_short_and_are_drawn_whole(records, tmp_path):
    for i, record in enumerate(records):
        assert len(repr(record)) < 200 and len(str(record)) < 80
        path = tmp_path / f"{i}.png"
        record.save(path)
        assert_picture(path)
        first = path.read_bytes()
        record.save(str(path))  # over the old one
        assert path.read_bytes() == first


def test_denoising_trajectory_saves_two_rows_of_images(records, tmp_path):
    records[0].save(tmp_path / "strip.png")
    pixels = assert_picture(tmp_path / "strip.png")
    last = pixels[-90:-30, -60:]  # the last prediction, with the words below it
    assert pixels.shape[1] > 8 * 56 and len(np.unique(last)) > 10


def test_nothing_else_is_touched():
    pipeline = real("flow", labels=2)
    images, given_mask = draws(2, *SIZE).clamp(-1, 1), LEFT.clone()
    before, kept = torch.get_rng_state(), images.clone()
    numpy_before = np.random.get_state()[1].tolist()

    def all_of_it() -> list[torch.Tensor]:
        return [
            denoising.denoising_trajectory(pipeline, label=1, steps=3).image,
            denoising.noising_trajectory(pipeline, images).mixed,
            denoising.invert(pipeline, images, [0, 1], steps=3).noise,
            inpainting.inpaint(pipeline, images, given_mask, [0, 1], steps=3, resample=2).images,
        ]

    first = all_of_it()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), first, strict=True))
    assert torch.equal(images, kept) and torch.equal(given_mask, LEFT)
    assert not any(each.requires_grad for each in first) and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in pipeline.unet.parameters())


def test_denoising_trajectory_of_ddpm_depends_on_its_seed_alone():
    first, same, other = (
        denoising.denoising_trajectory(Gaussian("v"), seed, steps=5, scheduler="ddpm").image
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


# ---- loss by time


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_by_time_is_that_of_the_best_there_can_be(objective):
    """Of normal images the least error is known; of flows it is that of noise - image."""
    pipeline = Gaussian(objective)
    levels = ((pipeline.sample(400) + 1) * 127.5).round().byte().numpy()
    data = Images(levels, None, [], np.arange(400), "")
    record = denoising.loss_by_time(pipeline, data)
    at = denoising.noising_at(pipeline, record.timesteps)
    left = SPREAD**2 / (at.alpha**2 * SPREAD**2 + at.sigma**2)  # variance over that of x_t
    least = {
        "epsilon": at.alpha**2 * left,
        "v": left,
        "x0": at.sigma**2 * left,
        "flow": left,
    }[objective]
    assert record.mean == pytest.approx(least.mean().item(), rel=0.1)


# ---- bad input

IMAGES = torch.zeros(2, *SIZE)
SPOILT = torch.zeros(2, *SIZE)
SPOILT[0, 0, 3, 3] = math.nan


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:0], r"images must have .*, got \(0, 1, 8, 8\)"),
        (IMAGES[0], r"images must have .*1, 8, 8.*, got \(1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), r"images must have .*1, 8, 8.*, got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 1, 16, 16), r"images must have .*, got \(2, 1, 16, 16\)"),
        (IMAGES.byte(), r"images must be floats in \[-1, 1\], got torch.uint8"),
        (SPOILT, "images: 1 of 128 values are not finite"),
        (IMAGES - 255, r"images must be in \[-1, 1\], got -255 to -255"),
    ],
)
def test_bad_images_are_named(images, message):
    pipeline = real("v")
    for verb in (
        denoising.noising_trajectory,
        denoising.invert,
        lambda *given_images: inpainting.inpaint(*given_images, LEFT),
    ):
        with pytest.raises(ValueError, match=message):
            verb(pipeline, images)


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (0, [0, 0], "labels: .*unconditional"),
        (3, None, "labels are required.*3 classes"),
        (3, [0], "labels must be 2 whole numbers"),
        (3, [0, 3], "labels must be 2 of 0 to 2"),
        (3, [0, -1], "labels must be 2 of 0 to 2"),
        (3, ["1", "🙂"], "labels must be 2 whole numbers"),
        (3, [True, False], "labels must be 2 whole numbers"),
    ],
)
def test_bad_labels_are_named(classes, labels, message):
    pipeline = real("v", classes)
    with pytest.raises(ValueError, match=message):
        denoising.invert(pipeline, IMAGES, labels)
    with pytest.raises(ValueError, match=message):
        inpainting.inpaint(pipeline, IMAGES, LEFT, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"label": 3}, "labels must be 1 of 0 to 2"),
        ({"label": "🙂"}, "label must be 1 whole numbers"),
        ({"steps": 0}, "steps must be .* 1 .*got 0"),
        ({"steps": 1001}, "steps must be .* 1000.*got 1001"),
        ({"scheduler": "plms"}, "scheduler: 'plms' does not fit"),
        ({"guidance": -1.0}, "guidance must be 0 or more, and finite, got -1.0"),
        ({"guidance": math.nan}, "guidance must be 0 or more, and finite, got nan"),
        ({"shown": 1}, "shown must be 2 or more, got 1"),
    ],
)
def test_bad_options_of_denoising_trajectory_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        denoising.denoising_trajectory(real("v", 3), **({"label": 0} | options))


def test_what_a_model_without_classes_cannot_do_is_named():
    with pytest.raises(ValueError, match=r"labels: .*unconditional"):
        denoising.denoising_trajectory(real("flow"), label=1)
    with pytest.raises(ValueError, match=r"guidance: 2\.0 requires"):
        denoising.denoising_trajectory(real("flow"), guidance=2.0)
    with pytest.raises(ValueError, match=r"scheduler: 'ddim' does not fit a model .* flow"):
        denoising.denoising_trajectory(real("flow"), scheduler="ddim")
    mean = DenoisingPipeline(denoisers.make_unet(SIZE, (8, 16), mean=True), scheduler("flow"))
    with pytest.raises(ValueError, match="pipeline: a mean flow"):
        denoising.denoising_trajectory(mean)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_steps_are_named(steps):
    message = f"steps must be .* got {steps}"
    with pytest.raises(ValueError, match=message):
        denoising.invert(real("v"), IMAGES, steps=steps)
    with pytest.raises(ValueError, match=message):
        inpainting.inpaint(real("v"), IMAGES, LEFT, steps=steps)


def test_bad_noising_is_named():
    with pytest.raises(ValueError, match="shown must be 2 or more, got 1"):
        denoising.noising_trajectory(real("v"), IMAGES, shown=1)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -2"):
        denoising.noising_trajectory(real("v"), IMAGES, seed=-2)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (LEFT.float(), {}, r"mask must be \(8, 8\) or \(2, 8, 8\), .* \(8, 8\) of float32"),
        (LEFT[:7], {}, r"mask must be .*, got \(7, 8\) of bool"),
        (LEFT.expand(3, 8, 8), {}, r"mask must be .*, got \(3, 8, 8\) of bool"),
        (LEFT.expand(2, 1, 8, 8), {}, r"mask must be .*, got \(2, 1, 8, 8\) of bool"),
        (LEFT, {"resample": 0}, "resample must be 1 or more, got 0"),
        (LEFT, {"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_bad_holes_are_named(mask, options, message):
    with pytest.raises(ValueError, match=message):
        inpainting.inpaint(real("v"), IMAGES, mask, **options)
