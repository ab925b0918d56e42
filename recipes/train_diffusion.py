"""Train a diffusion or flow-matching model on images: a network that removes noise.

    accelerate launch recipes/train_diffusion.py
    accelerate launch recipes/train_diffusion.py --images train.parquet --conditional
    accelerate launch recipes/train_diffusion.py --objective flow --extractor runs/classifier
    accelerate launch recipes/train_diffusion.py --objective meanflow --init_from runs/flow
    accelerate launch recipes/train_diffusion.py --images photos --latent runs/vae
    accelerate launch recipes/train_diffusion.py --output_dir runs/diffusion --resume

With --latent it learns to denoise the latents of an AutoencoderKL, such as train_vae trains with
--network spatial. The model in the output folder is at any time the best so far, in diffusers'
layout: a stock DDPMPipeline, or for --conditional, --latent and a mean flow the pipeline of
genkit/models/diffusion.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from genkit import machine
from genkit.data.images import Images, proportional_labels
from genkit.data.order import Order
from genkit.engine import unet
from genkit.errors import clean_errors
from genkit.files import weights_hash
from genkit.hub import download
from genkit.metrics.monitor import FEWEST, Monitor, coverage_k
from genkit.metrics.neighbours import K
from genkit.models import denoisers, diffusion, diffusion_losses, mean_flow
from genkit.training import diffusion_cards
from genkit.training.curves import loss_curve
from genkit.training.image_data import ImageSettings, load_for_run
from genkit.training.latent_data import load_latents
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import parse, setting
from genkit.vision import denoising, gallery, sampling

OBJECTIVES = (*diffusion.OBJECTIVES, "meanflow")

# ---- settings


@dataclass
class Settings(ImageSettings):
    """Settings of this recipe; see also ImageSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/diffusion", "folder of the run and of the model")
    objective: str = setting("v", "prediction of the network", choices=OBJECTIVES)
    schedule: str | None = setting(
        None,
        "noise schedule; default: linear for epsilon, cosine for v and x0",
        choices=tuple(diffusion.SCHEDULES),
    )
    min_snr: float = setting(
        0.0, "cap of the signal-to-noise ratio that weights the loss; 0 for no weights", least=0
    )
    init_from: str | None = setting(
        None, "folder of a flow or a mean flow whose weights a mean flow starts from"
    )
    latent: str | None = setting(
        None, "folder or Hub id of an AutoencoderKL whose latents are denoised; default: pixels"
    )
    conditional: bool = setting(False, "class-conditional model")
    cond_dropout: float | None = setting(
        None,
        "part of the classes dropped for classifier-free guidance; default if conditional: 0.1",
        above=0,
        below=1,
    )
    widths: list[int] | None = setting(
        None, "channels of the feature maps, the largest map first", least=1
    )
    layers: int = setting(1, "residual blocks at each size", least=1)
    attention: bool = setting(False, "self-attention in the smallest feature map")
    extractor: str | None = setting(
        None, "classifier whose features compare images; default: their pixels"
    )
    eval_samples: int = setting(1024, "generated images of an evaluation", least=K + 1)
    eval_steps: int | None = setting(
        None, "sampling steps of an evaluation; default: 10, of a mean flow 1", least=1
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        download.check_exists(self.extractor, "--extractor")
        flow = self.objective in ("flow", "meanflow")
        if flow and (self.min_snr or self.schedule):
            name = "min_snr" if self.min_snr else "schedule"
            raise ValueError(
                f"--{name} {getattr(self, name)} excludes --objective {self.objective}"
            )
        if self.init_from and not self.mean:
            raise ValueError(f"--init_from {self.init_from} requires --objective meanflow")
        download.check_exists(self.init_from, "--init_from")
        download.check_exists(self.latent, "--latent")
        if self.cond_dropout is not None and not self.conditional:
            raise ValueError(f"--cond_dropout {self.cond_dropout} requires --conditional")
        try:
            diffusion.resolve_sampler(make_scheduler(self), None, self.eval_steps, self.mean)
        except ValueError as error:
            raise ValueError(f"--eval_steps {self.eval_steps}: {error}") from error

    @property
    def mean(self) -> bool:
        """Whether the model is a mean flow."""
        return self.objective == "meanflow"


# at the end of the cosine schedule, all is noise, and predicted noise says little of the image
SCHEDULES = {"epsilon": "linear", "v": "cosine", "x0": "cosine"}
SMALLEST = 8  # largest side of the smallest feature map
GROWTH = (1, 2, 6, 8)  # of the channels, where the map gets smaller
VAL_ROWS = 1024  # most images whose loss is measured


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        run: dict[str, Any] = {"max_steps": 20_000, "batch_size": 256}
    else:
        run = {"max_minutes": 5.0, "batch_size": 64}
    if settings.objective in SCHEDULES:
        run["schedule"] = SCHEDULES[settings.objective]
    run["eval_steps"] = 1 if settings.mean else 10
    run |= {"cond_dropout": 0.1} if settings.conditional else {}
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.008, "weight_decay": 0.0}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    compiles = device == "accelerator" and machine.can_compile()
    if settings.compile and device != "accelerator":
        what = "on a CPU, torch's compiler gets the gradient of upsampled features wrong"
        raise ValueError(f"--compile requires a GPU: {what}")
    return run | rates | precision | {"optimizer": "muon", "ema": 0.999, "compile": compiles}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        train, val, order = load_for_run(run, settings, FEWEST)
        monitor = run.on_main_process(
            partial(Monitor, val, settings.extractor, settings.eval_samples)
        )
        size, vae = train.size, None
        if settings.latent:  # from here on, train and val are latents
            vae, train, val = load_latents(run, settings.latent, train, val)

        # ---- model
        scheduler = make_scheduler(settings)
        network = make_network(settings, train, size[1] // train.size[1], run.device.type)
        if settings.init_from:
            folder = download.fetch(settings.init_from, argument="init_from")
            scheduler = denoisers.start_from(network, folder, vae)
        model = run.network("model", network, optimizers(network, settings))
        loss = make_loss(run, settings, network, train)
        get_batch = partial(make_batch, run, settings, scheduler, train, order)
        run.log(
            f"{network.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, size))} to train on, {len(val):,} to compare with"
            + (f" · latents of {' x '.join(map(str, train.size))}" if vae else "")
        )
        pipeline = diffusion.DenoisingPipeline(run.weights(), scheduler, vae)
        dtype = "bfloat16" if settings.mixed_precision == "bf16" else "float32"
        runner = unet.UNetRunner(run.weights(), dtype, False)

        # ---- loop
        facts = {"vae_sha256": weights_hash(vae)} if vae else {}
        run.identify(train_sha256=train.sha256, val_sha256=val.sha256, **facts)
        run.warm_up(lambda rows: loss(model, *get_batch(rows)))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *get_batch(rows)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, pipeline, runner, monitor, train, val)
                    unit = f"mean squared error of {settings.objective}"
                    if run.report("distance", metrics, curve=partial(loss_curve, unit=unit)):
                        save = partial(save_model, run, settings, pipeline, train, val, metrics)
                        run.publish(save)


def make_scheduler(settings: Settings) -> diffusion.Scheduler:
    """Build the scheduler of the objective; that of a mean flow is a flow's."""
    kind = "flow" if settings.mean else settings.objective
    clip = not settings.latent
    return diffusion.make_scheduler(kind, settings.schedule or "linear", settings.mean, clip)


def make_network(settings: Settings, train: Images, factor: int, device: str) -> UNet2DModel:
    """Build a new model, of a size that fits the images, or their latents, and the machine."""
    halvings = max(1, math.ceil(math.log2(max(train.size[1:]) / SMALLEST)))
    fewest = 16 if device == "cpu" else 64  # channels of the largest map
    grown = [fewest * GROWTH[min(i, len(GROWTH) - 1)] for i in range(halvings + 1)]
    return denoisers.make_unet(
        train.size,
        settings.widths or grown,
        settings.layers,
        settings.attention,
        train.count_classes() if settings.conditional else 0,
        settings.mean,
        factor=factor,
    )


def make_loss(
    run: Run, settings: Settings, network: UNet2DModel, train: Images
) -> Callable[..., torch.Tensor]:
    """Return the loss of a model on a batch by `make_batch`."""
    if not settings.mean:
        objective, min_snr = settings.objective, settings.min_snr
        plain = partial(diffusion_losses.loss, objective=objective, min_snr=min_snr)
        return run.autocast(plain)
    null_label = train.count_classes() if settings.conditional else 0
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    return mean_flow.with_target(run.autocast(mean_flow.loss), network, null_label, dtype)


def make_batch(
    run: Run,
    settings: Settings,
    scheduler: diffusion.Scheduler,
    train: Images,
    order: Order,
    rows: np.ndarray,
) -> tuple[Any, ...]:
    """Look up images and draw random numbers: the same for a row at any number of processes.

    Returns:
        images and noise, (n, channels, height, width); labels, (n,); times, alpha and sigma, (n,),
        or of a mean flow `mean_flow.Spans`.
    """
    _, which = order(rows)
    slots = torch.from_numpy(rows - run.first_row)
    words = np.random.SeedSequence((settings.seed, run.turn))
    seed = int(words.generate_state(1, np.uint64)[0])
    generator, count = torch.Generator().manual_seed(seed), run.batch_size
    noise = torch.randn(count, *train.size, generator=generator)[slots]
    shuffled = torch.randperm(count, generator=generator)
    u = torch.rand(1, generator=generator)
    quantiles = diffusion_losses.stratified_quantiles(shuffled, u)[slots]
    labels, dropped = None, torch.ones(len(rows), dtype=torch.bool)
    if settings.cond_dropout:
        dropped = torch.rand(count, generator=generator)[slots] < settings.cond_dropout
        labels = train.classes(which).masked_fill(dropped, train.count_classes()).to(run.device)
    batch = train.batch(which, run.device), noise.to(run.device), labels
    if settings.mean:
        u = torch.rand(count, 2, generator=generator)[slots]
        asked = quantiles, slots, u, ~dropped, scheduler.config.num_train_timesteps
        return *batch, mean_flow.spans_at_quantiles(*asked).to(run.device)
    noising = diffusion_losses.noising_at_quantiles(scheduler, quantiles)
    levels = (part.to(run.device) for part in (noising.timesteps, noising.alpha, noising.sigma))
    return *batch, *levels


# ---- evaluate


def evaluate(
    run: Run,
    settings: Settings,
    pipeline: diffusion.DenoisingPipeline,
    runner: diffusion.Network,
    monitor: Monitor | None,
    train: Images,
    val: Images,
) -> dict[str, float]:
    """Evaluate images of fixed seeds on the main process, and save pictures."""
    network = run.weights().eval()
    metrics: dict[str, float] = {}
    if monitor is not None:
        count, labels = settings.eval_samples, None
        if settings.conditional:
            labels = proportional_labels(train, count).tolist()
        options = {"num_inference_steps": settings.eval_steps, "network": runner}
        samples = sampling.draw_samples(pipeline, range(count), labels, options)
        by_time = denoising.loss_by_time(pipeline, take_evenly(val), runner)
        by_time.save(run.folder.path / "loss_by_time.png")
        metrics = {"val_loss": by_time.mean} | monitor.measure(samples, labels)
        save_pictures(run, settings, pipeline, options, train)
    network.train()
    return run.broadcast(metrics)


def take_evenly(val: Images) -> Images:
    """Take the images whose loss is measured evenly from all, as they may be sorted by class."""
    return val.take(np.unique(np.linspace(0, len(val) - 1, VAL_ROWS, dtype=int)))


def save_pictures(
    run: Run,
    settings: Settings,
    pipeline: diffusion.DenoisingPipeline,
    options: dict[str, Any],
    train: Images,
) -> None:
    """Save samples of the same seeds at every evaluation."""
    seeds = range(gallery.COUNT)
    labels = [i % len(train.names) for i in seeds] if settings.conditional else None
    gallery.save_samples(
        run.folder.path,
        run.progress.step,
        sampling.draw_samples(pipeline, seeds, labels, options),
    )


# ---- save


def save_model(
    run: Run,
    settings: Settings,
    pipeline: diffusion.DenoisingPipeline,
    train: Images,
    val: Images,
    metrics: dict[str, float],
    path: Path,
) -> None:
    """Write the model as diffusers does, with its card."""
    denoisers.save_diffusion(pipeline, path)
    sampler = sampling.resolve_sampler(pipeline, settings.eval_steps)
    labels = ", of classes in the training images' proportions," if settings.conditional else ""
    shape = " x ".join(map(str, train.size))
    where = f", as latents of {shape} by {Path(settings.latent).name}" if settings.latent else ""
    diffusion_cards.write_diffusion_card(
        path,
        run,
        pipeline,
        about=f"objective {settings.objective}, trained on {len(train):,} images of "
        f"{settings.images}, of which it was shown {run.progress.rows:,}{where}.",
        figures=metrics,
        protocol=f"{settings.eval_samples:,} images of the seeds 0 and up{labels} by "
        f"{sampler.description} without guidance, {sampler.evaluations} evaluations each, compared "
        f"with {len(val):,} validation images by {settings.extractor or 'their pixels'}; coverage "
        f"has k = {coverage_k(settings.eval_samples, len(val))}; val_loss "
        f"of {len(take_evenly(val)):,} of these, evenly from all, at stratified times.",
        precision="bfloat16" if settings.mixed_precision == "bf16" else "float32",
        data=settings.images,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
