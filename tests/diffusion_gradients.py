"""Launched by test_train_diffusion.py: the gradients of a step for each objective, into files.

accelerate launch tests/diffusion_gradients.py FOLDER
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from genkit.data import images
from genkit.data.order import Order
from genkit.training.run import Run
from genkit.training.settings import parse

ROOT = Path(__file__).parent.parent
PARTS = ("1", "2")  # of gradient accumulation
SHAPE = "--widths 16 16 --batch_size 8 --compile no --mixed_precision no --dry_run"
KINDS = {
    "plain": "--objective epsilon",
    "clean": "--objective x0",
    "weighted": "--objective v --min_snr 5 --attention",
    "mean": "--objective meanflow --conditional --cond_dropout 0.4 --attention",
    "told": "--objective flow --conditional --cond_dropout 0.4",
}


def main(folder: str) -> None:
    path = ROOT / "recipes" / "train_diffusion.py"
    spec = importlib.util.spec_from_file_location("train_diffusion", path)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["train_diffusion"] = recipe
    spec.loader.exec_module(recipe)
    for parts in PARTS:
        found = {}
        for name, words in KINDS.items():
            argv = ["--gradient_accumulation", parts, *SHAPE.split(), *words.split()]
            found |= gradients(recipe, parse(recipe.Settings, recipe.preset, argv), name)
        if found:
            save_file(found, Path(folder) / f"{parts}.safetensors")


def gradients(recipe, settings, name: str) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of a step, on the main process."""
    train = images.load_images("digits")
    order = Order(len(train), settings.seed)
    run = Run(settings)  # not entered: on leaving, the processes would part
    torch.manual_seed(settings.seed)
    scheduler = recipe.make_scheduler(settings)
    network = recipe.make_network(settings, train, "cpu")
    model = run.network("model", network, [])
    loss = recipe.make_loss(run, settings, network, train)
    run.progress.step, run.progress.rows = 3, 3 * run.batch_size
    for rows in run.rows():
        run.backward(loss(model, *recipe.make_batch(run, settings, scheduler, train, order, rows)))
    parts = run.networks["model"].losses
    whole = run.sum(torch.stack(parts).mean()[None]) / run.processes
    named = {f"{name}/{n}": p.grad.contiguous() for n, p in network.named_parameters()}
    return named | {f"{name}/loss": whole} if run.is_main else {}


if __name__ == "__main__":
    main(*sys.argv[1:])
