"""The tab of images: samples, a plane of latents to drag across, ways between and out of noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from genkit.app import finding, parts, work
from genkit.app.finding import ModelIndex
from genkit.vision import pipelines

if TYPE_CHECKING:
    import torch

    from genkit.vision.pipelines import Decoder


MOST = 64  # images at once
EDGE = 0.01  # of the prior's probability, that is left out on each side of the plane
BIG = 224  # pixels of the page, for an image alone
CHANGES = 12  # outputs that go with a model
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


def tab(shelf: ModelIndex, shown: gr.Tab) -> None:
    """Build the tab."""
    names = shelf.names(finding.IMAGES)
    if not names:
        parts.canvas("no-images", parts.hint(HINT))
        return
    with gr.Row():
        model = parts.chooser(names)
        label = gr.Dropdown([], label="Class", visible=False, min_width=120)
    about, known = parts.canvas("about"), gr.State("")  # the model that all below is set for
    with gr.Row():
        seed = parts.seed_box()
        count = gr.Slider(1, MOST, 16, step=1, label="Images", min_width=150)
    with gr.Row(visible=False) as diffusion:
        scheduler = gr.Dropdown([], label="Scheduler", min_width=120)
        steps = gr.Number(20, label="Steps", precision=0, minimum=1, min_width=90)
        guidance = gr.Slider(0, 8, 1, step=0.5, label="Guidance", min_width=150)
    draw = gr.Button("Draw", variant="primary")
    samples = parts.canvas("samples")
    asked = [model, label, seed]
    how = [scheduler, steps, guidance]
    draw.click(parts.event(_draw, shelf), [*asked, count, *how], samples, api_name="draw")
    with gr.Column(visible=False) as walks:
        _plane(shelf, asked, known)
        way = _between(shelf, asked)
    with gr.Column(visible=False) as denoising:
        gr.Markdown("### Out of noise")
        out = gr.Button("Show how the image of this seed comes out of noise")
        noise = parts.canvas("denoising")
        out.click(parts.event(_denoise, shelf), [*asked, *how], noise, api_name="denoise")
    changes = [about, known, label, diffusion, scheduler, steps, guidance, walks, denoising]
    changes += [samples, way, noise]  # of the model before
    assert len(changes) == CHANGES, "an output of `_configure` is missing"
    configure = parts.event(_configure, shelf, [gr.skip()] * (CHANGES - 1))
    gr.on([model.input, shown.select], configure, [model, known], changes, api_name="about_images")
    scheduler.input(_steps, scheduler, steps, api_name=False, queue=False)


def _plane(shelf: ModelIndex, asked: list[Any], known: gr.State) -> None:
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
    drag = parts.event(_drag, shelf, [gr.skip()] * 2)
    pad.input(drag, [*asked, pad], [here, across, up], api_name="drag", **parts.LIVE)
    slide = parts.event(_slide, shelf, [gr.skip()])
    gr.on(
        [known.change, across.input, up.input, *(given.input for given in asked[1:])],
        slide, [*asked, across, up], [here, pad], api_name="slide", **parts.LIVE,
    )  # fmt: skip


def _between(shelf: ModelIndex, asked: list[Any]) -> gr.HTML:
    """Build the way between two seeds, and return where it is shown."""
    gr.Markdown("### Between two seeds\nFrom the seed above to another.")
    with gr.Row():
        end = parts.seed_box(1, "To seed")
        number = gr.Slider(2, 16, 8, step=1, label="Images", min_width=150)
    walk = gr.Button("Walk")
    way = parts.canvas("between")
    walk.click(parts.event(_walk, shelf), [*asked, end, number], way, api_name="walk")
    return way


# ---------------------------------------------------------------------------------------------
# The model


def load(shelf: ModelIndex, name: str) -> Any:
    """Load a model by its name in the page."""
    from genkit.vision import sampling

    return parts.loaded(sampling.load_image_model, shelf.resolve(finding.IMAGES, name))


def _configure(shelf: ModelIndex, name: str, known: str) -> tuple[Any, ...]:
    """Show what this model allows; where it is shown already, leave what was chosen."""
    if name == known:
        return (gr.skip(),) * CHANGES
    from genkit.models import diffusion
    from genkit.models.diffusion import DenoisingPipeline
    from genkit.vision import pipelines
    from genkit.vision.pixel_lm import PixelPipeline

    pipeline = load(shelf, name)
    classes = pipelines.count_classes(pipeline)
    noisy, pixels = isinstance(pipeline, DenoisingPipeline), isinstance(pipeline, PixelPipeline)
    told = f"told one of {classes} classes" if classes else "told no class"
    kind = type(pipeline).__name__.removesuffix("Pipeline")
    fitting, chosen, number = [], None, diffusion.DEFAULT_STEPS["dpm++"]
    if noisy:
        fitting = diffusion.compatible_samplers(pipeline.scheduler)
        chosen, number = diffusion.resolve_sampler(pipeline.scheduler, None, None)
    return (
        parts.hint(f"{kind} model, {told}." + (" It draws pixel after pixel." if pixels else "")),
        name,
        gr.Dropdown([EVERY, *map(str, range(classes))], value=EVERY, visible=bool(classes)),
        gr.Row(visible=noisy),
        gr.Dropdown(fitting, value=chosen),
        number,
        gr.Slider(value=1, visible=noisy and bool(classes)),
        gr.Column(visible=not pixels),
        gr.Column(visible=noisy),
        *[""] * 3,
    )


def _steps(scheduler: str) -> int:
    from genkit.models import diffusion

    return diffusion.DEFAULT_STEPS[scheduler]


def _one(pipeline: Any, label: str | None) -> int | None:
    """Return the class of a single image: the first, if they come one after the other."""
    from genkit.vision import pipelines

    if not pipelines.count_classes(pipeline):
        return None
    return int(label) if label and label != EVERY else 0


def _noisily(pipeline: Any, scheduler: str, steps: int, guidance: float) -> dict[str, Any]:
    """Return what a diffusion model takes beside a seed."""
    from genkit.models.diffusion import DenoisingPipeline

    if not isinstance(pipeline, DenoisingPipeline):
        return {}
    told = {"guidance": float(guidance)} if pipeline.labels else {}
    return {"scheduler": scheduler, "steps": steps, **told}


def _claim(pipeline: Any, images: int, options: dict[str, Any] | None = None) -> None:
    """Claim the work of drawing images; options are those of `_noisily`."""
    from genkit.vision import sampling

    steps = sampling.resolve_sampler(pipeline, **(options or {})).evaluations
    work.DESK.claim(images * steps, "images times steps")


# ---------------------------------------------------------------------------------------------
# What is drawn


def _draw(
    shelf: ModelIndex, name: str, label: str | None, seed: int | None, count: int, *how: Any
) -> str:
    import genkit
    from genkit.vision import pipelines

    pipeline, told = load(shelf, name), None
    classes = pipelines.count_classes(pipeline)
    if classes:
        every = label in (None, EVERY)
        told = [i % classes for i in range(int(count))] if every else int(str(label))
    options = _noisily(pipeline, *how)
    _claim(pipeline, int(count), options)
    made = genkit.sample(
        shelf.resolve(finding.IMAGES, name), int(count), seed=seed, label=told, **options
    )
    labels = [""] * len(made.seeds) if made.labels is None else [f" · {i}" for i in made.labels]
    captions = [f"{own}{kind}" for own, kind in zip(made.seeds, labels, strict=True)]
    drawn = map(parts.picture, made.images, captions)
    return f"{parts.hint(str(made))}{parts.strip(list(drawn))}"


def plane_latents(pipeline: Decoder, seed: int, across: float, up: float) -> torch.Tensor:
    """Return the latents at a place of a plane.

    Two latents are the plane themselves, as in `latent.plane`. More of them have the plane through
    those of three seeds, the first in the middle, where all places are as far out as others are.

    Args:
        seed: of the middle; the next one is to the right, and the one after it upwards.
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
    length = (1 + quantiles.square().sum()).sqrt()  # of three that are independent
    mixed = (middle + quantiles[0] * right + quantiles[1] * above) / length
    return pipelines.noise_to_latent(pipeline, mixed[None])


def _slide(
    shelf: ModelIndex, name: str, label: str | None, seed: int | None, across: float, up: float
) -> tuple[str, str]:
    from genkit.vision import pipelines
    from genkit.vision.pixel_lm import PixelPipeline

    pipeline = load(shelf, name)
    if isinstance(pipeline, PixelPipeline):
        return "", "0.5 0.5"  # it has no latents
    _claim(pipeline, 1)
    own = _one(pipeline, label)
    latents = plane_latents(pipeline, _seeded(seed), across, up)
    (image,) = pipelines.decode(pipeline, latents, None if own is None else [own])
    return parts.picture(image, wide=BIG), f"{across:g} {up:g}"


def _drag(
    shelf: ModelIndex, name: str, label: str | None, seed: int | None, where: str
) -> tuple[str, float, float]:
    across, up = map(float, where.split(" "))
    return _slide(shelf, name, label, seed, across, up)[0], across, up


def _walk(
    shelf: ModelIndex, name: str, label: str | None, seed: int | None, end: int | None, number: int
) -> str:
    from genkit.vision import latent

    pipeline = load(shelf, name)
    _claim(pipeline, 2 * int(number))  # on two lines
    first, last = (pipelines.draw_latents(pipeline, 1, _seeded(own))[0] for own in (seed, end))
    way = latent.interpolate(pipeline, first, last, int(number), _one(pipeline, label))
    return parts.hint(f"On the great circle: {way}.") + parts.strip(
        list(map(parts.picture, way.spherical))
    )


def _denoise(shelf: ModelIndex, name: str, label: str | None, seed: int | None, *how: Any) -> str:
    from genkit.vision import denoising

    pipeline = load(shelf, name)
    options = _noisily(pipeline, *how)
    _claim(pipeline, 1, options)
    shown = denoising.denoising_trajectory(
        pipeline, _seeded(seed), _one(pipeline, label), **options
    )
    times = [f"{time:.0f}" for time in shown.times]
    rows = [list(map(parts.picture, images, times)) for images in (shown.mixed, shown.clean)]
    seen, told = (parts.strip(row) for row in rows)
    return (
        f"{parts.hint('What the network sees, by time')}{seen}"
        f"{parts.hint('The image that it takes it for')}{told}"
    )


def _seeded(seed: int | None) -> int:
    if seed is None:
        raise ValueError("seed is empty; give a whole number")
    return int(seed)
