"""Train a character language model on any text.

    accelerate launch recipes/train_charlm.py
    accelerate launch recipes/train_charlm.py --text mybook.txt --output_dir runs/mybook
    accelerate launch recipes/train_charlm.py --output_dir runs/mybook --resume
    accelerate launch recipes/train_charlm.py --init_from runs/mybook --text sequel.txt

The output folder is an ordinary transformers model, at any time the best one so far.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genkit import machine
from genkit.data import characters, tables
from genkit.data.characters import CharacterCorpus
from genkit.data.order import Windows
from genkit.data.text import EMBEDDED
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.models import lm
from genkit.text import generation, kv_cache
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting(
        "runs/charlm", "folder of the run and of the model; runs/charlm-tuned with --init_from"
    )
    text: str = setting(EMBEDDED, "file, folder or dataset; or the embedded corpus")
    text_column: str = setting("text", "column of a dataset that holds the text")
    val_text: str | None = setting(None, "text to validate on, instead of the end of --text")
    val_fraction: float = setting(0.1, "part of the text, at its end, to validate on")
    table_memory: int = setting(tables.MEMORY, "MiB of the process that reads a table")
    init_from: str | None = setting(None, "character model to start from: a folder or a Hub id")
    architecture: str | None = setting(None, "llama or gpt2")
    depth: int | None = setting(None, "layers: the one dial of the model's size")
    width: int | None = setting(None, "size of a layer's vectors")
    heads: int | None = setting(None, "attention heads")
    context: int | None = setting(None, "characters seen at once")
    dropout: float | None = setting(None, "of attention weights; for gpt2 of residuals, too")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        if self.architecture not in (None, "llama", "gpt2"):
            raise ValueError(f"architecture must be llama or gpt2, got {self.architecture!r}")
        for name in ("depth", "width", "heads", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.width and self.heads and self.width % (2 * self.heads):
            raise ValueError(f"width: {self.width} is not {self.heads} heads of an even size")
        if self.init_from and self.output_dir == Settings.output_dir:
            self.output_dir = "runs/charlm-tuned"


TEMPERATURES = (0.25, 0.5, 1.0)


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "cuda":
        depth = settings.depth or 6
        shape: dict[str, Any] = {"depth": depth, "width": settings.width or 64 * depth}
        run: dict[str, Any] = {"batch_size": 64, "max_steps": 2500}
    else:
        depth = settings.depth or 4
        shape = {"depth": depth, "width": settings.width or 32 * depth}
        run = {"batch_size": 8, "max_minutes": 5.0}
    shape |= {"heads": lm.count_heads(shape["width"]), "context": 256, "dropout": 0.0}
    shape |= {"architecture": "llama"}
    if settings.init_from:
        asked = [name for name in shape if getattr(settings, name) is not None]
        if asked:
            raise ValueError(f"{asked[0]}: the model of init_from brings its own; leave it out")
        shape = {}
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.3}
    if settings.init_from:  # gently: it knows something already
        rates |= {"learning_rate": 1e-3, "muon_learning_rate": 0.005}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    step = {"optimizer": "muon", "ema": 0.0, "compile": machine.can_compile()}
    return shape | run | rates | precision | step


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        origin = start_from(settings.init_from) if settings.init_from else None
        context = origin.model.config.max_position_embeddings if origin else settings.context
        with run.accelerator.local_main_process_first():
            corpus = characters.read_characters(
                settings.text,
                settings.text_column,
                settings.val_text,
                settings.val_fraction,
                context,
                origin.tokenizer if origin else None,
                settings.table_memory,
            )
        train = Windows(corpus.train, context, settings.seed)

        # ---- model
        network = (
            lm.resize_embeddings(origin.model, corpus.tokenizer)
            if origin
            else make(settings, corpus)
        )
        network.set_attn_implementation(
            machine.attention(run.device.type, settings.mixed_precision)
        )
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(lm.loss)
        run.log(
            f"{network.num_parameters():,} parameters · {len(corpus.train):,} characters to train "
            f"on, {len(corpus.val):,} to validate · {len(train) * context:,} an epoch"
        )

        # ---- loop
        run.identify(**corpus.facts)
        run.restore()
        run.warm_up(lambda rows: loss(model, *train.batch(rows, run.device)))
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *train.batch(rows, run.device)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, corpus, context)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save, run, settings, corpus, metrics))
        run.log(f"the best model is in {run.folder.path}")


def start_from(name: str) -> generation.LanguageModel:
    """Load the character model to fine-tune."""
    model, tokenizer = lm.load_lm(name)  # not generate's own copy, which training would change
    if not characters.is_character_tokenizer(tokenizer):
        raise ValueError(f"init_from: {name!r} is not a character model of this recipe")
    return generation.LanguageModel(model, tokenizer, name)


def make(settings: Settings, corpus: CharacterCorpus) -> PreTrainedModel:
    """Build a new model."""
    return lm.make_model(
        settings.architecture,
        vocab_size=len(corpus.tokenizer),
        context=settings.context,
        depth=settings.depth,
        width=settings.width,
        heads=settings.heads,
        dropout=settings.dropout,
    )


# ---- evaluate


def evaluate(run: Run, corpus: CharacterCorpus, context: int) -> dict[str, float]:
    """Judge the model on the whole validation text, and let it write."""
    network = run.weights().eval()
    windows = run.shard(math.ceil((len(corpus.val) - 1) / context))
    nats, count = run.sum(lm.total_loss(network, corpus.val, context, windows)).tolist()
    metrics = {"val_loss": nats / count, "bits_per_character": nats / count / math.log(2)}
    if run.is_main:
        write_samples(run, corpus, generation.LanguageModel(network, corpus.tokenizer, "this run"))
    network.train()
    return metrics


def write_samples(run: Run, corpus: CharacterCorpus, language: generation.LanguageModel) -> None:
    """Continue the first characters of the validation text at several temperatures."""
    start = corpus.val[: kv_cache.context_length(language.model)].tolist()
    prompt = corpus.tokenizer.decode(start, skip_special_tokens=True)[:16]
    lines = [f"# Step {run.progress.step}\n"]
    for temperature in TEMPERATURES:
        written = generation.generate(
            prompt, model=language, temperature=temperature, max_new_tokens=200, seed=1
        )
        lines.append(f"## Temperature {temperature}\n\n```text\n{written}\n```\n")
    run.folder.write(f"samples/step-{run.progress.step:08d}.md", "\n".join(lines))


# ---- save


USAGE = """
from transformers import pipeline
print(pipeline("text-generation", model)("The "))

import genkit  # the same text for the same seed, at any batch size
print(genkit.generate("The ", model=model, seed=1))
"""


def save(
    run: Run,
    settings: Settings,
    corpus: CharacterCorpus,
    metrics: dict[str, float],
    folder: Path,
) -> None:
    """Write the model as transformers does, with its card."""
    network, weights = run.weights(), "averaged" if settings.ema else "raw"
    network.generation_config.update(do_sample=True, max_new_tokens=200, pad_token_id=0)
    network.save_pretrained(folder)
    lm.save_tokenizer(corpus.tokenizer, folder)
    text = card.card(
        run.folder.path,
        title="A character language model",
        task="text-generation",
        about=f"{network.num_parameters():,} parameters, trained on {len(corpus.train):,} "
        f"characters of {settings.text} for {run.progress.step:,} steps.",
        usage=USAGE,
        figures=metrics,
        protocol=f"Mean over all {len(corpus.val):,} characters of the validation text, in order, "
        f"in windows of {network.config.max_position_embeddings} that do not overlap; {weights} "
        f"weights, float32; data {corpus.facts}; seed {settings.seed}.",
        data=settings.text,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
