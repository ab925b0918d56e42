"""Mean flow: the exact mean velocity of normal images is its target, and samples them in a step."""

import math

import pytest
import torch
from builders import vae as tiny_vae
from diffusers.models.unets.unet_2d import UNet2DOutput

from genkit.hub import vendoring
from genkit.models import denoisers, diffusion, mean_flow
from genkit.models.diffusion import DenoisingPipeline

MEAN, SPREAD = 0.2, 0.15  # of all pixels of the data, which are normal and independent
SIZE, COUNT = (1, 8, 8), diffusion.MEAN_TIMES


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spans_of(count, seed=0, guided=True):
    generator = torch.Generator().manual_seed(seed)
    quantiles = (torch.randperm(count, generator=generator) + 0.5) / count
    u = torch.rand(count, 2, generator=generator)
    which = torch.full((count,), guided)
    return mean_flow.spans_at_quantiles(quantiles, torch.arange(count), u, which)


class Exact(torch.nn.Module):
    """Predicts the mean velocity of normal images, whatever the class."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep, class_labels=None):
        x, interval = sample[:, :1], sample[:, 1:2]
        t = timestep[:, None, None, None] / COUNT
        r = t - interval
        spread, later = (((1 - s) * SPREAD).square().add(s.square()).sqrt() for s in (t, r))
        end = (1 - r) * MEAN + later / spread * (x - (1 - t) * MEAN)
        slope = (t - (1 - t) * SPREAD**2) / spread.square()  # where the interval is 0
        velocity = slope * (x - (1 - t) * MEAN) - MEAN
        whole = interval.where(interval > 1e-3, 1)
        return UNet2DOutput(torch.where(interval > 1e-3, (x - end) / whole, velocity))


def unet_of(labels=0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = denoisers.make_unet(SIZE, (8, 16), attention=True, labels=labels, mean=True).eval()
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)
    return unet


def test_half_of_the_rows_are_asked_for_a_velocity_and_a_quarter_for_the_whole_way():
    spans = spans_of(400)
    assert (spans.intervals == 0).sum() == 200
    assert (spans.intervals == spans.times).sum() == 100
    assert ((spans.intervals >= 0) & (spans.intervals <= spans.times)).all()
    assert ((spans.times > 0) & (spans.times <= 1)).all()
    assert spans.guidance.min() >= 1 and spans.guidance.max() <= diffusion.MAX_GUIDANCE
    assert (spans_of(400, guided=False).guidance == 1).all()


def test_the_exact_mean_velocity_is_its_own_target():
    spans = spans_of(64)
    spans = spans.rows(spans.intervals > 0.01)
    images, noise = MEAN + SPREAD * normal(len(spans.times), *SIZE), normal(len(spans.times), *SIZE)
    found = mean_flow.target(Exact(), images, noise, None, spans)
    mixed = torch.lerp(images, noise, spans.times[:, None, None, None])
    still = mean_flow.Spans(spans.times, 0 * spans.times, spans.guidance)
    expected = Exact()(*still.inputs(mixed)).sample  # of all images and noise that mix to these
    wanted = Exact()(*spans.inputs(mixed)).sample + (noise - images - expected)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


def test_the_derivative_is_that_of_finite_differences():
    unet, spans, step = unet_of(), spans_of(8, guided=False), 1e-2
    images, noise = normal(8, *SIZE), normal(8, *SIZE, seed=1)
    found = mean_flow.target(unet, images, noise, None, spans)
    mixed = torch.lerp(images, noise, spans.times[:, None, None, None])
    still = mean_flow.Spans(spans.times, torch.zeros(8), spans.guidance)
    with torch.no_grad():
        own = unet(*still.inputs(mixed)).sample

        def moved(by):
            there = mean_flow.Spans(spans.times + by, spans.intervals + by, spans.guidance)
            return unet(*there.inputs(mixed + by * own)).sample

        slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
    mean = (spans.intervals > 0)[:, None, None, None]
    wanted = noise - images - mean * spans.intervals[:, None, None, None] * slope
    assert (wanted - found).abs().max() < step * wanted.abs().max()


def test_guidance_moves_the_velocity_away_from_that_of_no_class():
    unet, labels = unet_of(3), torch.tensor([0, 1, 2, 0])
    images, noise, times = normal(4, *SIZE), normal(4, *SIZE, seed=1), torch.full((4,), 0.6)
    spans = mean_flow.Spans(times, torch.zeros(4), torch.tensor([1.0, 1.0, 1.5, 2.0]))
    found = mean_flow.target(unet, images, noise, labels, spans, 3)
    seen = spans.inputs(torch.lerp(images, noise, times[:, None, None, None]))
    free = mean_flow.Spans(times, torch.zeros(4), torch.ones(4))
    plain = free.inputs(torch.lerp(images, noise, times[:, None, None, None]))
    with torch.no_grad():
        away = unet(*seen, class_labels=labels).sample
        away = away - unet(*plain, class_labels=torch.full((4,), 3)).sample
    part = (1 - 1 / spans.guidance)[:, None, None, None]
    torch.testing.assert_close(found, noise - images + part * away, rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_gradient_of_the_loss_is_that_of_the_logarithm():
    unet, spans = unet_of(), spans_of(8, guided=False)
    images, noise, target = normal(8, *SIZE), normal(8, *SIZE, seed=1), normal(8, *SIZE, seed=2)
    found = mean_flow.loss(unet, images, noise, None, spans, target)
    found.backward()
    gradient = unet.conv_out.weight.grad.clone()
    unet.zero_grad()
    seen = spans.inputs(torch.lerp(images, noise, spans.times[:, None, None, None]))
    errors = (unet(*seen).sample - target).square().mean((1, 2, 3))
    (errors + mean_flow.LEAST_ERROR).log().mean().backward()
    torch.testing.assert_close(found, errors.mean())
    torch.testing.assert_close(gradient, unet.conv_out.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_steps_of_the_exact_mean_velocity_leads_to_the_same_image(steps):
    scheduler, noise = diffusion.make_scheduler("flow", mean=True), normal(4, *SIZE)
    made = diffusion.make_sampler(scheduler, None, steps, mean=True)
    asked = []

    def network(seen, times, labels):
        asked.append(times[0].item())
        return Exact()(seen, times).sample

    *_, last = diffusion.denoise(network, made, noise, mean=True)
    assert asked == pytest.approx([COUNT * left / steps for left in range(steps, 0, -1)])
    torch.testing.assert_close(last.prev_sample, MEAN + SPREAD * noise, rtol=0, atol=1e-5)


def test_start_from_keeps_the_velocity_of_the_flow(tmp_path):
    for labels in (0, 3):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            flow = denoisers.make_unet(SIZE, (8, 16), attention=True, labels=labels).eval()
        with torch.no_grad():
            flow.time_embedding.linear_1.weight[:, [0, 4]] = 0  # the fastest sine and cosine
        pipeline = DenoisingPipeline(flow, diffusion.make_scheduler("flow"))
        vendoring.save_pipeline(pipeline, tmp_path / f"flow{labels}")
        mean = unet_of(labels)
        scheduler = denoisers.start_from(mean, tmp_path / f"flow{labels}")
        assert scheduler.config.num_train_timesteps == 100  # of 4 waves the fastest is left out
        told, x, times = torch.tensor([0, 1]) if labels else None, normal(2, *SIZE), (0.3, 0.7)
        found = DenoisingPipeline(mean, scheduler).predict(x, 100 * torch.tensor(times), told)
        wanted = pipeline.predict(x, 1000 * torch.tensor(times), told)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="init_from: 'flow3' has another shape"):
        denoisers.start_from(unet_of(0), tmp_path / "flow3")
    other = DenoisingPipeline(flow, diffusion.make_scheduler("v"))
    vendoring.save_pipeline(other, tmp_path / "v")
    with pytest.raises(ValueError, match="init_from: 'v' is no flow"):
        denoisers.start_from(unet_of(3), tmp_path / "v")


def test_start_from_needs_a_flow_of_the_same_latents(tmp_path):
    first, second = tiny_vae(1), tiny_vae(1)
    for name, vae in (("pixels", None), ("latents", first)):
        pipeline = DenoisingPipeline(unet_of(), diffusion.make_scheduler("flow"), vae)
        vendoring.save_pipeline(pipeline, tmp_path / name)
        denoisers.start_from(unet_of(), tmp_path / name, vae)
    for name, vae, reason in (
        ("pixels", first, "'pixels' denoises pixels, this model latents; give --latent"),
        ("latents", None, "'latents' denoises latents, this model pixels;"),
        ("latents", second, "denoises latents, this model latents of another autoencoder;"),
    ):
        with pytest.raises(ValueError, match=f"init_from: .*{reason}"):
            denoisers.start_from(unet_of(), tmp_path / name, vae)


def test_a_mean_flow_of_another_scheduler_is_refused(tmp_path):
    pipeline = DenoisingPipeline(unet_of(), diffusion.make_scheduler("v"))
    vendoring.save_pipeline(pipeline, tmp_path)
    with pytest.raises(ValueError, match=r"model: .*its scheduler, DDPMScheduler, is no flow's"):
        denoisers.load_diffusion(tmp_path)


def test_guidance_is_an_input_of_one_evaluation():
    pipeline, rows = DenoisingPipeline(unet_of(3), diffusion.make_scheduler("flow")), []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    own = [torch.Generator().manual_seed(0)]
    images = [pipeline(1, own, [1], guidance=g, output_type="pt").images for g in (1.0, 1.25)]
    hook.remove()
    assert [len(each) for each in rows] == [1, 1]
    assert rows[0][0, 1:].unique().tolist() == [0, 1]  # the whole way, no guidance
    assert math.isclose(rows[1][0, 2, 0, 0].item(), 0.2, rel_tol=1e-6)
    assert images[0].shape == (1, *SIZE)
