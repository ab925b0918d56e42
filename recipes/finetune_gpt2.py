"""Fine-tune GPT-2, or any causal language model, on your own text.

    accelerate launch recipes/finetune_gpt2.py --text mybook.txt
    accelerate launch recipes/finetune_gpt2.py --text mybook.txt --lora_rank 8
    accelerate launch recipes/finetune_gpt2.py --output_dir runs/gpt2-tuned --resume
    accelerate launch recipes/finetune_gpt2.py --init_from path/to/model --text mybook.txt

The output folder is an ordinary transformers model, at any time the best one so far; the model as
it came is the first to be judged.
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from genkit import files, machine
from genkit.data import tables
from genkit.data.corpus import Corpus, read_corpus, split_corpus
from genkit.data.order import Windows
from genkit.data.text import EMBEDDED
from genkit.errors import clean_errors
from genkit.hub import card
from genkit.models import lm, lora
from genkit.text import generation, kv_cache
from genkit.text.language_model import DEFAULT, REVISION
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import RunSettings, parse, setting

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; those that every recipe has are in genkit/training/settings.py."""

    output_dir: str = setting("runs/gpt2-tuned", "folder of the run and of the model")
    text: str = setting(EMBEDDED, "file, folder or dataset; or the embedded corpus")
    text_column: str = setting("text", "column of a dataset that holds the text")
    val_text: str | None = setting(None, "text to validate on, instead of the end of --text")
    val_fraction: float = setting(0.1, "part of the text, at its end, to validate on")
    table_memory: int = setting(tables.MEMORY, "MiB of the process that reads a table")
    init_from: str = setting(DEFAULT, "causal language model to start from: a folder or a Hub id")
    init_revision: str | None = setting(None, "branch, tag or commit of a model on the Hub")
    context: int | None = setting(None, "tokens seen at once; 512, or fewer if the model sees less")
    epochs: float | None = setting(None, "times through the text, if max_steps is not fewer steps")
    lora_rank: int = setting(0, "train adapters of this rank, not the weights; 0 for the weights")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        for name in ("context", "epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 or more, got {self.lora_rank}")
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise ValueError("lora_rank: pip install 'genkit[finetune]' first")
        if self.init_revision and Path(self.init_from).is_dir():
            raise ValueError(f"init_revision: the folder {self.init_from} has none; leave it out")


TEMPERATURES = (0.25, 0.5, 1.0)


def preset(settings: Settings, device: str) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    run: dict[str, Any] = {"batch_size": 16 if device == "cuda" else 4}
    if not (settings.epochs or settings.max_steps or settings.max_minutes):
        run |= {"epochs": 3.0} if device == "cuda" else {"max_minutes": 10.0}
    if not Path(settings.init_from).is_dir():
        run |= {"init_revision": REVISION if settings.init_from == DEFAULT else "main"}
    rates = {"learning_rate": 5e-5, "muon_learning_rate": 2e-3, "weight_decay": 0.01}
    if settings.lora_rank:  # adapters start from nothing
        rates |= {"learning_rate": 5e-4}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    compiled = device == "cuda" and machine.can_compile()  # on a CPU it takes longer than it saves
    return run | rates | precision | {"optimizer": "adamw", "ema": 0.0, "compile": compiled}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        with run.accelerator.local_main_process_first():
            network, tokenizer = lm.load_lm(settings.init_from, settings.init_revision)
            settings.context = choose_context(settings, network)
            parts = split_corpus(
                settings.text,
                settings.text_column,
                settings.val_text,
                settings.val_fraction,
                settings.table_memory,
            )
            corpus = read_corpus(*parts, tokenizer, settings.context)
        train = Windows(corpus.train, settings.context, settings.seed)

        # ---- model
        corpus.facts["model_sha256"] = files.weights_hash(network)
        network.set_attn_implementation(
            machine.attention(run.device.type, settings.mixed_precision)
        )
        if settings.lora_rank:
            network = lora.add_adapters(network, settings.lora_rank)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(lm.loss)
        run.log(
            f"{network.num_parameters():,} parameters, {trainable(network):,} of them to train · "
            f"{len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate · "
            f"{len(train) * settings.context:,} an epoch"
        )

        # ---- loop
        run.identify(**corpus.facts)
        if settings.epochs:
            steps = math.ceil(settings.epochs * len(train) / settings.batch_size)
            settings.max_steps = min(steps, settings.max_steps or steps)
        run.restore(before=partial(judge, run, settings, corpus))
        run.warm_up(lambda rows: loss(model, *train.batch(rows, run.device)))
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *train.batch(rows, run.device)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    judge(run, settings, corpus)
        run.log(f"the best model is in {run.folder.path}")


def choose_context(settings: Settings, network: PreTrainedModel) -> int:
    """Return the length of a window."""
    most = kv_cache.context_length(network)
    if settings.context and settings.context > most:
        raise ValueError(f"context: {settings.context} is more than the model's own, {most}")
    return settings.context or min(512, most)


def trainable(network: PreTrainedModel) -> int:
    """Count the parameters that training changes."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


# ---- evaluate


def judge(run: Run, settings: Settings, corpus: Corpus) -> None:
    """Evaluate the model as it would be saved, and save it if it is the best."""
    network = run.weights().eval()
    whole = lora.merge_adapters(network) if settings.lora_rank else network
    metrics = evaluate(run, settings, corpus, whole)
    if run.report("val_loss", metrics):
        run.publish(partial(save, run, settings, corpus, whole, metrics))
    network.train()


def evaluate(
    run: Run, settings: Settings, corpus: Corpus, network: PreTrainedModel
) -> dict[str, float]:
    """Judge the model on the whole validation text, and let it write."""
    context = settings.context
    windows = run.shard(math.ceil((len(corpus.val) - 1) / context))
    nats, tokens = run.sum(lm.total_loss(network, corpus.val, context, windows)).tolist()
    if run.is_main:
        write_samples(run, corpus, generation.LanguageModel(network, corpus.tokenizer, "this run"))
    return {
        "val_loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_character": nats / corpus.val_characters / math.log(2),
    }


def write_samples(run: Run, corpus: Corpus, language: generation.LanguageModel) -> None:
    """Continue the first tokens of the validation text at several temperatures."""
    start = corpus.val[: kv_cache.context_length(language.model)].tolist()
    prompt = corpus.tokenizer.decode(start[:8], skip_special_tokens=True)
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
    run: Run,
    settings: Settings,
    corpus: Corpus,
    network: PreTrainedModel,
    metrics: dict[str, float],
    folder: Path,
) -> None:
    """Write the model as transformers does, with its card."""
    weights = "averaged" if settings.ema else "raw"
    end = corpus.tokenizer.eos_token_id
    network.generation_config.update(do_sample=True, max_new_tokens=200, pad_token_id=end)
    network.save_pretrained(folder)
    lm.save_tokenizer(corpus.tokenizer, folder)
    judgements = (line for line in run.folder.log() if "val_loss" in line)
    before = next((line for line in judgements if line["step"] == 0), {})  # none in a lost log
    method = (
        f"adapters of rank {settings.lora_rank}, merged" if settings.lora_rank else "all weights"
    )
    text = card.card(
        run.folder.path,
        title=f"{Path(settings.init_from).name}, fine-tuned",
        task="text-generation",
        about=f"{settings.init_from}, {network.num_parameters():,} parameters, fine-tuned "
        f"({method}) on {len(corpus.train):,} tokens of {settings.text} for "
        f"{run.progress.step:,} steps.",
        usage=USAGE,
        figures={f"{name}, before": before[name] for name in metrics if name in before} | metrics,
        protocol=f"Mean over all {len(corpus.val):,} tokens of the validation text, in order, "
        f"in windows of {settings.context} that do not overlap; {weights} weights, float32; data "
        f"{corpus.facts}; seed {settings.seed}.",
        data=settings.text,
        license=settings.license,
    )
    (folder / card.FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with clean_errors():
        main()
