"""Fine-tune Stable Diffusion on images of your own: by LoRA, by a new word, or all of its weights.

    accelerate launch recipes/finetune_text2image.py --images cats --prompt "a photo of sks cat"
    accelerate launch recipes/finetune_text2image.py --images captioned.parquet \
        --caption_column text --method full
    accelerate launch recipes/finetune_text2image.py --images cats --prompt "a photo of <my-cat>" \
        --method textual_inversion --token "<my-cat>" --initializer cat
    accelerate launch recipes/finetune_text2image.py --output_dir runs/text2image-tuned --resume

The output folder has at any time the best so far: an adapter, which `load_lora_weights` of
diffusers loads; the embeddings of the word, which `load_textual_inversion` loads; or a pipeline.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit import files, machine
from genkit.data import images
from genkit.errors import clean_errors
from genkit.hub import download
from genkit.models import text2image_tuning as tuning
from genkit.training import captioned_images
from genkit.training.captioned_images import Batches, Captioned, Encoded
from genkit.training.curves import loss_curve
from genkit.training.image_data import ImageSettings
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.training.text2image_cards import write_tuned_card
from genkit.vision import gallery, imagining, text2image
from genkit.vision.text2image import Source

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/text2image-tuned", "folder of the run and of what it trains")
    init_from: str = setting(text2image.DEFAULT, "Stable Diffusion, or XL: a folder or a Hub id")
    init_revision: str | None = setting(None, "branch, tag or commit of a model on the Hub")
    method: str = setting("lora", "what is trained", choices=tuning.METHODS)
    prompt: str | None = setting(None, "caption of all images")
    image_column: str = setting("image", "column of images, if they are a table")
    caption_column: str | None = setting(None, "column of captions, if the images are a table")
    val_fraction: float = setting(
        0.0, "part of the images to validate on; 0: on those to train on", least=0, below=1
    )
    resolution: int | None = setting(
        None, "scale and crop images to squares of this side; default: the pipeline's own", least=8
    )
    channels: int | None = setting(3, "channels of the images: colours", choices=(3,))
    lora_rank: int = setting(8, "rank of the adapters of lora", least=1)
    lora_layers: str = setting(
        "attention", "layers of the denoiser that lora adapts", choices=("attention", "all")
    )
    train_text_encoder: bool = setting(False, "lora and full: train the text encoder, too")
    token: str | None = setting(None, "textual_inversion: the new word, such as <my-cat>")
    initializer: str | None = setting(None, "textual_inversion: the word that it starts from")
    vectors: int = setting(1, "textual_inversion: embeddings of the new word", least=1)
    prior_prompt: str | None = setting(
        None, "lora and full: what the pipeline is to draw as before, such as a photo of a cat"
    )
    prior_images: int = setting(100, "images of it that the pipeline draws ahead", least=1)
    prior_weight: float = setting(1.0, "weight of their loss", above=0)
    min_snr: float = setting(
        0.0, "cap of the signal-to-noise ratio that weights the loss; 0 for no weights", least=0
    )
    cond_dropout: float = setting(
        0.0, "part of the captions dropped for classifier-free guidance", least=0, below=1
    )
    sample_prompts: list[str] | None = setting(None, "prompts of samples; default: captions")
    samples: int = setting(CHOSEN, "pictures of an evaluation", least=0)
    sample_steps: int = setting(25, "steps of the pipeline's scheduler for each", least=1)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        download.check_exists(self.init_from, "--init_from")
        download.check_revision(self.init_from, self.init_revision)
        if self.val_images is not None:
            raise ValueError(f"--val_images {self.val_images}: give --val_fraction")
        if self.method == "lora" and importlib.util.find_spec("peft") is None:
            raise ValueError("--method lora requires peft: pip install 'hf-genkit[finetune]'")


EVALUATED, TIMES = 64, 8  # most images whose loss is measured, and timesteps of each
DRY = 64  # most images that a dry run encodes


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    words = settings.method == "textual_inversion"
    if device == "accelerator":
        run: dict[str, Any] = {"max_steps": 2000 if words else 800, "batch_size": 4}
        run |= {"samples": 4}
    else:
        run = {"max_minutes": 30.0, "batch_size": 1, "samples": 1}
    if not Path(settings.init_from).is_dir() and settings.init_from != text2image.DEFAULT:
        run |= {"init_revision": "main"}
    rates = {"lora": 1e-4, "textual_inversion": 5e-3, "full": 1e-5}
    run |= {"learning_rate": rates[settings.method], "muon_learning_rate": 2e-3}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    step = {"optimizer": "adamw", "weight_decay": 0.0 if words else 0.01}
    return run | precision | step | {"ema": 0.0, "compile": False}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    check_settings(settings)
    source = find_pipeline(settings)

    with Run(settings) as run:
        # ---- data and model
        names = settings.prompt, settings.image_column, settings.caption_column
        data = captioned_images.load_captioned(run, settings, *names)
        task = load_task(run, settings, source)
        train, val = encode_data(run, settings, task, data)
        parts = [train, *draw_prior(run, settings, task)]
        model = run.network("model", task.tuner, optimizers(task.tuner, settings))
        options = {"scheduler": task.scheduler, "min_snr": settings.min_snr}
        row_losses = run.autocast(partial(tuning.row_losses, model, **options))
        timesteps = task.scheduler.config.num_train_timesteps
        batches = Batches(parts, settings.seed, settings.cond_dropout, timesteps)
        loss = partial(total_loss, run, batches, row_losses, settings.prior_weight)
        side = settings.resolution
        run.log(
            f"{count(task.pipeline.unet):,} parameters in the denoiser, "
            f"{count(task.tuner, True):,} to train · {len(data):,} images of {side} x {side} · "
            f"{sum(part.megabytes for part in parts):.1f} MB of latents and prompts"
        )

        # ---- loop
        run.identify(model_sha256=task.sha256, data_sha256=data.sha256)
        run.warm_up(loss)
        run.restore(before=partial(evaluate, run, settings, task, data, val))
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(rows))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    evaluate(run, settings, task, data, val)


def check_settings(settings: Settings) -> None:
    """Refuse settings that lack what the method needs, or have what it does not."""
    words = settings.method == "textual_inversion"
    captioned_images.check_captions(settings.images, settings.prompt, settings.caption_column)
    for name in ("token", "initializer"):
        value = getattr(settings, name)
        if words and not (value or "").strip():
            raise ValueError(f"--{name} is missing; --method textual_inversion requires it")
        if not words and value is not None:
            raise ValueError(f"--{name} {value} is for --method textual_inversion")
    for name in ("prior_prompt", "train_text_encoder"):
        if words and getattr(settings, name):
            raise ValueError(f"--{name} is not for --method textual_inversion")
    if words and settings.optimizer == "muon":
        raise ValueError("--optimizer muon is for matrices; textual_inversion trains none")
    if settings.prior_prompt is not None and not settings.prior_prompt.strip():
        raise ValueError(f"--prior_prompt is {settings.prior_prompt!r}; give a text, or leave it")


def find_pipeline(settings: Settings) -> Source:
    """Find the pipeline, check that it can be trained, and choose the side of the images."""
    name, revision = settings.init_from, settings.init_revision
    source = text2image.find_source(name, revision, argument="--init_from")
    tuning.check_pipeline(source.pipeline.__name__, source.settings, name)
    settings.resolution = settings.resolution or source.default_size[0]
    if settings.resolution % source.multiple:
        raise ValueError(
            f"--resolution must be a multiple of {source.multiple} for {name}, got "
            f"{settings.resolution}"
        )
    dropped_text = settings.cond_dropout and settings.train_text_encoder
    if dropped_text and "text_encoder_2" in source.settings:  # which draws with zeros for no words
        raise ValueError("--cond_dropout excludes --train_text_encoder for Stable Diffusion XL")
    try:
        imagining.resolve_options(source, None, settings.sample_steps, None, None)
    except ValueError as error:
        raise ValueError(f"--sample_steps {settings.sample_steps}: {error}") from error
    return source


# ---- data and model


@dataclass(frozen=True)
class Task:
    """A pipeline, and what is trained of it."""

    source: Source
    pipeline: Any
    scheduler: Any  # of training
    tuner: tuning.Tuner
    words: list[str]  # names of new embeddings
    sha256: str  # of the networks as they were


def load_task(run: Run, settings: Settings, source: Source) -> Task:
    """Load the pipeline, and freeze it but for what is trained."""
    with run.accelerator.local_main_process_first():
        pipeline = text2image.read_pipeline(source, lambda _: torch.float32).to(run.device)
    parts = [pipeline.vae, pipeline.unet, *tuning.text_encoders(pipeline)]
    hashes = "".join(files.weights_hash(part) for part in parts)
    words: list[str] = []
    if settings.method == "textual_inversion":
        assert settings.token and settings.initializer, "checked"
        added = settings.token, settings.initializer, settings.vectors
        words = tuning.add_words(pipeline, *added)
    assert settings.resolution, "chosen"
    tuner = tuning.make_tuner(
        pipeline,
        settings.method,
        settings.lora_rank,
        settings.lora_layers == "all",
        settings.train_text_encoder,
        settings.resolution,
    )
    sha256 = hashlib.sha256(hashes.encode()).hexdigest()
    return Task(source, pipeline, tuning.make_scheduler(pipeline), tuner, words, sha256)


def encode_data(
    run: Run, settings: Settings, task: Task, data: Captioned
) -> tuple[Encoded, Encoded]:
    """Encode images and captions; a dry run encodes a few.

    Returns:
        Those to train on, and those to validate on, which may be the same.
    """
    argument = "--prompt" if settings.caption_column is None else "--images"
    tuning.check_words(task.pipeline, task.words, data.captions, argument)
    tuning.tokenize(task.pipeline, settings.sample_prompts or [""], "--sample_prompts")
    prompts = captioned_images.encode_prompts(
        run, task.pipeline, task.tuner, data.captions, argument
    )
    some = data.take(np.arange(min(len(data), DRY))) if settings.dry_run else data
    latents = captioned_images.encode_latents(run, task.pipeline, some.images)
    every = Encoded(latents, some.which, prompts)
    if not settings.val_fraction:
        return every, every
    train, val = images.split_images(some.images, None, settings.val_fraction)
    return every.take(train.rows), every.take(val.rows)


def draw_prior(run: Run, settings: Settings, task: Task) -> list[Encoded]:
    """Let the pipeline draw the images of the prior, if one is asked for; a dry run draws one."""
    if settings.prior_prompt is None:
        return []
    prompts = captioned_images.encode_prompts(
        run, task.pipeline, task.tuner, [settings.prior_prompt], "--prior_prompt"
    )
    steps, side = settings.sample_steps, task.tuner.side
    draw = partial(
        text2image.draw_latents, task.pipeline, settings.prior_prompt, steps=steps, size=side
    )
    content = [task.sha256, settings.prior_prompt, steps, side]
    total = 1 if settings.dry_run else settings.prior_images
    latents = captioned_images.draw_latents(run, draw, total, content)
    return [Encoded(latents, np.zeros(total, np.int64), prompts)]


def count(network: torch.nn.Module, trained: bool = False) -> int:
    """Count the parameters of a network, or those that are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)


def total_loss(
    run: Run, batches: Batches, row_losses: Any, prior_weight: float, rows: np.ndarray
) -> torch.Tensor:
    """Return the mean loss of images, and of the prior if there is one."""
    loss: torch.Tensor = row_losses(*batches.take(run, 0, rows)).mean()
    if len(batches.parts) == 1:
        return loss
    return loss + prior_weight * row_losses(*batches.take(run, 1, rows)).mean()


# ---- evaluate


def evaluate(run: Run, settings: Settings, task: Task, data: Captioned, val: Encoded) -> None:
    """Measure the loss at fixed noise and timesteps, draw samples, and save the best."""
    tuner = run.weights().eval()
    rows = np.unique(np.linspace(0, len(val) - 1, EVALUATED, dtype=int))
    losses = [row_loss(run, task, val, int(rows[i])) for i in run.shard(len(rows))]
    (total,) = run.sum(torch.tensor([sum(losses)], dtype=torch.float64)).tolist()
    metrics = {"val_loss": total / len(rows)}
    tuning.put_into(task.pipeline, tuner)
    if run.is_main and settings.samples:
        save_samples(run, settings, task, data)
    if run.report("val_loss", metrics, curve=partial(loss_curve, unit="squared error")):
        run.publish(partial(save_model, run, settings, task, data, metrics, len(rows)))
    tuner.train()


@torch.no_grad()
def row_loss(run: Run, task: Task, val: Encoded, row: int) -> float:
    """Return the mean loss of an image at evenly spaced timesteps, with noise of its own."""
    timesteps = task.scheduler.config.num_train_timesteps
    batch = captioned_images.repeat_image(val, row, TIMES, timesteps, run.device)
    return tuning.row_losses(run.weights(), *batch, task.scheduler).mean().item()


def sample_prompts(settings: Settings, data: Captioned) -> list[str]:
    """Return the prompts of samples: those asked for, or captions evenly from all."""
    if settings.sample_prompts:
        return settings.sample_prompts
    some = np.unique(np.linspace(0, len(data.captions) - 1, settings.samples or 1, dtype=int))
    return [data.captions[i] for i in some]


def save_samples(run: Run, settings: Settings, task: Task, data: Captioned) -> None:
    """Save pictures of the seeds 0 and up, as `genkit.imagine` draws them."""
    prompts = sample_prompts(settings, data)
    size = {"steps": settings.sample_steps, "size": settings.resolution}
    options = imagining.resolve_options(task.source, negative=None, guidance=None, **size)
    draw = partial(imagining.generate_picture, task.pipeline, task.source, options=options)
    drawn = [draw(prompts[i % len(prompts)], i).image for i in range(settings.samples)]
    values = np.stack([np.asarray(image.convert("RGB")) for image in drawn])
    pictures = torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1
    gallery.save_samples(run.folder.path, run.progress.step, pictures, columns=min(8, len(drawn)))


# ---- save


def save_model(
    run: Run,
    settings: Settings,
    task: Task,
    data: Captioned,
    metrics: dict[str, float],
    measured_images: int,
    path: Path,
) -> None:
    """Write what was trained as diffusers loads it, with its card."""
    tuning.save_tuned(task.pipeline, settings.method, task.words, path)
    what = {
        "lora": f"LoRA adapters of rank {settings.lora_rank} for the denoiser",
        "textual_inversion": f"the word {settings.token}",
        "full": "all weights of the denoiser",
    }
    text = " and the text encoder" if settings.train_text_encoder else ""
    images = f"{len(data):,} images of {settings.images}"
    write_tuned_card(
        path,
        run,
        base=settings.init_from,
        method=settings.method,
        second_encoder=settings.method == "textual_inversion" and len(task.tuner.encoders) == 2,
        about=f"{what[settings.method]}{text}, {count(task.tuner, True):,} parameters, trained on "
        f"{images} for {run.progress.step:,} steps.",
        prompt=sample_prompts(settings, data)[0],
        figures=metrics,
        protocol=f"Squared error of the predicted {tuning.objective(task.scheduler)}, mean over "
        f"{measured_images:,} images "
        f"{'held out' if settings.val_fraction else 'that it was trained on'}, at {TIMES} evenly "
        "spaced timesteps each, with noise of fixed seeds.",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
