"""Train a model that draws images from words, on captioned images of your own.

    python -m genkit.data.scenes --digits mnist/train.parquet      # captioned scenes to begin with
    accelerate launch recipes/train_text2image.py --images scenes/train.parquet
    accelerate launch recipes/train_text2image.py --images captioned.parquet --caption_column title
    accelerate launch recipes/train_text2image.py --images captioned.parquet --text_encoder clip
    accelerate launch recipes/train_text2image.py --output_dir runs/text2image --resume

A UNet learns to remove noise from images whose captions it attends to, and with it a text encoder,
unless --text_encoder names one, which stays as it is. The model in the output folder is at any time
the best so far, in diffusers' layout:

    genkit imagine "a red three left of a blue seven" --model runs/text2image
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor

from genkit import machine
from genkit.data import seq2seq_tokenizers
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card, download, vendoring
from genkit.models import diffusion_losses, lm, text_denoisers
from genkit.models.text_denoisers import TextDenoiser
from genkit.models.text_diffusion import GUIDANCE, STEPS, TextDiffusionPipeline
from genkit.training import captioned_images, prompts
from genkit.training.captioned_images import Captioned
from genkit.training.curves import loss_curve
from genkit.training.image_data import ImageSettings
from genkit.training.optim import optimizers
from genkit.training.prompts import Prompts
from genkit.training.run import Run
from genkit.training.settings import parse, setting
from genkit.vision import gallery

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/text2image", "folder of the run and of the model")
    images: str = setting("digits", "a table of captioned images, or a Hub id; digits have none")
    image_column: str = setting("image", "column of a table with images")
    caption_column: str = setting("text", "column of a table with the caption of each image")
    objective: str = setting("v", "prediction of the UNet", choices=text_denoisers.OBJECTIVES)
    cond_dropout: float = setting(
        0.1, "part of the captions dropped for classifier-free guidance", above=0, below=1
    )
    text_encoder: str | None = setting(
        None, "folder or Hub id of a CLIP, T5 or BERT that encodes captions; default: a new one"
    )
    text_layers: int = setting(2, "layers of a new text encoder", least=1)
    text_width: int = setting(128, "width of a new text encoder", least=2)
    vocab_size: int = setting(
        2048, "most tokens of a new text encoder", least=seq2seq_tokenizers.LEAST
    )
    max_tokens: int | None = setting(
        None, "tokens of the longest caption, its end among them; default: as the images have"
    )
    widths: list[int] | None = setting(
        None, "channels of the feature maps, the largest map first", least=1
    )
    layers: int = setting(1, "residual blocks at each size", least=1)
    sample_prompts: list[str] | None = setting(None, "prompts of samples; default: captions")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        download.check_exists(self.text_encoder, "--text_encoder")
        if self.val_images is not None:
            raise ValueError(f"--val_images {self.val_images}: give --val_fraction")


SMALLEST = 8  # largest side of the smallest feature map
GROWTH = (1, 2, 6, 8)  # of the channels, where the map gets smaller
VAL_ROWS, BLOCK = 512, 64  # most images whose loss is measured, and how many at once
SAMPLES = 16  # pictures of an evaluation


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        run: dict[str, Any] = {"max_steps": 50_000, "batch_size": 256}
    else:
        run = {"max_minutes": 30.0, "batch_size": 64}
    if settings.compile and device != "accelerator":
        raise ValueError("--compile requires a GPU: on a CPU, its gradients are wrong")
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.008, "weight_decay": 0.0}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    return {"optimizer": "muon", "ema": 0.999, "compile": False} | rates | precision | run


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    captioned_images.check_captions(settings.images, None, settings.caption_column)

    with Run(settings) as run:
        # ---- data
        names = None, settings.image_column, settings.caption_column
        data = captioned_images.load_captioned(run, settings, *names)
        train, val = captioned_images.split(data, settings.val_fraction)
        order = Order(len(train), settings.seed)
        texts = load_prompts(run, settings, data)

        # ---- model
        scheduler = text_denoisers.make_scheduler(settings.objective)
        network = make_network(settings, train, texts, run.device.type)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(partial(text_denoisers.loss, model, objective=settings.objective))
        get_batch = partial(make_batch, run, settings, scheduler, train, texts, order)
        run.log(
            f"{sum(each.numel() for each in network.parameters()):,} parameters · {len(train):,} "
            f"images of {' x '.join(map(str, train.images.size))} to train on, {len(val):,} to "
            f"validate · {len(data.captions):,} captions of at most {texts.length} tokens"
        )
        weights = run.weights()
        text_encoder = weights.text_encoder or texts.frozen
        pipeline = TextDiffusionPipeline(texts.tokenizer, text_encoder, weights.unet, scheduler)

        # ---- loop
        run.identify(data_sha256=data.sha256, text_encoder_sha256=texts.sha256)
        run.warm_up(lambda rows: loss(*get_batch(rows)))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(*get_batch(rows)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, pipeline, val, texts)
                    curve = partial(loss_curve, unit=f"mean squared error of {settings.objective}")
                    if run.report("val_loss", metrics, curve=curve):
                        save = partial(save_model, run, settings, pipeline, train, val, metrics)
                        run.publish(save)


def load_prompts(run: Run, settings: Settings, data: Captioned) -> Prompts:
    """Tokenize the captions, and encode them if the text encoder is not trained."""
    most = settings.max_tokens
    if settings.text_encoder is None:
        tokenizer = prompts.make_tokenizer(data.captions, settings.vocab_size, most)
        return prompts.tokenize_captions(tokenizer, data.captions)
    frozen = prompts.load_text_encoder(settings.text_encoder, most)
    return prompts.encode_captions(*frozen, data.captions, run.device)


def make_network(settings: Settings, train: Captioned, texts: Prompts, device: str) -> TextDenoiser:
    """Build new networks, of a size that fits the images and the machine."""
    size = train.images.size
    halvings = max(1, math.ceil(math.log2(max(size[1:]) / SMALLEST)))
    fewest = 16 if device == "cpu" else 64  # channels of the largest map
    widths = settings.widths or [
        fewest * GROWTH[min(i, len(GROWTH) - 1)] for i in range(halvings + 1)
    ]
    encoder = None
    if texts.frozen is None:
        shape = settings.text_layers, settings.text_width
        encoder = text_denoisers.make_text_encoder(texts.tokenizer, *shape)
    width = texts.width or settings.text_width
    unet = text_denoisers.make_unet(size, widths, settings.layers, width)
    if device == "cpu":  # where gradients of torch's fused attention are slow
        unet.set_attn_processor(AttnProcessor())
    return TextDenoiser(unet, encoder)


def make_batch(
    run: Run,
    settings: Settings,
    scheduler: Any,
    train: Captioned,
    texts: Prompts,
    order: Order,
    rows: np.ndarray,
) -> tuple[Any, ...]:
    """Look up images and captions, and draw random numbers.

    They are the same for a row at any number of processes.

    Returns:
        images, (n, channels, height, width); prompts, see `Prompts.of`; noise like the images;
        timesteps, alpha and sigma, (n,).
    """
    _, which = order(rows)
    slots = torch.from_numpy(rows - run.first_row)
    words = np.random.SeedSequence((settings.seed, run.turn))
    seed = int(words.generate_state(1, np.uint64)[0])
    numbers = draw_numbers(scheduler, train.images.size, run.batch_size, seed)
    u, *drawn = (each[slots] for each in numbers)
    chosen = texts.of(train.which[which], u < settings.cond_dropout, run.device)
    return train.images.batch(which, run.device), chosen, *(e.to(run.device) for e in drawn)


def draw_numbers(
    scheduler: Any, size: tuple[int, ...], count: int, seed: int
) -> list[torch.Tensor]:
    """Draw random numbers for a batch: whether to drop captions, noise, timesteps, alpha, sigma."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=generator)
    noise = torch.randn(count, *size, generator=generator)
    shuffled, offset = (
        torch.randperm(count, generator=generator),
        torch.rand(1, generator=generator),
    )
    quantiles = diffusion_losses.stratified_quantiles(shuffled, offset)
    noising = diffusion_losses.noising_at_quantiles(scheduler, quantiles)
    return [u, noise, noising.timesteps, noising.alpha, noising.sigma]


# ---- evaluate


def evaluate(
    run: Run,
    settings: Settings,
    pipeline: TextDiffusionPipeline,
    val: Captioned,
    texts: Prompts,
) -> dict[str, float]:
    """Measure the loss on fixed noise on the main process, and draw samples."""
    network, objective = run.weights().eval(), settings.objective
    metrics: dict[str, float] = {}
    if run.is_main:
        some = np.unique(np.linspace(0, len(val) - 1, VAL_ROWS, dtype=int))
        drawn = draw_numbers(pipeline.scheduler, val.images.size, len(some), 0)[1:]
        total = 0.0
        with torch.no_grad():
            for slots in torch.arange(len(some)).split(BLOCK):
                which = some[slots.numpy()]
                images = val.images.batch(which, run.device)
                given = texts.of(val.which[which], torch.zeros(len(slots)) > 0, run.device)
                noise = [each[slots].to(run.device) for each in drawn]
                part = text_denoisers.loss(network, images, given, *noise, objective=objective)
                total += part.item() * len(slots)
        metrics = {"val_loss": total / len(some)}
        save_samples(run, settings, pipeline, val)
    network.train()
    return run.broadcast(metrics)


def sample_prompts(settings: Settings, val: Captioned) -> list[str]:
    """Return the prompts of samples: those asked for, or captions evenly from all."""
    if settings.sample_prompts:
        return settings.sample_prompts
    some = np.unique(np.linspace(0, len(val) - 1, SAMPLES, dtype=int))
    return [val.captions[val.which[i]] for i in some]


def save_samples(
    run: Run, settings: Settings, pipeline: TextDiffusionPipeline, val: Captioned
) -> None:
    """Save pictures of the seeds 0 and up at every evaluation."""
    given = sample_prompts(settings, val)
    asked = [given[i % len(given)] for i in range(SAMPLES)]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(SAMPLES)]
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(asked, generator=seeds, output_type="pt").images * 2 - 1
    gallery.save_samples(run.folder.path, run.progress.step, made, columns=8)


# ---- save


USAGE = """
import torch
from diffusers import DiffusionPipeline

# the class is in this folder, and its code runs
pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
pipeline({prompt!r}, generator=generator).images[0].save("picture.png")

import genkit

# without running that code
genkit.imagine({prompt!r}, model=model, seed=0).save("picture.png")
"""


def save_model(
    run: Run,
    settings: Settings,
    pipeline: TextDiffusionPipeline,
    train: Captioned,
    val: Captioned,
    metrics: dict[str, float],
    path: Path,
) -> None:
    """Write the model as diffusers does, with its card."""
    vendoring.save_pipeline(pipeline, path)
    if settings.text_encoder is None:
        lm.save_tokenizer(pipeline.tokenizer, path / "tokenizer")
    prompt = sample_prompts(settings, val)[0]
    encoder = settings.text_encoder or "a text encoder that was trained along"
    card.write_card(
        path,
        run.folder.path,
        title="A model that draws images from words",
        task="text-to-image",
        library="diffusers",
        about=f"{pipeline.unet.num_parameters():,} parameters in the UNet, with {encoder}; "
        f"objective {settings.objective}, trained on {len(train):,} images of {settings.images} "
        f"with captions of at most {pipeline.tokenizer.model_max_length} tokens, of which it was "
        f"shown {run.progress.rows:,}. By default it draws with {STEPS} steps at guidance "
        f"{GUIDANCE:g}.",
        usage=USAGE.format(prompt=prompt),
        prompt=prompt,
        figures=metrics,
        protocol=f"val_loss is the mean squared error of {settings.objective} on "
        f"{min(VAL_ROWS, len(val)):,} validation images, evenly from {len(val):,}, with noise of "
        "a fixed seed.",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
