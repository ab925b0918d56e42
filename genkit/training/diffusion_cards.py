"""Cards of diffusion models and flows: how diffusers draws with them, and genkit."""

from __future__ import annotations

from pathlib import Path

from genkit.hub import card
from genkit.models import denoisers, diffusion
from genkit.models.diffusion import DenoisingPipeline
from genkit.training.run import Run

STOCK_USAGE = """
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

pipeline = DDPMPipeline.from_pretrained(model)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
    pipeline.scheduler.config{flow}
)
pipeline(4, num_inference_steps=20).images[0].save("sample.png")

import genkit

genkit.sample(model, 64, seed=0).save_grid("samples.png")  # a seed an image
"""
FLOW = ', prediction_type="flow_prediction", use_flow_sigmas=True'
OWN_USAGE = """
import torch
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
pipeline(4, seeds{labels}).images[0].save("sample.png")

import genkit

# without that code
genkit.sample(model, 4{label}, seed=0).save_grid("samples.png")
"""


def write_diffusion_card(
    folder: Path,
    run: Run,
    pipeline: DenoisingPipeline,
    *,
    about: str,
    figures: dict[str, float],
    protocol: str,
    precision: str,
    data: str,
) -> None:
    """Write the card of a diffusion model or a flow.

    Args:
        folder: that `denoisers.save_diffusion` wrote it to.
        run: that has trained it.
        about, figures, protocol, precision, data: see `card.card`.
    """
    card.write_card(
        folder,
        run.folder.path,
        title="A diffusion model of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{pipeline.unet.num_parameters():,} parameters, {about}",
        usage=usage_of(pipeline),
        figures=figures,
        protocol=protocol,
        precision=precision,
        data=data,
    )


def usage_of(pipeline: DenoisingPipeline) -> str:
    """Return code that draws with a saved pipeline."""
    if denoisers.is_stock(pipeline):
        flow = diffusion.objective_of(pipeline.scheduler) == "flow"
        return STOCK_USAGE.format(flow=FLOW if flow else "")
    if not pipeline.labels:
        return OWN_USAGE.format(labels="", label="")
    some = [i % pipeline.labels for i in range(4)]
    return OWN_USAGE.format(labels=f", labels={some}, guidance=1.5", label=f", label={some}")
