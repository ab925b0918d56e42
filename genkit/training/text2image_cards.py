"""Cards of fine-tuned text-to-image pipelines: adapters, new words, whole pipelines."""

from __future__ import annotations

from pathlib import Path

from genkit.hub import card
from genkit.training.run import Run

USAGE = """
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base}){load}
generator = torch.Generator().manual_seed(0)
pipeline({prompt!r}, generator=generator).images[0].save("picture.png")
"""
LOAD = {
    "lora": "\npipeline.load_lora_weights(model)",
    "textual_inversion": "\npipeline.load_textual_inversion(model)",
    "full": "",
}
SECOND = """
pipeline.load_textual_inversion(
    model,
    weight_name="learned_embeds_2.safetensors",
    text_encoder=pipeline.text_encoder_2,
    tokenizer=pipeline.tokenizer_2,
)"""


def write_tuned_card(
    folder: Path,
    run: Run,
    *,
    base: str,
    method: str,
    second_encoder: bool,
    about: str,
    prompt: str,
    figures: dict[str, float],
    protocol: str,
    data: str,
) -> None:
    """Write the card of what was trained of a text-to-image pipeline.

    Args:
        folder: that it is in.
        run: that has trained it.
        base: the pipeline that it was made from, and that it needs unless it is a whole one.
        method: one of `text2image_tuning.METHODS`.
        second_encoder: there are new words for a second text encoder, too.
        about, prompt, figures, protocol, data: see `card.card`.
    """
    load = LOAD[method] + (SECOND if second_encoder else "")
    whole = method == "full"
    card.write_card(
        folder,
        run.folder.path,
        title=f"{Path(base).name}, fine-tuned",
        task="text-to-image",
        library="diffusers",
        about=f"Of {base}: {about}",
        usage=USAGE.format(base="model" if whole else repr(base), load=load, prompt=prompt),
        prompt=prompt,
        figures=figures,
        protocol=protocol,
        data=data,
        base_model=base,
    )
