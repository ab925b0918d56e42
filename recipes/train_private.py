"""Train a generator of images under differential privacy: it keeps each single image secret.

    accelerate launch recipes/train_private.py --images train.parquet --epsilon 10 --conditional
    accelerate launch recipes/train_private.py --images train.parquet --method gan --conditional
    accelerate launch recipes/train_private.py --images train.parquet --noise 1.1
    accelerate launch recipes/train_private.py --output_dir runs/private --resume

Methods: merf, one noisy mean embedding; gan, a critic whose gradients at private images are clipped
and noisy. Nothing else is computed from private images: no figures, no pictures, no hash. The
checkpoints hold the secret key of the noise: publish the model, by `genkit push`, never them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from genkit import machine
from genkit.data.images import Images
from genkit.errors import clean_errors
from genkit.hub import card, vendoring
from genkit.metrics.monitor import Monitor
from genkit.metrics.neighbours import K
from genkit.models import gan, gan_losses, mean_embedding, private
from genkit.models.mean_embedding import RandomFeatures
from genkit.models.private_critic import Critic, CriticSteps
from genkit.training import accounting, curves, private_run
from genkit.training.optim import player_optimizers
from genkit.training.private_run import Budget, PrivateSettings, Secret
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.vision import gallery
from genkit.vision.sampling import draw_samples

# ---- settings


@dataclass
class Settings(PrivateSettings):
    """Settings of this recipe; see also PrivateSettings, ImageSettings and RunSettings."""

    output_dir: str = setting("runs/private", "folder of the run and of the model")
    method: str = setting("merf", "mean embedding, or a GAN (in hours)", choices=("merf", "gan"))
    conditional: bool = setting(False, "class-conditional model")
    widths: list[int] | None = setting(
        None, "features of the generator, the smallest map first", least=1
    )
    critic_widths: list[int] = setting((32, 64), "features of the critic's layers", least=1)
    latent_dim: int = setting(64, "length of the noise vector", least=1)
    loss: str = setting("hinge", "loss of both networks", choices=("hinge", "wasserstein"))
    weight_clip: float = setting(0.0, "limit of the critic's weights", least=0)
    spectral_limit: float = setting(
        0.0, "limit of the singular values of the critic's matrices", least=0
    )
    critic_steps: int | None = setting(
        None, "critic steps for each generator step; default: doubled when too few", least=1
    )
    critic_learning_rate: float = setting(CHOSEN, "peak learning rate of the critic", above=0)
    features: int = setting(10_000, "random features of merf", least=4)
    warmup: float = setting(
        CHOSEN, "part of the run over which the rate rises from 0", least=0, most=1
    )
    decay: float = setting(
        CHOSEN, "part of the run, at its end, over which the rate falls to 0", least=0, most=1
    )
    clip: float = setting(0.0, "largest norm of the gradient; 0 for no limit", least=0)
    extractor: str | None = setting(
        None, "classifier whose features compare images with the public ones; default: their pixels"
    )
    eval_samples: int = setting(2000, "images compared with the public ones", least=K + 1)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if self.weight_clip and self.spectral_limit:
            raise ValueError("--weight_clip and --spectral_limit exclude each other")
        if self.loss == "wasserstein" and not (self.weight_clip or self.spectral_limit):
            raise ValueError("--loss wasserstein requires --weight_clip or --spectral_limit")
        if self.max_minutes and (self.warmup or self.decay):
            raise ValueError(
                "--max_minutes excludes --warmup and --decay: rates that follow the clock would "
                "differ in steps that are repeated after a crash"
            )


BETAS = {"merf": (0.5, 0.9), "gan": (0.0, 0.99)}  # of AdamW
MOMENTUM = 0.5  # of Muon
COMPARED = 800  # frequencies of merf that a step compares
LIMIT = 8  # the largest side of the smallest feature map of the generator
# without batch normalisation all images of a game turn black, where a tanh has no gradient
NETWORKS: dict[str, dict[str, Any]] = {
    "merf": {},
    "gan": {"network": "dcgan", "normalize": True, "kernels": (4, 5)},
}


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open."""
    values: dict[str, Any] = {"epsilon": None if settings.noise else 10.0}
    values |= {"accountant": accounting.default_accountant()}
    steps, batch_size = (3000, 256) if settings.method == "gan" else (2000, 300)
    values |= {"max_steps": steps, "batch_size": batch_size}
    values |= {"learning_rate": 2e-3, "critic_learning_rate": 1e-3, "muon_learning_rate": 0.01}
    values |= {"warmup": 0.0, "decay": 0.0 if settings.max_minutes else 0.5}
    values |= {"optimizer": "adamw", "weight_decay": 0.0, "ema": 0.99, "mixed_precision": "no"}
    return values | {"compile": False}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    adversarial = settings.method == "gan"

    with Run(settings) as run:
        # ---- data
        train, public = private_run.load_private(run, settings)
        budget = private_run.plan(run, settings, len(train), once=not adversarial)
        secret = Secret(run, train.sha256)

        # ---- model
        generator = make_generator(settings, train)
        optimizers = player_optimizers(generator, settings, BETAS[settings.method], MOMENTUM)
        wrapped = run.network("generator", generator, optimizers)
        critic = make_critic(run, settings, train) if adversarial else None
        run.kept["critic_steps"] = turns = CriticSteps(settings.critic_steps if critic else 1)
        run.log(
            f"{generator.num_parameters():,} parameters · {len(train):,} images of "
            f"{' x '.join(map(str, train.size))} · ε = {budget.spent(budget.steps):.3f} at "
            f"δ = {budget.delta:g} after {budget.steps:,} steps on private images, with noise "
            f"{budget.noise:.4g} and q = {budget.rate:.4g}"
        )
        monitor = None
        if public:
            compare = partial(Monitor, public, settings.extractor, settings.eval_samples)
            monitor = run.on_main_process(compare)

        # ---- loop
        run.identify()
        run.restore()
        g_loss: Callable[..., torch.Tensor]
        if critic:
            g_loss = partial(critic_loss, run, critic, turns)
            mine = np.arange(run.batch_size)  # batch normalisation needs all on every process
        else:
            extract = RandomFeatures(train.size, settings.features, settings.seed).to(run.device)
            released = private_run.release_embedding(
                run, train, settings.conditional, budget, secret, extract
            )
            g_loss = partial(embedding_loss, run, extract, released)
            mine = np.array(run.shard(run.batch_size))
        for _ in run.steps():
            if critic:
                critic_step(run, settings, train, budget, secret, critic, generator)
                critic.requires_grad_(False)
            if turns.is_generators():
                latents, labels, classes = draw_noise(run, settings, train, 1, mine)
                run.backward(g_loss(wrapped(latents, labels), classes), "generator")
                run.update("generator")
            if critic:
                critic.requires_grad_(True)
            if run.evaluation_due():
                with run.clock.paused():
                    publish(run, settings, train, budget, monitor)


def make_generator(settings: Settings, train: Images) -> gan.Generator:
    """Build the generator, which never sees an image and may be of any kind."""
    sides, adversarial = train.size[1:], settings.method == "gan"
    patch = 1 if adversarial else 4 if min(sides) > 16 else 2
    halvings = max(int(adversarial), math.ceil(math.log2(max(sides) / patch / LIMIT)))
    widths = [max(16, 64 >> i) if adversarial else 64 for i in range(halvings + 1)]
    return gan.Generator(
        image_size=train.size,
        latent_dim=settings.latent_dim,
        widths=settings.widths or widths,
        patch=patch,
        labels=train.count_classes() if settings.conditional else 0,
        **NETWORKS[settings.method],
    )


def make_critic(run: Run, settings: Settings, train: Images) -> Critic:
    """Build the critic, whose gradients are the only thing that private images are used for."""
    labels = train.count_classes() if settings.conditional else 0
    critic = Critic(train.size, settings.critic_widths, labels)
    own = dataclasses.replace(settings, learning_rate=settings.critic_learning_rate)
    optimizers = player_optimizers(critic, own, BETAS["gan"], MOMENTUM)
    run.network("discriminator", critic, optimizers, averaged=False)
    return critic


def draw_noise(
    run: Run, settings: Settings, train: Images, network: int, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Draw latents, classes and one-hot classes of rows of a batch of generated images.

    They follow from the run's seed, which is no secret. All classes are as likely, however many
    private images they have.
    """
    words = np.random.SeedSequence((settings.seed, run.progress.step, network))
    draw = torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0]))
    latents = torch.randn(run.batch_size, settings.latent_dim, generator=draw)
    labels = torch.randint(max(1, len(train.names)), (run.batch_size,), generator=draw)
    chosen = torch.from_numpy(rows)
    labels, latents = labels[chosen].to(run.device), latents[chosen].to(run.device)
    classes = private_run.one_hot(labels, len(train.names) if settings.conditional else 0)
    return latents, labels if settings.conditional else None, classes


def critic_loss(
    run: Run, critic: Critic, turns: CriticSteps, fake: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Return the loss of the generator against the critic, that of both losses."""
    scores = critic(fake, classes)
    turns.record(run.broadcast((scores < 0).float().mean().item()))
    return -scores.mean()


def embedding_loss(
    run: Run,
    extract: RandomFeatures,
    released: torch.Tensor,
    fake: torch.Tensor,
    classes: torch.Tensor,
) -> torch.Tensor:
    """Return the distance of the mean embedding of a batch over all processes from the released.

    A step compares some of the features, others than the step before.
    """
    draw = torch.Generator().manual_seed(run.progress.step)
    some = torch.randperm(extract.pairs, generator=draw)[:COMPARED].to(run.device)
    released = released[:, extract.columns(some)] * math.sqrt(extract.pairs / len(some))
    own = mean_embedding.class_sums(extract(fake, some), classes) / len(fake)
    mean = run.sum(own.detach().flatten().double() / run.processes).view_as(own).to(own)
    return mean_embedding.embedding_loss(released, own, mean)


# ---- what is computed from private images


def critic_step(
    run: Run,
    settings: Settings,
    train: Images,
    budget: Budget,
    secret: Secret,
    critic: Critic,
    generator: gan.Generator,
) -> None:
    """Train the critic for a step: private images by a clipped and noisy gradient.

    Gradients at generated images are clipped alike, so that neither side outweighs the other. They
    get no noise: the generator knows of private images by noisy gradients alone.
    """
    step, limit = run.progress.step, settings.clip_norm
    weights = {name: weight.detach() for name, weight in critic.named_parameters()}

    def loss(sign: int, weights: private.Parameters, image: Any, classes: Any) -> torch.Tensor:
        score = sign * functional_call(critic, weights, (image[None], classes[None]))[0]
        return F.relu(1 - score) if settings.loss == "hinge" else -score

    drawn = private.poisson_draw(secret.key, step, len(train), budget.rate)
    mine = drawn[np.array(run.shard(len(drawn)), int)]
    rows = private_run.rows(train, mine, settings.conditional, run.device)
    real, _ = private.clipped_sum(partial(loss, 1), weights, rows, limit)
    normal = private.normals(secret.key, "noise", step, len(real))
    expected = budget.rate * len(train)
    gradient = private.noisy_mean(run.sum(real.double()), normal, budget.noise, limit, expected)

    latents, labels, classes = draw_noise(run, settings, train, 0, np.arange(run.batch_size))
    with torch.no_grad():
        fake = generator(latents, labels)  # of the whole batch, for batch normalisation
    mine = np.array(run.shard(run.batch_size))
    rows = fake[mine], classes[mine]
    total, losses = private.clipped_sum(partial(loss, -1), weights, rows, limit)
    gradient += run.sum(total.double()) / run.batch_size
    private.assign_gradient(critic, gradient)
    run.networks["discriminator"].losses.append(losses.mean())
    run.update("discriminator")
    if settings.weight_clip:
        gan_losses.clip_weights(critic, settings.weight_clip)
    if settings.spectral_limit:
        private.limit_spectrum(critic, settings.spectral_limit)


# ---- evaluate and save


def publish(
    run: Run, settings: Settings, train: Images, budget: Budget, monitor: Monitor | None
) -> None:
    """Save samples, and the model: the last one or, by public images, the best one."""
    steps = 1 if settings.method == "merf" else run.progress.step
    network = run.weights("generator").eval()
    metrics: dict[str, float] = {"epsilon": 0.0}
    if run.is_main:
        metrics["epsilon"] = budget.spent(steps)
        pipeline = gan.GANPipeline(network)
        save_pictures(run, settings, pipeline, train)
        if monitor is not None:
            count = settings.eval_samples
            labels = np.arange(count) % len(train.names) if settings.conditional else None
            metrics |= monitor.measure(draw_samples(pipeline, range(count), labels), labels)
    network.train()
    metrics = run.broadcast(metrics)
    chooses = settings.public_images is not None
    baseline = monitor.baseline if monitor else {}

    def curve(log: list[dict[str, Any]], path: Path) -> None:
        curves.plot_game(log, baseline, (), path)

    better = run.report("distance" if chooses else "epsilon", metrics, chooses, curve)
    if better or not chooses:
        run.publish(partial(save_model, run, settings, train, budget, steps, metrics))


def save_pictures(run: Run, settings: Settings, pipeline: gan.GANPipeline, train: Images) -> None:
    """Save samples of the same seeds at every evaluation."""
    labels = torch.arange(gallery.COUNT) % len(train.names) if settings.conditional else None
    generators = gallery.sample_generators()
    samples = pipeline(gallery.COUNT, generators, labels, output_type="pt").images
    gallery.save_samples(run.folder.path, run.progress.step, 2 * samples - 1)


def save_model(
    run: Run,
    settings: Settings,
    train: Images,
    budget: Budget,
    steps: int,
    metrics: dict[str, float],
    path: Path,
) -> None:
    """Write the model as diffusers does, with its card, and beside it the raw weights."""
    network, raw = run.weights("generator"), run.networks["generator"].module
    vendoring.save_pipeline(gan.GANPipeline(network), path)
    gan.Generator.save_pretrained(raw, path / "generator", variant=gan.RAW)
    labels = f", labels={[i % len(train.names) for i in range(4)]}" if settings.conditional else ""
    limit = settings.clip_norm if settings.method == "gan" else 1.0  # features have norm 1
    protocol = f"ε at δ = {budget.delta:g}, of the steps until this model."
    if settings.public_images:
        protocol += (
            f" {settings.eval_samples:,} images of the seeds 0 and up, compared with the public "
            f"images {settings.public_images} by {settings.extractor or 'their pixels'}."
        )
    card.write_card(
        path,
        run.folder.path,
        title="A differentially private generator of images",
        task="unconditional-image-generation",
        library="diffusers",
        about=f"{network.num_parameters():,} parameters, trained on {len(train):,} images of "
        f"{settings.images} under differential privacy, by {METHODS[settings.method]}.",
        usage=card.PIPELINE_USAGE.format(labels=labels),
        figures=metrics,
        protocol=protocol,
        data=settings.images,
        guarantee=private_run.section(budget, steps, limit, len(train)),
    )


METHODS = {
    "gan": "an adversarial game whose critic's gradients are clipped and noisy",
    "merf": "one noisy mean embedding of random features",
}


if __name__ == "__main__":
    with clean_errors():
        main()
