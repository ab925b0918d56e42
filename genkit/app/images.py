"""The tab of images: samples, a plane of latents, interpolation, the denoising trajectory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from genkit.app import chapters, code, events, jobs, model_index, parts
from genkit.app.model_index import ModelIndex
from genkit.vision import pipelines

if TYPE_CHECKING:
    import torch

    from genkit.vision.pipelines import Decoder


MOST = 64  # images at once
WALK = 16  # images of an interpolation
EDGE = 0.01  # of the prior's probability, left out on each side of the plane
WIDE = 224  # pixels of the page, for a single image
CHANGES = 13  # outputs that change with the model
MOST_STEPS, MOST_GUIDANCE = 1000, 8
EVERY = "one after the other"
PAD = (Path(__file__).parent / "pad.js").read_text(encoding="utf-8")
KNOB = (
    '<div class="pad" role="application" aria-label="plane of latents">'
    "<span style=\"left: ${100 * value.split(' ')[0]}%; "
    "bottom: ${100 * value.split(' ')[1]}%\"></span></div>"
)
WALK_CODE = """import genkit
from genkit.vision import latent, pipelines

model = genkit.load({name!r})
first, last = (pipelines.draw_latents(model, 1, seed)[0] for seed in {ends})
latent.interpolate(model, first, last, {number}, {label}).save("walk.png")"""
DENOISE_CODE = """import genkit
from genkit.vision import denoising

model = genkit.load({name!r})
shown = denoising.denoising_trajectory(model, {seed}, {label}, **{sampler})
shown.save("denoising.png")"""
HINT = (
    "No image model was named. Train one with "
    "<code>genkit train vae</code>, <code>genkit train gan</code> or "
    "<code>genkit train diffusion</code>, then start the page with its folder."
)


def tab(index: ModelIndex, shown: gr.Tab) -> None:
    """Build the tab."""
    help_line = "Draw images, walk between them, and watch noise become one."
    chapters.add_help(help_line, "gans", "autoencoders", "vae", "diffusion")
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
        steps = gr.Number(
            20, label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, min_width=90
        )
        guidance = gr.Slider(0, MOST_GUIDANCE, 1, step=0.5, label="Guidance", min_width=150)
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", min_width=90)
        stop = gr.Button("Stop", min_width=90)
        parts.add_download("samples", "samples.png")
    samples = parts.canvas("samples")
    inputs = [model, label, seed]
    options = [scheduler, steps, guidance]
    _add_work(index, _draw_samples, draw, [*inputs, count, *options], samples, "draw")
    with gr.Column(visible=False) as walks:
        here = _add_plane(index, inputs, current)
        way = _add_walk(index, inputs)
    with gr.Column(visible=False) as denoising:
        gr.Markdown("## Denoising trajectory")
        with gr.Row():
            out = gr.Button("Show how the image of this seed is denoised")
            parts.add_download("denoising", "denoising.png")
        noise = parts.canvas("denoising")
        _add_work(index, _denoise, out, [*inputs, *options], noise, "denoise")
    for do in (_draw_samples, _walk, _denoise):
        stop.click(events.make_stop(do), queue=False, api_name=f"stop{do.__name__}")
    old = [samples, here, way, noise]  # of the model before
    changes = [about, current, label, diffusion, scheduler, steps, guidance, walks, denoising, *old]
    assert len(changes) == CHANGES, "an output of `_configure` is missing"
    cleared = [about, *old]
    model.change(None, model, cleared, js=parts.loading(len(cleared)), api_name=False)
    configure = events.make_job(_configure, index, [gr.skip()] * (CHANGES - 1))
    gr.on(
        [model.change, shown.select],
        configure, [model, current], changes, api_name="about_images", **events.EVENT,
    )  # fmt: skip
    scheduler.input(_default_steps, scheduler, steps, api_name=False, queue=False, **events.EVENT)


def _add_work(
    index: ModelIndex,
    do: Callable[..., str],
    button: gr.Button,
    inputs: list[Any],
    canvas: gr.HTML,
    name: str,
) -> None:
    """Let a button start work whose result goes into a canvas."""
    drawing = parts.busy(str(canvas.elem_id), "Drawing")
    button.click(None, None, canvas, js=drawing, api_name=False)
    event = events.make_job(do, index)
    button.click(event, inputs, canvas, api_name=name, **events.EVENT)


def _add_plane(index: ModelIndex, inputs: list[Any], current: gr.State) -> gr.HTML:
    """Build the plane to drag across and its two sliders; return what shows its image."""
    gr.Markdown("## A plane of latents\nDrag across the square, or move the sliders.")
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
    drag = events.make_event(_drag, index, [gr.skip()] * 2)
    pad.input(drag, [*inputs, pad], [here, across, up], api_name="drag", **events.LIVE)
    slide = events.make_event(_slide, index, [gr.skip()])
    gr.on(
        [current.change, across.input, up.input, *(given.input for given in inputs[1:])],
        slide, [*inputs, across, up], [here, pad], api_name="slide", **events.LIVE,
    )  # fmt: skip
    return here


def _add_walk(index: ModelIndex, inputs: list[Any]) -> gr.HTML:
    """Build the interpolation between two seeds, and return the component that shows it."""
    gr.Markdown("## Between two seeds\nFrom the seed above to another.")
    with gr.Row():
        end = parts.seed_box(1, "To seed")
        number = gr.Slider(2, WALK, 8, step=1, label="Images", min_width=150)
    with gr.Row():
        walk = gr.Button("Walk")
        parts.add_download("between", "walk.png")
    way = parts.canvas("between")
    _add_work(index, _walk, walk, [*inputs, end, number], way, "walk")
    return way


# ---------------------------------------------------------------------------------------------
# The model


def load_image_model(index: ModelIndex, name: str) -> Any:
    """Load a model by its name in the page."""
    from genkit.vision import sampling

    return events.load_once(sampling.load_image_model, index.resolve(model_index.IMAGES, name))


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
    samplers, number = gr.skip(), diffusion.DEFAULT_STEPS["dpm++"]
    if diffuses:
        chosen, number = diffusion.resolve_sampler(pipeline.scheduler, None, None, pipeline.mean)
        schedulers = diffusion.compatible_samplers(pipeline.scheduler, pipeline.mean)
        samplers = gr.Dropdown(schedulers, value=chosen)
    return (
        parts.hint(f"{kind} model, {labels}." + (" It draws pixel by pixel." if pixels else "")),
        name,
        gr.Dropdown([EVERY, *map(str, range(classes))], value=EVERY, visible=bool(classes)),
        gr.Row(visible=diffuses),
        samplers,
        number,
        gr.Slider(value=1, visible=diffuses and bool(classes)),
        gr.Column(visible=not pixels),
        gr.Column(visible=diffuses),
        *[""] * 4,
    )


def _default_steps(scheduler: str) -> int:
    from genkit.models import diffusion

    return diffusion.DEFAULT_STEPS[scheduler]


def _check_label(pipeline: Any, label: Any) -> int | None:
    """Return the class that is chosen; None if all take turns, or there are none."""
    from genkit.vision import pipelines

    classes = pipelines.count_classes(pipeline)
    if not classes or label in (None, EVERY):
        return None
    if label not in map(str, range(classes)):
        raise ValueError(f"Class must be from 0 to {classes - 1} or {EVERY!r}, got {label!r:.100}")
    return int(label)


def _single_label(pipeline: Any, label: Any) -> int | None:
    """Return the class of a single image: the first one if all classes take turns."""
    from genkit.vision import pipelines

    if not pipelines.count_classes(pipeline):
        return None
    return _check_label(pipeline, label) or 0


def _sampler_options(pipeline: Any, scheduler: str, steps: Any, guidance: Any) -> dict[str, Any]:
    """Return the options that a diffusion model takes; none for other models."""
    from genkit.models.diffusion import DenoisingPipeline

    if not isinstance(pipeline, DenoisingPipeline):
        return {}
    guided = {}
    if pipeline.labels:
        guided["guidance"] = parts.check_number("Guidance", guidance, 0, MOST_GUIDANCE)
    steps = parts.check_count("Steps", steps, 1, MOST_STEPS)
    return {"scheduler": scheduler, "steps": steps, **guided}


def _claim(pipeline: Any, images: int, options: dict[str, Any] | None = None) -> None:
    """Claim the work of drawing images; options are those of `_sampler_options`."""
    from genkit.vision import sampling

    steps = sampling.resolve_sampler(pipeline, **(options or {})).evaluations
    jobs.QUEUE.claim(images * steps, "images times steps")


# ---------------------------------------------------------------------------------------------
# What is drawn


def _draw_samples(
    index: ModelIndex, name: str, label: Any, seed: Any, count: Any, *options: Any
) -> str:
    import genkit
    from genkit.vision import pipelines

    count, seed = parts.check_count("Images", count, 1, MOST), parts.check_seed(seed)
    pipeline = load_image_model(index, name)
    classes, labels = pipelines.count_classes(pipeline), _check_label(pipeline, label)
    turns = [i % classes for i in range(count)] if classes and labels is None else labels
    sampler = _sampler_options(pipeline, *options)
    _claim(pipeline, count, sampler)
    made = genkit.sample(
        index.resolve(model_index.IMAGES, name), count, seed=seed, label=turns, **sampler
    )
    suffixes = [""] * len(made.seeds) if made.labels is None else [f" · {i}" for i in made.labels]
    captions = [f"{own}{kind}" for own, kind in zip(made.seeds, suffixes, strict=True)]
    drawn = map(parts.picture, made.images, captions)
    again = {"n": count, "seed": seed, "label": labels, **sampler}
    shown = code.format_code("sample", name, again)
    return f"{parts.hint(str(made))}{parts.strip(list(drawn))}{shown}"


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
    index: ModelIndex, name: str, label: Any, seed: Any, across: Any, up: Any
) -> tuple[str, str]:
    from genkit.vision import pipelines
    from genkit.vision.pixel_lm import PixelPipeline

    across, up = parts.check_number("Across", across, 0, 1), parts.check_number("Up", up, 0, 1)
    seed, pipeline = parts.check_seed(seed), load_image_model(index, name)
    if isinstance(pipeline, PixelPipeline):
        return "", "0.5 0.5"  # it has no latents
    _claim(pipeline, 1)
    own = _single_label(pipeline, label)
    latents = plane_latents(pipeline, seed, across, up)
    (image,) = pipelines.decode(pipeline, latents, None if own is None else [own])
    return parts.picture(image, wide=WIDE), f"{across:g} {up:g}"


def _drag(
    index: ModelIndex, name: str, label: Any, seed: Any, where: str
) -> tuple[str, float, float]:
    across, up = map(float, where.split(" "))
    return _slide(index, name, label, seed, across, up)[0], across, up


def _walk(index: ModelIndex, name: str, label: Any, seed: Any, end: Any, number: Any) -> str:
    from genkit.vision import latent

    ends = parts.check_seed(seed), parts.check_seed(end, "To seed")
    number = parts.check_count("Images", number, 2, WALK)
    pipeline = load_image_model(index, name)
    _claim(pipeline, 2 * number)  # `interpolate` decodes a straight line, too
    first, last = (pipelines.draw_latents(pipeline, 1, own)[0] for own in ends)
    own = _single_label(pipeline, label)
    way = latent.interpolate(pipeline, first, last, number, own)
    drawn = parts.strip(list(map(parts.picture, way.spherical)))
    again = WALK_CODE.format(name=name, ends=ends, number=number, label=own)
    return parts.hint(f"On the great circle: {way}.") + drawn + code.fold(again)


def _denoise(index: ModelIndex, name: str, label: Any, seed: Any, *options: Any) -> str:
    from genkit.vision import denoising

    seed, pipeline = parts.check_seed(seed), load_image_model(index, name)
    sampler = _sampler_options(pipeline, *options)
    _claim(pipeline, 1, sampler)
    own = _single_label(pipeline, label)
    shown = denoising.denoising_trajectory(pipeline, seed, own, **sampler)
    again = DENOISE_CODE.format(name=name, seed=seed, label=own, sampler=sampler)
    times = [f"{time:.0f}" for time in shown.timesteps]
    rows = [list(map(parts.picture, images, times)) for images in (shown.mixed, shown.clean)]
    noisy, predicted = (parts.strip(row) for row in rows)
    return (
        f"{parts.hint('Noisy images, by timestep')}{noisy}"
        f"{parts.hint('The clean image that the network predicts')}{predicted}{code.fold(again)}"
    )
