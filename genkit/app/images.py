"""The tab of images: samples, a plane of latents, interpolation, the denoising trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from genkit.app import jobs, model_index, parts
from genkit.app.model_index import ModelIndex
from genkit.vision import pipelines

if TYPE_CHECKING:
    import torch

    from genkit.vision.pipelines import Decoder


MOST = 64  # images at once
EDGE = 0.01  # of the prior's probability, left out on each side of the plane
WIDE = 224  # pixels of the page, for a single image
CHANGES = 12  # outputs that change with the model
EVERY = "one after the other"
PAD = (Path(__file__).parent / "pad.js").read_text(encoding="utf-8")
KNOB = (
    '<div class="pad" role="application" aria-label="plane of latents">'
    "<span style=\"left: ${100 * value.split(' ')[0]}%; "
    "bottom: ${100 * value.split(' ')[1]}%\"></span></div>"
)
HINT = (
    "No image model was named. Train one with "
    "<code>accelerate launch recipes/train_vae.py</code>, <code>train_gan.py</code> or "
    "<code>train_diffusion.py</code>, then start the page with its folder."
)


def tab(index: ModelIndex, shown: gr.Tab) -> None:
    """Build the tab."""
    names = index.names(model_index.IMAGES)
    if not names:
        parts.canvas("no-images", parts.hint(HINT))
        return
    with gr.Row():
        model = parts.chooser(names)
        label = gr.Dropdown([], label="Class", visible=False, min_width=120)
    about, current = parts.canvas("about"), gr.State("")  # the model that all below is set for
    with gr.Row():
        seed = parts.seed_box()
        count = gr.Slider(1, MOST, 16, step=1, label="Images", min_width=150)
    with gr.Row(visible=False) as diffusion:
        scheduler = gr.Dropdown([], label="Scheduler", min_width=120)
        steps = gr.Number(20, label="Steps", precision=0, minimum=1, min_width=90)
        guidance = gr.Slider(0, 8, 1, step=0.5, label="Guidance", min_width=150)
    draw = gr.Button("Draw", variant="primary")
    samples = parts.canvas("samples")
    inputs = [model, label, seed]
    options = [scheduler, steps, guidance]
    draw.click(
        parts.make_event(_draw_samples, index), [*inputs, count, *options], samples, api_name="draw"
    )
    with gr.Column(visible=False) as walks:
        _add_plane(index, inputs, current)
        way = _add_walk(index, inputs)
    with gr.Column(visible=False) as denoising:
        gr.Markdown("### Denoising trajectory")
        out = gr.Button("Show how the image of this seed is denoised")
        noise = parts.canvas("denoising")
        out.click(parts.make_event(_denoise, index), [*inputs, *options], noise, api_name="denoise")
    changes = [about, current, label, diffusion, scheduler, steps, guidance, walks, denoising]
    changes += [samples, way, noise]  # of the model before
    assert len(changes) == CHANGES, "an output of `_configure` is missing"
    configure = parts.make_event(_configure, index, [gr.skip()] * (CHANGES - 1))
    gr.on(
        [model.input, shown.select], configure, [model, current], changes, api_name="about_images"
    )
    scheduler.input(_default_steps, scheduler, steps, api_name=False, queue=False)


def _add_plane(index: ModelIndex, inputs: list[Any], current: gr.State) -> None:
    """Build the plane to drag across, and its two sliders."""
    gr.Markdown("### A plane of latents\nDrag across the square, or move the sliders.")
    with gr.Row():
        with gr.Column(min_width=260):
            pad = gr.HTML(
                "0.5 0.5",
                html_template=KNOB,
                js_on_load=PAD,
                elem_id="pad",
                apply_default_css=False,
            )
        with gr.Column(min_width=260):
            here = parts.canvas("here")
    with gr.Row():
        across = gr.Slider(0, 1, 0.5, step=0.01, label="Across", min_width=150)
        up = gr.Slider(0, 1, 0.5, step=0.01, label="Up", min_width=150)
    drag = parts.make_event(_drag, index, [gr.skip()] * 2)
    pad.input(drag, [*inputs, pad], [here, across, up], api_name="drag", **parts.LIVE)
    slide = parts.make_event(_slide, index, [gr.skip()])
    gr.on(
        [current.change, across.input, up.input, *(given.input for given in inputs[1:])],
        slide, [*inputs, across, up], [here, pad], api_name="slide", **parts.LIVE,
    )  # fmt: skip


def _add_walk(index: ModelIndex, inputs: list[Any]) -> gr.HTML:
    """Build the interpolation between two seeds, and return the component that shows it."""
    gr.Markdown("### Between two seeds\nFrom the seed above to another.")
    with gr.Row():
        end = parts.seed_box(1, "To seed")
        number = gr.Slider(2, 16, 8, step=1, label="Images", min_width=150)
    walk = gr.Button("Walk")
    way = parts.canvas("between")
    walk.click(parts.make_event(_walk, index), [*inputs, end, number], way, api_name="walk")
    return way


# ---------------------------------------------------------------------------------------------
# The model


def load_image_model(index: ModelIndex, name: str) -> Any:
    """Load a model by its name in the page."""
    from genkit.vision import sampling

    return parts.load_once(sampling.load_image_model, index.resolve(model_index.IMAGES, name))


def _configure(index: ModelIndex, name: str, current: str) -> tuple[Any, ...]:
    """Show the options of a model; keep what was chosen if they are shown already."""
    if name == current:
        return (gr.skip(),) * CHANGES
    from genkit.models import diffusion
    from genkit.models.diffusion import DenoisingPipeline
    from genkit.vision import pipelines
    from genkit.vision.pixel_lm import PixelPipeline

    pipeline = load_image_model(index, name)
    classes = pipelines.count_classes(pipeline)
    diffuses, pixels = isinstance(pipeline, DenoisingPipeline), isinstance(pipeline, PixelPipeline)
    labels = f"class-conditional ({classes} classes)" if classes else "unconditional"
    kind = type(pipeline).__name__.removesuffix("Pipeline")
    schedulers, chosen, number = [], None, diffusion.DEFAULT_STEPS["dpm++"]
    if diffuses:
        schedulers = diffusion.compatible_samplers(pipeline.scheduler)
        chosen, number = diffusion.resolve_sampler(pipeline.scheduler, None, None)
    return (
        parts.hint(f"{kind} model, {labels}." + (" It draws pixel by pixel." if pixels else "")),
        name,
        gr.Dropdown([EVERY, *map(str, range(classes))], value=EVERY, visible=bool(classes)),
        gr.Row(visible=diffuses),
        gr.Dropdown(schedulers, value=chosen),
        number,
        gr.Slider(value=1, visible=diffuses and bool(classes)),
        gr.Column(visible=not pixels),
        gr.Column(visible=diffuses),
        *[""] * 3,
    )


def _default_steps(scheduler: str) -> int:
    from genkit.models import diffusion

    return diffusion.DEFAULT_STEPS[scheduler]


def _single_label(pipeline: Any, label: str | None) -> int | None:
    """Return the class of a single image: the first one if all classes take turns."""
    from genkit.vision import pipelines

    if not pipelines.count_classes(pipeline):
        return None
    return int(label) if label and label != EVERY else 0


def _sampler_options(pipeline: Any, scheduler: str, steps: int, guidance: float) -> dict[str, Any]:
    """Return the options that a diffusion model takes; none for other models."""
    from genkit.models.diffusion import DenoisingPipeline

    if not isinstance(pipeline, DenoisingPipeline):
        return {}
    guided = {"guidance": float(guidance)} if pipeline.labels else {}
    return {"scheduler": scheduler, "steps": steps, **guided}


def _claim(pipeline: Any, images: int, options: dict[str, Any] | None = None) -> None:
    """Claim the work of drawing images; options are those of `_sampler_options`."""
    from genkit.vision import sampling

    steps = sampling.resolve_sampler(pipeline, **(options or {})).evaluations
    jobs.QUEUE.claim(images * steps, "images times steps")


# ---------------------------------------------------------------------------------------------
# What is drawn


def _draw_samples(
    index: ModelIndex, name: str, label: str | None, seed: int | None, count: int, *options: Any
) -> str:
    import genkit
    from genkit.vision import pipelines

    pipeline, labels = load_image_model(index, name), None
    classes = pipelines.count_classes(pipeline)
    if classes:
        every = label in (None, EVERY)
        labels = [i % classes for i in range(int(count))] if every else int(str(label))
    sampler = _sampler_options(pipeline, *options)
    _claim(pipeline, int(count), sampler)
    made = genkit.sample(
        index.resolve(model_index.IMAGES, name), int(count), seed=seed, label=labels, **sampler
    )
    suffixes = [""] * len(made.seeds) if made.labels is None else [f" · {i}" for i in made.labels]
    captions = [f"{own}{kind}" for own, kind in zip(made.seeds, suffixes, strict=True)]
    drawn = map(parts.picture, made.images, captions)
    return f"{parts.hint(str(made))}{parts.strip(list(drawn))}"


def plane_latents(pipeline: Decoder, seed: int, across: float, up: float) -> torch.Tensor:
    """Return the latent at a point of a plane.

    A space of two latents is the plane itself, as in `latent.plane`. In a larger one the plane goes
    through the latents of three seeds, the first in the middle, and its points are scaled to have
    the norm of draws from the prior.

    Args:
        seed: of the middle; the next seed lies to the right, and the one after it above.
        across, up: shares of the prior's probability, 0 to 1.

    Returns:
        (1, *latent_shape).
    """
    import torch

    from genkit.vision import pipelines

    shares = torch.tensor([across, up], dtype=torch.float64).clamp(EDGE, 1 - EDGE)
    quantiles = torch.special.ndtri(shares).float()
    shape = tuple(pipeline.latent_shape)
    if shape == (2,):
        return pipelines.noise_to_latent(pipeline, quantiles[None])
    own = [torch.Generator().manual_seed(seed + i) for i in range(3)]
    middle, right, above = (torch.randn(shape, generator=each) for each in own)
    length = (1 + quantiles.square().sum()).sqrt()  # std of a sum of three independent ones
    mixed = (middle + quantiles[0] * right + quantiles[1] * above) / length
    return pipelines.noise_to_latent(pipeline, mixed[None])


def _slide(
    index: ModelIndex, name: str, label: str | None, seed: int | None, across: float, up: float
) -> tuple[str, str]:
    from genkit.vision import pipelines
    from genkit.vision.pixel_lm import PixelPipeline

    pipeline = load_image_model(index, name)
    if isinstance(pipeline, PixelPipeline):
        return "", "0.5 0.5"  # it has no latents
    _claim(pipeline, 1)
    own = _single_label(pipeline, label)
    latents = plane_latents(pipeline, _check_seed(seed), across, up)
    (image,) = pipelines.decode(pipeline, latents, None if own is None else [own])
    return parts.picture(image, wide=WIDE), f"{across:g} {up:g}"


def _drag(
    index: ModelIndex, name: str, label: str | None, seed: int | None, where: str
) -> tuple[str, float, float]:
    across, up = map(float, where.split(" "))
    return _slide(index, name, label, seed, across, up)[0], across, up


def _walk(
    index: ModelIndex, name: str, label: str | None, seed: int | None, end: int | None, number: int
) -> str:
    from genkit.vision import latent

    pipeline = load_image_model(index, name)
    _claim(pipeline, 2 * int(number))  # `interpolate` decodes a straight line, too
    first, last = (pipelines.draw_latents(pipeline, 1, _check_seed(own))[0] for own in (seed, end))
    way = latent.interpolate(pipeline, first, last, int(number), _single_label(pipeline, label))
    return parts.hint(f"On the great circle: {way}.") + parts.strip(
        list(map(parts.picture, way.spherical))
    )


def _denoise(
    index: ModelIndex, name: str, label: str | None, seed: int | None, *options: Any
) -> str:
    from genkit.vision import denoising

    pipeline = load_image_model(index, name)
    sampler = _sampler_options(pipeline, *options)
    _claim(pipeline, 1, sampler)
    shown = denoising.denoising_trajectory(
        pipeline, _check_seed(seed), _single_label(pipeline, label), **sampler
    )
    times = [f"{time:.0f}" for time in shown.timesteps]
    rows = [list(map(parts.picture, images, times)) for images in (shown.mixed, shown.clean)]
    noisy, predicted = (parts.strip(row) for row in rows)
    return (
        f"{parts.hint('Noisy images, by timestep')}{noisy}"
        f"{parts.hint('The clean image that the network predicts')}{predicted}"
    )


def _check_seed(seed: int | None) -> int:
    if seed is None:
        raise ValueError("seed is empty; give a whole number")
    return int(seed)
