"""Train a sequence-to-sequence model on sources with targets, or on the turns of a dialogue.

    accelerate launch recipes/train_seq2seq.py --data pairs.jsonl
    accelerate launch recipes/train_seq2seq.py --dialogue plays.txt --vocab_size 2000
    accelerate launch recipes/train_seq2seq.py --output_dir runs/seq2seq --resume
    accelerate launch recipes/train_seq2seq.py --init_from path/to/t5 --data pairs.jsonl

Rows have `source` and `target`; of a dialogue, each speech is the source of the next. The output
folder is an ordinary transformers model, at any time the best one so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genkit import files, machine
from genkit.data import characters, dialogues, parallel, seq2seq_tokenizers, table_sources, tables
from genkit.data.corpus import tokenizer_hash
from genkit.data.order import Order, blocks
from genkit.data.parallel import Example
from genkit.data.text import check_source
from genkit.errors import clean_errors
from genkit.hub import card, download
from genkit.metrics import outputs
from genkit.models import lm, seq2seq
from genkit.text.generation import generate
from genkit.text.kv_cache import context_length, decoder_start
from genkit.text.language_model import LanguageModel
from genkit.text.parallel_tokens import encode_source, encode_target
from genkit.text.samples import outputs_page
from genkit.training.optim import optimizers
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, RunSettings, parse, setting

# ---- settings


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; see also RunSettings in genkit/training/settings.py."""

    output_dir: str = setting(
        "runs/seq2seq", "folder of the run and of the model; runs/seq2seq-tuned with --init_from"
    )
    data: str | None = setting(None, "table with columns source and target: a file or a Hub id")
    dialogue: str | None = setting(
        None, "instead of --data: a text, its speeches apart by empty lines"
    )
    val_fraction: float = setting(
        0.1, "part of the pairs to validate on; of a dialogue, its end", above=0, below=1
    )
    init_from: str | None = setting(None, "encoder-decoder to start from: a folder or a Hub id")
    init_revision: str | None = setting(None, "branch, tag or commit of a model on the Hub")
    vocab_size: int = setting(0, "tokens of a byte-pair encoding; 0 for characters", least=0)
    architecture: str = setting(CHOSEN, "architecture", choices=("bart", "t5"))
    depth: int = setting(CHOSEN, "layers of encoder and decoder: the one dial of the size", least=1)
    width: int = setting(CHOSEN, "size of a layer's vectors", least=1)
    heads: int = setting(CHOSEN, "attention heads", least=1)
    dropout: float = setting(CHOSEN, "dropout", least=0, below=1)
    max_length: int = setting(
        CHOSEN, "most tokens of a source and of a target; longer pairs are left out", least=2
    )
    eval_samples: int = setting(
        200, "validation pairs that are written at each evaluation", least=1
    )
    table_memory: int = setting(
        tables.MEMORY, "MiB of the process that reads a table", least=tables.MIN_MEMORY
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        table_sources.check_source(self.data)
        check_source(self.dialogue, "dialogue")
        download.check_exists(self.init_from, "--init_from")
        if self.init_from:
            download.check_revision(self.init_from, self.init_revision)
        if 0 < self.vocab_size < seq2seq_tokenizers.LEAST:
            least = seq2seq_tokenizers.LEAST
            raise ValueError(f"--vocab_size must be 0, or {least} or more, got {self.vocab_size}")
        if self.init_from and self.output_dir == Settings.output_dir:
            self.output_dir = "runs/seq2seq-tuned"


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    if device == "accelerator":
        depth = settings.depth or 4
        run: dict[str, Any] = {"batch_size": 128, "max_steps": 5000}
    else:
        depth = settings.depth or 2
        run = {"batch_size": 64, "max_minutes": 5.0}
    shape: dict[str, Any] = {"architecture": "bart", "dropout": 0.0}
    # at more, AdamW does not train BART's layers, which are normalised after each residual
    rate = 5e-4 if settings.optimizer == "adamw" else 2e-3
    rates = {"learning_rate": rate, "muon_learning_rate": 0.01, "weight_decay": 0.1}
    if settings.init_from:
        names = (*shape, "depth", "width", "heads")
        given = [name for name in names if getattr(settings, name) is not None]
        given += ["vocab_size"] if settings.vocab_size else []
        if given:
            raise ValueError(
                f"--{given[0]} is fixed by the model of --init_from; leave one of the two out"
            )
        shape = {}
        rates = {"learning_rate": 3e-4, "muon_learning_rate": 2e-3, "weight_decay": 0.01}
    else:
        shape |= lm.choose_shape(depth, settings.width, settings.heads, 64) | {"max_length": 128}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # batches differ in length: on a CPU, compiling for each costs more than it saves
    compiled = device == "accelerator" and machine.can_compile()
    step = {"optimizer": "adamw" if settings.init_from else "muon", "ema": 0.0}
    return shape | run | rates | precision | step | {"compile": compiled}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)
    if (settings.data is None) == (settings.dialogue is None):
        raise ValueError("--data or --dialogue is required, one of the two")

    with Run(settings) as run:
        # ---- data
        with run.accelerator.local_main_process_first():
            train, held = read(settings)
            network, tokenizer = start_model(settings, train, held)
        data = Pairs(settings, LanguageModel(network, tokenizer, "this run"), train, held)
        run.check_held_out(len(data.val), "pairs")
        if settings.init_from:
            data.facts["model_sha256"] = files.weights_hash(network)

        # ---- model
        attention = machine.attention(run.device.type, settings.mixed_precision)
        network.set_attn_implementation(attention)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(seq2seq.loss)
        run.log(f"{network.num_parameters():,} parameters · {data}")
        if not outputs.has_chrf():
            run.log(f"chrF is not measured without sacrebleu: {outputs.HOW_TO}")

        # ---- loop
        run.identify(**data.facts)
        run.warm_up(lambda rows: loss(model, *data.batch(run, rows)))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *data.batch(run, rows)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, data)
                    if run.report("val_loss", metrics):
                        run.publish(partial(save_model, run, settings, data, metrics))


def read(settings: Settings) -> tuple[list[Example], list[Example]]:
    """Read the pairs, and hold some out; the end of a dialogue, whose speeches stand in two."""
    if settings.data is not None:
        examples = parallel.read_examples(settings.data, settings.table_memory)
        return dialogues.split(examples, settings.val_fraction, "data")
    assert settings.dialogue is not None, "one of the two is given"
    turns = parallel.read_turns(settings.dialogue)
    return parallel.hold_out_end(turns, settings.val_fraction, "dialogue")


def start_model(
    settings: Settings, train: Sequence[Example], held: Sequence[Example]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the model to fine-tune, or make a tokenizer and a new model."""
    if settings.init_from:
        network, tokenizer = lm.load_lm(settings.init_from, settings.init_revision, True)
        settings.max_length = choose_length(settings, network)
        check_known(tokenizer, [*train, *held])
        return network, tokenizer
    known = train if settings.vocab_size else [*train, *held]  # no character is unknown
    texts = [text for each in known for text in (each.source, each.target)]
    tokenizer = seq2seq_tokenizers.make_tokenizer(texts, settings.vocab_size)
    shape = settings.depth, settings.width, settings.heads, settings.dropout
    vocabulary = tokenizer.get_vocab()
    made = seq2seq.make_model(settings.architecture, vocabulary, settings.max_length, *shape)
    return made, tokenizer


def choose_length(settings: Settings, network: PreTrainedModel) -> int:
    """Return the most tokens of a source and of a target for the model to fine-tune."""
    most = context_length(network)
    if settings.max_length and settings.max_length > most:
        raise ValueError(
            f"--max_length must be {most} or less for this model, got {settings.max_length}"
        )
    return settings.max_length or min(128, most)


def check_known(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> None:
    """Refuse characters that a character model does not know."""
    if characters.is_character_tokenizer(tokenizer):
        texts = "".join(each.source + each.target for each in examples)
        unknown = characters.unknown_characters(tokenizer, texts)
        if unknown:
            raise ValueError(
                f"the model of --init_from has never seen {', '.join(map(repr, unknown))}; leave "
                "pairs with such characters out, or train a new model"
            )


class Pairs:
    """Sources and targets as tokens, in a shuffled order."""

    def __init__(
        self,
        settings: Settings,
        language: LanguageModel,
        train: Sequence[Example],
        held: Sequence[Example],
    ) -> None:
        self.tokenizer, self.longest = language.tokenizer, settings.max_length
        self.source = settings.data or settings.dialogue or ""
        self.start = decoder_start(language.model)
        pad = language.tokenizer.pad_token_id
        self.pad = language.tokenizer.eos_token_id if pad is None else pad
        self.train, _ = self._encode(train, language, "train")
        self.val, self.held = self._encode(held, language, "validate")
        self.left_out = len(train) + len(held) - len(self.train) - len(self.val)
        self.order = Order(len(self.train), settings.seed)
        every = [[each.source, each.target] for each in (*train, *held)]
        self.facts: dict[str, Any] = {"data_sha256": dialogues.content_hash(every)}
        self.facts["tokenizer_sha256"] = tokenizer_hash(language.tokenizer)
        seen = {each.source for each in train}
        self.seen = sum(each.source in seen for each in self.held)

    def _encode(
        self, examples: Sequence[Example], language: LanguageModel, use: str
    ) -> tuple[list[tuple[list[int], list[int]]], list[Example]]:
        """Return the tokens of the examples that are short enough, and those examples."""
        rows, kept = [], []
        for each in examples:
            source = encode_source(each.source, language)
            target = encode_target(each.target, language)
            if max(len(source), len(target)) <= self.longest:
                rows.append((source, target))
                kept.append(each)
        if not rows:
            raise ValueError(
                f"--max_length {self.longest} leaves no pair to {use}: all {len(examples):,} are "
                "longer; give more"
            )
        return rows, kept

    def __str__(self) -> str:
        tokens = sum(len(target) for _, target in self.train)
        rest = f" · {self.left_out:,} pairs are longer than {self.longest} tokens, and left out"
        return (
            f"{len(self.train):,} pairs with {tokens:,} tokens of targets to train on, "
            f"{len(self.val):,} to validate{rest if self.left_out else ''}"
        )

    def batch(self, run: Run, rows: np.ndarray) -> tuple[seq2seq.Batch, float]:
        """Return pairs, and how many tokens of targets their part of the batch stands for.

        It is the same for all parts, so that each token of the global batch weighs the same.
        """
        every = self.order(run.first_row + np.arange(run.batch_size))[1]
        count = sum(len(self.train[i][1]) for i in every) / run.shares
        return self.stack([self.train[i] for i in self.order(rows)[1]]).to(run.device), count

    def stack(self, rows: Sequence[tuple[list[int], list[int]]]) -> seq2seq.Batch:
        """Return rows as a batch."""
        sources, targets = zip(*rows, strict=True)
        return seq2seq.make_batch(sources, targets, self.start, self.pad)

    @property
    def protocol(self) -> str:
        """How the figures are measured, for the card."""
        tokens = sum(len(target) for _, target in self.val)
        return (
            f"val_loss is the mean over all {tokens:,} tokens of {len(self.val):,} validation "
            f"targets, {self.seen:,} of whose sources are in the training data, too."
        )


# ---- evaluate


AT_ONCE = 64  # pairs that are read at once


@torch.no_grad()
def evaluate(run: Run, settings: Settings, data: Pairs) -> dict[str, float]:
    """Evaluate the model on all validation pairs, and write some of them greedily."""
    network = run.weights().eval()
    total = torch.zeros(2, dtype=torch.float64)
    mine = run.shard(len(data.val))
    for some in blocks(len(mine), AT_ONCE):
        rows = [data.val[mine[i]] for i in some]
        nats = seq2seq.loss(network, data.stack(rows).to(run.device), 1.0).item()
        total += torch.tensor([nats, sum(len(target) for _, target in rows)])
    nats, tokens = run.sum(total).tolist()
    shown = data.held[: settings.eval_samples]
    written = run.gather(write(network, data, [shown[i].source for i in run.shard(len(shown))]))
    targets = [each.target for each in shown]
    metrics = {"val_loss": nats / tokens, "perplexity": math.exp(nats / tokens)}
    metrics["exact_match"] = outputs.exact_match(written, targets)
    if outputs.has_chrf():
        metrics["chrf"] = outputs.chrf(written, targets)[0]
    if run.is_main:
        page = outputs_page(run.progress.step, shown[:SHOWN], written[:SHOWN])
        run.folder.write_samples(run.progress.step, page)
    network.train()
    return metrics


def write(network: PreTrainedModel, data: Pairs, sources: list[str]) -> list[str]:
    """Write the most likely token each time, for every source."""
    if not sources:
        return []
    language = LanguageModel(network, data.tokenizer, "this run")
    options: dict[str, Any] = {"strategy": "greedy", "max_new_tokens": data.longest}
    return [
        record.completion
        for record in generate(sources, model=language, parse_special=False, **options)
    ]


# ---- save


SHOWN = 8  # pairs on a page of samples


def save_model(
    run: Run, settings: Settings, data: Pairs, metrics: dict[str, float], path: Path
) -> None:
    """Write the model as transformers does, with its card."""
    network, prompt = run.weights(), data.held[0].source
    network.generation_config.update(max_new_tokens=data.longest, pad_token_id=data.pad)
    network.save_pretrained(path)
    lm.save_tokenizer(data.tokenizer, path)
    count = min(settings.eval_samples, len(data.held))
    protocol = f"{data.protocol} exact_match, the share of outputs that equal their targets, is of "
    protocol += f"the first {count:,} of them, written greedily."
    if outputs.has_chrf():
        protocol += (
            f" chrF is of the same; sacrebleu's signature is {outputs.chrf(['a'], ['a'])[1]}."
        )
    origin = f"{settings.init_from}, fine-tuned" if settings.init_from else "trained from scratch"
    card.write_card(
        path,
        run.folder.path,
        title="A sequence-to-sequence model",
        task="text2text-generation",
        about=f"{type(network).__name__}, {network.num_parameters():,} parameters, {origin} on "
        f"{len(data.train):,} pairs of {data.source} for {run.progress.step:,} steps.",
        usage=card.SEQ2SEQ_USAGE.format(prompt=prompt),
        prompt=prompt,
        figures=metrics,
        protocol=protocol,
        data=data.source,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
