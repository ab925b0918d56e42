"""What many tests build: tiny models, files, runs, and the ways to start recipes."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import random
import resource
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from readers import pointer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import genkit
from genkit.data import characters, seq2seq_tokenizers
from genkit.data.columns import CATEGORY, NUMBER, Column, find_columns
from genkit.hub import vendoring
from genkit.models import (
    autoencoder,
    denoisers,
    diffusion,
    gan,
    lm,
    seq2seq,
    table,
    table_autoencoder_losses,
    table_fit,
    text_denoisers,
)
from genkit.models.autoencoder import Autoencoder, AutoencoderPipeline
from genkit.models.diffusion import DenoisingPipeline
from genkit.models.gan import GANPipeline, Generator
from genkit.models.stylizer import Stylizer, StylizerPipeline
from genkit.models.table_autoencoder import TableAutoencoder, TableAutoencoderPipeline
from genkit.models.text_diffusion import TextDiffusionPipeline
from genkit.models.translation import TranslationPipeline
from genkit.tabular.model import TableModel
from genkit.text.language_model import LanguageModel
from genkit.training import checkpoints
from genkit.vision import pixel_lm
from genkit.vision.pixel_lm import PixelFormat

ROOT = Path(__file__).parent.parent
SHAPE = "--depth 1 --width 32 --heads 2 --context 32"
SHORT = ("--batch_size", "4", "--compile", "no")
TINY = (*SHAPE.split(), *SHORT)
ACCELERATE = [str(Path(sys.executable).parent / "accelerate"), "launch"]


Train = Callable[..., subprocess.CompletedProcess[str]]


@contextlib.contextmanager
def recipe_module(recipe: str, *arguments: str | Path) -> Iterator[Any]:
    """Import a recipe under a command line."""
    path = ROOT / "recipes" / f"{recipe}.py"
    spec = importlib.util.spec_from_file_location(recipe, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, recipe, module)
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        spec.loader.exec_module(module)
        yield module


def benchmark(name: str) -> ModuleType:
    """Import a benchmark."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # dataclasses look it up
        spec.loader.exec_module(module)
    return module


def run_here(recipe: str, *arguments: str | Path) -> None:
    """Run a recipe in this process: the seconds that a launch takes are saved."""
    with recipe_module(recipe, *arguments) as module:
        module.main()


@contextlib.contextmanager
def full_disk(limit: int = 0) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def listing(folder: Path) -> dict[str, bytes | str]:
    """Return all that lies in a folder: the bytes of files, and where links lead."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else "no file"
    return found


# a run of one weight, of a step in 10 ms, that ends by a signal
STEPPING = """
import sys, time, torch
from genkit.training import optim
from genkit.training.settings import RunSettings
from genkit.training.run import Run

told = RunSettings(
    output_dir=sys.argv[1], batch_size=4, max_minutes=60.0, ema=0.0, mixed_precision="no",
    compile=False, save_minutes=60.0,
)
with Run(told) as run:
    network = torch.nn.Linear(1, 1)
    run.network("model", network, [torch.optim.SGD(network.parameters(), lr=0.1)])
    run.restore()
    start = time.monotonic()
    try:
        for _ in run.steps():
            time.sleep(0.01)
            run.backward(network(torch.ones(2, 1)).square().mean())
            run.update()
    finally:
        lost = time.monotonic() - start - run.progress.seconds
        if run.is_main:
            run.folder.write("lost", str(lost))
"""


def wait_for_steps(folder: Path, running: subprocess.Popen, steps: int) -> None:
    """Wait until a run has made so many steps more."""
    log = folder / "metrics.jsonl"

    def count() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    until = count() + steps
    while count() < until:
        assert running.poll() is None, "the run ended by itself"
        time.sleep(0.01)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, but for the time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights_of(folder: Path) -> tuple[str, bytes, str]:
    """Name and bytes of the last checkpoint, and the hash of the published model."""
    last, problems = checkpoints.find_newest(folder / "checkpoints")
    assert last is not None and problems == []
    published = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    model = hashlib.sha256(published[0].read_bytes()).hexdigest()
    return last.name, (last / checkpoints.TENSORS).read_bytes(), model


# a port for each process of tests, also of another checkout's; systems hand out others on their own
PORT = 20_000 + os.getpid() % 12_000
TWO = ("--multi_gpu", "--num_processes", "2", "--main_process_port", str(PORT))
ON_CPU = {"ACCELERATE_USE_CPU": "1"}


def tokenizer() -> CLIPTokenizer:
    """Letters are tokens: there are no merges."""
    pieces = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, [], model_max_length=16)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
    )


def stable_diffusion() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae(4),
        CLIPTextModel(text_config()),
        tokenizer(),
        unet,
        EulerAncestralDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    encoders = CLIPTextModel(text_config()), CLIPTextModelWithProjection(text_config())
    return StableDiffusionXLPipeline(
        vae(4), *encoders, tokenizer(), tokenizer(), unet, EulerDiscreteScheduler()
    )


def made_up(rng, count):
    """Words of no language."""
    words = set()
    while len(words) < count:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
        words.add("".join(syllables) + rng.choice("klmnprst"))
    words = sorted(words)
    rng.shuffle(words)
    return words


def facts_file(path, seed, articles, own_words, impossible=False):
    """Write articles such as "The zorp is blue. The mig is tal.", a question a sentence.

    Args:
        own_words: each of the six subjects has words of its own that may follow it. Otherwise all
            have the same, and only the sentence tells which word answers.
        impossible: ask for one more subject, too, of which the article says nothing.
    """
    rng = random.Random(seed)
    words = made_up(rng, 66)
    subjects, words = words[:6], words[6:]
    pools = [words[10 * k : 10 * k + 10] if own_words else words[:30] for k in range(6)]
    data = []
    for a in range(articles):
        *told, untold = rng.sample(range(6), 4)
        context, qas = "", []
        for k in told:
            context += f"The {subjects[k]} is "
            gold = {"text": rng.choice(pools[k]), "answer_start": len(context)}
            asked = f"What is the {subjects[k]}?"
            qas.append({"id": f"{a}-{k}", "question": asked, "answers": [gold]})
            context += gold["text"] + ". "
        if impossible:
            asked = f"What is the {subjects[untold]}?"
            qas.append({"id": f"{a}-{untold}", "question": asked, "answers": []})
        data.append({"title": f"article {a}", "paragraphs": [{"context": context, "qas": qas}]})
    path.write_text(json.dumps({"version": "made up", "data": data}))
    return path


LETTERS = "abcdefghijklmnop .\n"


def small_model(architecture: str, context: int = 64) -> LanguageModel:
    """A random model with rather peaked predictions, as trained ones have."""
    torch.manual_seed(1)
    tokenizer = characters.make_tokenizer(LETTERS)
    model = lm.make_model(architecture, len(tokenizer), context, 2, 32, 2, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
        model.get_input_embeddings().weight[257:].mul_(5)  # letters: bytes and <eos> are rare
    return LanguageModel(model.eval(), tokenizer, architecture)


SIZE = (1, 8, 8)


def tiny_autoencoder(folder: Path) -> None:
    model = Autoencoder(SIZE, 3, widths=(16,), labels=4, variational=True).eval()
    model.fit_prior(torch.randn(50, 3) * 2 + 1)
    vendoring.save_pipeline(AutoencoderPipeline(model), folder)


def tiny_gan(folder: Path) -> None:
    generator = gan.Generator(SIZE, 3, widths=(8,), patch=4).eval()
    vendoring.save_pipeline(gan.GANPipeline(generator), folder)


def tiny_stylizer(folder: Path) -> None:
    vendoring.save_pipeline(StylizerPipeline(Stylizer(3, (4, 8), 1).eval()), folder)


def seq2seq_model(architecture: str, texts: list[str]) -> LanguageModel:
    """A new encoder-decoder of characters, with a context of 16."""
    tokenizer = seq2seq_tokenizers.make_tokenizer(texts)
    torch.manual_seed(0)
    shape = (16, 1, 32, 2, 0.0)
    model = seq2seq.make_model(architecture, tokenizer.get_vocab(), *shape).eval()
    return LanguageModel(model, tokenizer, architecture)


def tiny_seq2seq(folder: Path) -> None:
    with torch.random.fork_rng():
        language = seq2seq_model("bart", ["a b"])
    language.model.save_pretrained(folder)
    lm.save_tokenizer(language.tokenizer, folder)


def table_rows(count: int = 200, seed: int = 0) -> tuple[list[list[str]], np.ndarray]:
    """Rows of two categories, a number with gaps and one frequent value, and a date."""
    rng = np.random.default_rng(seed)
    region, smokes = rng.integers(0, 2, count), rng.integers(0, 2, count)
    age = np.round(np.clip(rng.normal(45 + 10 * region, 12), 18, 90), 1)
    age[::8] = 50.0
    days = np.round(18_000 + 200 * rng.random(count) + 5 * age)
    age[3::9] = np.nan
    since = [str(np.datetime64(int(day), "D")) for day in days]
    cells = [
        [("north", "south")[r], ("no", "yes")[s], "" if np.isnan(a) else f"{a:.1f}", day]
        for r, s, a, day in zip(region, smokes, age, since, strict=True)
    ]
    return cells, np.column_stack([region, smokes, age, days]).astype(float)


def write_table(path: Path, cells: list[list[str]]) -> Path:
    lines = [["region", "smokes", "age", "since"], *cells]
    path.write_text("".join(f"{','.join(line)}\n" for line in lines))
    return path


def tiny_table(
    sizes: list[int] | None = None, values: np.ndarray | None = None, learned: bool = True
) -> TableModel:
    """A table model with random weights, or one whose decoder says nothing yet."""
    if values is None:
        columns, values, _ = find_columns(["region", "smokes", "age", "since"], table_rows()[0])
    else:
        columns = [
            Column("abc"[j], CATEGORY, list("xyz"[:size]))
            if size
            else Column(
                "abc"[j], NUMBER, (), 3, float(values[:, j].min()), float(values[:, j].max())
            )
            for j, size in enumerate(sizes or ())
        ]
    sizes = [len(column.categories) for column in columns]
    steps = [10.0**-column.decimals for column in columns]
    fitted = table_fit.fit_table(sizes, steps, values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = table.make_model(fitted, 1, 32, 2, 0.0).eval()
        if learned:
            torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    usual = [1.0, 2.0, 3.0], [0.0] * len(columns)
    return TableModel(model, columns, fitted, *usual)


def table_autoencoder() -> TableAutoencoderPipeline:
    """An autoencoder of tables with random weights."""
    columns, values, _ = find_columns(["region", "smokes", "age", "since"], table_rows()[0])
    of_numbers = [not column.categories for column in columns]
    knots = [
        table_autoencoder_losses.rank_gauss(own) if is_number else ([], [])
        for own, is_number in zip(values.T, of_numbers, strict=True)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = list(map(dataclasses.asdict, columns))
        return TableAutoencoderPipeline(TableAutoencoder(found, knots, (16, 8)).eval())


def tiny_table_autoencoder(folder: Path) -> None:
    vendoring.save_pipeline(table_autoencoder(), folder)


def tiny_translator(folder: Path, condition: str = "grey", objective: str | None = "v") -> None:
    vendoring.save_pipeline(translator(condition, objective), folder)


def translator(condition: str = "grey", objective: str | None = "v", channels: int = 3):
    """Return a model of 8 x 8 tiles; without an objective it is deterministic."""
    given = {"grey": 1, "edges": 1, "mask": channels + 1}.get(condition, channels)
    inputs = given + (channels if objective else 0)
    scheduler = diffusion.make_scheduler(objective, "cosine") if objective else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = denoisers.make_unet((channels, 8, 8), (4, 8), inputs=inputs).eval()
    return TranslationPipeline(unet, scheduler, condition)


def tiny_text_diffusion(folder: Path, objective: str = "v") -> None:
    """Save a model of 8 x 8 images and prompts of up to 24 characters, that shows what is asked."""
    tokenizer = seq2seq_tokenizers.make_tokenizer(["a fox", "two owls and a very long tail", "c"])
    tokenizer.model_max_length = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = text_denoisers.make_text_encoder(tokenizer, 1, 8).eval()
        unet = text_denoisers.make_unet((3, 8, 8), (4, 8), 1, 8).eval()
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(2)
    scheduler = text_denoisers.make_scheduler(objective)
    vendoring.save_pipeline(TextDiffusionPipeline(tokenizer, encoder, unet, scheduler), folder)


def captioned_table(path: Path, captions: Sequence[Any] = ("a red one", "two blue ones")) -> Path:
    """Write a table of 24 captioned images of 8 x 8, columns image and text."""
    cells, texts = [], []
    for i in range(24):
        image = Image.new("RGB", (8, 8), ("red", "blue")[i % 2])
        image.putpixel((i % 8, i // 8), (255, 255, 255))
        file = io.BytesIO()
        image.save(file, "png")
        cells.append({"bytes": file.getvalue(), "path": None})
        texts.append(captions[i % len(captions)])
    pq.write_table(pa.table({"image": cells, "text": texts}), path)
    return path


def tiny_denoiser(objective: str, labels: int = 0, schedule: str = "linear", mean: bool = False):
    def save(folder: Path) -> None:
        unet = denoisers.make_unet(SIZE, (8, 16), labels=labels, mean=mean).eval()
        with torch.no_grad():
            unet.conv_out.weight.mul_(3)  # that classes are seen
        scheduler = diffusion.make_scheduler(objective, schedule, mean)
        if labels or mean:
            vendoring.save_pipeline(DenoisingPipeline(unet, scheduler), folder)
        else:
            DDPMPipeline(unet, scheduler).save_pretrained(folder)

    return save


def tiny_latents(objective: str, labels: int = 0, channels: int = 1) -> DenoisingPipeline:
    """A pipeline in the latents, (2, 4, 4), of an autoencoder of images of 8 x 8."""
    latent = autoencoder.make_spatial((channels, 8, 8), (4, 8), 2).eval().requires_grad_(False)
    latent.register_to_config(scaling_factor=0.5)
    with torch.no_grad():
        latent.decoder.conv_out.weight.mul_(20)  # that images differ
    unet = denoisers.make_unet((2, 4, 4), (8, 16), labels=labels).eval()
    scheduler = diffusion.make_scheduler(objective, clip=False)
    return DenoisingPipeline(unet, scheduler, latent)


def tiny_pixels(folder: Path) -> None:
    model = pixel_lm.make_model(PixelFormat((1, 3, 4), 16), depth=1, width=32, heads=2).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(4)
    model.save_pretrained(folder)


CANARY = "canary"


class Bomb:
    """A pickle that leaves a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def text_model(folder: Path) -> None:
    tokenizer = characters.make_tokenizer("abc ")
    lm.make_model("llama", len(tokenizer), 16, 1, 32, 2, 0.0).save_pretrained(folder)
    lm.save_tokenizer(tokenizer, folder)


def reader(folder: Path) -> None:
    made = pointer()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)


def images(folder: Path) -> None:
    vendoring.save_pipeline(
        GANPipeline(Generator((1, 8, 8), 3, widths=(8,), patch=4).eval()), folder
    )


MAKE = {"text": text_model, "answers": reader, "gan": images}
USE = {
    "text": lambda folder: genkit.generate("ab", model=folder, max_new_tokens=2),
    "answers": lambda folder: genkit.answer("Where?", "The alpha is omega.", model=folder),
    "gan": lambda folder: genkit.sample(folder),
}


def weights_file(folder: Path) -> Path:
    return next(folder.rglob("*.safetensors"))


def letter_model(eos: int | list[int] | str | None = None) -> LanguageModel:
    """A random GPT-2 of 27 tokens, a to z and a space; eos="stock": GPT-2's own, beyond them."""
    letters = string.ascii_lowercase + " "
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    ends = {} if eos == "stock" else {"eos_token_id": eos, "bos_token_id": None}
    torch.manual_seed(0)
    size = {"vocab_size": 27, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, **ends)).eval()
    return LanguageModel(model, PreTrainedTokenizerFast(tokenizer_object=made), "letters")


END = "<|endoftext|>"


def byte_model() -> LanguageModel:
    """A random GPT-2 whose tokens are the 256 bytes, and the end token 256."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet | {END: 256}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    size = {"vocab_size": 257, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=256, eos_token_id=256)).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END)
    return LanguageModel(model, tokenizer, "bytes")
