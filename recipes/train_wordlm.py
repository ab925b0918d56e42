"""Train a language model over words on any text.

    accelerate launch recipes/train_wordlm.py
    accelerate launch recipes/train_wordlm.py --text mybook.txt --output_dir runs/mywords
    accelerate launch recipes/train_wordlm.py --output_dir runs/mywords --resume

The output folder is an ordinary transformers model, at any time the best one so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genkit import machine
from genkit.data import words
from genkit.data.corpus import Corpus
from genkit.data.order import Windows
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.models import lm
from genkit.text.samples import example_prompt
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.training.text_data import TextSettings, write_samples

# ---- settings


@dataclass
class Settings(TextSettings):
    """Settings of this recipe; see also TextSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/wordlm", "folder of the run and of the model")
    vocab_size: int = setting(10_000, "most frequent words, which are the vocabulary", least=3)
    lower: bool = setting(False, "convert the text to lower case")
    architecture: str = setting(CHOSEN, "architecture", choices=("llama", "gpt2"))
    depth: int = setting(CHOSEN, "layers: the one dial of the model's size", least=1)
    width: int = setting(CHOSEN, "size of a layer's vectors", least=1)
    heads: int = setting(CHOSEN, "attention heads", least=1)
    context: int = setting(CHOSEN, "context length, in words", least=1)
    dropout: float = setting(
        CHOSEN, "dropout of attention weights; for gpt2 of residuals, too", least=0, below=1
    )


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        depth, width_per_layer = settings.depth or 6, 64
        run: dict[str, Any] = {"batch_size": 64, "max_steps": 2500}
    else:
        depth, width_per_layer = settings.depth or 4, 32
        run = {"batch_size": 8, "max_minutes": 5.0}
    shape: dict[str, Any] = {"architecture": "llama", "context": 128, "dropout": 0.0}
    rates = {"learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.3}
    shape |= lm.choose_shape(depth, settings.width, settings.heads, width_per_layer)
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    step = {"optimizer": "muon", "ema": 0.0, "compile": machine.can_compile()}
    return shape | run | rates | precision | step


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        source = settings.text, settings.text_column, settings.val_text, settings.val_fraction
        with run.accelerator.local_main_process_first():
            vocabulary = settings.vocab_size, settings.lower
            corpus = words.read_words(*source, settings.context, *vocabulary, settings.table_memory)
        train = Windows(corpus.train, settings.context, settings.seed)

        # ---- model
        network = make_network(settings, corpus)
        attention = machine.attention(run.device.type, settings.mixed_precision)
        network.set_attn_implementation(attention)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(lm.loss)
        run.log(
            f"{network.num_parameters():,} parameters · {len(corpus.train):,} words to train "
            f"on, {len(corpus.val):,} to validate · {len(train) * settings.context:,} an epoch"
        )

        # ---- loop
        run.identify(**corpus.facts)
        run.warm_up(lambda rows: loss(model, *train.batch(rows, run.device)))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *train.batch(rows, run.device)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, corpus, settings.context)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save_model, run, settings, corpus, metrics))


def make_network(settings: Settings, corpus: Corpus) -> PreTrainedModel:
    """Build a new model."""
    shape = settings.depth, settings.width, settings.heads, settings.dropout
    network = lm.make_model(settings.architecture, len(corpus.tokenizer), settings.context, *shape)
    network.generation_config.suppress_tokens = [words.UNKNOWN_ID]  # it generates words only
    return network


# ---- evaluate


def evaluate(run: Run, corpus: Corpus, context: int) -> dict[str, float]:
    """Evaluate the model on the whole validation text, and write samples."""
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
    write_samples(run, corpus, network, PROMPT, 100)
    network.train()
    return metrics


# ---- save


PROMPT = 4  # tokens of the prompt of samples


def save_model(
    run: Run, settings: Settings, corpus: Corpus, metrics: dict[str, float], path: Path
) -> None:
    """Write the model as transformers does, with its card."""
    network = run.weights()
    prompt = example_prompt(corpus.val, network, corpus.tokenizer, PROMPT)
    network.generation_config.update(do_sample=True, max_new_tokens=200, pad_token_id=0)
    network.save_pretrained(path)
    lm.save_tokenizer(corpus.tokenizer, path)
    card.write_card(
        path,
        run.folder.path,
        title="A language model over words",
        task="text-generation",
        about=f"{network.num_parameters():,} parameters, trained on {len(corpus.train):,} "
        f"words of {settings.text} for {run.progress.step:,} steps. Its vocabulary is "
        f"{len(corpus.tokenizer):,} tokens: words, numbers and punctuation marks, each with the "
        "space before it, and ends of lines.",
        usage=card.TEXT_USAGE.format(prompt=prompt),
        prompt=prompt,
        figures=metrics,
        protocol=f"Mean over all {len(corpus.val):,} words of the validation text, in order, "
        f"in windows of {network.config.max_position_embeddings} that do not overlap; bits per "
        "character with those for spelling out unknown words, every character equally likely.",
        data=settings.text,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
