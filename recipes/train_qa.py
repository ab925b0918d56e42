"""Train an encoder for extractive question answering: it finds answers in texts.

    accelerate launch recipes/train_qa.py --data rajpurkar/squad
    accelerate launch recipes/train_qa.py --data train-v2.0.json --val_data dev-v2.0.json
    accelerate launch recipes/train_qa.py --output_dir runs/qa --resume
    accelerate launch recipes/train_qa.py --init_from path/to/encoder --data questions.json
    accelerate launch recipes/train_qa.py --from_scratch --data questions.json

The output folder is an ordinary transformers model, at any time the best one so far; the
calibration of its scores, fitted in validation, is in its config.json.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from genkit import files, machine
from genkit.data import squad, table_sources, tables
from genkit.data.corpus import tokenizer_hash
from genkit.data.order import Order
from genkit.errors import clean_errors
from genkit.hub import card, download
from genkit.metrics.calibration import fit_temperature, plot_reliability
from genkit.models import lm
from genkit.qa import reader, training
from genkit.qa.model import load_extractor, make_model, make_tokenizer
from genkit.training.optim import optimizers
from genkit.training.progress import count_steps
from genkit.training.run import Run
from genkit.training.settings import CHOSEN, RunSettings, parse, setting

# ---- settings

DEFAULT = "distilbert/distilbert-base-cased"


@dataclass
class Settings(RunSettings):
    """Settings of this recipe; see also RunSettings in genkit/training."""

    output_dir: str = setting("runs/qa", "folder of the run and of the model")
    data: str = setting("rajpurkar/squad", "questions: a file in SQuAD's format, or a dataset")
    val_data: str | None = setting(
        None, "questions to validate on; default: the dataset's own, or the last articles"
    )
    val_fraction: float = setting(
        0.1, "part of the articles, the last ones, to validate on", above=0, below=1
    )
    table_memory: int = setting(
        tables.MEMORY, "MiB of the process that reads a file", least=tables.MIN_MEMORY
    )
    init_from: str = setting(DEFAULT, "encoder to start from: a folder or a Hub id")
    init_revision: str | None = setting(None, "branch, tag or commit of a model on the Hub")
    from_scratch: bool = setting(False, "start from random weights and a tokenizer of the data")
    depth: int = setting(CHOSEN, "from scratch, layers: the one dial of the model's size", least=1)
    width: int = setting(CHOSEN, "from scratch, size of a layer's vectors", least=1)
    heads: int = setting(CHOSEN, "from scratch, attention heads", least=1)
    vocab_size: int = setting(CHOSEN, "from scratch, most tokens of the vocabulary", least=1)
    max_seq_len: int = setting(
        CHOSEN, "tokens of a window; default: 384, or the model's own if it is less", least=1
    )
    doc_stride: int = setting(
        CHOSEN, "tokens that windows share; default: 128, or half a window if it is less", least=0
    )
    max_answer_len: int = setting(30, "most tokens of an answer, in validation", least=1)
    epochs: float | None = setting(
        None, "passes over the data, unless max_steps is fewer steps", above=0
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any long work."""
        super().__post_init__()
        table_sources.check_source(self.data)
        table_sources.check_source(self.val_data, "val_data")
        for name in ("depth", "width", "heads", "vocab_size"):
            if getattr(self, name) is not None and not self.from_scratch:
                raise ValueError(f"--{name} {getattr(self, name)} requires --from_scratch")
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"--width {self.width} does not divide into --heads {self.heads}")
        if self.from_scratch and self.init_from != DEFAULT:
            raise ValueError(f"--init_from {self.init_from} and --from_scratch exclude each other")
        if not self.from_scratch:
            download.check_exists(self.init_from, "--init_from")
        if self.init_revision and (self.from_scratch or Path(self.init_from).is_dir()):
            other = "--from_scratch" if self.from_scratch else f"the folder {self.init_from}"
            raise ValueError(
                f"--init_revision {self.init_revision} requires a model on the Hub, got {other}"
            )


SAMPLES = 12


def preset(settings: Settings, device: machine.Kind) -> dict[str, Any]:
    """Choose what was left open: for a GPU, or for a CPU."""
    run: dict[str, Any] = {"batch_size": 32 if device == "accelerator" else 16}
    rates = {"learning_rate": 4e-5, "muon_learning_rate": 2e-3, "weight_decay": 0.01}
    if settings.from_scratch:
        depth, width_per_layer = (6, 64) if device == "accelerator" else (4, 32)
        depth = settings.depth or depth
        shape = lm.choose_shape(depth, None, settings.heads, width_per_layer)
        width = settings.width or shape["width"]
        run |= {"depth": depth, "width": width, "vocab_size": 8000}
        run |= {"heads": math.gcd(width, max(4, width // 64))}
        rates |= {"learning_rate": 1e-3, "muon_learning_rate": 0.02}
    elif not Path(settings.init_from).is_dir():
        run |= {"init_revision": "main"}
    if not (settings.epochs or settings.max_steps or settings.max_minutes):
        if settings.from_scratch:
            run |= {"epochs": 20.0} if device == "accelerator" else {"max_minutes": 10.0}
        else:
            run |= {"epochs": 2.0}
    precision = {"mixed_precision": "bf16" if machine.fast_bf16() else "no"}
    # windows differ in length, and each length would compile anew
    return run | rates | precision | {"optimizer": "adamw", "ema": 0.0, "compile": False}


def main() -> None:
    """Train."""
    settings = parse(Settings, preset)

    with Run(settings) as run:
        # ---- data
        with run.accelerator.local_main_process_first():
            parts = squad.split_examples(
                settings.data, settings.val_data, settings.val_fraction, settings.table_memory
            )
            check_count(run, len(parts[1]))
            network, tokenizer = load_start(settings, parts[0])
            settings.max_seq_len, settings.doc_stride = choose_size(settings, tokenizer)
            limit = None if settings.from_scratch else tokenizer.model_max_length
            size = settings.max_seq_len, settings.doc_stride, limit
            train = training.Questions(parts[0], tokenizer, *size)
            shard = [parts[1][i] for i in run.shard(len(parts[1]))]
            val_shard = training.Questions(shard, tokenizer, *size)
        order = Order(len(train.windows), settings.seed)
        facts = hash_inputs(settings, parts, network, tokenizer)
        impossible = squad.has_impossible(parts[0])
        corpus = QuestionCorpus(tokenizer, parts[1], val_shard, impossible, facts)

        # ---- model
        attention = machine.attention(run.device.type, settings.mixed_precision)
        network.set_attn_implementation(attention)
        model = run.network("model", network, optimizers(network, settings))
        loss = run.autocast(training.loss)
        run.log(
            f"{network.num_parameters():,} parameters · {len(parts[0]):,} questions to train on, "
            f"{len(parts[1]):,} to validate · {len(train.windows):,} windows of up to "
            f"{settings.max_seq_len} tokens an epoch"
        )

        # ---- loop
        run.identify(**corpus.facts)
        settings.max_steps = count_steps(
            settings.epochs, len(train.windows), settings.batch_size, settings.max_steps
        )
        run.warm_up(lambda rows: loss(model, *train.batch(order(rows)[1], network)))
        run.restore()
        for _ in run.steps():
            for rows in run.rows():
                run.backward(loss(model, *train.batch(order(rows)[1], network)))
            run.update()
            if run.evaluation_due():
                with run.clock.paused():
                    metrics = evaluate(run, settings, corpus)
                    if run.report("f1", metrics.figures, lower_is_better=False):
                        run.publish(partial(save_model, run, settings, corpus, metrics))


@dataclass(frozen=True)
class QuestionCorpus:
    """Validation questions, the tokenizer, and hashes of the run's input."""

    tokenizer: Any
    val: list[squad.Example]
    val_shard: training.Questions  # the part of them that this process evaluates
    impossible: bool  # some training questions have no answer
    facts: dict[str, str]


def check_count(run: Run, count: int) -> None:
    """Refuse too few validation questions: each half of them calibrates the other."""
    least = max(2, run.processes)
    if count < least:
        raise ValueError(f"--data must hold {least} or more questions to validate on, got {count}")


def load_start(settings: Settings, examples: list[squad.Example]) -> tuple[PreTrainedModel, Any]:
    """Return the model to start from, and its tokenizer."""
    if not settings.from_scratch:
        return load_extractor(settings.init_from, settings.init_revision)
    positions = settings.max_seq_len or reader.MAX_SEQ_LEN
    tokenizer = make_tokenizer(examples, settings.vocab_size, positions)
    shape = settings.depth, settings.width, settings.heads
    return make_model(len(tokenizer), positions, *shape), tokenizer


def choose_size(settings: Settings, tokenizer: Any) -> tuple[int, int]:
    """Return the tokens of a window, and how many of them it shares with the next one."""
    most, stride = tokenizer.model_max_length, settings.doc_stride
    if settings.max_seq_len and settings.max_seq_len > most:
        raise ValueError(
            f"--max_seq_len must be {most} or less for this model, got {settings.max_seq_len}"
        )
    length = settings.max_seq_len or min(reader.MAX_SEQ_LEN, most)
    return length, min(reader.DOC_STRIDE, length // 2) if stride is None else stride


def hash_inputs(
    settings: Settings,
    parts: tuple[list[squad.Example], list[squad.Example]],
    network: PreTrainedModel,
    tokenizer: Any,
) -> dict[str, str]:
    """Return hashes of all that the run is made of."""
    hashes = {"train_sha256": squad.content_hash(parts[0])}
    hashes |= {"val_sha256": squad.content_hash(parts[1])}
    hashes |= {"tokenizer_sha256": tokenizer_hash(tokenizer)}
    return hashes | ({} if settings.from_scratch else {"model_sha256": files.weights_hash(network)})


# ---- evaluate


@dataclass(frozen=True)
class Metrics:
    """Result of an evaluation."""

    figures: dict[str, float]
    calibration: reader.Calibration
    evaluation: training.Evaluation


def evaluate(run: Run, settings: Settings, corpus: QuestionCorpus) -> Metrics:
    """Evaluate the model on all validation questions, and write some of its answers."""
    network, shard = run.weights().eval(), corpus.val_shard
    logits, nats = training.predict_logits(network, shard)
    network.train()
    total = torch.tensor([nats, len(logits)], dtype=torch.float64)
    nats, windows = run.sum(total).tolist()
    half = training.assign_halves(len(corpus.val))[list(run.shard(len(corpus.val)))]
    temperature, *of_half = fit_temperatures(run, logits, shard, half)
    others = np.array(of_half)[1 - half]  # fitted to the half that a question is not in
    own = training.predict_answers(logits, shard, settings.max_answer_len, others)
    every = run.gather([asdict(prediction) for prediction in own])
    predictions = [training.Prediction(**prediction) for prediction in every]
    evaluation = training.evaluate_predictions(predictions, corpus.val)
    figures = {"val_loss": nats / windows, **evaluation.figures, "temperature": temperature}
    if run.is_main:
        write_samples(run, corpus, evaluation)
    window = settings.max_seq_len, settings.doc_stride, settings.max_answer_len
    calibration = reader.Calibration(temperature, evaluation.threshold, corpus.impossible, *window)
    return Metrics(figures, calibration, evaluation)


def fit_temperatures(
    run: Run, logits: np.ndarray, shard: training.Questions, half: np.ndarray
) -> list[float]:
    """Fit a temperature to the questions of all processes, and to each half of them."""
    logits, classes, of = run.gather_arrays(
        logits, training.gold_classes(shard), half[shard.windows.row]
    )
    return [
        fit_temperature(logits[chosen].reshape(-1, logits.shape[-1]), classes[chosen].flatten())
        for chosen in (of >= 0, of == 0, of == 1)
    ]


def write_samples(run: Run, corpus: QuestionCorpus, evaluation: training.Evaluation) -> None:
    """Write a table of some questions and their answers."""
    lines = [f"# Step {run.progress.step}\n", "| | question | answer | confidence | gold |"]
    lines.append("|---|---|---|---|---|")
    for i in np.unique(np.linspace(0, len(corpus.val) - 1, SAMPLES, dtype=int)).tolist():
        example, mark = corpus.val[i], "right" if evaluation.right[i] else "wrong"
        golds = " / ".join(dict.fromkeys(text for text, _ in example.answers))
        cells = (example.question, evaluation.answers[i] or "(none)", golds or "(none)")
        question, answer, gold = (" ".join(cell.replace("|", "\\|").split()) for cell in cells)
        lines.append(
            f"| {mark} | {question} | {answer} | {evaluation.confidences[i]:.2f} | {gold} |"
        )
    run.folder.write_samples(run.progress.step, "\n".join(lines) + "\n")


# ---- save


USAGE = """
import genkit
answer = genkit.answer("Who wrote it?", "It was written by Ada Lovelace.", model=model)
print(answer, answer.confidence)

from transformers import AutoModelForQuestionAnswering
network = AutoModelForQuestionAnswering.from_pretrained(model)
"""


def save_model(
    run: Run, settings: Settings, corpus: QuestionCorpus, metrics: Metrics, path: Path
) -> None:
    """Write the model as transformers does, with its card."""
    network, evaluation = run.weights(), metrics.evaluation
    network.config.calibration = asdict(metrics.calibration)
    network.save_pretrained(path)
    lm.save_tokenizer(corpus.tokenizer, path)
    plot_reliability(evaluation.confidences, evaluation.right, path / "calibration.png")
    origin = "a new encoder" if settings.from_scratch else settings.init_from
    rules = "2.0" if squad.has_impossible(corpus.val) else "1.1"
    card.write_card(
        path,
        run.folder.path,
        title="A model that finds answers in texts",
        task="question-answering",
        about=f"{network.num_parameters():,} parameters, trained from {origin} on the questions "
        f"of {settings.data} for {run.progress.step:,} steps.",
        usage=USAGE,
        figures=metrics.figures,
        protocol=f"All {len(corpus.val):,} validation questions, by the rules of SQuAD {rules}; "
        f"windows of {settings.max_seq_len} tokens that share {settings.doc_stride}, answers of "
        f"up to {settings.max_answer_len} tokens in whole words. Expected calibration error of "
        "the answer's probability, 15 bins, before and after temperature scaling; temperature and "
        "threshold of a question are fitted to the half of the questions that it is not in, those "
        "in config.json to all.",
        data=settings.data,
    )


if __name__ == "__main__":
    with clean_errors():
        main()
