"""Launched by test_train_gan.py: the gradients that a step of each game takes, into files.

accelerate launch tests/gan_gradients.py FILE [parts of gradient accumulation]
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from genkit.data import images
from genkit.data.order import Order
from genkit.models.gan_losses import LOSSES
from genkit.training.run import Run
from genkit.training.settings import parse

ROOT = Path(__file__).parent.parent
PARTS = ("1", "2")  # of gradient accumulation
SHAPE = "--widths 4 --discriminator_widths 4 --latent_dim 3 --batch_size 8 --dry_run"
OWN = {
    "wasserstein": "--gradient_penalty 10 --r1 0",
    "maximum_likelihood": "--r1 0.3",
}
GAMES = {loss: f"--loss {loss} {OWN.get(loss, '--r1 0.5 --r2 0.2')}" for loss in LOSSES}
GAMES |= {
    "normalised": "--preset dcgan --normalize --widths 4 4 4 --discriminator_widths 4 4",
    "clipped": "--loss wasserstein --weight_clip 0.1 --r1 0 --r2 0 --critic_steps 2",
    "plain": "--loss non_saturating --r1 0 --r2 0 --smoothing 0.1 --label_noise 0.05",
    "noisy": "--instance_noise 0.3 --augmentations colour translation cutout",
    "packed": "--packing 2",
    "packed_penalty": "--packing 2 --loss wasserstein --gradient_penalty 10 --r1 0 --r2 0",
    "packed_targets": "--packing 2 --loss least_squares --label_noise 0.3",
    "spectral": "--spectral --loss hinge",
    "projection": "--conditional --discriminator_conditioning projection",
    "concatenation": "--conditional --discriminator_conditioning concat "
    "--generator_conditioning embedding_product",
    "auxiliary": "--conditional --discriminator_conditioning auxiliary --loss wasserstein "
    "--gradient_penalty 10 --r1 0 --r2 0",
}


def main(folder: str) -> None:
    spec = importlib.util.spec_from_file_location("train_gan", ROOT / "recipes" / "train_gan.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["train_gan"] = recipe
    spec.loader.exec_module(recipe)
    for parts in PARTS:
        every = ["--mixed_precision", "no", "--gradient_accumulation", parts, *SHAPE.split()]
        found = {}
        for name, words in GAMES.items():
            argv = [*every, "--penalty_every", "1", *words.split()]
            found |= gradients(recipe, parse(recipe.Settings, recipe.preset, argv), name)
        if found:
            save_file(found, Path(folder) / f"{parts}.safetensors")


def gradients(recipe, settings, name: str) -> dict[str, torch.Tensor]:
    """Return both players' gradients of the first step, on the main process."""
    game = recipe.make_game(settings)
    train = images.load_images("digits")
    order = Order(len(train), settings.seed)
    run = Run(settings)  # not entered: on leaving, the processes would part
    torch.manual_seed(settings.seed)
    generator, discriminator = recipe.make_networks(settings, train)
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        with torch.no_grad():  # blocks that start as nothing would have no gradient
            parameter.add_(0.1 * torch.randn_like(parameter))
    making = run.network("generator", generator, [])
    scoring = run.network("discriminator", discriminator, [], False)
    get_batch = partial(recipe.make_batch, run, settings, train, order)
    run.progress.step, run.progress.rows = 1, run.batch_size
    for turn in range(settings.critic_steps):  # of which the last is kept
        discriminator.zero_grad()
        for rows in run.rows(turn, settings.critic_steps):
            loss = game.discriminator_loss(scoring, generator, get_batch(rows, 0))
            run.backward(loss, "discriminator")
    discriminator.requires_grad_(False)
    for rows in run.rows():
        loss = game.generator_loss(discriminator, making, get_batch(rows, 1))
        run.backward(loss, "generator")
    players = {"generator": generator, "discriminator": discriminator}
    named = ((f"{name}/{p}/{n}", w) for p, m in players.items() for n, w in m.named_parameters())
    return {n: weight.grad.contiguous() for n, weight in named} if run.is_main else {}


if __name__ == "__main__":
    main(*sys.argv[1:])
