"""Diffusion and flow matching: exact losses, samplers that meet closed forms, and the pipeline."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from genkit.hub import vendoring
from genkit.models import denoisers, diffusion, diffusion_losses
from genkit.models.diffusion import OBJECTIVES, DenoisingPipeline

KINDS = [(o, s) for o in OBJECTIVES for s in diffusion.SCHEDULES if (o, s) != ("flow", "cosine")]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def even_ranks(count):
    return (torch.arange(count) + 0.5) / count


def tiny(size=(1, 8, 8), labels=0, seed=0, **options):
    """A small network whose last layer is not nearly nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = denoisers.make_unet(size, (8, 16), labels=labels, **options).eval()
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)
    return unet


def pipeline_of(objective="epsilon", labels=0, size=(1, 8, 8)):
    return DenoisingPipeline(tiny(size, labels), diffusion.make_scheduler(objective))


# ---- networks


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 12, 20), (2, 4, 8)])
@pytest.mark.parametrize(
    ("widths", "options"),
    [
        ((8,), {}),
        ((8, 16), {"attention": True}),  # fewer features than a head has
        ((4, 6, 64), {"attention": True, "layers": 2}),
        ((3, 5), {"labels": 4}),
    ],
)
def test_networks_fit_any_size_and_all_of_them_learns(size, widths, options):
    unet = denoisers.make_unet(size, widths, **options)
    labels = torch.tensor([0, 2, 4]) if options.get("labels") else None
    told = unet(normal(3, *size), torch.tensor([0.0, 7.3, 999.0]), class_labels=labels).sample
    assert told.shape == (3, *size)
    told.square().sum().backward()
    assert [n for n, p in unet.named_parameters() if p.grad is None] == []
    assert unet.down_blocks[-1].__class__.__name__.startswith("Attn") == bool(
        options.get("attention")
    )


def test_make_unet_has_one_more_class_for_no_class():
    unet = tiny(labels=5)
    assert unet.config.num_class_embeds == 6 and tiny().config.num_class_embeds is None
    images = normal(1, 1, 8, 8).expand(6, -1, -1, -1)
    told = unet(images, torch.tensor(500.0), class_labels=torch.arange(6)).sample
    assert torch.pdist(told.flatten(1)).min() > 1e-4  # each is heard
    with pytest.raises(IndexError):
        unet(images[:1], torch.tensor(500.0), class_labels=torch.tensor([6]))


@pytest.mark.parametrize(
    ("size", "widths"),
    [((1, 30, 30), 3), ((1, 28, 20), 4), ((3, 7, 7), 2), ((2, 24, 36), 5), ((1, 28, 28), 4)],
)
def test_pictures_that_cannot_be_halved_are_refused_with_what_can(size, widths):
    with pytest.raises(
        ValueError, match=f"resolution: {widths} widths .* {size[2]} x {size[1]}"
    ) as e:
        denoisers.make_unet(size, (8,) * widths)
    side, most = map(int, re.search(r"--resolution (\d+), or (\d+) widths", str(e.value)).groups())
    assert side >= max(size[1:])
    denoisers.make_unet((size[0], side, side), (8,) * widths)  # both pieces of advice work
    denoisers.make_unet(size, (8,) * most)
    with pytest.raises(ValueError, match="resolution"):
        denoisers.make_unet(size, (8,) * (most + 1))


# ---- the way from an image to noise


@pytest.mark.parametrize(("objective", "schedule"), KINDS)
def test_noise_grows_along_the_way(objective, schedule):
    scheduler = diffusion.make_scheduler(objective, schedule)
    assert diffusion.objective_of(scheduler) == objective
    way = diffusion_losses.noising_at_quantiles(scheduler, even_ranks(1000))
    alpha, sigma = way.alpha.double(), way.sigma.double()
    if objective == "flow":
        whole = alpha + sigma
    else:
        whole = alpha.square() + sigma.square()
        assert torch.equal(way.timesteps, torch.arange(1000))  # each once
    assert (whole - 1).abs().max() < 1e-6
    assert (sigma.diff() > 0).all() and alpha.min() >= 0
    again = diffusion_losses.noising_at_timesteps(scheduler, way.timesteps)
    for name in ("timesteps", "alpha", "sigma"):
        torch.testing.assert_close(getattr(again, name), getattr(way, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", [*diffusion.PREDICTIONS])
@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_it_is_the_way_of_diffusers(objective, schedule):
    scheduler = diffusion.make_scheduler(objective, schedule)
    images, noise = normal(50, 2, 3, 4), normal(50, 2, 3, 4, seed=1)
    way = diffusion_losses.noising_at_quantiles(scheduler, even_ranks(50))
    mixed = way.mix(images, noise)
    torch.testing.assert_close(mixed, scheduler.add_noise(images, noise, way.timesteps))
    found = diffusion_losses.target(images, noise, way.alpha, way.sigma, objective)
    if objective == "v":
        torch.testing.assert_close(found, scheduler.get_velocity(images, noise, way.timesteps))
    # and what is told is what its sampler takes it for
    for i in (3, 25, 45):
        told = scheduler.step(found[i], int(way.timesteps[i]), mixed[i])
        kept = images[i].clamp(-1, 1)  # as the scheduler does
        torch.testing.assert_close(told.pred_original_sample, kept, rtol=0, atol=2e-3)


def test_a_flow_goes_the_way_of_diffusers():
    scheduler = diffusion.make_scheduler("flow")
    times = scheduler.timesteps[::20]
    images, noise = normal(len(times), 2, 3, 4), normal(len(times), 2, 3, 4, seed=1)
    mixed = diffusion_losses.noising_at_timesteps(scheduler, times).mix(images, noise)
    torch.testing.assert_close(mixed, scheduler.scale_noise(images, times, noise))


def test_times_of_a_flow_are_logit_normal():
    way = diffusion_losses.noising_at_quantiles(diffusion.make_scheduler("flow"), even_ranks(4001))
    ranks = torch.special.ndtr(way.sigma.double().logit())  # the distribution function
    assert (ranks - even_ranks(4001)).abs().max() < 1e-5
    torch.testing.assert_close(way.timesteps, 1000 * way.sigma)
    ends = diffusion_losses.noising_at_quantiles(
        diffusion.make_scheduler("flow"), torch.tensor([0.0, 1 - 2**-24])
    )
    assert ends.sigma.isfinite().all() and ends.sigma[0] > 0 and ends.alpha[1] > 0


@given(st.integers(1, 300), st.integers(0, 2**24 - 1), st.randoms(use_true_random=False))
def test_ranks_are_spread_evenly(count, offset, random):
    order = list(range(count))
    random.shuffle(order)
    drawn = torch.tensor([offset / 2**24])  # as torch.rand does
    ranks = diffusion_losses.stratified_quantiles(torch.tensor(order), drawn)
    assert ranks.min() >= 0 and ranks.max() < 1
    places = torch.tensor(order)
    assert (ranks * count - places - drawn).abs().max() < 1e-4 * max(1, count / 100)
    scheduler = diffusion.make_scheduler("epsilon")
    assert diffusion_losses.noising_at_quantiles(scheduler, ranks).timesteps.max() < diffusion.TIMES


def test_the_largest_offset_does_not_lead_beyond_the_last_time():
    ranks = diffusion_losses.stratified_quantiles(torch.arange(256), torch.tensor([1 - 2**-24]))
    assert ranks.max() < 1  # although 255 + offset is 256 in float32
    assert (
        diffusion_losses.noising_at_quantiles(diffusion.make_scheduler("v"), ranks).timesteps.max()
        == 999
    )


# ---- losses


@pytest.mark.parametrize(("objective", "schedule"), KINDS)
def test_predicted_image_inverts_target(objective, schedule):
    scheduler = diffusion.make_scheduler(objective, schedule)
    way = diffusion_losses.noising_at_quantiles(
        scheduler, 0.98 * even_ranks(64)
    )  # where all is noise it is rounded
    images, noise = normal(64, 2, 3, 4).double(), normal(64, 2, 3, 4, seed=1).double()
    kept = way.alpha.double()
    sigma = 1 - kept if objective == "flow" else (1 - kept.square()).sqrt()
    mixed = diffusion_losses.Noising(way.timesteps, kept, sigma).mix(images, noise)
    told = diffusion_losses.target(images, noise, kept, sigma, objective)
    found = diffusion_losses.predicted_image(mixed, told, kept, sigma, objective)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-9)
    # an error of what is told is an error of the image
    wrong = diffusion_losses.predicted_image(mixed, told + 0.1, kept, sigma, objective)
    by = {"epsilon": sigma / kept, "v": sigma, "x0": torch.ones(64), "flow": sigma}[objective]
    torch.testing.assert_close((wrong - found).abs().amax((1, 2, 3)), 0.1 * by.double())


class Oracle(torch.nn.Module):
    """Knows the truth, but for an error; it has no config."""

    def __init__(self, truth, error=0.0):
        super().__init__()
        self.truth, self.error, self.heard = truth, error, None

    def forward(self, sample, timestep, class_labels=None):
        self.heard = (sample, timestep, class_labels)
        return UNet2DOutput(self.truth + self.error)


@pytest.mark.parametrize(
    ("objective", "min_snr"),
    [*((each, 0.0) for each in OBJECTIVES), *((each, 5.0) for each in diffusion.PREDICTIONS)],
)
def test_the_truth_costs_nothing(objective, min_snr):
    way = diffusion_losses.noising_at_quantiles(diffusion.make_scheduler(objective), even_ranks(20))
    images, noise, labels = normal(20, 1, 4, 4), normal(20, 1, 4, 4, seed=1), torch.arange(20)
    parts = (images, noise, labels, way.timesteps, way.alpha, way.sigma)
    truth = diffusion_losses.target(images, noise, way.alpha, way.sigma, objective)
    oracle = Oracle(truth)
    assert diffusion_losses.loss(oracle, *parts, objective, min_snr).item() == 0
    torch.testing.assert_close(oracle.heard[0], way.mix(images, noise))
    assert torch.equal(oracle.heard[1], way.timesteps) and torch.equal(oracle.heard[2], labels)
    error = torch.linspace(0.1, 2, 20)  # of each row
    found = diffusion_losses.loss(
        Oracle(truth, error[:, None, None, None]), *parts, objective, min_snr
    )
    weights = torch.ones(20)
    if min_snr:
        weights = diffusion_losses.min_snr_weights(way.alpha, way.sigma, objective, min_snr)
    torch.testing.assert_close(found, (weights * error.square()).mean())


@given(st.floats(0.1, 20), st.floats(-6, 6))
def test_min_snr_weights_are_the_papers(cap, log_snr):
    snr = torch.tensor([10.0**log_snr], dtype=torch.float64)
    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
    wanted = {  # section 3.4, and its table of targets
        "x0": min(snr.item(), cap),
        "epsilon": min(cap / snr.item(), 1),
        "v": min(snr.item(), cap) / (snr.item() + 1),
    }
    for objective, weight in wanted.items():
        found = diffusion_losses.min_snr_weights(alpha, sigma, objective, cap).item()
        assert found == pytest.approx(weight, rel=1e-6)
    # whatever the target is, an error of the image weighs the same
    mixed = alpha[:, None, None, None] * normal(1, 1, 2, 2).double()
    for objective in wanted:
        truth, wrong = (
            diffusion_losses.predicted_image(
                mixed, told * torch.ones(1, 1, 2, 2).double(), alpha, sigma, objective
            )
            for told in (0.3, 0.4)
        )
        weight = diffusion_losses.min_snr_weights(alpha, sigma, objective, cap).item()
        wanted_loss = min(snr.item(), cap) * (wrong - truth).square().mean().item()
        assert weight * 0.1**2 == pytest.approx(wanted_loss, rel=1e-4)


def test_weights_are_finite_where_all_is_noise():
    scheduler = diffusion.make_scheduler("v", "cosine")
    way = diffusion_losses.noising_at_quantiles(scheduler, even_ranks(1000))
    for objective in diffusion.PREDICTIONS:
        found = diffusion_losses.min_snr_weights(way.alpha, way.sigma, objective, 5.0)
        assert found.isfinite().all() and (found >= 0).all()


# ---- samplers, where the exact network is known


MEAN, SPREAD = 0.2, 0.15  # of all pixels of the data, which are normal and independent


def way_at(scheduler, times):
    """Signal and grain at any time between the steps of training, too, as diffusers sees it."""
    times = times.double()
    if diffusion.objective_of(scheduler) == "flow":
        return 1 - times / 1000, times / 1000
    kept = scheduler.alphas_cumprod.double()
    sigmas = ((1 - kept) / kept).log() / 2
    below = times.floor().long().clamp(0, 998)
    sigma = torch.lerp(sigmas[below], sigmas[below + 1], times - below).exp()
    alpha = (1 + sigma.square()).rsqrt()
    return alpha, alpha * sigma


def exact_network(scheduler):
    """What a perfect network tells: the mean of all images that x_t could come from."""
    objective = diffusion.objective_of(scheduler)

    def network(seen, times, labels=None):
        alpha, sigma = way_at(scheduler, times)
        a, b = alpha[:, None, None, None], sigma[:, None, None, None]
        x = seen.double()
        gain = a * SPREAD**2 / (a.square() * SPREAD**2 + b.square())
        images = MEAN + gain * (x - a * MEAN)
        told = diffusion_losses.target(images, (x - a * images) / b, alpha, sigma, objective)
        return told.float()

    return network


def flowed(scheduler, noise):
    """Where the probability flow takes noise: it is linear."""
    start = torch.tensor([1000.0 if diffusion.objective_of(scheduler) == "flow" else 999.0])
    alpha, sigma = (float(part) for part in way_at(scheduler, start))
    spread = math.hypot(alpha * SPREAD, sigma)
    return MEAN + SPREAD * (noise - alpha * MEAN) / spread


def run_through(scheduler, name, steps, noise, generator=None):
    made = diffusion.make_sampler(scheduler, name, steps)
    *_, last = diffusion.denoise(exact_network(scheduler), made, noise, generator=generator)
    return last.prev_sample


WITHOUT_NOISE = [
    (objective, name)
    for objective in OBJECTIVES
    for name in (diffusion.FLOW_SAMPLERS if objective == "flow" else diffusion.SAMPLERS)
    if name != "ddpm" and (objective, name) != ("x0", "heun")
]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "name"), WITHOUT_NOISE)
def test_samplers_without_noise_follow_the_probability_flow(objective, name):
    schedule = "linear" if objective in ("epsilon", "flow") else "cosine"
    scheduler = diffusion.make_scheduler(objective, schedule)
    noise = normal(4, 1, 12, 12)
    wanted = flowed(scheduler, noise)
    errors = [
        (run_through(scheduler, name, steps, noise) - wanted).square().mean().sqrt() / SPREAD
        for steps in (50, 200)
    ]
    order = 1 if name in ("ddim", "euler") else 2
    assert errors[1] < (0.06 if order == 1 else 0.02)
    assert errors[0] / errors[1] > 3  # a quarter of the step, at most a third of the error


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "schedule"), KINDS[:-1])
def test_ancestral_sampling_draws_the_data(objective, schedule):
    scheduler = diffusion.make_scheduler(objective, schedule)
    count = 8 * 32 * 32
    noise, generator = normal(8, 1, 32, 32), torch.Generator().manual_seed(1)
    drawn = run_through(scheduler, "ddpm", 1000, noise, generator)
    assert abs(drawn.mean() - MEAN) < 4 * SPREAD / math.sqrt(count)
    # discrete steps lose less than 1.5 % of the spread
    assert abs(drawn.std() / SPREAD - 1) < 0.015 + 4 / math.sqrt(2 * count)
    kurtosis = ((drawn - drawn.mean()) / drawn.std()).pow(4).mean()
    assert abs(kurtosis - 3) < 4 * math.sqrt(24 / count)
    # it adds noise of its own: half of what it draws does not come from where it starts
    assert abs(torch.corrcoef(torch.stack([drawn.flatten(), noise.flatten()]))[0, 1]) < 0.1


def test_ancestral_noise_is_a_rows_own():
    scheduler, noise = diffusion.make_scheduler("v"), normal(3, 1, 4, 4)
    together = run_through(scheduler, "ddpm", 20, noise, seeds(0, 1, 2))
    alone = [run_through(scheduler, "ddpm", 20, noise[i, None], seeds(i)) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-6)
    other = run_through(scheduler, "ddpm", 20, noise, seeds(3, 4, 5))
    assert (other - together).abs().mean() > 0.1 * SPREAD


@pytest.mark.parametrize(("objective", "name"), [("epsilon", "ddpm"), *WITHOUT_NOISE])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_few_steps_are_as_many_as_were_asked_for(objective, name, steps):
    scheduler = diffusion.make_scheduler(objective)
    made = diffusion.make_sampler(scheduler, name, steps)
    assert len(made.timesteps) == (2 * steps - 1 if name == "heun" else steps)
    assert made.timesteps[0] >= (1000 if objective == "flow" else 900)  # next to all noise
    drawn = run_through(scheduler, name, steps, normal(2, 1, 4, 4), seeds(0, 1))
    assert drawn.isfinite().all() and abs(drawn.mean() - MEAN) < SPREAD


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++", "unipc"])
def test_steps_are_spread_evenly_or_refused_with_what_can_be(name):
    scheduler, refused = diffusion.make_scheduler("v"), 0
    first = 21 if name in diffusion.SPACED else 1  # fewer are spread otherwise
    for steps in (*range(first, 1000, 83 if name in ("dpm++", "unipc") else 9), 999, 1000):
        try:
            made = diffusion.make_sampler(scheduler, name, steps)
        except ValueError as error:
            refused += 1
            match = re.search(rf"steps: {re.escape(name)} .* {steps} .* (\d+) or (\d+)", str(error))
            for near in map(int, match.groups()):
                assert diffusion.resolve_sampler(scheduler, name, near) == (name, near)
            continue
        gaps = -made.timesteps.diff()
        assert len(made.timesteps) == steps and made.timesteps[0] == 999
        assert (gaps > 0).all() and ((gaps - 1000 / steps).abs() <= 1).all()
        # where it is led to by a step is where the next one begins
        assert name != "ddim" or (gaps == 1000 // steps).all()
    assert (name == "ddim") <= (refused > 0)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_few_steps_of_a_solver_are_even_in_the_logarithm_of_noise(name, schedule):
    made = diffusion.make_sampler(diffusion.make_scheduler("v", schedule), name, 10)
    *sigmas, last = made.sigmas.tolist()
    ratios = [later / sooner for sooner, later in itertools.pairwise(sigmas)]
    assert ratios == pytest.approx([ratios[0]] * 9, rel=1e-3)
    assert last == 0 and 50 < sigmas[0] <= diffusion.MOST_RATIO
    assert (made.timesteps.diff() < 0).all()


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_ten_steps_of_a_solver_are_near_where_a_thousand_lead(name):
    noise = normal(64, 1, 8, 8)
    exact = MEAN + SPREAD * noise
    scheduler = diffusion.make_scheduler("v", "cosine")
    error = (run_through(scheduler, name, 10, noise) - exact).square().mean().sqrt() / SPREAD
    plain = (run_through(scheduler, "ddim", 10, noise) - exact).square().mean().sqrt() / SPREAD
    assert error < {"dpm++": 0.01, "unipc": 0.04}[name] and error < plain / 2


# independent pixels of two kinds, as of ink on paper, by their shares, means and deviations
SHARES, MEANS, SPREADS = torch.tensor([[0.7, 0.3], [-0.8, 0.7], [0.12, 0.2]]).double()


def mixture_velocity(seen, times, labels=None):
    """The velocity of a flow from noise to such pixels."""
    sigma = times.double()[:, None, None, None] / 1000
    alpha, x = 1 - sigma, seen.double()
    variance = (alpha[..., None] * SPREADS).square() + sigma[..., None].square()
    away = x[..., None] - alpha[..., None] * MEANS
    of_each = (SHARES.log() - away.square() / variance / 2 - variance.log() / 2).softmax(-1)
    pixel = (of_each * (MEANS + alpha[..., None] * SPREADS.square() / variance * away)).sum(-1)
    return ((x - pixel) / sigma).float()


def mixture_pixels(noise):
    """Where the flow takes noise: a pixel keeps its quantile."""
    u = torch.special.ndtr(noise.double())
    low, high = torch.full_like(u, -5), torch.full_like(u, 5)
    for _ in range(60):
        middle = (low + high) / 2
        below = (SHARES * torch.special.ndtr((middle[..., None] - MEANS) / SPREADS)).sum(-1) < u
        low, high = low.where(~below, middle), high.where(below, middle)
    return low


def test_dpm_steps_of_a_flow_are_closer_than_evenly_spaced_ones():
    noise = normal(4, 1, 32, 32)
    wanted, errors = mixture_pixels(noise), {}
    for name, steps in (("euler", 10), ("heun", 5), ("dpm++", 10), ("dpm++", 20), ("dpm++", 80)):
        made = diffusion.make_sampler(diffusion.make_scheduler("flow"), name, steps)
        *_, last = diffusion.denoise(mixture_velocity, made, noise)
        error = (last.prev_sample - wanted).square().mean().sqrt() / wanted.std()
        errors[name, steps] = error.item()
    assert errors["dpm++", 10] < 0.07  # at as many evaluations
    assert errors["dpm++", 10] < 0.7 * min(errors["heun", 5], errors["euler", 10])
    assert errors["dpm++", 20] < errors["dpm++", 10] / 2
    assert errors["dpm++", 80] < errors["dpm++", 20] / 4


def test_flow_sigmas_fall_from_noise_alone_to_the_image():
    for steps in (1, 2, 10, 1000):
        sigmas = diffusion.flow_sigmas(steps)
        assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
        torch.testing.assert_close(sigmas + sigmas.flip(0), torch.ones(steps + 1))


def test_make_sampler_warns_of_no_unknown_settings(caplog, capfd):
    diffusion.make_sampler(diffusion.make_scheduler("flow"))
    for name in diffusion.SAMPLERS:
        diffusion.make_sampler(diffusion.make_scheduler("epsilon"), name)
    assert caplog.text == "" and capfd.readouterr() == ("", "")


def test_denoise_yields_whole_steps():
    scheduler = diffusion.make_scheduler("flow")
    made, noise = diffusion.make_sampler(scheduler, "euler", 5), normal(2, 1, 4, 4)
    steps = list(diffusion.denoise(exact_network(scheduler), made, noise))
    assert [step.timestep.item() for step in steps] == made.timesteps.tolist()
    assert torch.equal(steps[0].model_input, noise)
    for step, later, next_time in zip(steps, steps[1:], made.timesteps[1:], strict=False):
        assert torch.equal(step.prev_sample, later.model_input)
        by_hand = step.model_input + (next_time - step.timestep) / 1000 * step.prediction
        torch.testing.assert_close(step.prev_sample, by_hand)


# ---- guidance


@pytest.mark.parametrize(("objective", "name"), [("v", "dpm++"), ("v", "ddpm"), ("flow", "heun")])
def test_guidance_goes_from_no_class_through_the_class(objective, name):
    scheduler, noise = diffusion.make_scheduler(objective), normal(3, 1, 4, 4)
    labels, none, rows = torch.tensor([2, 0, 1]), 3, []
    told = normal(4, 1, 4, 4, seed=2)  # by label

    def network(seen, times, labels):
        rows.append(len(seen))
        assert times.shape == (len(seen),) and labels.shape == (len(seen),)
        return told[labels] + 0.1 * seen

    def steps(guidance, asked=labels):
        rows.clear()
        made = diffusion.make_sampler(scheduler, name, 5)
        found = list(diffusion.denoise(network, made, noise, asked, none, guidance, seeds(0, 1, 2)))
        assert sum(rows) == len(made.timesteps) * 3 * (1 if guidance == 1 else 2)
        return found

    by = {guidance: steps(guidance) for guidance in (0, 0.5, 1, 3)}
    free = steps(1, torch.full_like(labels, none))
    torch.testing.assert_close(
        by[0][-1].prev_sample, free[-1].prev_sample
    )  # the class does not matter at 0
    first = {guidance: found[0].prediction for guidance, found in by.items()}
    assert torch.equal(first[1], told[labels] + 0.1 * by[1][0].model_input)
    torch.testing.assert_close(first[0.5], (first[0] + first[1]) / 2)
    torch.testing.assert_close(first[3], first[0] + 3 * (first[1] - first[0]))
    near = steps(1 + 1e-6)[-1].prev_sample
    torch.testing.assert_close(near, by[1][-1].prev_sample, rtol=0, atol=1e-4)


# ---- pipeline


@pytest.mark.parametrize(
    ("objective", "name"),
    [("epsilon", "ddpm"), ("v", "unipc"), ("x0", "euler"), ("epsilon", "heun"), ("flow", None)],
)
def test_an_image_depends_on_its_seed_alone(objective, name):
    pipeline = pipeline_of(objective, labels=3)
    labels, how = [0, 1, 2, 0, 1], {"num_inference_steps": 6, "sampler_name": name}
    how |= {"guidance": 2.0, "output_type": "pt"}
    whole = pipeline(5, seeds(0, 1, 2, 3, 4), labels, **how).images
    assert whole.shape == (5, 1, 8, 8) and whole.min() >= 0 and whole.max() <= 1
    for i in range(5):
        alone = pipeline(1, seeds(i), labels[i : i + 1], **how).images[0]
        # noise of these two is 80 times as large at first, and so is what rounds
        far = {"heun": 1e-4, "euler": 3e-5}.get(name, 1e-5)
        torch.testing.assert_close(alone, whole[i], rtol=0, atol=far)
    assert (whole[0] - whole[3]).abs().max() > 1e-3  # one class, two seeds


def test_images_come_as_asked_for():
    pipeline, how = pipeline_of(size=(3, 4, 8)), {"num_inference_steps": 2}
    tensor = pipeline(2, seeds(0, 1), output_type="pt", **how).images
    array = pipeline(2, seeds(0, 1), output_type="np", **how).images
    pictures = pipeline(2, seeds(0, 1), **how).images
    assert tensor.shape == (2, 3, 4, 8) and pipeline.latent_shape == (3, 4, 8)
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert pictures[1].size == (8, 4)
    np.testing.assert_allclose(np.asarray(pictures[1]) / 255, array[1], atol=0.51 / 255)
    plain = pipeline(2, seeds(0, 1), output_type="pt", return_dict=False, **how)[0]
    assert torch.equal(plain, tensor)


@pytest.mark.parametrize(("objective", "labels"), [("epsilon", 0), ("v", 3), ("flow", 3)])
def test_what_is_decoded_is_what_is_drawn(objective, labels):
    pipeline = pipeline_of(objective, labels)
    told = [2, 0, 1] if labels else None
    noise = torch.stack([torch.randn(1, 8, 8, generator=g) for g in seeds(0, 1, 2)])
    decoded = pipeline.decode(pipeline.noise_to_latent(noise), told)
    drawn = pipeline(3, seeds(0, 1, 2), told, output_type="pt").images
    torch.testing.assert_close(decoded / 2 + 0.5, drawn, rtol=0, atol=1e-5)


def test_gradients_pass_through_decoding():
    latents = normal(1, 1, 8, 8).mul(0.1).requires_grad_()
    pipeline_of("flow").decode(latents).sum().backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().sum() > 0


def test_pipeline_calls_a_given_network_instead_of_the_unet():
    pipeline, asked = pipeline_of(), []

    def network(seen, times, labels):
        asked.append((len(seen), times.tolist(), labels))
        return pipeline.predict(seen, times, labels)

    how = {"num_inference_steps": 4, "output_type": "pt", "sampler_name": "ddim"}
    drawn = pipeline(2, seeds(0, 1), network=network, **how).images
    assert torch.equal(drawn, pipeline(2, seeds(0, 1), **how).images)
    assert [count for count, _, _ in asked] == [2] * 4 and asked[0][1] == [999.0] * 2


def test_a_stock_pipeline_draws_the_same():
    pipeline = pipeline_of("v", size=(3, 8, 8))
    stock = DDPMPipeline(pipeline.unet, pipeline.scheduler)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(3, seeds(0, 1, 2), num_inference_steps=11, output_type="np").images
    how = {"num_inference_steps": 11, "sampler_name": "ddpm", "output_type": "np"}
    np.testing.assert_allclose(pipeline(3, seeds(0, 1, 2), **how).images, theirs, atol=1e-6)


# ---- what is saved


def test_saved_pipelines_are_loaded_as_they_were(tmp_path):
    for objective in OBJECTIVES:
        for labels in (0, 3):
            pipeline, folder = pipeline_of(objective, labels), tmp_path / f"{objective}{labels}"
            if labels:
                vendoring.save_pipeline(pipeline, folder)
            else:
                DDPMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(folder)
            again = denoisers.load_diffusion(folder)
            assert diffusion.objective_of(again.scheduler) == objective
            assert again.labels == labels and not again.unet.training
            told, how = [1] if labels else None, {"output_type": "pt", "num_inference_steps": 2}
            one, other = (p(1, seeds(0), told, **how).images for p in (again, pipeline))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_weight(path):
    weights = load_file(path)
    del weights["conv_in.bias"]
    save_file(weights, path, {"format": "pt"})


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "No such file"),
        (lambda f: (f / "model_index.json").write_text("no JSON"), "Expecting value"),
        (lambda f: (f / "model_index.json").write_text("[]"), "list indices"),
        (lambda f: (f / "model_index.json").write_text("{}"), "_class_name"),
        (
            lambda f: edit(f / "model_index.json", _class_name="DDIMPipeline"),
            "class is DDIMPipeline",
        ),
        (lambda f: edit(f / "model_index.json", _class_name=["gan", "GANPipeline"]), "GANPipeline"),
        (lambda f: edit(f / "model_index.json", scheduler=["os", "system"]), "system"),
        (lambda f: edit(f / "model_index.json", scheduler=None), "subscriptable"),
        (lambda f: (f / "unet/a.safetensors.index.json").write_text("{}"), "in several files"),
        (lambda f: (f / WEIGHTS).unlink(), "diffusion_pytorch_model"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "safetensors"),
        (lambda f: drop_a_weight(f / WEIGHTS), "its weights lack .'conv_in.bias'."),
        (lambda f: edit(f / "unet/config.json", block_out_channels=[8, 24]), "shape"),
        (lambda f: edit(f / "unet/config.json", down_block_types=["A", "B"]), "A"),
        (lambda f: edit(f / "unet/config.json", sample_size=1), "sample_size is 1"),
        (lambda f: edit(f / "unet/config.json", sample_size=[8, 7]), r"sample_size is \[8, 7\]"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "scheduler"),
        (
            lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="score"),
            "score",
        ),
        (
            lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="steep"),
            "steep",
        ),
    ],
)
def test_what_is_no_diffusion_model_is_refused(tmp_path, spoil, message):
    pipeline = pipeline_of()
    DDPMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)model: .* holds no diffusion model .*{message}"):
        denoisers.load_diffusion(tmp_path)


# ---- what cannot work


PLAIN, TOLD, FLOW = pipeline_of(), pipeline_of(labels=3), pipeline_of("flow")
CLEAN = pipeline_of("x0")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PLAIN(1, labels=[0]), "labels: .*unconditional"),
        (lambda: PLAIN.decode(normal(1, 1, 8, 8), [0]), "labels: .*unconditional"),
        (lambda: TOLD(1), "labels are required.*3 classes"),
        (lambda: TOLD(1, labels=[3]), r"labels must be 1 of 0 to 2, got \[3\]"),
        (lambda: TOLD(2, labels=[0, -1]), r"labels must be 2 of 0 to 2, got \[0, -1\]"),
        (lambda: TOLD(1, labels=[0.5]), r"labels must be 1 of 0 to 2, got \[0.5\]"),
        (lambda: TOLD(2, labels=[0]), r"labels must be 2 of 0 to 2, got \[0\]"),
        (lambda: TOLD(1, labels=0), "labels must be 1 of 0 to 2, got 0"),
        (lambda: PLAIN(1, guidance=2.0), "guidance: 2.0 requires"),
        (lambda: TOLD(1, labels=[0], guidance=-1.0), "guidance must be 0 or more, .* got -1.0"),
        (lambda: TOLD(1, labels=[0], guidance=math.inf), "guidance must be .* got inf"),
        (lambda: TOLD(1, labels=[0], guidance=math.nan), "guidance must be .* got nan"),
        (lambda: PLAIN(1, seeds(0, 1)), "generator must be one or a list of 1, got 2"),
        (lambda: PLAIN(1, num_inference_steps=0), "steps must be .* 1 to 1000.* got 0"),
        (lambda: PLAIN(1, num_inference_steps=1001), "steps must be .* 1 to 1000.* got 1001"),
        (lambda: PLAIN(1, num_inference_steps=2.5), "steps must be a whole number .* got 2.5"),
        (lambda: PLAIN(1, num_inference_steps=True), "steps must be a whole number .* got True"),
        (lambda: FLOW(1, sampler_name="ddpm"), "scheduler: 'ddpm' .* flow; .* euler, heun$"),
        (lambda: FLOW(1, sampler_name="ddim"), "scheduler: 'ddim' does not fit .* flow"),
        (lambda: CLEAN(1, sampler_name="heun"), "scheduler: 'heun' does not fit .* x0"),
        (lambda: PLAIN(1, sampler_name="plms"), "'plms' .* ddpm, ddim, dpm.*, unipc, heun, euler$"),
        (lambda: diffusion.make_scheduler("score"), "objective must be one of .*flow, got 'score'"),
        (lambda: diffusion.make_scheduler("v", "steep"), "schedule must be one of .* got 'steep'"),
    ],
)
def test_calls_that_cannot_work_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_steps_are_those_of_the_models_own_training():
    short = DDPMScheduler(100, prediction_type="v_prediction")
    assert diffusion.resolve_sampler(short, "ddim", 100) == ("ddim", 100)
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 100"):
        diffusion.resolve_sampler(short, "ddim", 101)
    assert diffusion.resolve_sampler(short, "ddpm", None) == ("ddpm", 100)
