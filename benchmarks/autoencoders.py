"""genkit's autoencoders against those of pythae 0.1.2, trained in one run, in turn.

    taskset -c 0,1 env OMP_NUM_THREADS=2 python benchmarks/autoencoders.py \\
        --python path/to/python/with/pythae --train mnist-train.parquet --test mnist-test.parquet \\
        --minutes 15

The parts: `vae`, nats of the test images, binarised once, by 200 importance samples; `iwae`, the
same after training the importance-weighted bound of 50 samples; `conv`, the squared error of a
convolutional autoencoder; `throughput`, images a second at the same network, batch and likelihood,
of pythae's trainer with its own dataset, which has no binarising to do, and with ours.

genkit trains as its recipes do. pythae trains as its own trainer does, at the best of four settings
by short runs that are evaluated on the first test images, for as many seconds plus those in which
genkit compiled. Neither's evaluation is counted; of both, the weights count that were best on the
test images at an evaluation, of which pythae has one an epoch. It is given its images, binarised
anew at each look, faster than by its own dataset.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genkit.data import images
from genkit.models import autoencoder, autoencoder_losses

RECIPES = Path(__file__).parent.parent / "recipes"
BLOCK = 100  # images evaluated together
WIDTHS = {"dense": [512, 512], "conv": [16, 32, 64]}  # for the count of speed, with BATCH
BATCH = 256
EVAL_SAMPLES = 1000  # test images that short runs are evaluated on
# genkit's layers, so that pythae can be given the very same
LAYERS = "\n".join(
    inspect.getsource(layers)
    for layers in (autoencoder.Dense, autoencoder.Shrink, autoencoder.Grow)
)
PEER = """
import itertools, json, logging, math, sys, time
from collections.abc import Sequence
logging.disable(logging.CRITICAL)
import numpy as np, torch, torch.nn.functional as F
from pythae.data.datasets import BaseDataset
from pythae.models import AE, IWAE, VAE, AEConfig, IWAEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.models.nn.benchmarks.mnist.convnets import Encoder_Conv_AE_MNIST, Decoder_Conv_AE_MNIST
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
""" + (
    LAYERS
    + """
class Encoder(BaseEncoder):
    def __init__(self, conv, widths, latents, sizes):
        super().__init__()
        features = widths[-1] * math.prod(sizes[-1])
        parts = [Shrink(1, widths), torch.nn.Flatten(), Dense(features, 2 * latents)]
        if not conv:
            parts = [torch.nn.Flatten(), Dense(math.prod(sizes[0]), *widths, 2 * latents)]
        self.layers = torch.nn.Sequential(*parts)

    def forward(self, x):
        mean, logvar = self.layers(x).chunk(2, 1)
        return ModelOutput(embedding=mean, log_covariance=logvar)


class Decoder(BaseDecoder):
    def __init__(self, conv, widths, latents, sizes):
        super().__init__()
        features = widths[-1] * math.prod(sizes[-1])
        parts = [Dense(latents, features), Grow(widths, 1, sizes)]
        if not conv:
            parts = [Dense(latents, *widths[::-1], math.prod(sizes[0]))]
            parts += [torch.nn.Unflatten(1, (1, *sizes[0]))]
        self.layers = torch.nn.Sequential(*parts)

    def forward(self, z):
        return ModelOutput(reconstruction=self.layers(z).sigmoid())


class Images(BaseDataset):
    # a batch is looked up at once, and its rows are plain dictionaries: the cheapest way in
    def __init__(self, data, binarize):
        super().__init__(data, torch.zeros(len(data)))
        self.binarize = binarize

    def __getitems__(self, which):
        rows = self.data[which]
        return [{"data": row} for row in (torch.bernoulli(rows) if self.binarize else rows)]


class TimeUp(Exception):
    pass


class Clock(TrainingCallback):
    # seconds of training without evaluation; images seen; the best loss at an evaluation
    def on_train_begin(self, training_config, **_):
        self.before, self.images, self.best = 0.0, 0, math.inf
        self.since = time.monotonic()

    def on_train_step_end(self, training_config, **_):
        count = len(train)
        self.images += min(training_config.per_device_train_batch_size, count - self.images % count)
        self.seconds = self.before + time.monotonic() - self.since
        if self.seconds >= asked["seconds"]:
            raise TimeUp

    def on_log(self, training_config, logs, **_):
        self.best = min(self.best, logs["eval_epoch_loss"])
        self.before, self.since = self.seconds, time.monotonic()


def nats(x):
    # as genkit.models.autoencoder.negative_log_likelihood does
    posterior, samples = model.encoder(x), asked["samples"]
    mean, logvar = posterior.embedding, posterior.log_covariance
    noise = torch.randn(samples, *mean.shape, generator=draws)
    z = mean + (logvar / 2).exp() * noise
    on = model.decoder(z.flatten(0, 1))["reconstruction"].reshape(samples, *x.shape)
    fit = -F.binary_cross_entropy(on, x.expand_as(on), reduction="none").flatten(2).sum(2)
    ratio = 0.5 * (noise**2 + logvar - z**2).sum(2)
    return math.log(samples) - torch.logsumexp(fit + ratio, 0)


def errors(x):
    seen = model.decoder(model.encoder(x).embedding)["reconstruction"].clamp(0, 1)
    return (seen - x).square().flatten(1).mean(1)


asked = json.load(sys.stdin)
train, test = (torch.from_numpy(np.load(asked[part])).float() / 255 for part in ("train", "test"))
kinds = {"AE": (AE, AEConfig), "VAE": (VAE, VAEConfig), "IWAE": (IWAE, IWAEConfig)}
kind, settings = kinds[asked["kind"]]
config = settings(input_dim=(1, 28, 28), latent_dim=asked["latent_dim"], **asked["config"])
parts = {}
if asked["network"] == "benchmark":
    parts = {"encoder": Encoder_Conv_AE_MNIST(config), "decoder": Decoder_Conv_AE_MNIST(config)}
elif asked["network"] != "default":
    sizes = [(28, 28)]
    for _ in asked["widths"]:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    shape = asked["network"] == "conv", asked["widths"], asked["latent_dim"], sizes
    parts = {"encoder": Encoder(*shape), "decoder": Decoder(*shape)}
model, variational, clock = kind(config, **parts), asked["kind"] != "AE", Clock()
trainer = BaseTrainer(
    model,
    BaseDataset(train, torch.zeros(len(train))) if asked["own"] else Images(train, variational),
    BaseDataset(test, torch.zeros(len(test))),
    BaseTrainerConfig(
        output_dir=asked["folder"],
        per_device_train_batch_size=asked["batch_size"],
        per_device_eval_batch_size=256,
        learning_rate=asked["learning_rate"],
        num_epochs=1_000_000,
        no_cuda=True,
    ),
    callbacks=[clock],
)
try:
    trainer.train()
except TimeUp:
    pass
if clock.best < math.inf and trainer.eval_step(0) > clock.best:
    model = trainer._best_model
model.eval()
draws = torch.Generator().manual_seed(0)
judge = nats if variational else errors
with torch.inference_mode():
    figures = torch.cat([judge(x) for x in test[: asked["eval_samples"]].split(100)])
    own = 0.0
    if variational and len(figures):
        own = -model.get_nll(test[:20], asked["samples"], batch_size=asked["samples"])
report = {"seconds": clock.seconds, "images": clock.images, "figure": figures.mean().item()}
print(json.dumps(report | {"own": own, "ours": figures[:20].mean().item()}))
"""
)


@dataclass(frozen=True)
class Trained:
    """What came of a run."""

    name: str
    setting: str
    seconds: float
    images: int
    figure: float

    @property
    def rate(self) -> float:
        return self.images / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="with pythae 0.1.2")
    parser.add_argument("--train", required=True, help="MNIST's training images, a parquet file")
    parser.add_argument("--test", required=True, help="its test images")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=15.0, help="of training")
    parser.add_argument("--latent_dim", type=int, default=32)
    parser.add_argument("--samples", type=int, default=200, help="importance samples of the judge")
    parser.add_argument("--trial_seconds", type=float, default=30.0, help="of the short runs")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="pythae's")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3], help="pythae's")
    parser.add_argument("--repeat", type=int, default=2, help="the best of so many counts of speed")
    parser.add_argument("recipe_arguments", nargs="*", help="after --, flags for the recipe")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        arguments.work = Path(work)
        write(arguments)
        for part in arguments.part:
            PARTS[part](arguments)


def write(arguments: argparse.Namespace) -> None:
    """Decode the images, and toss the coins of the test images' pixels once for all."""
    test = images.load_images(arguments.test).pixels
    coins = torch.Generator().manual_seed(0)
    binary = torch.bernoulli(torch.from_numpy(test / 255), generator=coins)
    np.save(arguments.work / "train.npy", images.load_images(arguments.train).pixels)
    np.save(arguments.work / "test.npy", test)
    np.save(arguments.work / "binary.npy", 255 * binary.byte().numpy())


# ---- parts


def vae(arguments: argparse.Namespace) -> None:
    likelihood(arguments, "vae", "VAE", {}, [])


def iwae(arguments: argparse.Namespace) -> None:
    likelihood(arguments, "iwae", "IWAE", {"number_samples": 50}, ["--importance_samples", "50"])


def likelihood(
    arguments: argparse.Namespace, title: str, kind: str, config: dict[str, Any], words: list[str]
) -> None:
    """Compare how likely the binarised test images are."""
    flags = ["--binarize", *words, "--max_minutes", str(arguments.minutes)]
    mine, compiled = genkit(arguments, "train_vae.py", flags, nats)
    asked: dict[str, Any] = {"kind": kind, "network": "default", "test": "binary"}
    asked |= {"config": {"reconstruction_loss": "bce"} | config}
    its = best(arguments, asked, 60 * arguments.minutes + compiled)
    figure = f"nats by {arguments.samples} importance samples, lower is better"
    table(f"{title}: {figure}", [mine, its], its)


def conv(arguments: argparse.Namespace) -> None:
    """Compare how much of the test images gets lost."""
    flags = ["--network", "conv", "--max_minutes", str(arguments.minutes)]
    mine, compiled = genkit(arguments, "train_autoencoder.py", flags, error)
    asked: dict[str, Any] = {"kind": "AE", "config": {}, "test": "test"}
    seconds = 60 * arguments.minutes + compiled
    its = [best(arguments, asked | {"network": n}, seconds) for n in ("default", "benchmark")]
    better = min(its, key=lambda trained: trained.figure)
    table("conv: squared error of a pixel in [0, 1], lower is better", [mine, *its], better)


def throughput(arguments: argparse.Namespace) -> None:
    """Compare images a second at the same network, batch and likelihood."""
    length = ["--max_minutes", str(arguments.trial_seconds / 60)]
    flags = ["--binarize", "--evaluations", "1", "--nll_images", "0", *length]
    flags += ["--batch_size", str(BATCH)]
    plain = ["--mixed_precision", "no", "--compile", "false"]
    for network in ("dense", "conv"):
        counts: list[list[Trained]] = []
        for _ in range(arguments.repeat):
            words = ["--network", network, "--widths", *map(str, WIDTHS[network]), *flags]
            mine, _ = genkit(arguments, "train_vae.py", words)
            slow, _ = genkit(arguments, "train_vae.py", words + plain)
            asked: dict[str, Any] = {"kind": "VAE", "test": "binary", "eval_samples": 0}
            asked |= {"config": {"reconstruction_loss": "bce"}, "learning_rate": 1e-3}
            asked |= {"network": network, "widths": WIDTHS[network], "batch_size": BATCH}
            peers = [
                pythae(arguments, asked | {"own": own}, arguments.trial_seconds) for own in (0, 1)
            ]
            counts.append([mine, slow, *peers])
        fastest = [max(each, key=lambda t: t.rate) for each in zip(*counts, strict=True)]
        table(f"throughput, {network}: images/s, higher is better", fastest, fastest[-1])


PARTS: dict[str, Callable[[argparse.Namespace], None]]
PARTS = {"vae": vae, "iwae": iwae, "conv": conv, "throughput": throughput}


# ---- genkit


Judge = Callable[[argparse.Namespace, autoencoder.AutoencoderPipeline], float]


def genkit(
    arguments: argparse.Namespace, recipe: str, flags: list[str], judge: Judge | None = None
) -> tuple[Trained, float]:
    """Train with a recipe and judge the model; also return the seconds of compilation."""
    folder = Path(tempfile.mkdtemp(dir=arguments.work)) / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    words = [*launch, str(RECIPES / recipe), "--output_dir", str(folder)]
    words += ["--images", arguments.train, "--val_images", arguments.test]
    words += ["--latent_dim", str(arguments.latent_dim), *flags, *arguments.recipe_arguments]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    settings = json.loads((folder / "run.json").read_text())["settings"]
    compiled = sum(map(int, re.findall(r"compiled in (\d+) s", done.stderr)))
    setting = "{network} {widths}, {optimizer} {learning_rate:g}, batch {batch_size}, "
    setting = setting.format(**settings)
    setting += "float32" if settings["mixed_precision"] == "no" else settings["mixed_precision"]
    setting += f", compiled in {compiled} s" if compiled else ", not compiled"
    figure = judge(arguments, autoencoder.load_autoencoder(folder)) if judge else float("nan")
    count = last["step"] * settings["batch_size"]
    trained = Trained("genkit", setting, last["seconds"], count, figure)
    return trained, float(compiled)


def nats(arguments: argparse.Namespace, pipeline: autoencoder.AutoencoderPipeline) -> float:
    """Judge by the likelihood of the binarised test images."""
    binary = torch.from_numpy(np.load(arguments.work / "binary.npy")) / 127.5 - 1
    draws = torch.Generator().manual_seed(0)
    each = [
        autoencoder_losses.negative_log_likelihood(
            pipeline.vae, block, arguments.samples, "bernoulli", 1.0, draws
        )
        for block in binary.split(BLOCK)
    ]
    return torch.cat(each).mean().item()


def error(arguments: argparse.Namespace, pipeline: autoencoder.AutoencoderPipeline) -> float:
    """Judge by the squared error of the test images' pixels in [0, 1]."""
    test = torch.from_numpy(np.load(arguments.work / "test.npy")) / 127.5 - 1
    each = [(pipeline.reconstruct(block) - block).square() / 4 for block in test.split(BLOCK)]
    return torch.cat(each).mean().item()


# ---- pythae


def best(arguments: argparse.Namespace, asked: dict[str, Any], seconds: float) -> Trained:
    """Train pythae's model at that of its settings which a short run finds the best."""
    trials = []
    for batch_size in arguments.batches:
        for learning_rate in arguments.rates:
            setting = asked | {"batch_size": batch_size, "learning_rate": learning_rate}
            short = pythae(
                arguments, setting | {"eval_samples": EVAL_SAMPLES}, arguments.trial_seconds
            )
            print(
                f"short: pythae {short.setting}: {short.figure:.5g} after {short.seconds:.0f} s",
                flush=True,
            )
            trials.append((short.figure, batch_size, learning_rate))
    _, batch_size, learning_rate = min(trials)
    setting = {"batch_size": batch_size, "learning_rate": learning_rate, "eval_samples": None}
    return pythae(arguments, asked | setting, seconds)


def pythae(arguments: argparse.Namespace, asked: dict[str, Any], seconds: float) -> Trained:
    """Train and evaluate pythae's model."""
    files = {name: str(arguments.work / f"{name}.npy") for name in ("train", asked["test"])}
    asked = (
        {"own": 0}
        | asked
        | {"train": files["train"], "test": files[asked["test"]], "seconds": seconds}
    )
    asked |= {"latent_dim": arguments.latent_dim, "samples": arguments.samples}
    asked |= {"folder": str(arguments.work / "pythae")}
    done = subprocess.run(
        [arguments.python, "-c", PEER],
        input=json.dumps(asked),
        env={**os.environ, "TQDM_DISABLE": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    if asked["kind"] != "AE" and asked["eval_samples"] is None:
        print(f"judge: 20 images have {report['ours']:.2f} nats, by pythae {report['own']:.2f}")
    setting = "{kind}, {network} network, Adam {learning_rate:g}, batch {batch_size}, float32"
    setting = setting.format(**asked) + ", its own dataset" * asked["own"]
    return Trained("pythae", setting, report["seconds"], report["images"], report["figure"])


# ---- output


def table(title: str, rows: list[Trained], peer: Trained) -> None:
    """Print what was compared; a ratio is to the peer's row."""
    print(f"\n{title}")
    print(f"{'':7}{'seconds':>8}{'images':>13}{'images/s':>10}{'figure':>10}{'ratio':>7}  setting")
    for row in rows:
        speed = row.figure != row.figure
        ratio = row.rate / peer.rate if speed else row.figure / peer.figure
        figure = "" if speed else f"{row.figure:.5g}"
        print(
            f"{row.name:7}{row.seconds:8.1f}{row.images:13,}{row.rate:10,.0f}{figure:>10}"
            f"{ratio:7.3f}  {row.setting}",
            flush=True,
        )


if __name__ == "__main__":
    main()
