"""Fine-tune GPT-2, or any causal language model, on your own text.

    accelerate launch recipes/finetune_gpt2.py --text mybook.txt
    accelerate launch recipes/finetune_gpt2.py --text mybook.txt --lora_rank 8
    accelerate launch recipes/finetune_gpt2.py --output_dir runs/gpt2-tuned --resume
    accelerate launch recipes/finetune_gpt2.py --init_from path/to/model --text mybook.txt

The output folder is an ordinary transformers model, at any time the best one so far; the model is
evaluated before the first step, too.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genkit import files, machine
from genkit.data.corpus import Corpus, read_corpus, split_corpus
from genkit.data.order import Windows
from genkit.errors import clean_errors
from genkit.hub import card, download
from genkit.models import lm, lora
from genkit.text.kv_cache import context_length
from genkit.text.language_model import DEFAULT, REVISION
from genkit.text.samples import example_prompt
from genkit.training.optim import optimizers
from genkit.training.progress import count_steps
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, parse, setting
from genkit.training.text_data import TextSettings, write_samples

# ---- settings


@dataclass
class Settings(TextSettings):
    """Settings of this recipe; see also TextSettings and RunSettings in genkit/training."""

    output_dir: str = setting("runs/gpt2-tuned", "folder of the run and of the model")
    init_from: str = setting(DEFAULT, "causal language model to start from: a folder or a Hub id")
    init_revision: str | None = setting(None, "branch, tag or commit of a model on the Hub")
    context: int = setting(
        CHOSEN, "context length in tokens; default: 512, or the model's own if it is less", least=1
    )
    epochs: float | None = setting(
        None, "passes over the text, unless max_steps is fewer steps", above=0
    )
    lora_rank: int = setting(
        0, "train LoRA adapters of this rank; 0 to train the weights themselves", least=0
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise ValueError("--lora_rank requires peft: pip install 'hf-genkit[finetune]'")
        download.check_exists(self.init_from, "--init_from")
        if self.init_revision and Path(self.init_from).is_dir():
            raise ValueError(
                f"--init_revision {self.init_revision} requires a model on the Hub, --init_from "
                f"{self.init_from} is a folder"
            )


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    run: dict[str, Any] = {"batch_size": 16 if device == "accelerator" else 4}
    if not (settings.epochs or settings.max_steps or settings.max_minutes):
        run |= {"epochs": 3.0} if device == "accelerator" else {"max_minutes": 10.0}
    if not Path(settings.init_from).is_dir():
        run |= {"init_revision": REVISION if settings.init_from == DEFAULT else "main"}
    rates = {"learning_rate": 5e-5, "muon_learning_rate": 2e-3, "weight_decay": 0.01}
    if settings.lora_rank:  # adapters start at zero
        rates |= {"learning_rate": 5e-4}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # on a CPU it costs more than it saves
    compiled = device == "accelerator" and machine.can_compile()
    return run | rates | precision | {"optimizer": "adamw", "ema": 0.0, "compile": compiled}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        source = settings.text, settings.text_column, settings.val_text, settings.val_fraction
        with run.accelerator.local_main_process_first():
            network, tokenizer = lm.load_lm(settings.init_from, settings.init_revision)
            settings.context = choose_context(settings, network)
            parts = split_corpus(*source, settings.table_memory)
            corpus = read_corpus(*parts, tokenizer, settings.context)
        train = Windows(corpus.train, settings.context, settings.seed)

        # ---- model
        corpus.facts["model_sha256"] = files.weights_hash(network)
        attention = machine.attention(run.device.type, settings.mixed_precision)
        network.set_attn_implementation(attention)
        if settings.lora_rank:
            network = lora.add_adapters(network, settings.lora_rank)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(lm.loss)
        run.log(
            f"{network.num_parameters():,} parameters, {count_trainable(network):,} to train · "
            f"{len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate · "
            f"{len(train) * settings.context:,} an epoch"
        )

        # ---- loop
        run.identify(**corpus.facts)
        settings.max_steps = count_steps(
            settings.epochs, len(train), settings.batch_size, settings.max_steps
        )
        run.warm_up(lambda rows: loss(model, *train.batch(rows, run.device)))
        run.restore(before=partial(evaluate_and_save, run, settings, corpus))
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *train.batch(rows, run.device)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    evaluate_and_save(run, settings, corpus)


def choose_context(settings: Settings, network: PreTrainedModel) -> int:
    """Return the context length in tokens."""
    most = context_length(network)
    if settings.context and settings.context > most:
        raise ValueError(f"--context must be {most} or less for this model, got {settings.context}")
    return settings.context or min(512, most)


def count_trainable(network: PreTrainedModel) -> int:
    """Count the parameters that training changes."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


# ---- evaluate


def evaluate_and_save(run: Run, settings: Settings, corpus: Corpus) -> None:
    """Evaluate the model, adapters merged, and save it if it is the best."""
    network = run.weights().eval()
    merged = lora.merge_adapters(network) if settings.lora_rank else network
    metrics = evaluate(run, settings, corpus, merged)
    if run.report("val_loss", metrics):
        run.publish(partial(save_model, run, settings, corpus, merged, metrics))
    network.train()


def evaluate(
    run: Run, settings: Settings, corpus: Corpus, network: PreTrainedModel
) -> dict[str, float]:
    """Evaluate the model on the whole validation text, and write samples."""
    context = settings.context
    windows = run.shard(math.ceil((len(corpus.val) - 1) / context))
    nats, tokens = run.sum(lm.total_loss(network, corpus.val, context, windows)).tolist()
    write_samples(run, corpus, network, PROMPT, 100)
    return {
        "val_loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_character": nats / corpus.val_characters / math.log(2),
    }


# ---- save


PROMPT = 8  # tokens of the prompt of samples
USAGE = """
from transformers import pipeline
print(pipeline("text-generation", model)({prompt!r}))

import genkit  # the same text for the same seed, at any batch size
print(genkit.generate({prompt!r}, model=model, seed=1))
"""


def save_model(
    run: Run,
    settings: Settings,
    corpus: Corpus,
    network: PreTrainedModel,
    metrics: dict[str, float],
    path: Path,
) -> None:
    """Write the model as transformers does, with its card."""
    end = corpus.tokenizer.eos_token_id
    prompt = example_prompt(corpus.val, network, corpus.tokenizer, PROMPT)
    network.generation_config.update(do_sample=True, max_new_tokens=200, pad_token_id=end)
    network.save_pretrained(path)
    lm.save_tokenizer(corpus.tokenizer, path)
    evaluations = (line for line in run.folder.log() if "val_loss" in line)
    before = next((line for line in evaluations if line["step"] == 0), {})  # none in a lost log
    method = (
        f"adapters of rank {settings.lora_rank}, merged" if settings.lora_rank else "all weights"
    )
    card.write_card(
        path,
        run.folder.path,
        title=f"{Path(settings.init_from).name}, fine-tuned",
        task="text-generation",
        about=f"{settings.init_from}, {network.num_parameters():,} parameters, fine-tuned "
        f"({method}) on {len(corpus.train):,} tokens of {settings.text} for "
        f"{run.progress.step:,} steps.",
        usage=USAGE.format(prompt=prompt),
        prompt=prompt,
        figures={f"{name}, before": before[name] for name in metrics if name in before} | metrics,
        protocol=f"Mean over all {len(corpus.val):,} tokens of the validation text, in order, "
        f"in windows of {settings.context} that do not overlap.",
        data=settings.text,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
