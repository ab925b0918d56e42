"""Fine-tune GPT-2, or any causal language model, on your own text, or on prompts with answers.

    accelerate launch recipes/finetune_gpt2.py --text mybook.txt
    accelerate launch recipes/finetune_gpt2.py --data demonstrations.jsonl
    accelerate launch recipes/finetune_gpt2.py --text mybook.txt --lora_rank 8
    accelerate launch recipes/finetune_gpt2.py --output_dir runs/gpt2-tuned --resume
    accelerate launch recipes/finetune_gpt2.py --init_from path/to/model --text mybook.txt

Of prompts with answers, or chats, it learns the answers alone. The output folder is an ordinary
transformers model, at any time the best one so far; the model is evaluated before the first step,
too.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genkit import files, machine
from genkit.data import dialogues, table_sources
from genkit.data.corpus import read_corpus, split_corpus
from genkit.data.order import Order, Windows
from genkit.data.text import EMBEDDED
from genkit.errors import clean_errors
from genkit.hub import card, download
from genkit.models import completions, lm, lora
from genkit.models.alignment_losses import supervised_loss
from genkit.models.completions import Rows
from genkit.text.dialogue_tokens import Row, add_template, encode_dialogue
from genkit.text.kv_cache import context_length
from genkit.text.language_model import DEFAULT, REVISION, LanguageModel
from genkit.text.samples import answers_page, example_prompt
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
    data: str | None = setting(
        None, "instead of --text: a table of prompts with answers, or of chats"
    )
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
        table_sources.check_source(self.data)
        if self.data is not None and (self.text, self.val_text) != (EMBEDDED, None):
            raise ValueError(f"--data {self.data} excludes --text and --val_text")
        if self.data is not None and self.context is not None:
            raise ValueError(f"--context {self.context} is of windows of --text, not for --data")
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise ValueError("--lora_rank requires peft: pip install 'hf-genkit[finetune]'")
        download.check_exists(self.init_from, "--init_from")
        download.check_revision(self.init_from, self.init_revision)


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
        with run.accelerator.local_main_process_first():
            network, tokenizer = lm.load_lm(settings.init_from, settings.init_revision)
            source = Text if settings.data is None else Answers
            data = source(settings, network, tokenizer)

        # ---- model
        data.facts["model_sha256"] = files.weights_hash(network)
        attention = machine.attention(run.device.type, settings.mixed_precision)
        network.set_attn_implementation(attention)
        if settings.lora_rank:
            network = lora.add_adapters(network, settings.lora_rank)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(partial(data.loss, model))
        run.log(
            f"{network.num_parameters():,} parameters, {count_trainable(network):,} to train · "
            f"{data}"
        )

        # ---- loop
        run.identify(**data.facts)
        settings.max_steps = count_steps(
            settings.epochs, len(data), settings.batch_size, settings.max_steps
        )
        run.warm_up(lambda rows: loss(*data.batch(run, rows)))
        run.restore(before=partial(evaluate_and_save, run, settings, data))
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(*data.batch(run, rows)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    evaluate_and_save(run, settings, data)


# ---- data


class Text:
    """A text, of which every token is learnt from those before it in a window."""

    def __init__(
        self, settings: Settings, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        settings.context = self.context = choose_context(settings, network)
        source = settings.text, settings.text_column, settings.val_text, settings.val_fraction
        parts = split_corpus(*source, settings.table_memory)
        self.corpus = read_corpus(*parts, tokenizer, self.context)
        self.facts, self.tokenizer, self.source = self.corpus.facts, tokenizer, settings.text
        self.windows = Windows(self.corpus.train, self.context, settings.seed)

    def __len__(self) -> int:
        return len(self.windows)

    def __str__(self) -> str:
        return (
            f"{len(self.corpus.train):,} tokens to train on, {len(self.corpus.val):,} to validate "
            f"· {len(self) * self.context:,} an epoch"
        )

    def batch(self, run: Run, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return windows, and the tokens after theirs."""
        return self.windows.batch(rows, run.device)

    loss = staticmethod(lm.loss)

    def evaluate(self, run: Run, network: PreTrainedModel) -> dict[str, float]:
        """Evaluate a model on the whole validation text, and write samples."""
        windows = run.shard(math.ceil((len(self.corpus.val) - 1) / self.context))
        found = lm.total_loss(network, self.corpus.val, self.context, windows)
        nats, tokens = run.sum(found).tolist()
        write_samples(run, self.corpus, network, PROMPT, 100)
        return {
            "val_loss": nats / tokens,
            "perplexity": math.exp(nats / tokens),
            "bits_per_character": nats / self.corpus.val_characters / math.log(2),
        }

    def prompt(self, network: PreTrainedModel) -> str:
        """Return a prompt to try the model with."""
        return example_prompt(self.corpus.val, network, self.tokenizer, PROMPT)

    @property
    def amount(self) -> str:
        """How much it is, for the card."""
        return f"{len(self.corpus.train):,} tokens of {self.source}"

    @property
    def protocol(self) -> str:
        """How the figures are measured, for the card."""
        return (
            f"Mean over all {len(self.corpus.val):,} tokens of the validation text, in order, "
            f"in windows of {self.context} that do not overlap."
        )


class Answers:
    """Prompts with answers, of which the tokens of the answers are learnt."""

    def __init__(
        self, settings: Settings, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        assert settings.data, "else the data is a text"
        found = dialogues.read_demonstrations(settings.data, settings.table_memory)
        if any(not isinstance(each.prompt, str) for each in found):
            add_template(tokenizer)
        language = LanguageModel(network, tokenizer, settings.init_from)
        rows = [
            encode_dialogue(each.prompt, each.answer, language, f"data: row {i}")
            for i, each in enumerate(found)
        ]
        self.train, self.val = dialogues.split(rows, settings.val_fraction, "data")
        _, self.held = dialogues.split(found, settings.val_fraction, "data")
        self.order = Order(len(self.train), settings.seed)
        self.facts: dict[str, Any] = {"data_sha256": dialogues.content_hash(found)}
        self.tokenizer, self.source = tokenizer, settings.data

    def __len__(self) -> int:
        return len(self.train)

    def __str__(self) -> str:
        tokens = sum(row.count for row in self.train)
        return (
            f"{len(self.train):,} answers of {tokens:,} tokens to train on, "
            f"{len(self.val):,} to validate"
        )

    def batch(self, run: Run, rows: np.ndarray) -> tuple[Rows, float]:
        """Return rows, and how many tokens of answers their part of the batch stands for."""
        every = self.order(run.first_row + np.arange(run.batch_size))[1]
        count = sum(self.train[i].count for i in every) / run.shares
        return stack_rows([self.train[i] for i in self.order(rows)[1]]).to(run.device), count

    @staticmethod
    def loss(model: torch.nn.Module, rows: Rows, count: float) -> torch.Tensor:
        """Return the mean loss of the batch's tokens of answers, this part's share of it."""
        return supervised_loss(completions.log_probabilities(model, rows)[0], rows.mask, count)

    @torch.no_grad()
    def evaluate(self, run: Run, network: PreTrainedModel) -> dict[str, float]:
        """Evaluate a model on all validation answers, and write its own beside them."""
        total = torch.zeros(2, dtype=torch.float64)
        for i in run.shard(len(self.val)):
            rows = stack_rows([self.val[i]]).to(run.device)
            loss = self.loss(network, rows, 1.0).item()
            total += torch.tensor([loss, self.val[i].count])
        nats, tokens = run.sum(total).tolist()
        if run.is_main:
            language = LanguageModel(network, self.tokenizer, "this run")
            page = answers_page(run.progress.step, self.held[:SHOWN], language)
            run.folder.write_samples(run.progress.step, page)
        return {"val_loss": nats / tokens, "perplexity": math.exp(nats / tokens)}

    def prompt(self, network: PreTrainedModel) -> dialogues.Prompt:
        """Return a prompt to try the model with."""
        return self.held[0].prompt

    @property
    def amount(self) -> str:
        """How much it is, for the card."""
        return f"{len(self.train):,} answers of {self.source}"

    @property
    def protocol(self) -> str:
        """How the figures are measured, for the card."""
        tokens = sum(row.count for row in self.val)
        return f"Mean over all {tokens:,} tokens of {len(self.val):,} validation answers."


def stack_rows(rows: list[Row]) -> Rows:
    """Return rows as a batch."""
    return completions.pad_rows([row.ids for row in rows], [row.answers for row in rows])


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


def evaluate_and_save(run: Run, settings: Settings, data: Text | Answers) -> None:
    """Evaluate the model, adapters merged, and save it if it is the best."""
    network = run.weights().eval()
    merged = lora.merge_adapters(network) if settings.lora_rank else network
    metrics = data.evaluate(run, merged)
    if run.report("val_loss", metrics):
        run.publish(partial(save_model, run, settings, data, merged, metrics))
    network.train()


# ---- save


PROMPT = 8  # tokens of the prompt of samples
SHOWN = 8  # answers on a page of samples


def save_model(
    run: Run,
    settings: Settings,
    data: Text | Answers,
    network: PreTrainedModel,
    metrics: dict[str, float],
    path: Path,
) -> None:
    """Write the model as transformers does, with its card."""
    end = data.tokenizer.eos_token_id
    prompt = data.prompt(network)
    network.generation_config.update(do_sample=True, max_new_tokens=200, pad_token_id=end)
    network.save_pretrained(path)
    lm.save_tokenizer(data.tokenizer, path)
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
        f"({method}) on {data.amount} for "
        f"{run.progress.step:,} steps.",
        usage=card.TEXT_USAGE.format(prompt=prompt),
        prompt=prompt,
        figures={f"{name}, before": before[name] for name in metrics if name in before} | metrics,
        protocol=data.protocol,
        data=data.source,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
