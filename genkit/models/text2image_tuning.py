"""Fine-tuning of text-to-image pipelines of diffusers: what is trained of them, and its loss.

The denoiser predicts noise in the latents of the pipeline's VAE, which stays as it is. Trained are
low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685), all weights, or nothing but
the embeddings of new words (textual inversion, Gal et al. 2022, https://arxiv.org/abs/2208.01618).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit.hub import privacy
from genkit.models import diffusion, diffusion_losses, lora

METHODS = ("lora", "textual_inversion", "full")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
ENCODERS = ("text_encoder", "text_encoder_2")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # layers of the denoiser, by the end of the name
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # of a text encoder
ADAPTER = "pytorch_lora_weights.safetensors"  # as diffusers names it
EMBEDDINGS = {  # files of new words, by text encoder
    "text_encoder": "learned_embeds.safetensors",
    "text_encoder_2": "learned_embeds_2.safetensors",
}

Pipeline = Any  # of diffusers
Scheduler = Any

# ---------------------------------------------------------------------------------------------
# Parts of a pipeline


def encoder_names(pipeline: Pipeline) -> list[str]:
    """Return the names of a pipeline's text encoders."""
    return [name for name in ENCODERS if pipeline.components.get(name) is not None]


def text_encoders(pipeline: Pipeline) -> list[Any]:
    """Return a pipeline's text encoders."""
    return [getattr(pipeline, name) for name in encoder_names(pipeline)]


def tokenizers(pipeline: Pipeline) -> list[Any]:
    """Return the tokenizers of a pipeline's text encoders."""
    return [getattr(pipeline, tokenizer_of(name)) for name in encoder_names(pipeline)]


def tokenizer_of(encoder: str) -> str:
    """Return the name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def check_pipeline(name: str, settings: Any, model: str) -> None:
    """Refuse pipelines that are trained in another way.

    Args:
        name: of the pipeline's class.
        settings: of each component.
        model: by which the user named it.

    Raises:
        ValueError: it is another pipeline, or its networks do not fit.
    """
    what = "give a StableDiffusionPipeline or a StableDiffusionXLPipeline that draws from words"
    if name not in PIPELINES:
        raise ValueError(f"--init_from {model} is a {name}, which this recipe cannot train; {what}")
    unet, latents = settings.get("unet", {}), settings.get("vae", {}).get("latent_channels", 4)
    for side in ("in_channels", "out_channels"):
        if unet.get(side, 4) != latents:
            raise ValueError(
                f"--init_from {model}: its denoiser has {unet[side]} {side} for latents of "
                f"{latents}, as those that repaint pictures have; {what}"
            )
    if "flow" in str(settings.get("scheduler", {}).get("_class_name", "")).lower():
        raise ValueError(f"--init_from {model} was trained by flow matching; {what}")


def make_scheduler(pipeline: Pipeline) -> Scheduler:
    """Make the scheduler of training: the noise and the objective of the pipeline's own."""
    names = inspect.signature(DDPMScheduler).parameters
    # diffusers' own way would replace defaults of the pipeline's class by those of this one
    config = {name: value for name, value in pipeline.scheduler.config.items() if name in names}
    return DDPMScheduler(**config)


def objective(scheduler: Scheduler) -> str:
    """Return what the denoiser predicts: one of `diffusion.OBJECTIVES`."""
    return diffusion.objective_of(scheduler)


# ---------------------------------------------------------------------------------------------
# Words


class ExtendedEmbedding(nn.Module):
    """A frozen table of embeddings, and rows behind it that are trained.

    Args:
        table: of the text encoder, (tokens, width) or more rows.
        first: the id of the first new row.
        rows: the new ones as they start, (new, width).
    """

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.table, self.first = table.requires_grad_(False), first
        self.rows = nn.Embedding.from_pretrained(rows.clone(), freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids, (n, length): (n, length, width)."""
        is_new = ids >= self.first
        old = F.embedding(ids.masked_fill(is_new, 0), self.table.weight)
        new = self.rows((ids - self.first).clamp(min=0))
        return torch.where(is_new[..., None], new, old)


def add_words(pipeline: Pipeline, token: str, initializer: str, vectors: int) -> list[str]:
    """Add a word to a pipeline, of one embedding or several in a row; only these can be trained.

    Args:
        token: the word, such as "<cat>".
        initializer: words whose embeddings it starts from.
        vectors: embeddings of the word, in each text encoder.

    Returns:
        The names of its embeddings, as diffusers names them.

    Raises:
        ValueError: the word is not new, or a tokenizer cuts it up; the initializer is longer than
            the word.
    """
    names = [token, *(f"{token}_{i}" for i in range(1, vectors))]
    for name, tokenizer in zip(encoder_names(pipeline), tokenizers(pipeline), strict=True):
        known = [each for each in names if each in tokenizer.get_vocab()]
        if known:
            raise ValueError(
                f"--token {token}: {known[0]!r} is a token of the pipeline already; give a new "
                "one, such as '<my-cat>'"
            )
        start = tokenizer(initializer, add_special_tokens=False).input_ids
        if not 1 <= len(start) <= vectors:
            raise ValueError(
                f"--initializer {initializer}: it is {len(start)} tokens, and the new word has "
                f"{vectors} embeddings; give a shorter word, or --vectors {max(1, len(start))}"
            )
        first = len(tokenizer)
        tokenizer.add_tokens(names)
        ids = tokenizer(" ".join(names), add_special_tokens=False).input_ids
        if ids != list(range(first, first + vectors)):
            raise ValueError(f"--token {token}: the tokenizer cuts it up; give one as '<my-cat>'")
        encoder = getattr(pipeline, name)
        table = encoder.get_input_embeddings()
        rows = table.weight[[start[i % len(start)] for i in range(vectors)]].detach()
        encoder.set_input_embeddings(ExtendedEmbedding(table, first, rows))
    return names


def tokenize(pipeline: Pipeline, captions: Sequence[str], argument: str) -> tuple[Tensor, ...]:
    """Return the ids of captions for each text encoder, (n, length) each.

    Args:
        argument: where the captions are from, for messages.

    Raises:
        ValueError: a caption is longer than a text encoder reads.
    """
    found = []
    for tokenizer in tokenizers(pipeline):
        most = tokenizer.model_max_length
        texts = [pipeline.maybe_convert_prompt(caption, tokenizer) for caption in captions]
        ids = tokenizer(texts, padding="max_length", max_length=most, verbose=False).input_ids
        for caption, row in zip(captions, ids, strict=True):
            if len(row) > most:
                raise ValueError(
                    f"{argument}: the caption {caption!r:.60} has {len(row)} tokens, its start and "
                    f"end among them, and the text encoder reads {most}; shorten it"
                )
        found.append(torch.tensor(ids))
    return tuple(found)


def check_words(
    pipeline: Pipeline, words: Sequence[str], captions: Sequence[str], argument: str
) -> None:
    """Refuse captions without the new word, of which it would learn nothing.

    Args:
        words: by `add_words`; none if there is no new word.
        argument: where the captions are from, for messages.

    Raises:
        ValueError: naming the caption.
    """
    for caption in captions if words else ():
        tokenizer = pipeline.tokenizer
        if words[0] not in tokenizer.tokenize(pipeline.maybe_convert_prompt(caption, tokenizer)):
            raise ValueError(
                f"{argument}: the caption {caption!r:.60} lacks the new word {words[0]}; put it in"
            )


def encode_prompts(encoders: Sequence[nn.Module], ids: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Encode prompts as the pipelines do.

    Args:
        encoders: one, or the two of Stable Diffusion XL.
        ids: for each of them, (n, length).

    Returns:
        Of one encoder its last hidden state, (n, length, width). Of two, the last hidden states but
        one side by side, and the second's embedding of the whole prompt, (n, width).
    """
    if len(encoders) == 1:
        return (encoders[0](ids[0])[0],)
    pairs = zip(encoders, ids, strict=True)
    found = [encoder(row, output_hidden_states=True) for encoder, row in pairs]
    return torch.cat([each.hidden_states[-2] for each in found], -1), found[-1][0]


# ---------------------------------------------------------------------------------------------
# What is trained


class Tuner(nn.Module):
    """The denoiser of a pipeline, with its text encoders where they are trained, too.

    Args:
        unet: a UNet2DConditionModel.
        encoders: text encoders; none if prompts are encoded before.
        side: of the pictures in pixels, which Stable Diffusion XL is given.
    """

    def __init__(self, unet: nn.Module, encoders: Sequence[nn.Module], side: int) -> None:
        super().__init__()
        self.unet, self.encoders, self.side = unet, nn.ModuleList(encoders), side

    def forward(self, noisy: Tensor, timesteps: Tensor, *prompts: Tensor) -> Tensor:
        """Return the denoiser's prediction, of the shape of its input.

        Args:
            noisy: x_t, (n, channels, height, width).
            timesteps: (n,).
            prompts: by `tokenize` if there are encoders, otherwise by `encode_prompts`.
        """
        if len(self.encoders):
            prompts = encode_prompts(list(self.encoders), prompts)
        added = None
        if len(prompts) == 2:
            size = torch.tensor([self.side, self.side, 0, 0, self.side, self.side])
            added = {"text_embeds": prompts[1], "time_ids": size.to(noisy).repeat(len(noisy), 1)}
        prediction: Tensor = self.unet(noisy, timesteps, prompts[0], added_cond_kwargs=added).sample
        return prediction


def make_tuner(
    pipeline: Pipeline, method: str, rank: int, all_layers: bool, with_text: bool, side: int
) -> Tuner:
    """Freeze a pipeline but for what a method trains.

    Args:
        method: one of `METHODS`; for textual_inversion `add_words` comes first.
        rank: of lora.
        all_layers: lora adapts all linear layers and convolutions, not those of attention alone.
        with_text: the text encoders are trained, too.
        side: of the pictures, in pixels.
    """
    unet, encoders = pipeline.unet, text_encoders(pipeline)
    kinds = (nn.Linear, nn.Conv2d)
    every = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    for part in (unet, *encoders, pipeline.vae):
        part.requires_grad_(False)
    if method == "textual_inversion":
        for encoder in encoders:
            encoder.get_input_embeddings().rows.requires_grad_(True)
        return Tuner(unet, encoders, side)
    if method == "lora":
        lora.add_part_adapters(unet, rank, every if all_layers else ATTENTION)
    else:
        unet.requires_grad_(True)
    for encoder in encoders if with_text else ():
        if method == "lora":
            lora.add_part_adapters(encoder, rank, TEXT_ATTENTION)
        else:
            encoder.requires_grad_(True)
    if with_text and len(encoders) == 2:  # nothing reads what the first one computes last
        for part in (encoders[0].encoder.layers[-1], encoders[0].final_layer_norm):
            part.requires_grad_(False)
    return Tuner(unet, encoders if with_text else (), side)


def put_into(pipeline: Pipeline, tuner: Tuner) -> None:
    """Let a pipeline draw with the networks of a tuner, such as averaged ones."""
    parts = zip(encoder_names(pipeline), tuner.encoders, strict=False)
    pipeline.register_modules(unet=tuner.unet, **dict(parts))


def save_tuned(pipeline: Pipeline, method: str, names: Sequence[str], folder: Path) -> None:
    """Save what was trained as plain diffusers loads it.

    Args:
        pipeline: that draws with the trained networks.
        method: one of `METHODS`.
        names: of new embeddings, by `add_words`.
        folder: gets the weights of an adapter, of new words, or a whole pipeline.
    """
    if method == "full":
        pipeline.save_pretrained(folder)
        privacy.shorten_origins(folder)
    elif method == "lora":
        adapted = {"unet": pipeline.unet}
        adapted |= {name: getattr(pipeline, name) for name in encoder_names(pipeline)}
        layers = {
            f"{name}_lora_layers": lora.adapter_state(part)
            for name, part in adapted.items()
            if getattr(part, "peft_config", None)
        }
        pipeline.save_lora_weights(folder, **layers)
    else:
        for name in encoder_names(pipeline):
            rows = getattr(pipeline, name).get_input_embeddings().rows.weight
            save_file({names[0]: rows.detach().cpu().clone()}, folder / EMBEDDINGS[name])


# ---------------------------------------------------------------------------------------------
# Latents and loss


@torch.no_grad()
def encode_images(pipeline: Pipeline, images: Tensor) -> Tensor:
    """Return the latents of images in [-1, 1], as the denoiser takes them: the posterior's mode."""
    config, latents = pipeline.vae.config, pipeline.vae.encode(images).latent_dist.mode()
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        wide = [torch.tensor(each).to(latents).view(1, -1, 1, 1) for each in (mean, deviation)]
        return (latents - wide[0]) * config.scaling_factor / wide[1]
    return latents * config.scaling_factor


def row_losses(
    model: nn.Module,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    prompts: Sequence[Tensor],
    scheduler: Scheduler,
    min_snr: float = 0.0,
) -> Tensor:
    """Return the mean squared error of each row's prediction, (n,).

    Args:
        model: a `Tuner`.
        latents, noise: (n, channels, height, width).
        timesteps: (n,).
        prompts: see `Tuner`.
        scheduler: by `make_scheduler`.
        min_snr: see `diffusion_losses.min_snr_weights`; 0 for no weights.
    """
    predicted = objective(scheduler)
    noising = diffusion_losses.noising_at_timesteps(scheduler, timesteps)
    prediction = model(noising.mix(latents, noise), timesteps, *prompts).float()
    levels = noising.alpha, noising.sigma
    error = prediction - diffusion_losses.target(latents, noise, *levels, predicted)
    each = error.square().mean((1, 2, 3))
    if min_snr:
        each = diffusion_losses.min_snr_weights(*levels, predicted, min_snr) * each
    return each
