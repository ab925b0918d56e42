"""Train a language model over words on any text.

    accelerate launch recipes/train_wordlm.py
    accelerate launch recipes/train_wordlm.py --text mybook.txt --output_dir runs/mywords
    accelerate launch recipes/train_wordlm.py --output_dir runs/mywords --resume

The output folder is an ordinary transformers model, at any time the best one so far.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genkit import machine
from genkit.data import tables, words
from genkit.data.corpus import Corpus
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

    output_dir: str = setting("runs/wordlm", "folder of the run and of the model")
    text: str = setting(EMBEDDED, "file, folder or dataset; or the embedded corpus")
    text_column: str = setting("text", "column of a dataset that holds the text")
    val_text: str | None = setting(None, "text to validate on, instead of the end of --text")
    val_fraction: float = setting(0.1, "part of the text, at its end, to validate on")
    table_memory: int = setting(tables.MEMORY, "MiB of the process that reads a table")
    vocab_size: int = setting(10_000, "the most frequent words, which the model knows")
    lower: bool = setting(False, "make no difference between upper and lower case")
    architecture: str | None = setting(None, "llama or gpt2")
    depth: int | None = setting(None, "layers: the one dial of the model's size")
    width: int | None = setting(None, "size of a layer's vectors")
    heads: int | None = setting(None, "attention heads")
    context: int | None = setting(None, "words seen at once")
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
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size must be 3 or more, got {self.vocab_size}")


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
    shape |= {"heads": max(1, shape["width"] // 64), "context": 128, "dropout": 0.0}
    shape |= {"architecture": "llama"}
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.3}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    step = {"optimizer": "muon", "ema": 0.0, "compile": machine.can_compile()}
    return shape | run | rates | precision | step


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        with run.accelerator.local_main_process_first():
            corpus = words.read_words(
                settings.text,
                settings.text_column,
                settings.val_text,
                settings.val_fraction,
                settings.context,
                settings.vocab_size,
                settings.lower,
                settings.table_memory,
            )
        train = Windows(corpus.train, settings.context, settings.seed)

        # ---- model
        network = make(settings, corpus)
        network.set_attn_implementation(
            machine.attention(run.device.type, settings.mixed_precision)
        )
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(lm.loss)
        run.log(
            f"{network.num_parameters():,} parameters · {len(corpus.train):,} words to train "
            f"on, {len(corpus.val):,} to validate · {len(train) * settings.context:,} an epoch"
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
                    metrics = evaluate(run, corpus, settings.context)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save, run, settings, corpus, metrics))
        run.log(f"the best model is in {run.folder.path}")


def make(settings: Settings, corpus: Corpus) -> PreTrainedModel:
    """Build a new model."""
    network = lm.make_model(
        settings.architecture,
        vocab_size=len(corpus.tokenizer),
        context=settings.context,
        depth=settings.depth,
        width=settings.width,
        heads=settings.heads,
        dropout=settings.dropout,
    )
    network.generation_config.suppress_tokens = [words.UNKNOWN_ID]  # it writes words only
    return network


# ---- evaluate


def evaluate(run: Run, corpus: Corpus, context: int) -> dict[str, float]:
    """Judge the model on the whole validation text, and let it write."""
    network = run.weights().eval()
    windows = run.shard(math.ceil((len(corpus.val) - 1) / context))
    nats, count = run.sum(lm.total_loss(network, corpus.val, context, windows)).tolist()
    unknown, spelling = words.unknown_words(corpus)
    metrics = {
        "val_loss": nats / count,
        "perplexity": math.exp(nats / count),
        "bits_per_character": (nats / math.log(2) + spelling) / corpus.val_characters,
        "unknown": unknown,
    }
    if run.is_main:
        write_samples(run, corpus, generation.LanguageModel(network, corpus.tokenizer, "this run"))
    network.train()
    return metrics


def write_samples(run: Run, corpus: Corpus, language: generation.LanguageModel) -> None:
    """Continue the first words of the validation text at several temperatures."""
    start = corpus.val[: kv_cache.context_length(language.model)].tolist()
    prompt = corpus.tokenizer.decode(start[:4], skip_special_tokens=True)
    lines = [f"# Step {run.progress.step}\n"]
    for temperature in TEMPERATURES:
        written = generation.generate(
            prompt, model=language, temperature=temperature, max_new_tokens=100, seed=1
        )
        lines.append(f"## Temperature {temperature}\n\n```text\n{written}\n```\n")
    run.folder.write(f"samples/step-{run.progress.step:08d}.md", "\n".join(lines))


# ---- save


USAGE = """
from transformers import pipeline
print(pipeline("text-generation", model)("The"))

import genkit  # the same text for the same seed, at any batch size
print(genkit.generate("The", model=model, seed=1))
"""


def save(
    run: Run, settings: Settings, corpus: Corpus, metrics: dict[str, float], folder: Path
) -> None:
    """Write the model as transformers does, with its card."""
    network, weights = run.weights(), "averaged" if settings.ema else "raw"
    network.generation_config.update(do_sample=True, max_new_tokens=200, pad_token_id=0)
    network.save_pretrained(folder)
    lm.save_tokenizer(corpus.tokenizer, folder)
    text = card.card(
        run.folder.path,
        title="A language model over words",
        task="text-generation",
        about=f"{network.num_parameters():,} parameters, trained on {len(corpus.train):,} "
        f"words of {settings.text} for {run.progress.step:,} steps. It knows "
        f"{len(corpus.tokenizer):,} tokens: words, numbers and punctuation marks, each with the "
        "space before it, and ends of lines.",
        usage=USAGE,
        figures=metrics,
        protocol=f"Mean over all {len(corpus.val):,} words of the validation text, in order, "
        f"in windows of {network.config.max_position_embeddings} that do not overlap; bits per "
        "character with those for spelling out unknown words, every character equally likely; "
        f"{weights} weights, float32; data {corpus.facts}; seed {settings.seed}.",
        data=settings.text,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
