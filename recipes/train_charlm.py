"""Train a character language model on any text.

    accelerate launch recipes/train_charlm.py
    accelerate launch recipes/train_charlm.py --text mybook.txt --output_dir runs/mybook
    accelerate launch recipes/train_charlm.py --output_dir runs/mybook --resume
    accelerate launch recipes/train_charlm.py --init_from runs/mybook --text sequel.txt

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
from genkit.data import character_corpus, characters
from genkit.data.character_corpus import CharacterCorpus
from genkit.data.order import Windows
from genkit.errors import clean_errors
from genkit.hub import card, download
from genkit.models import lm
from genkit.text.language_model import LanguageModel
from genkit.text.samples import example_prompt
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.training.text_data import TextSettings, write_samples

MOMENTUM = 0.9  # of Muon: in runs of minutes, more remembers gradients that are too old

# ---- settings


@dataclass
class Settings(TextSettings):
    """Settings of this recipe; see also TextSettings and RunSettings in genkit/training."""

    output_dir: str = setting(
        "runs/charlm", "folder of the run and of the model; runs/charlm-tuned with --init_from"
    )
    init_from: str | None = setting(None, "character model to start from: a folder or a Hub id")
    architecture: str = setting(CHOSEN, "architecture", choices=("llama", "gpt2"))
    depth: int = setting(CHOSEN, "layers: the one dial of the model's size", least=1)
    width: int = setting(CHOSEN, "size of a layer's vectors", least=1)
    heads: int = setting(CHOSEN, "attention heads", least=1)
    context: int = setting(CHOSEN, "context length, in characters", least=1)
    dropout: float = setting(
        CHOSEN, "dropout of attention weights; for gpt2 of residuals, too", least=0, below=1
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        download.check_exists(self.init_from, "--init_from")
        if self.init_from and self.output_dir == Settings.output_dir:
            self.output_dir = "runs/charlm-tuned"


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        depth, width_per_layer = settings.depth or 6, 64
        run: dict[str, Any] = {"batch_size": 64, "max_steps": 2500}
    else:
        depth, width_per_layer = settings.depth or 4, 32
        run = {"batch_size": 8, "max_minutes": 5.0}
    shape: dict[str, Any] = {"architecture": "llama", "context": 256, "dropout": 0.0}
    rates = {"learning_rate": 1e-2, "muon_learning_rate": 0.02, "weight_decay": 0.3}
    if settings.init_from:
        names = (*shape, "depth", "width", "heads")
        given = [name for name in names if getattr(settings, name) is not None]
        if given:
            raise ValueError(
                f"--{given[0]} is fixed by the model of --init_from; leave one of the two out"
            )
        shape = {}
        # smaller steps: the model is trained already
        rates |= {"learning_rate": 1e-3, "muon_learning_rate": 0.005}
    else:
        shape |= lm.choose_shape(depth, settings.width, settings.heads, width_per_layer)
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    step = {"optimizer": "muon", "ema": 0.0, "compile": machine.can_compile()}
    return shape | run | rates | precision | step


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        origin = load_origin(settings.init_from) if settings.init_from else None
        context = origin.model.config.max_position_embeddings if origin else settings.context
        source = settings.text, settings.text_column, settings.val_text, settings.val_fraction
        with run.accelerator.local_main_process_first():
            tokenizer = origin.tokenizer if origin else None
            corpus = character_corpus.read_characters(
                *source, context, tokenizer, settings.table_memory
            )
        train = Windows(corpus.train, context, settings.seed)

        # ---- model
        if origin:
            network = lm.resize_embeddings(origin.model, corpus.tokenizer)
        else:
            network = make_network(settings, corpus)
        attention = machine.attention(run.device.type, settings.mixed_precision)
        network.set_attn_implementation(attention)
        model = run.network("model", network, optimizers(network, settings, MOMENTUM))
        loss = run.autocast(lm.loss)
        run.log(
            f"{network.num_parameters():,} parameters · {len(corpus.train):,} characters to train "
            f"on, {len(corpus.val):,} to validate · {len(train) * context:,} an epoch"
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
                    metrics = evaluate(run, corpus, context)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save_model, run, settings, corpus, metrics))


def load_origin(name: str) -> LanguageModel:
    """Load the character model to fine-tune."""
    model, tokenizer = lm.load_lm(name)  # not the copy that generate keeps: training changes it
    if not characters.is_character_tokenizer(tokenizer):
        raise ValueError(f"--init_from {name} is not a character model of this recipe")
    return LanguageModel(model, tokenizer, name)


def make_network(settings: Settings, corpus: CharacterCorpus) -> PreTrainedModel:
    """Build a new model."""
    shape = settings.depth, settings.width, settings.heads, settings.dropout
    return lm.make_model(settings.architecture, len(corpus.tokenizer), settings.context, *shape)


# ---- evaluate


def evaluate(run: Run, corpus: CharacterCorpus, context: int) -> dict[str, float]:
    """Evaluate the model on the whole validation text, and write samples."""
    network = run.weights().eval()
    windows = run.shard(math.ceil((len(corpus.val) - 1) / context))
    nats, count = run.sum(lm.total_loss(network, corpus.val, context, windows)).tolist()
    metrics = {"val_loss": nats / count, "bits_per_character": nats / count / math.log(2)}
    write_samples(run, corpus, network, PROMPT, 200)
    network.train()
    return metrics


# ---- save


PROMPT = 16  # tokens of the prompt of samples


def save_model(
    run: Run, settings: Settings, corpus: CharacterCorpus, metrics: dict[str, float], path: Path
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
        title="A character language model",
        task="text-generation",
        about=f"{network.num_parameters():,} parameters, trained on {len(corpus.train):,} "
        f"characters of {settings.text} for {run.progress.step:,} steps.",
        usage=card.TEXT_USAGE.format(prompt=prompt),
        prompt=prompt,
        figures=metrics,
        protocol=f"Mean over all {len(corpus.val):,} characters of the validation text, in order, "
        f"in windows of {network.config.max_position_embeddings} that do not overlap.",
        data=settings.text,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
